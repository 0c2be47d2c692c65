"""GaLore: trajectories against the official package, known special cases, state, interrupted runs, mixed precision, wrong input."""
import copy
import io
import warnings

import pytest
import torch
from torch import nn

from efftrain.accounting import state_bytes
from efftrain.memory.galore import GaLoreAdafactor, GaLoreAdamW, GaLoreAdamW8bit, galore_param_groups, per_layer
from efftrain.memory.projection import METHODS, PROJ_TYPES, project, project_back, projected_shape, subspace
from efftrain.memory.quantize import dequantize, quantize
from efftrain.models import llama, mlp

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import galore_torch

KINDS = {"adamw": GaLoreAdamW, "adafactor": GaLoreAdafactor, "adamw8bit": GaLoreAdamW8bit}
every_kind = pytest.mark.parametrize("kind", list(KINDS))


def problem(seed=0, shapes=((12, 20), (20, 12), (16, 16), (7,))):
    g = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=g)) for s in shapes], [torch.randn(s, generator=g) for s in shapes]


def groups(params, rank=4, gap=40, **rest): return [dict(params=params[:3], rank=rank, update_proj_gap=gap, **{"scale": 0.5, "proj_type": "std", **rest}), dict(params=params[3:])]


def walk(optimizer, params, targets, steps):
    for _ in range(steps):
        for p, t in zip(params, targets): p.grad = (p - t).detach() * t.abs()
        optimizer.step()


def language_model(seed=0):
    model = llama(32, 1, seed=seed)
    ids = torch.randint(512, (4, 16), generator=torch.Generator().manual_seed(seed))
    return model, lambda: model(input_ids=ids, labels=ids).loss


# against the official package

