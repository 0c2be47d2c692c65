"""Fira: trajectories against NumPy and against pytorch-optimizer, known special cases, the limiter, state, interrupted runs, mixed precision, wrong input."""
import copy
import io
import math

import numpy as np
import pytest
import pytorch_optimizer
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from efftrain.accounting import state_bytes
from efftrain.memory.fira import FORMS, SCALINGS, Fira, fira_param_groups, full_rank_update, scaling_factors
from efftrain.memory.galore import GaLoreAdamW, galore_param_groups
from efftrain.memory.projected import bases
from efftrain.memory.projection import PROJ_TYPES, project, project_back
from efftrain.models import llama, mlp

SHAPES = ((12, 20), (20, 12), (16, 16), (7,))


def problem(seed=0, shapes=SHAPES, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=g, dtype=dtype)) for s in shapes], [torch.randn(s, generator=g, dtype=dtype) for s in shapes]


def groups(params, rank=4, **keys): return [dict(params=params[:3], rank=rank, **keys), dict(params=params[3:])]


def walk(optimizer, params, targets, steps, start=0):
    """Gradients of quadratics with a jump now and then, which the limiter must see."""
    for t in range(start, start + steps):
        for p, target in zip(params, targets): p.grad = (p - target).detach() * target.abs() * (5.0 if t % 7 == 3 else 1.0)
        optimizer.step()


def language_model(seed=0):
    model = llama(32, 1, seed=seed)
    ids = torch.randint(512, (4, 16), generator=torch.Generator().manual_seed(seed))
    return model, lambda: model(input_ids=ids, labels=ids).loss


# against independent implementations

def numpy_fira(W, targets, rank, gap, lr, scale, decay, scaling, limiter, form, signs, tall):
    """The published algorithm with the residual as a matrix; `tall` works on the transpose. Returns weights and residual norm after each step."""
    if tall: W, targets = W.T, [T.T for T in targets]
    M = V = np.zeros((rank, W.shape[1])); before, out = None, []
    for t, T in enumerate(targets, 1):
        G = W - T
        if (t - 1) % gap == 0:
            P = np.linalg.svd(G.T)[2].T[:, :rank] if tall else np.linalg.svd(G)[0][:, :rank]
            P = P * np.sign((P * signs[t - 1]).sum(0))
        R = P.T @ G
        M, V = 0.9 * M + 0.1 * R, 0.999 * V + 0.001 * R**2
        N = M / (np.sqrt(V) + 1e-6)
        S = G - (P @ R if form == "paper" else scale * (P @ R))
        if scaling == "column": S = S * (np.sqrt((N**2).sum(0)) / (np.sqrt((R**2).sum(0)) + 1e-8))
        if scaling == "matrix": S = S * (np.sqrt((N**2).sum()) / (np.sqrt((R**2).sum()) + 1e-8))
        if limiter is not None and before is not None: S = S / (max(np.sqrt((S**2).sum()) / (before + 1e-8), limiter) / limiter)
        before = np.sqrt((S**2).sum())
        size = lr * math.sqrt(1 - 0.999**t) / (1 - 0.9**t)
        W = W - size * (scale * (P @ N) + (scale * S if form == "paper" else S))
        W = W * (1 - lr * decay)
        out.append((W.T if tall else W, before))
    return out


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("limiter", [1.01, 1.5, None])
@pytest.mark.parametrize("shape", [(8, 12), (12, 8)])
def test_walks_as_numpy_says(shape, limiter, scaling, form):
    """Six steps with two refreshes after the first subspace and growing gradients; NumPy decomposes by itself and takes only signs."""
    g = torch.Generator().manual_seed(5)
    start, targets = torch.randn(shape, generator=g, dtype=torch.float64), [torch.randn(shape, generator=g, dtype=torch.float64) * 2**k for k in range(6)]
    p, ours, signs = nn.Parameter(start.clone()), [], []
    o = Fira([dict(params=[p], rank=3, update_proj_gap=2, scale=0.25, scaling=scaling, limiter=limiter, form=form)], lr=0.1, weight_decay=0.1)
    for T in targets:
        p.grad = (p - T).detach(); o.step()
        ours.append(p.detach().clone()); signs.append(next(iter(bases(o.state[p]).values())).numpy().copy())
        norm = o.state[p].get("residual_norm")
    expected = numpy_fira(start.numpy(), [T.numpy() for T in targets], 3, 2, 0.1, 0.25, 0.1, scaling, limiter, form, signs, shape[0] > shape[1])
    for w, (W, _) in zip(ours, expected): np.testing.assert_allclose(w.numpy(), W, rtol=1e-6, atol=1e-7)
    if limiter: np.testing.assert_allclose(norm.item(), expected[-1][1], rtol=1e-6)
    else: assert norm is None


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("gap, steps", [(10**9, 60), (1, 15)])
@pytest.mark.parametrize("proj_type, scale, form", [("std", 0.25, "code"), ("left", 0.25, "code"), ("right", 0.25, "code"), ("reverse_std", 0.25, "code"), ("std", 4.0, "code"), ("std", 1.0, "paper")])
def test_walks_as_pytorch_optimizer(proj_type, scale, form, gap, steps, weight_decay):
    """The released code's form; theirs refreshes one step earlier, so there is one subspace here or a new one at every step."""
    (ours, targets), (theirs, _) = problem(), problem()
    walk(Fira(groups(ours, update_proj_gap=gap, scale=scale, proj_type=proj_type, form=form), lr=0.02, weight_decay=weight_decay), ours, targets, steps)
    walk(pytorch_optimizer.Fira(groups(theirs, update_proj_gap=gap, scale=scale, projection_type=proj_type), lr=0.02, weight_decay=weight_decay), theirs, targets, steps)
    for a, b in zip(ours, theirs): torch.testing.assert_close(a, b, atol=5e-5, rtol=5e-5)


