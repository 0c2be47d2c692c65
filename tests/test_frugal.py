"""FRUGAL: NumPy reference, special cases, coordinates, state, interrupted runs, sharding, compiled training steps, wrong input."""
import copy
import io
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from efftrain.accounting import state_bytes
from efftrain.memory.frugal import ORDERS, SELECTIONS, STATE_FREE, STATE_FULL, Frugal, _key, active_blocks, coordinates, frugal_param_groups, subset
from efftrain.memory.projection import project, project_back, subspace
from efftrain.models import llama, mlp
from efftrain.optim.lion import Lion

SHAPES = ((12, 20), (20, 12), (16, 16), (8, 24))
every_selection = pytest.mark.parametrize("selection", SELECTIONS)


def problem(seed=0, shapes=SHAPES, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=g).to(dtype)) for s in shapes], [torch.randn(s, generator=g).to(dtype) for s in shapes]


def walk(optimizer, params, targets, steps):
    for _ in range(steps):
        for p, t in zip(params, targets): p.grad = (p - t).detach() * t.abs()
        optimizer.step()


def run(steps=30, shapes=SHAPES, dtype=torch.float32, **options):
    params, targets = problem(shapes=shapes, dtype=dtype)
    optimizer = Frugal(params, **{"lr": 0.02, **options})
    walk(optimizer, params, targets, steps)
    return params, optimizer


def held(optimizer): return sum(t.numel() for s in optimizer.state.values() for t in s.values() if torch.is_tensor(t))


# against plain NumPy

def reference(selection, density, gap, steps, state_full, state_free, reset=True, lr=0.02, free=0.5, decay=0.1, eps=1e-8):
    """Algorithm 1 in float64, every projection a matrix."""
    params, targets = problem()
    thetas, goals = [p.detach().double().numpy() for p in params], [t.double().numpy() for t in targets]
    ms, vs, ts, choice = [0.0] * 4, [0.0] * 4, [0] * 4, [None] * 4
    beta1, beta2 = (0.9, 0.99) if state_full == "lion" else (0.9, 0.999)
    for step in range(steps):
        for i, (theta, goal) in enumerate(zip(thetas, goals)):
            g = (theta - goal) * abs(goal)
            if step % gap == 0:
                if reset or step == 0: ms[i], vs[i], ts[i] = 0.0, 0.0, 0
                m, n, period = *theta.shape, step // gap
                flat = np.arange(theta.size).reshape(theta.shape)
                if selection == "blocks": choice[i] = flat.ravel() if i in active_blocks(4, density, period) else flat.ravel()[:0]
                elif selection == "randk": choice[i] = coordinates(m * n, int(density * m * n), _key(0, period, i)).numpy()
                elif selection == "columns": choice[i] = flat[:, subset(n, int(density * n), _key(0, period, i))].ravel()
                elif selection == "rows": choice[i] = flat[subset(m, int(density * m), _key(0, period, i))].ravel()
                else:
                    u, _, vh = np.linalg.svd(g, full_matrices=False)
                    r = round(min(g.shape) * density)
                    choice[i] = ("right", vh[:r].T) if m >= n else ("left", u[:, :r])
            if selection == "svd":
                side, basis = choice[i]
                down, up = (lambda x: x @ basis, lambda x: x @ basis.T) if side == "right" else (lambda x: basis.T @ x, lambda x: basis @ x)
            else:
                matrix = np.eye(theta.size)[choice[i]]  # a projection that picks coordinates, as a matrix
                down, up = lambda x: matrix @ x.ravel(), lambda x: (matrix.T @ x).reshape(theta.shape)
            low = down(g)
            ts[i] += 1
            if state_full == "adamw":
                ms[i], vs[i] = beta1 * ms[i] + (1 - beta1) * low, beta2 * vs[i] + (1 - beta2) * low**2
                u = lr * ms[i] / (1 - beta1**ts[i]) / (np.sqrt(vs[i] / (1 - beta2**ts[i])) + eps)
            elif state_full == "lion": u, ms[i] = lr * np.sign(beta1 * ms[i] + (1 - beta1) * low), beta2 * ms[i] + (1 - beta2) * low
            else: ms[i] = 0.9 * ms[i] + low; u = lr * ms[i]
            rest = g - up(low)
            theta *= 1 - lr * decay
            theta -= up(u) + {"signsgd": lr * free * np.sign(rest), "sgd": lr * free * rest, None: 0}[state_free]
    return thetas