@pytest.mark.parametrize("proj_type", ["std", "left", "right"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_walks_as_the_official_one(proj_type, weight_decay):
    """100 steps with two refreshes after the first subspace."""
    (ours, targets), (theirs, _) = problem(), problem()
    walk(GaLoreAdamW(groups(ours, proj_type=proj_type), lr=0.02, weight_decay=weight_decay), ours, targets, 100)
    walk(galore_torch.GaLoreAdamW(groups(theirs, proj_type=proj_type), lr=0.02, weight_decay=weight_decay, no_deprecation_warning=True), theirs, targets, 100)
    for a, b in zip(ours, theirs): torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_full_projection_walks_as_the_official_one():
    (ours, targets), (theirs, _) = problem(), problem()
    walk(GaLoreAdamW(groups(ours, proj_type="full"), lr=0.02), ours, targets, 60)
    walk(galore_torch.GaLoreAdamW(groups(theirs, proj_type="full"), lr=0.02, no_deprecation_warning=True), theirs, targets, 60)
    for a, b in zip(ours, theirs): torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", [dict(), dict(beta1=0.9), dict(lr=0.01, relative_step=False, scale_parameter=False, weight_decay=0.1), dict(warmup_init=True)])
def test_adafactor_walks_as_the_official_one(options):
    """Far from the optimum, where updates are signs of numbers around zero and rounding decides."""
    (ours, targets), (theirs, _) = problem(), problem()
    walk(GaLoreAdafactor(groups(ours, gap=15), **options), ours, targets, 40)
    walk(galore_torch.GaLoreAdafactor(groups(theirs, gap=15), **options), theirs, targets, 40)
    for a, b in zip(ours, theirs): torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-5)


# special cases

def test_without_rank_it_is_adamw():
    (ours, targets), (plain, _) = problem(), problem()
    walk(GaLoreAdamW(ours, lr=0.01, eps=1e-30), ours, targets, 30)
    walk(torch.optim.AdamW(plain, lr=0.01, eps=1e-30, weight_decay=0.0), plain, targets, 30)
    for a, b in zip(ours, plain): torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("shape", [(8, 12), (12, 8)])
@pytest.mark.parametrize("proj_type", PROJ_TYPES)
def test_gradients_of_low_rank_pass_whole(shape, proj_type):
    """A gradient of rank r, projected and brought back, is the gradient: GaLore-SGD is SGD."""
    g = torch.Generator().manual_seed(1)
    gradient = torch.randn(shape[0], 3, generator=g, dtype=torch.float64) @ torch.randn(3, shape[1], generator=g, dtype=torch.float64)
    from efftrain.memory.projection import projected_sides
    bases = {side: subspace(gradient, 3, side) for side in projected_sides(shape, proj_type)}
    low = project(gradient, bases)
    assert low.shape == projected_shape(shape, 3, proj_type)
    torch.testing.assert_close(project_back(low, bases), gradient)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bases_are_orthonormal(method, dtype):
    gradient = torch.randn(40, 60, generator=torch.Generator().manual_seed(2)).to(dtype)
    for side in ("left", "right"):
        basis = subspace(gradient, 8, side, method=method)
        assert basis.dtype == dtype
        torch.testing.assert_close((basis.float().T @ basis.float()), torch.eye(8), atol=1e-5 if dtype == torch.float32 else 2e-2, rtol=0)


def test_a_zero_gradient_moves_nothing_and_breaks_nothing():
    p = nn.Parameter(torch.ones(6, 8)); p.grad = torch.zeros(6, 8)
    for method in METHODS:
        o = GaLoreAdamW([dict(params=[p], rank=2, subspace=method, update_proj_gap=1)], lr=0.1)
        o.step(); o.step()
        assert torch.equal(p, torch.ones(6, 8))


# state

def test_state_is_as_large_as_the_formula_says():
    model, loss = language_model()
    o = GaLoreAdamW(galore_param_groups(model, rank=8), lr=0.01)
    loss().backward(); o.step()
    projected = [p for g in o.param_groups if g.get("rank") for p in g["params"]]
    rest = [p for g in o.param_groups if not g.get("rank") for p in g["params"]]
    assert len(projected) == 7 and len(projected) + len(rest) == len(list(model.parameters()))
    assert state_bytes(o) == 4 * (sum(2 * 8 * max(p.shape) + 8 * min(p.shape) for p in projected) + 2 * sum(p.numel() for p in rest))


def test_moments_outlive_a_refresh():
    params, targets = problem()
    o = GaLoreAdamW(groups(params, gap=5), lr=0.01)
    walk(o, params, targets, 5)
    before = o.state[params[0]]["exp_avg"].clone(), o.state[params[0]]["basis_left"].clone()
    params[0].grad = torch.zeros_like(params[0]); params[1].grad = params[2].grad = params[3].grad = None
    o.step()
    torch.testing.assert_close(o.state[params[0]]["exp_avg"], before[0] * 0.9)
    assert not torch.equal(o.state[params[0]]["basis_left"], before[1])


@every_kind
def test_a_saved_run_goes_on_bit_for_bit(kind):
    (a, targets), (b, _) = problem(shapes=((80, 70), (70, 80), (16, 16), (7,))), problem(shapes=((80, 70), (70, 80), (16, 16), (7,)))
    first = KINDS[kind](groups(a, rank=8, gap=3)); walk(first, a, targets, 7)
    buffer = io.BytesIO(); torch.save(first.state_dict(), buffer); buffer.seek(0)
    second = KINDS[kind](groups(b, rank=8, gap=3)); second.load_state_dict(torch.load(buffer, weights_only=True))
    for p, q in zip(a, b): q.data.copy_(p.data)
    walk(first, a, targets, 5); walk(second, b, targets, 5)
    assert all(torch.equal(p, q) for p, q in zip(a, b))


@every_kind
def test_copies_step_alike(kind):
    model, _ = language_model()
    o = KINDS[kind](galore_param_groups(model, rank=8))
    model.requires_grad_(True); model(input_ids=torch.ones(1, 4, dtype=torch.long), labels=torch.ones(1, 4, dtype=torch.long)).loss.backward(); o.step()
    twin, copied = copy.deepcopy((model, o))
    for m, optimizer in ((model, o), (twin, copied)): optimizer.zero_grad(); m(input_ids=torch.ones(1, 4, dtype=torch.long), labels=torch.ones(1, 4, dtype=torch.long)).loss.backward(); optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters()))


