"""AdaBelief against independent implementations and closed forms; what users expect of any torch optimizer is asked in test_optimizers.py."""
import contextlib
import io
import itertools
import math

import adabelief_pytorch
import numpy as np
import pytest
import pytorch_optimizer
import torch
import torch_optimizer
from torch import nn

from efftrain.optim import base, moments
from efftrain.optim.adabelief import AdaBelief

PATHS = {"single": dict(foreach=False), "foreach": dict(foreach=True), "fused": dict(fused=True)}
every_path = pytest.mark.parametrize("path", PATHS)
DECAYS = {"none": dict(weight_decay=0.0), "decoupled": dict(weight_decay=0.1), "fixed": dict(weight_decay=0.002, fixed_decay=True), "l2": dict(weight_decay=0.1, weight_decouple=False)}


def gradients(params, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in params: p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)


def official(params, degenerate_to_sgd=True, **options):
    with contextlib.redirect_stdout(io.StringIO()): return adabelief_pytorch.AdaBelief(params, print_change_log=False, degenerated_to_sgd=degenerate_to_sgd, **options)


def second(params, degenerate_to_sgd=True, amsgrad=False, **options): return pytorch_optimizer.AdaBelief(params, degenerated_to_sgd=degenerate_to_sgd, ams_bound=amsgrad, **options)


def third(params, degenerate_to_sgd=True, **options): return torch_optimizer.AdaBelief(params, **options)


def run_both(make, peer, options, steps=200, dtype=torch.float32):
    torch.manual_seed(0)
    start = [torch.randn(s, dtype=dtype) for s in ((13, 7), (29,), ())]
    ours, theirs = ([nn.Parameter(s.clone()) for s in start] for _ in range(2))
    a, b = make(ours, **options), peer(theirs, **options)
    for step in range(steps):
        gradients(ours, step); gradients(theirs, step)
        a.step(); b.step()
    return ours, theirs, a, b


# the rule

@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("rectify, degenerate_to_sgd, amsgrad", [f for f in itertools.product((False, True), repeat=3) if f[0] or f[1]])
def test_equals_the_peers_over_200_steps(decay, rectify, degenerate_to_sgd, amsgrad):
    """With rectification and amsgrad the official code computes the maximum and does not use it: there pytorch-optimizer is the only peer. torch-optimizer has the plain rule in common."""
    options = dict(lr=1e-3, eps=1e-16, rectify=rectify, degenerate_to_sgd=degenerate_to_sgd, amsgrad=amsgrad, **{"weight_decouple": True, "fixed_decay": False, **DECAYS[decay]})
    for peer in [second] + [official] * (not (rectify and amsgrad)) + [third] * (not (rectify or amsgrad)):
        ours, theirs, *_ = run_both(AdaBelief, peer, options)
        for p, q in zip(ours, theirs): torch.testing.assert_close(p, q, rtol=0, atol=1e-6, msg=lambda text: f"{peer.__name__}: {text}")


def numpy_adabelief(w, grads, lr, beta1, beta2, eps, decay, rectify, amsgrad):
    m, s, x = np.zeros_like(w), np.zeros_like(w), np.zeros_like(w)
    limit = 2 / (1 - beta2) - 1
    for t, g in enumerate(grads, 1):
        w = w * (1 - lr * decay)
        m = beta1 * m + (1 - beta1) * g
        s = beta2 * s + (1 - beta2) * (g - m) ** 2 + eps
        x = np.maximum(x, s)
        m_hat, below = m / (1 - beta1**t), x if amsgrad else s
        if not rectify:
            w = w - lr * m_hat / (np.sqrt(below / (1 - beta2**t)) + eps)
            continue
        rho = limit - 2 * t * beta2**t / (1 - beta2**t)
        if rho < 5: w = w - lr * m_hat
        else: w = w - lr * math.sqrt((rho - 4) * (rho - 2) * limit / ((limit - 4) * (limit - 2) * rho)) * m_hat / ((np.sqrt(below) + eps) / math.sqrt(1 - beta2**t))
    return w