@pytest.mark.parametrize("state_full", STATE_FULL)
@pytest.mark.parametrize("state_free", STATE_FREE)
@pytest.mark.parametrize("selection", ["blocks", "columns", "rows", "randk", "svd"])
@pytest.mark.parametrize("path", [dict(foreach=False), dict(foreach=True)], ids=["single", "foreach"])
def test_steps_as_numpy_across_changes(selection, state_full, state_free, path):
    if selection == "svd" and (state_full == "lion" or state_free == "signsgd"): pytest.skip("signs of numbers around zero: float32 and float64 disagree")
    ours, _ = run(25, density=0.25, selection=selection, update_gap=10, state_full=state_full, state_free=state_free, free_lr_scale=0.5, weight_decay=0.1, **path)
    for a, b in zip(ours, reference(selection, 0.25, 10, 25, state_full, state_free)): np.testing.assert_allclose(a.detach().numpy(), b, atol=5e-5 if selection == "svd" else 1e-5)


@pytest.mark.parametrize("selection", ["columns", "rows", "randk", "svd"])
def test_without_reset_moments_stay_where_they_are(selection):
    ours, _ = run(25, density=0.25, selection=selection, update_gap=10, state_free="sgd", free_lr_scale=0.5, weight_decay=0.1, reset=False)
    for a, b in zip(ours, reference(selection, 0.25, 10, 25, "adamw", "sgd", reset=False)): np.testing.assert_allclose(a.detach().numpy(), b, atol=5e-5 if selection == "svd" else 1e-5)
    _, fresh = run(11, density=0.25, selection=selection, update_gap=10)
    assert {s["step"] for s in fresh.state.values()} == {1} and {s["period"] for s in fresh.state.values()} == {1}


# special cases

@every_selection
@pytest.mark.parametrize("state_full", STATE_FULL)
def test_density_one_is_the_state_full_rule_bit_for_bit(selection, state_full):
    decay = 0.0 if state_full == "sgdm" else 0.1
    ours, _ = run(density=1.0, selection=selection, update_gap=5, state_full=state_full, weight_decay=decay)
    plain, targets = problem()
    peer = {"adamw": lambda: torch.optim.AdamW(plain, lr=0.02, weight_decay=decay), "lion": lambda: Lion(plain, lr=0.02, weight_decay=decay), "sgdm": lambda: torch.optim.SGD(plain, lr=0.02, momentum=0.9)}[state_full]()
    walk(peer, plain, targets, 30)
    assert all(torch.equal(a, b) for a, b in zip(ours, plain))


@every_selection
def test_density_zero_is_signsgd_without_state(selection):
    ours, optimizer = run(density=0.0, selection=selection, free_lr_scale=0.5, lr_scale=0.5)
    plain, targets = problem()
    for _ in range(30):
        for p, t in zip(plain, targets): p.data -= 0.005 * ((p.data - t) * t.abs()).sign()
    for a, b in zip(ours, plain): torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
    assert held(optimizer) == 0


@every_selection
@pytest.mark.parametrize("density", [0.1, 0.3, 0.9])
def test_the_two_parts_add_up_to_the_gradient(selection, density):
    """SGD on both parts is SGD, whatever the split."""
    ours, _ = run(density=density, selection=selection, state_full="sgdm", momentum=0.0, state_free="sgd", update_gap=4)
    plain, targets = problem()
    walk(torch.optim.SGD(plain, lr=0.02), plain, targets, 30)
    for a, b in zip(ours, plain): torch.testing.assert_close(a, b, atol=2e-6, rtol=0)