def test_both_sides_at_once_walks_as_pytorch_optimizer():
    (ours, targets), (theirs, _) = problem(), problem()
    walk(Fira(groups(ours, proj_type="full", scaling="matrix", form="code"), lr=0.02), ours, targets, 20)
    walk(pytorch_optimizer.Fira(groups(theirs, update_proj_gap=200, scale=0.25, projection_type="full"), lr=0.02), theirs, targets, 20)
    for a, b in zip(ours, theirs): torch.testing.assert_close(a, b, atol=5e-5, rtol=5e-5)


# special cases

def test_without_rank_it_is_adamw():
    (ours, targets), (plain, _) = problem(), problem()
    walk(Fira(ours, lr=0.01, eps=1e-30), ours, targets, 30)
    walk(torch.optim.AdamW(plain, lr=0.01, eps=1e-30, weight_decay=0.0), plain, targets, 30)
    for a, b in zip(ours, plain): torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("scale", [0.25, 4.0])
def test_at_full_rank_it_is_galore(scale):
    """Nothing is outside. (The code's form is not: it subtracts a part only.)"""
    shapes = ((6, 9), (9, 6), (6, 6), (3,))
    (ours, targets), (theirs, _) = problem(shapes=shapes, dtype=torch.float64), problem(shapes=shapes, dtype=torch.float64)
    walk(Fira(groups(ours, rank=6, update_proj_gap=7, scale=scale), lr=0.02, weight_decay=0.1), ours, targets, 25)
    walk(GaLoreAdamW(groups(theirs, rank=6, update_proj_gap=7, scale=scale), lr=0.02, weight_decay=0.1), theirs, targets, 25)
    for a, b in zip(ours, theirs): torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


def test_at_scale_one_both_forms_are_one():
    (paper, targets), (code, _) = problem(dtype=torch.float64), problem(dtype=torch.float64)
    walk(Fira(groups(paper, scale=1.0, form="paper"), lr=0.02), paper, targets, 20)
    walk(Fira(groups(code, scale=1.0, form="code"), lr=0.02), code, targets, 20)
    for a, b in zip(paper, code): torch.testing.assert_close(a, b)