@every_kind
def test_bfloat16_parameters_keep_bfloat16_state(kind):
    p = nn.Parameter(torch.randn(70, 80).bfloat16()); o = KINDS[kind]([dict(params=[p], rank=16)])
    for _ in range(3): p.grad = torch.randn_like(p); o.step()
    assert p.dtype == torch.bfloat16 and p.isfinite().all() and o.state[p]["basis_left"].dtype in (torch.bfloat16, torch.float32)


def test_eight_bit_moments_take_a_quarter():
    p = nn.Parameter(torch.randn(96, 128)); q = nn.Parameter(p.detach().clone())
    full, eight = GaLoreAdamW([dict(params=[p], rank=64)], lr=0.01), GaLoreAdamW8bit([dict(params=[q], rank=64)], lr=0.01, weight_decay=0.0)
    for _ in range(5):
        p.grad = torch.randn(96, 128, generator=torch.Generator().manual_seed(0)); q.grad = p.grad.clone()
        full.step(); eight.step()
    size = lambda o, w: sum(t.nbytes for k, t in o.state[w].items() if k.startswith("exp"))
    assert size(eight, q) < 0.27 * size(full, p)
    assert (p - q).norm() < 0.05 * (p - torch.zeros(1)).norm()


def test_quantisation_error_is_bounded_by_the_table():
    from hypothesis import given, settings, strategies as st

    @settings(max_examples=40, deadline=None)
    @given(st.integers(1, 700), st.integers(-8, 8), st.booleans(), st.integers(0, 10**6))
    def check(n, power, signed, seed):
        x = torch.randn(n, generator=torch.Generator().manual_seed(seed)) * 10.0**power
        x = x if signed else x.abs()
        back = dequantize(*quantize(x, signed), signed)
        assert back.shape == x.shape and ((x - back).abs() <= 0.04 * x.abs().max() + 1e-30).all()
    check()


# as any optimizer

@every_kind
def test_closure_none_gradients_and_schedulers(kind):
    params, targets = problem()
    o = KINDS[kind](groups(params), **(dict(relative_step=False, lr=0.01) if kind == "adafactor" else dict(lr=0.01)))
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(o, 10)
    def closure():
        assert torch.is_grad_enabled(); o.zero_grad()
        loss = sum((p - t).square().sum() for p, t in zip(params[:2], targets)); loss.backward(); return loss
    first = o.step(closure); scheduler.step()
    assert o.step(closure) < first and not o.state.get(params[3]) and o.param_groups[0]["lr"] < 0.01


def test_maximize_is_the_mirror():
    (up, targets), (down, _) = problem(), problem()
    a, b = GaLoreAdamW(groups(up), lr=0.01, maximize=True), GaLoreAdamW(groups(down), lr=0.01)
    for p, q, t in zip(up, down, targets): p.grad, q.grad = t.clone(), -t
    a.step(); b.step()
    for p, q in zip(up, down): torch.testing.assert_close(p, q)


@every_kind
def test_sparse_and_complex_gradients_are_refused_by_name(kind):
    table = nn.Embedding(10, 4, sparse=True); table(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse"): KINDS[kind]([dict(params=[table.weight], rank=2)]).step()
    z = nn.Parameter(torch.ones(3, 3, dtype=torch.complex64)); z.grad = torch.ones_like(z)
    with pytest.raises(RuntimeError, match="complex"): KINDS[kind]([z]).step()


def test_with_a_compiled_model_and_gradient_scaler():
    model, loss = language_model()
    o, scaler = GaLoreAdamW(galore_param_groups(model, rank=8), lr=0.01), torch.amp.GradScaler("cpu")
    losses = []
    for _ in range(5):
        o.zero_grad(); value = loss(); scaler.scale(value).backward(); scaler.step(o); scaler.update(); losses.append(value.item())
    assert losses[-1] < losses[0]


def test_per_layer_is_the_same_update_without_gradients():
    def run(layered):
        model, loss = language_model(3)
        make = lambda named: GaLoreAdamW([dict(params=named, rank=8)] if "mlp" in named[0][0] else named, lr=0.01)
        o = per_layer(model, make) if layered else GaLoreAdamW(galore_param_groups(model, rank=8, targets=["mlp"]), lr=0.01)
        for _ in range(3): loss().backward(); o.step(); o.zero_grad()
        assert all(p.grad is None for p in model.parameters())
        return model, o
    (a, layered), (b, _) = run(True), run(False)
    for p, q in zip(a.parameters(), b.parameters()): torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-5)
    saved = layered.state_dict()
    layered.load_state_dict(saved)
    with pytest.raises(ValueError, match="state_dict"): layered.load_state_dict({"x": 1})
    layered.remove()
    before = [p.clone() for p in a.parameters()]
    a(input_ids=torch.ones(1, 4, dtype=torch.long), labels=torch.ones(1, 4, dtype=torch.long)).loss.backward()
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), before))