@every_path
@pytest.mark.parametrize("rectify", [False, True])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_equals_numpy_in_float64(path, rectify, amsgrad):
    w = torch.randn(base.SMALL + 17, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    p, grads = nn.Parameter(w.clone()), []
    opt = AdaBelief([p], lr=1e-2, betas=(0.8, 0.97), eps=1e-10, weight_decay=0.7, rectify=rectify, amsgrad=amsgrad, **PATHS[path])
    for step in range(12):
        gradients([p], step); p.grad *= step % 3 + 0.1; grads.append(p.grad.numpy().copy()); opt.step()
    np.testing.assert_allclose(p.detach().numpy(), numpy_adabelief(w.numpy(), grads, 1e-2, 0.8, 0.97, 1e-10, 0.7, rectify, amsgrad), rtol=0, atol=1e-11)


@every_path
@pytest.mark.parametrize("gradient", [0.3, -2.0])
def test_a_steady_gradient_leaves_epsilon_alone(path, gradient):
    """s settles at eps / (1 - beta2), because eps accumulates in the state; the step is proportional to the gradient."""
    p = nn.Parameter(torch.zeros(base.SMALL if path == "fused" else 3, dtype=torch.float64)); opt = AdaBelief([p], lr=1e-3, betas=(0.9, 0.9), eps=1e-4, rectify=False, **PATHS[path])
    p.grad = torch.full_like(p, gradient)
    for _ in range(400): before = p.detach().clone(); opt.step()
    torch.testing.assert_close(opt.state[p]["exp_avg_var"], torch.full_like(p, 1e-3).detach(), rtol=1e-10, atol=0)
    torch.testing.assert_close(before - p.detach(), torch.full_like(before, 1e-3 * gradient / (math.sqrt(1e-3) + 1e-4)), rtol=1e-9, atol=0)


def test_the_deviation_is_taken_from_the_new_average():
    p = nn.Parameter(torch.zeros(1)); opt = AdaBelief([p], betas=(0.75, 0.5), eps=0.0); p.grad = torch.tensor([4.0]); opt.step()
    assert opt.state[p]["exp_avg"].item() == 1.0 and opt.state[p]["exp_avg_var"].item() == 0.5 * (4 - 1) ** 2


def test_the_first_steps_are_momentum_steps_or_none():
    for degenerate in (True, False):
        p = nn.Parameter(torch.zeros(2)); opt = AdaBelief([p], lr=0.1, degenerate_to_sgd=degenerate); p.grad = torch.tensor([1.0, 100.0])
        for _ in range(5): opt.step()
        torch.testing.assert_close(p.detach(), -0.5 * p.grad * degenerate)
        opt.step()
        assert p[0] != -0.5 * degenerate and 0.9 < (p[1] + 50 * degenerate).abs() / (p[0] + 0.5 * degenerate).abs() < 1.1, "from the sixth on the scale of the gradient drops out"


def test_a_short_memory_never_rectifies():
    for beta2 in (0.0, 0.5, 0.6, 2 / 3):  # 0.6 would divide by zero
        p = nn.Parameter(torch.zeros(1)); opt = AdaBelief([p], lr=0.1, betas=(0.9, beta2)); p.grad = torch.tensor([3.0])
        for _ in range(20): opt.step()
        torch.testing.assert_close(p.detach(), torch.tensor([-6.0]))


@pytest.mark.parametrize("function, optimum", [(lambda w: (w[0] + w[1]) ** 2 + (w[0] - w[1]) ** 2 / 10, [0.0, 0.0]), (lambda w: (1.5 - w[0] + w[0] * w[1]) ** 2 + (2.25 - w[0] + w[0] * w[1] ** 2) ** 2 + (2.625 - w[0] + w[0] * w[1] ** 3) ** 2, [3.0, 0.5])], ids=["bowl", "Beale"])
def test_minimises_in_two_dimensions(function, optimum):
    w = nn.Parameter(torch.tensor([2.0, 1.0])); opt = AdaBelief([w], lr=0.02, eps=1e-8, rectify=False)
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda k: max(1 - k / 2500, 0.01))
    for _ in range(2500): opt.zero_grad(); function(w).backward(); opt.step(); schedule.step()
    torch.testing.assert_close(w.detach(), torch.tensor(optimum), rtol=0, atol=0.02)