def test_unscaled_and_unlimited_it_is_galore_and_gradient_descent():
    (w, v), T = (nn.Parameter(torch.linspace(-1, 1, 54, dtype=torch.float64).reshape(6, 9)) for _ in range(2)), torch.randn(6, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    a, b = (kind([dict(params=[x], rank=2, update_proj_gap=3, **keys)], lr=0.02, correct_bias=False) for kind, x, keys in ((Fira, w, dict(scaling=None, limiter=None)), (GaLoreAdamW, v, {})))
    for _ in range(10):
        w.grad, v.grad = (w - T).detach(), (v - T).detach()
        a.step(); b.step()
        with torch.no_grad(): v -= 0.02 * 0.25 * (v.grad - project_back(project(v.grad, bases(b.state[v])), bases(b.state[v])))
    torch.testing.assert_close(w, v)


@pytest.mark.parametrize("proj_type", PROJ_TYPES)
@pytest.mark.parametrize("shape", [(8, 12), (12, 8)])
def test_the_update_outside_is_along_the_residual(shape, proj_type):
    """With one factor a matrix, the update minus Adam's part is a multiple of G - P P^T G, orthogonal to the subspace."""
    p = nn.Parameter(torch.zeros(shape, dtype=torch.float64)); o = Fira([dict(params=[p], rank=3, proj_type=proj_type, scaling="matrix", scale=0.5)], lr=1.0, correct_bias=False)
    p.grad = torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64); o.step()
    found, state = bases(o.state[p]), o.state[p]
    direction = state["exp_avg"] / (state["exp_avg_sq"].sqrt() + 1e-6)
    outside = -p.detach() - 0.5 * project_back(direction, found)
    residual = p.grad - project_back(project(p.grad, found), found)
    torch.testing.assert_close(outside / outside.norm(), residual / residual.norm(), atol=1e-7, rtol=1e-6)
    assert project(outside, found).norm() < 1e-7
    torch.testing.assert_close(outside.norm(), 0.5 * residual.norm() * direction.norm() / project(p.grad, found).norm(), atol=1e-6, rtol=1e-6)