@pytest.mark.parametrize("selection", ["svd", "random"])
@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "left", "right", "full"])
def test_bases_are_orthonormal_and_on_the_named_sides(selection, proj_type):
    _, optimizer = run(3, density=0.25, selection=selection, proj_type=proj_type)
    for p in optimizer.param_groups[0]["params"]:
        found = {k[6:]: v for k, v in optimizer.state[p].items() if k.startswith("basis_")}
        assert set(found) == ({"left", "right"} if proj_type == "full" else {proj_type} if proj_type in ("left", "right") else {"right" if (p.shape[0] >= p.shape[1]) == (proj_type == "std") else "left"})
        for basis in found.values(): torch.testing.assert_close(basis.T @ basis, torch.eye(basis.shape[1]), atol=1e-5, rtol=0)


def test_svd_takes_the_first_singular_directions():
    p = nn.Parameter(torch.zeros(12, 20)); p.grad = torch.randn(12, 20, generator=torch.Generator().manual_seed(4))
    Frugal([p], lr=1.0, density=0.25, selection="svd", state_full="sgdm", state_free=None).step()
    basis = {"left": subspace(p.grad, 3, "left")}
    torch.testing.assert_close(-p.detach(), project_back(project(p.grad, basis), basis), atol=1e-5, rtol=0)


# choosing coordinates

@settings(max_examples=60, deadline=None)
@given(st.integers(0, 500), st.floats(0, 1), st.integers(0, 2**32 - 1))
def test_choices_are_distinct_and_in_range(n, share, key):
    k = int(n * share)
    for draw in (subset, coordinates):
        index = draw(n, k, key)
        assert index.dtype == torch.int64 and len(index) == k == len(index.unique()) and (k == 0 or (0 <= index.min() and index.max() < n))
        assert torch.equal(index, draw(n, k, key))


@pytest.mark.parametrize("draw", [subset, coordinates])
@pytest.mark.parametrize("n, k", [(12, 3), (50, 13), (7, 6)])
def test_every_number_is_as_likely_as_any_other(draw, n, k):
    from scipy.stats import chisquare
    draws = 2000
    counts = torch.stack([torch.bincount(draw(n, k, _key(1, key)), minlength=n) for key in range(draws)]).sum(0).double()
    assert chisquare(counts.numpy()).pvalue > 1e-4


def test_random_subsets_are_uniform_over_pairs():
    from itertools import combinations
    from scipy.stats import chisquare
    names = {pair: i for i, pair in enumerate(combinations(range(6), 2))}
    counts = np.zeros(len(names))
    for key in range(3000): counts[names[tuple(subset(6, 2, _key(2, key)).tolist())]] += 1
    assert chisquare(counts).pvalue > 1e-4


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("count, density", [(8, 0.25), (8, 0.5), (12, 0.5), (14, 0.3)])
def test_orders_of_blocks(order, count, density):
    active = round(count * density)
    periods = [active_blocks(count, density, t, order) for t in range(60)]
    assert all(len(p) == active and p <= set(range(count)) for p in periods) and set().union(*periods) == set(range(count))
    if order == "ascending": assert periods[0] == set(range(active))
    if order == "descending": assert periods[0] == set(range(count - active, count))
    if order == "mirror": assert all({count - 1 - i for i in p} == p for p in periods)
    if order != "random" and count % active == 0: assert not periods[0] & periods[1]


def test_seeds_and_periods_choose_differently():
    index = {subset(100, 10, _key(seed, period, i)).numpy().tobytes() for seed in range(3) for period in range(3) for i in range(3)}
    assert len(index) == 27


# state