def test_parameters_keep_counts_of_their_own():
    """A parameter that had no gradient at first is corrected as if it began now."""
    for flags in PATHS.values():
        a, b, alone = (nn.Parameter(torch.ones(4)) for _ in range(3))
        opt, other = AdaBelief([a, b], lr=0.1, rectify=False, **flags), AdaBelief([alone], lr=0.1, rectify=False)
        for step in range(9):
            gradients([a], step)
            if step >= 4: gradients([b], step); gradients([alone], step); other.step()
            opt.step()
        assert opt.state[a]["step"] == 9 and opt.state[b]["step"] == 5
        torch.testing.assert_close(b, alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@every_path
def test_sixteen_bit_weights_have_float32_state_and_are_rounded_once(dtype, path):
    start = torch.randn(base.SMALL, generator=torch.Generator().manual_seed(0)).to(dtype)
    p, exact = nn.Parameter(start.clone()), nn.Parameter(start.float())
    opt, reference = AdaBelief([p], lr=0.01, **PATHS[path]), AdaBelief([exact], lr=0.01)
    gradients([p], 0); p.grad *= 1e-3
    for _ in range(8):
        exact.data.copy_(p); exact.grad = p.grad.float()
        opt.step(); reference.step()
        assert torch.allclose(p.float(), exact.to(dtype).float(), rtol=2**-7, atol=1e-6) and (p != exact.to(dtype)).float().mean() < 1e-3
    assert {opt.state[p][k].dtype for k in ("exp_avg", "exp_avg_var")} == {torch.float32} and p.dtype == dtype
    assert (opt.state[p]["exp_avg_var"] > 0).all(), "an epsilon of 1e-16 is not lost"


@pytest.mark.parametrize("options, error, text", [
    (dict(eps=-1e-8), ValueError, "eps is -1e-08"), (dict(eps=float("nan")), ValueError, "eps is nan"), (dict(eps=None), TypeError, "eps is None"), (dict(rectify=None), TypeError, "rectify is None"),
    (dict(weight_decouple=1), TypeError, "weight_decouple is 1"), (dict(amsgrad="yes"), TypeError, "amsgrad is 'yes'"), (dict(betas=(0.9, 1.0)), ValueError, r"betas\[1\] is 1.0"), (dict(betas=[0.9]), ValueError, "betas is")])
def test_bad_arguments_are_named(options, error, text):
    with pytest.raises(error, match=text): AdaBelief([nn.Parameter(torch.ones(2))], **options)
    opt = AdaBelief([nn.Parameter(torch.ones(2))])
    with pytest.raises(error, match=text): opt.add_param_group({"params": [nn.Parameter(torch.ones(2))], **options})
    assert len(opt.param_groups) == 1


def test_rectify_and_amsgrad_go_together_and_amsgrad_can_begin_later():
    p = nn.Parameter(torch.ones(3)); opt = AdaBelief([p], rectify=True, amsgrad=False)
    for step in range(8):
        if step == 4: opt.param_groups[0]["amsgrad"] = True
        gradients([p], step); opt.step()
    assert (opt.state[p]["max_exp_avg_var"] >= opt.state[p]["exp_avg_var"]).all()


def test_counts_and_choices():
    counters = [moments.counter(torch.ones(1)) for _ in range(2)]
    assert moments.advance(counters[:1]) == [(1.0, [0])] and moments.advance(counters) == [(2.0, [0]), (1.0, [1])]
    assert moments.choose(True, 1.0, 2.0) == 1.0 and moments.choose(torch.tensor(False), 1.0, torch.tensor(2.0)).item() == 2.0
    assert moments.wide(torch.bfloat16) == moments.wide(torch.float16) == moments.wide(torch.float32) == torch.float32 and moments.wide(torch.float64) == torch.float64