def test_factors_are_ratios_of_norms():
    a, b = torch.tensor([[3.0, 0.0], [4.0, 2.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    torch.testing.assert_close(scaling_factors(a, b, 0), torch.tensor([[5.0, 2.0]])); torch.testing.assert_close(scaling_factors(a, b, 1), torch.tensor([[3.0], [math.sqrt(20)]]))
    torch.testing.assert_close(scaling_factors(a, b), torch.tensor(math.sqrt(29 / 2)))
    assert scaling_factors(a.bfloat16(), b.bfloat16()).dtype == torch.float32
    for bad in (dict(gradient=b[:1]), dict(dim=2), dict(direction=a[0], gradient=b[0])):
        with pytest.raises(ValueError, match="direction has shape|dim is 2"): scaling_factors(**{"direction": a, "gradient": b, **bad})


# the limiter

@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(1e-4, 1e4), min_size=3, max_size=12), st.floats(1.0, 2.0), st.sampled_from(SCALINGS), st.sampled_from(FORMS), st.booleans())
def test_the_residual_never_grows_faster_than_the_limiter_says(sizes, limiter, scaling, form, tall):
    """Measured on the updates themselves: what is left of them outside the subspace."""
    shape = (9, 6) if tall else (6, 9)
    p = nn.Parameter(torch.zeros(shape, dtype=torch.float64)); o = Fira([dict(params=[p], rank=2, scaling=scaling, limiter=limiter, form=form)], lr=1.0, correct_bias=False)
    generator, norms = torch.Generator().manual_seed(len(sizes)), []
    for size in sizes:
        p.grad = size * torch.randn(shape, generator=generator, dtype=torch.float64)
        before = p.detach().clone(); o.step()
        step, found = before - p.detach(), bases(o.state[p])
        norms.append((step - project_back(project(step, found), found)).norm().item() if form == "paper" else o.state[p]["residual_norm"].item())
        if form == "paper": assert norms[-1] == pytest.approx(0.25 * o.state[p]["residual_norm"].item(), rel=1e-6)
    for a, b in zip(norms, norms[1:]): assert b <= a * limiter * (1 + 1e-6) + 1e-7


def test_zero_gradients_do_not_hold_later_residuals_down():
    """An expert that no token reaches for a while. In the released code the limiter would start again from 1e-8."""
    g = torch.Generator().manual_seed(0)
    p = nn.Parameter(torch.zeros(6, 9)); o = Fira([dict(params=[p], rank=2)], lr=0.1)
    p.grad = torch.zeros(6, 9); o.step(); o.step()
    assert (p == 0).all() and not math.isnan(o.state[p]["residual_norm"])
    p.grad = torch.randn(6, 9, generator=g); o.step()
    first = o.state[p]["residual_norm"].clone()
    assert 0.1 < first < 1000
    p.grad = torch.zeros(6, 9); o.step()
    assert o.state[p]["residual_norm"] == first and p.isfinite().all()
    p.grad = torch.randn(6, 9, generator=g); o.step()
    assert 0.01 * first < o.state[p]["residual_norm"] <= 1.0101 * first


# state

def test_state_is_galores_and_one_number_a_matrix():
    sizes = []
    for kind, make in ((Fira, fira_param_groups), (GaLoreAdamW, galore_param_groups)):
        model, loss = language_model(); o = kind(make(model, rank=8), lr=0.01)
        loss().backward(); o.step(); sizes.append(state_bytes(o))
    assert sizes[0] == sizes[1] + 7 * 4


@pytest.mark.parametrize("keys", [{}, dict(form="code", scaling="matrix"), dict(limiter=None, scaling=None)])
def test_a_saved_run_goes_on_bit_for_bit(keys):
    (a, targets), (b, _) = problem(), problem()
    first = Fira(groups(a, update_proj_gap=3, **keys)); walk(first, a, targets, 7)
    buffer = io.BytesIO(); torch.save(first.state_dict(), buffer); buffer.seek(0)
    second = Fira(groups(b, update_proj_gap=3)); second.load_state_dict(torch.load(buffer, weights_only=True))
    for p, q in zip(a, b): q.data.copy_(p.data)
    twin_params, twin = copy.deepcopy((a, first))
    walk(first, a, targets, 5, 7); walk(second, b, targets, 5, 7); walk(twin, twin_params, targets, 5, 7)
    assert all(torch.equal(p, q) and torch.equal(p, r) for p, q, r in zip(a, b, twin_params))


def test_a_checkpoint_of_galore_goes_on_with_fira():
    (a, targets), (b, _) = problem(), problem()
    old = GaLoreAdamW(groups(a), lr=0.01); walk(old, a, targets, 4)
    for p, q in zip(a, b): q.data.copy_(p.data)
    new = Fira(groups(b), lr=0.01); new.load_state_dict(old.state_dict())
    moments = new.state[b[0]]["exp_avg"].clone()
    walk(new, b, targets, 1)
    assert torch.equal(moments, old.state[a[0]]["exp_avg"]) and new.state[b[0]]["residual_norm"] > 0


def test_bfloat16_parameters():
    """State in the parameter's dtype, the norm in float32; the update is the float32 one up to rounding."""
    g = torch.Generator().manual_seed(2)
    p = nn.Parameter(torch.randn(70, 80, generator=g).bfloat16()); q = nn.Parameter(p.detach().float())
    a, b = Fira([dict(params=[p], rank=16)], lr=0.5), Fira([dict(params=[q], rank=16)], lr=0.5)
    start = q.detach().clone()
    for _ in range(5):
        p.grad = torch.randn(70, 80, generator=g).bfloat16(); q.grad = p.grad.float()
        a.step(); b.step()
    assert p.dtype == torch.bfloat16 and a.state[p]["exp_avg"].dtype == torch.bfloat16 and a.state[p]["residual_norm"].dtype == torch.float32
    assert (p.float() - q).norm() < 0.06 * (q - start).norm()


# as any optimizer (the rest is in test_optimizers.py)

def test_groups_mix_and_schedules_reach_the_step():
    (together, targets), (apart, _) = problem(), problem()
    one = Fira(groups(together, lr=0.05), lr=0.01)
    two = [Fira([dict(params=apart[:3], rank=4)], lr=0.05), Fira(apart[3:], lr=0.01)]
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(o, 10) for o in (one, *two)]
    for t in range(5):
        walk(one, together, targets, 1, t); walk(two[0], apart[:3], targets[:3], 1, t); walk(two[1], apart[3:], targets[3:], 1, t)
        for s in schedules: s.step()
    assert all(torch.equal(p, q) for p, q in zip(together, apart)) and one.param_groups[0]["lr"] < 0.05