# wrong input

@pytest.mark.parametrize("bad, word", [(dict(rank=0), "rank is 0"), (dict(rank=5), r"rank is 5 for a parameter of shape \(4, 6\)"), (dict(rank=2, update_proj_gap=0), "update_proj_gap is 0"), (dict(rank=2, proj_type="both"), "proj_type is 'both'"),
                                       (dict(rank=2, scale=-1.0), "scale is -1.0"), (dict(rank=2, subspace="qr"), "subspace is 'qr'"), (dict(proj_type="std"), "without rank"), (dict(lr=-1.0), "lr is -1.0"), (dict(betas=(0.9, 1.0)), r"betas\[1\]")])
@every_kind
def test_wrong_groups_are_named_and_not_added(bad, word, kind):
    if kind == "adafactor" and set(bad) & {"lr", "betas"}: pytest.skip("Adafactor has its own")
    o = KINDS[kind]([nn.Parameter(torch.ones(2, 2))])
    with pytest.raises(ValueError, match=word): o.add_param_group({"params": [nn.Parameter(torch.ones(4, 6))], **bad})
    assert len(o.param_groups) == 1


def test_vectors_cannot_be_projected():
    with pytest.raises(ValueError, match=r"shape \(4,\)"): GaLoreAdamW([dict(params=[nn.Parameter(torch.ones(4))], rank=2)])


@pytest.mark.parametrize("bad", [dict(lr=0.1), dict(relative_step=False), dict(warmup_init=True, relative_step=False, lr=1.0), dict(clip_threshold=0), dict(eps=1e-3)])
def test_adafactor_says_which_options_exclude_one_another(bad):
    with pytest.raises((ValueError, TypeError)): GaLoreAdafactor([nn.Parameter(torch.ones(2))], **bad)


def test_groups_say_what_they_took(capsys):
    model = llama(32, 1)
    taken = galore_param_groups(model, rank=16, verbose=True)
    assert "7 matrices" in capsys.readouterr().out and taken[0]["rank"] == 16
    with pytest.raises(ValueError, match="targets="): galore_param_groups(mlp([2, 3]), targets=["attn"])


# wrong gradients, and options of every kind

@every_kind
def test_a_subspace_of_gradients_that_are_not_finite_is_refused_by_name_and_changes_nothing(kind):
    params, targets = problem()
    named = [(f"layer{i}.weight", p) for i, p in enumerate(params[:3])]
    optimizer = KINDS[kind]([dict(params=named, rank=4)])
    for p in params: p.grad = torch.ones_like(p)
    params[1].grad[2, 3] = float("nan")
    before = [p.detach().clone() for p in params]
    with pytest.raises(RuntimeError, match="gradient that is not finite, and that of parameter 'layer1.weight' .*has 1 such"): optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(params, before)) and not any(len(s) for s in optimizer.state.values())
    params[1].grad[2, 3] = 0.0
    optimizer.step()
    assert all((p != q).any() for p, q in zip(params[:3], before))


@pytest.mark.parametrize("flag", ["maximize", "scale_parameter", "relative_step", "warmup_init"])
def test_adafactor_takes_no_other_flags(flag):
    with pytest.raises((TypeError, ValueError), match=flag): GaLoreAdafactor([nn.Parameter(torch.ones(2))], **{flag: None})


def test_targets_that_are_one_string_are_refused():
    with pytest.raises(TypeError, match="targets is 'attn'"): galore_param_groups(llama(16, 1, heads=1), 2, targets="attn")