@pytest.mark.parametrize("state_full, moments", [("adamw", 2), ("lion", 1), ("sgdm", 1)])
@pytest.mark.parametrize("density", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("selection", ["columns", "rows", "randk"])
def test_state_is_the_density_times_that_of_the_rule(selection, density, state_full, moments):
    shapes = ((16, 32), (32, 16), (64, 8))
    _, optimizer = run(3, shapes=shapes, density=density, selection=selection, state_full=state_full)
    assert state_bytes(optimizer) == 4 * moments * density * sum(math.prod(s) for s in shapes)


def test_blocks_hold_state_in_turn():
    params, targets = problem()
    optimizer = Frugal(params, lr=0.01, density=0.25, order="ascending", update_gap=3)
    for period in range(5):
        walk(optimizer, params, targets, 3)
        assert [bool(optimizer.state[p]) for p in params] == [i == period % 4 for i in range(4)] and held(optimizer) == 2 * params[period % 4].numel()


def test_state_of_a_model():
    model = llama(32, 2)
    optimizer = Frugal(frugal_param_groups(model, 0.25, selection="columns"), lr=0.01)
    model(input_ids=torch.ones(1, 4, dtype=torch.long), labels=torch.ones(1, 4, dtype=torch.long)).loss.backward(); optimizer.step()
    split, rest = (sum(p.numel() for p in g["params"]) for g in optimizer.param_groups)
    assert state_bytes(optimizer) == 4 * 2 * (0.25 * split + rest)


@every_selection
@pytest.mark.parametrize("stop", [3, 4, 6], ids=["before a change", "at a change", "in a period"])
def test_a_saved_run_goes_on_bit_for_bit(selection, stop):
    (a, targets), (b, _) = problem(), problem()
    one, other = (Frugal(p, lr=0.02, density=0.5, selection=selection, update_gap=4, seed=s, weight_decay=0.1) for p, s in ((a, 7), (b, 8)))
    walk(one, a, targets, stop)
    file = io.BytesIO(); torch.save(one.state_dict(), file); file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    for p, q in zip(a, b): q.data.copy_(p)
    c, copied = copy.deepcopy((a, one))
    for params, optimizer in ((a, one), (b, other), (c, copied)): walk(optimizer, params, targets, 9)
    assert all(torch.equal(p, q) and torch.equal(p, r) for p, q, r in zip(a, b, c))


@every_selection
@pytest.mark.parametrize("saved, loaded", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float32, torch.float64)])
def test_a_checkpoint_of_another_dtype_goes_on(selection, saved, loaded):
    params, one = run(5, density=0.5, selection=selection, update_gap=4, dtype=saved, lr=1e-3)
    b, targets = problem(dtype=loaded)
    other = Frugal(b, lr=1e-3, density=0.5, selection=selection, update_gap=4); other.load_state_dict(one.state_dict())
    walk(other, b, targets, 5)
    assert all(p.dtype == loaded and p.isfinite().all() for p in b) and all(s["exp_avg"].dtype == loaded for s in other.state.values() if s)


def test_a_parameter_that_was_away_starts_in_the_present_period():
    params, targets = problem()
    optimizer = Frugal(params, lr=0.01, density=0.25, selection="columns", update_gap=4)
    walk(optimizer, params, targets, 2)
    params[0].grad = None
    for _ in range(4):
        for p, t in zip(params[1:], targets[1:]): p.grad = (p - t).detach()
        optimizer.step()
    assert optimizer.state[params[0]]["period"] == 0 and optimizer.state[params[1]]["period"] == 1
    walk(optimizer, params, targets, 1)
    assert optimizer.state[params[0]]["period"] == 1 and optimizer.state[params[0]]["step"] == 1


# as part of training

@every_selection
def test_maximize_mirrors(selection):
    (up, targets), (down, _) = problem(), problem()
    a, b = Frugal(up, lr=0.01, density=0.5, selection=selection, maximize=True), Frugal(down, lr=0.01, density=0.5, selection=selection)
    for p, q, t in zip(up, down, targets): p.grad, q.grad = t.clone(), -t
    a.step(); b.step()
    for p, q in zip(up, down): torch.testing.assert_close(p, q, atol=1e-6, rtol=0)