def test_trains_a_compiled_model_with_a_gradient_scaler():
    model, loss = language_model()
    o, scaler, losses = Fira(fira_param_groups(model, rank=4, update_proj_gap=5), lr=0.01), torch.amp.GradScaler("cpu"), []
    for _ in range(8):
        o.zero_grad(); value = loss(); scaler.scale(value).backward(); scaler.step(o); scaler.update(); losses.append(value.item())
    assert losses[-1] < losses[0] - 0.1


def test_learns_where_the_subspace_does_not_reach():
    """A target of full rank, one fixed subspace: GaLore can reach a part of it, Fira all."""
    T, left = torch.randn(16, 24, generator=torch.Generator().manual_seed(4)), {}
    for kind in (Fira, GaLoreAdamW):
        p = nn.Parameter(torch.zeros(16, 24)); o = kind([dict(params=[p], rank=4, update_proj_gap=10**9, scale=1.0)], lr=0.02)
        for _ in range(400): p.grad = (p - T).detach(); o.step()
        left[kind] = ((p - T).norm() / T.norm()).item()
    assert left[Fira] < 0.1 and left[GaLoreAdamW] > 0.5


# wrong input

@pytest.mark.parametrize("bad, error, word", [
    (dict(rank=0), ValueError, "rank is 0"), (dict(rank=5), ValueError, r"rank is 5 for a parameter of shape \(4, 6\)"), (dict(rank=2, update_proj_gap=0), ValueError, "update_proj_gap is 0"), (dict(rank=2, scale=-1.0), ValueError, "scale is -1.0"),
    (dict(rank=2, scaling="row"), ValueError, "scaling is 'row'"), (dict(rank=2, scaling=1.0), ValueError, "scaling is 1.0"), (dict(rank=2, limiter=0.99), ValueError, "limiter is 0.99"), (dict(rank=2, limiter=float("nan")), ValueError, "limiter is nan"),
    (dict(rank=2, limiter="1.01"), TypeError, "limiter is '1.01'"), (dict(rank=2, form="official"), ValueError, "form is 'official'"), (dict(rank=2, proj_type="full"), ValueError, "proj_type='full'"), (dict(scaling="column"), ValueError, "without rank"),
    (dict(limiter=1.01), ValueError, "without rank"), (dict(lr=-1.0), ValueError, "lr is -1.0"), (dict(betas=(0.9, 1.0)), ValueError, r"betas\[1\]"), (dict(eps=-1.0), ValueError, "eps is -1.0"), (dict(correct_bias=None), TypeError, "correct_bias is None")])
def test_wrong_groups_are_named_and_not_added(bad, error, word):
    o = Fira([nn.Parameter(torch.ones(2, 2))])
    with pytest.raises(error, match=word): o.add_param_group({"params": [nn.Parameter(torch.ones(4, 6))], **bad})
    assert len(o.param_groups) == 1


def test_vectors_and_models_without_targets_are_refused():
    with pytest.raises(ValueError, match=r"shape \(4,\)"): Fira([dict(params=[nn.Parameter(torch.ones(4))], rank=2)])
    with pytest.raises(ValueError, match="targets="): fira_param_groups(mlp([2, 3]), rank=1)


def test_groups_say_what_they_took(capsys):
    taken = fira_param_groups(llama(32, 1), rank=16, scaling="matrix", limiter=None, form="code", verbose=True)
    assert "7 matrices" in capsys.readouterr().out and taken[0]["rank"] == 16 and taken[0]["scaling"] == "matrix" and taken[0]["limiter"] is None and taken[0]["form"] == "code" and "scaling" not in taken[-1]


def test_full_rank_update_reads_and_leaves_its_arguments_alone():
    g = torch.Generator().manual_seed(0)
    G = torch.randn(6, 9, generator=g); P = torch.linalg.qr(torch.randn(6, 2, generator=g)).Q; R = P.T @ G; N = R.sign()
    kept = [t.clone() for t in (G, P, R, N)]
    full_rank_update(dict(rank=2, proj_type="std", scale=0.25, scaling="column", limiter=1.01, form="paper"), {"basis_left": P}, G, R, N)
    assert all(torch.equal(a, b) for a, b in zip(kept, (G, P, R, N)))