@pytest.mark.parametrize("selection", ["blocks", "randk", "columns"])
def test_a_compiled_training_step_trains_alike(selection):
    """The forward and backward pass are compiled, the optimizer runs beside the graph, across changes of coordinates."""
    def make():
        torch.manual_seed(0)
        model = mlp([6, 32, 3])
        groups = [dict(params=[p for p in model.parameters() if p.ndim == 2], density=0.5, selection=selection, update_gap=2), dict(params=[p for p in model.parameters() if p.ndim < 2])]
        return model, Frugal(groups, lr=0.01, eps=1e-3)
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(1))

    def step_of(model, optimizer):
        def step():
            optimizer.zero_grad(); loss = model(x).square().mean(); loss.backward(); optimizer.step(); return loss
        return step
    (plain, one), (model, other) = make(), make()
    torch.compiler.reset()
    eager, compiled = step_of(plain, one), torch.compile(step_of(model, other), backend="aot_eager")
    for _ in range(7): torch.testing.assert_close(eager(), compiled(), atol=1e-6, rtol=0)
    for p, q in zip(plain.parameters(), model.parameters()): torch.testing.assert_close(p, q, atol=1e-6, rtol=0)


def test_trains_a_language_model_and_its_schedule():
    model = llama(32, 1)
    ids = torch.randint(512, (4, 16), generator=torch.Generator().manual_seed(0))
    optimizer = Frugal(frugal_param_groups(model, 0.25, update_gap=5), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 30)
    losses = []
    for _ in range(30):
        optimizer.zero_grad(); loss = model(input_ids=ids, labels=ids).loss; loss.backward(); optimizer.step(); schedule.step(); losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0] and optimizer.param_groups[0]["updates"] == 30


@every_selection
def test_memory_on_fake_tensors_is_the_real_one(selection):
    from efftrain.accounting import memory
    loss = lambda model: model(input_ids=torch.ones(1, 8, dtype=torch.long), labels=torch.ones(1, 8, dtype=torch.long)).loss
    make = lambda model: Frugal(frugal_param_groups(model, 0.25, selection=selection), lr=0.01)
    counted = memory(lambda: llama(32, 2), make, loss)
    model = llama(32, 2); optimizer = make(model); loss(model).backward(); optimizer.step()
    assert counted.optimizer == state_bytes(optimizer)


def _worker(rank, world, store):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    mesh, x = init_device_mesh("cpu", (world,)), torch.randn(8, 6, generator=torch.Generator().manual_seed(5))
    network = lambda: (torch.manual_seed(0), nn.Sequential(nn.Linear(6, 30, bias=False), nn.Tanh(), nn.Linear(30, 9, bias=False)))[1]
    for selection in SELECTIONS:
        for rest in STATE_FREE:
            plain, sharded = network(), network()
            for layer in (sharded[0], sharded[2]): fully_shard(layer, mesh=mesh)
            fully_shard(sharded, mesh=mesh)
            make = lambda m: Frugal(m.parameters(), lr=1e-2, density=0.5, selection=selection, update_gap=3, weight_decay=0.1, eps=1e-2, state_free="sgd" if selection in ("svd", "random") and rest == "signsgd" else rest)
            one, other = make(plain), make(sharded)
            for step in range(5):
                if step == 4: saved, other = other.state_dict(), make(sharded); other.load_state_dict(saved)
                for model, optimizer, batch in ((plain, one, x), (sharded, other, x.chunk(world)[rank])): optimizer.zero_grad(); model(batch).square().mean().backward(); optimizer.step()
            for p, q in zip(plain.parameters(), sharded.parameters()): torch.testing.assert_close(p, q.full_tensor(), rtol=0, atol=1e-5, msg=lambda text: f"{selection}, {rest}: {text}")
    dist.destroy_process_group()


def test_sharded_parameters_step_as_whole_ones(tmp_path):
    torch.multiprocessing.spawn(_worker, (2, str(tmp_path / "store")), nprocs=2)


# which parameters

def test_groups_say_what_they_split(capsys):
    model = llama(32, 1)
    split, rest = frugal_param_groups(model, 0.3, verbose=True, weight_decay=0.1)
    assert "7 tensors" in capsys.readouterr().out and split["density"] == 0.3 and "density" not in rest and split["weight_decay"] == rest["weight_decay"] == 0.1
    assert len(split["params"]) + len(rest["params"]) == len(list(model.parameters()))
    assert {n for n, _ in frugal_param_groups(model, also=["norm"])[0]["params"]} - {n for n, _ in split["params"]} == {n for n, _ in model.named_parameters() if "norm" in n}
    assert len(frugal_param_groups(mlp([3, 4, 2]), targets=lambda name, module: module.out_features == 4)[0]["params"]) == 1
    for bad, error in ((dict(targets=["conv"]), ValueError), (dict(targets="attn"), TypeError), (dict(also=["nothing"]), ValueError)):
        with pytest.raises(error, match=next(iter(bad))): frugal_param_groups(model, **bad)


def test_layers_of_gpt2_and_tied_weights():
    from transformers import GPT2Config, GPT2LMHeadModel
    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=50, n_positions=16))
    split, rest = frugal_param_groups(model)
    assert {n.split(".")[-2] for n, _ in split["params"]} == {"c_attn", "c_proj", "c_fc"} and sum("wte" in n or "lm_head" in n for n, _ in rest["params"]) == 1
    Frugal([split, rest], lr=1e-3)


# wrong input

@pytest.mark.parametrize("bad, error, word", [
    (dict(density=1.5), ValueError, "density is 1.5"), (dict(density=-0.1), ValueError, "density is -0.1"), (dict(density="half"), TypeError, "density is 'half'"), (dict(density=0.5, update_gap=0), ValueError, "update_gap is 0"),
    (dict(update_gap=2.5), ValueError, "update_gap is 2.5"), (dict(selection="topk"), ValueError, "selection is 'topk'"), (dict(state_full="adam"), ValueError, "state_full is 'adam'"), (dict(state_free="lion"), ValueError, "state_free is 'lion'"),
    (dict(order="middle"), ValueError, "order is 'middle'"), (dict(proj_type="both"), ValueError, "proj_type is 'both'"), (dict(density=0.5, order="mirror"), ValueError, "order='mirror'"), (dict(reset="yes"), TypeError, "reset is 'yes'"),
    (dict(free_lr_scale=-1.0), ValueError, "free_lr_scale is -1.0"), (dict(lr_scale=0.0), ValueError, "lr_scale is 0.0"), (dict(momentum=1.0), ValueError, "momentum is 1.0"), (dict(betas=(0.9, 1.0)), ValueError, r"betas\[1\]"), (dict(eps=-1e-8), ValueError, "eps is -1e-08"),
    (dict(seed=-1), ValueError, "seed is -1"), (dict(lr=0.0), ValueError, "lr is 0.0"), (dict(density=0.5, selection="columns", params=[nn.Parameter(torch.ones(4))]), ValueError, r"shape \(4,\)"), (dict(density=0.5, selection="svd", params=[nn.Parameter(torch.ones(4))]), ValueError, r"shape \(4,\)")])
def test_wrong_groups_are_named_and_not_added(bad, error, word):
    optimizer = Frugal([nn.Parameter(torch.ones(2, 2))])
    with pytest.raises(error, match=word): optimizer.add_param_group({"params": [nn.Parameter(torch.ones(4, 6))], **bad})
    assert len(optimizer.param_groups) == 1


def test_singular_vectors_of_no_numbers_are_refused_before_anything_changes():
    params, targets = problem()
    optimizer = Frugal([("first", params[0]), ("second", params[1])], lr=0.1, density=0.5, selection="svd")
    for p, t in zip(params, targets): p.grad = t.clone()
    params[1].grad[0, 0] = math.nan
    before = [p.detach().clone() for p in params]
    with pytest.raises(RuntimeError, match="'second'.*1 such numbers"): optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(params, before)) and optimizer.param_groups[0]["updates"] == 0
