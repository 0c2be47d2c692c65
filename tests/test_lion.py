"""Lion against independent implementations; what users expect of any torch optimizer is asked in test_optimizers.py."""
import warnings

import lion_pytorch
import numpy as np
import pytest
import pytorch_optimizer
import torch
from torch import nn

from efftrain.optim import base
from efftrain.optim.lion import Lion

PATHS = {"single": dict(foreach=False), "foreach": dict(foreach=True), "fused": dict(fused=True)}
every_path = pytest.mark.parametrize("path", PATHS)


def gradients(params, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in params: p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)


def numpy_lion(w, grads, lr, beta1, beta2, decay):
    m = np.zeros_like(w)
    for g in grads:
        w = w * (1 - lr * decay) - lr * np.sign(beta1 * m + (1 - beta1) * g)
        m = beta2 * m + (1 - beta2) * g
    return w


# the rule

@pytest.mark.parametrize("peer", [lion_pytorch.Lion, pytorch_optimizer.Lion], ids=["lion_pytorch", "pytorch_optimizer"])
@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_equals_the_peers_over_200_steps(peer, decay):
    options = dict(lr=1e-3, betas=(0.9, 0.99), weight_decay=decay)
    torch.manual_seed(0)
    start = [torch.randn(s) for s in ((13, 7), (29,), ())]
    ours, theirs = ([nn.Parameter(s.clone()) for s in start] for _ in range(2))
    a, b = Lion(ours, **options), peer(theirs, **options)
    for step in range(200):
        gradients(ours, step); gradients(theirs, step)
        a.step(); b.step()
        for p, q in zip(ours, theirs): torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


@every_path
def test_equals_numpy_in_float64(path):
    w = torch.randn(base.SMALL + 17, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    p, grads = nn.Parameter(w.clone()), []
    opt = Lion([p], lr=1e-2, betas=(0.8, 0.95), weight_decay=0.7, **PATHS[path])
    for step in range(12):
        gradients([p], step); grads.append(p.grad.numpy()); opt.step()
    np.testing.assert_allclose(p.detach().numpy(), numpy_lion(w.numpy(), grads, 1e-2, 0.8, 0.95, 0.7), rtol=0, atol=1e-12)


@pytest.mark.parametrize("k", [-8, -3, 4, 9])
def test_scale_of_the_gradients_does_not_matter(k):
    a, b = (nn.Parameter(torch.ones(50)) for _ in range(2))
    one, other = Lion([a], lr=1e-2, weight_decay=0.1), Lion([b], lr=1e-2, weight_decay=0.1)
    for step in range(60):
        gradients([a], step); b.grad = a.grad * 10.0**k
        one.step(); other.step()
    torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@every_path
def test_without_momentum_it_is_signsgd(path):
    p = nn.Parameter(torch.zeros(base.SMALL)); q = torch.zeros(base.SMALL)
    opt = Lion([p], lr=0.5, betas=(0, 0), **PATHS[path])
    for step, size in enumerate([1e10, 1e-10, 1.0]):
        gradients([p], step); p.grad *= size; p.grad[:7] = 0
        q -= 0.5 * p.grad.sign()
        opt.step()
    assert torch.equal(p, q) and (p[:7] == 0).all()


def test_a_convex_quadratic_converges_when_the_rate_falls():
    torch.manual_seed(0)
    root = torch.randn(12, 8); target = torch.randn(8)
    w = nn.Parameter(torch.zeros(8)); opt = Lion([w], lr=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda k: max(1 - k / 1000, 0))
    for _ in range(1000):
        opt.zero_grad(); (root @ (w - target)).square().sum().backward(); opt.step(); schedule.step()
    torch.testing.assert_close(w.detach(), target, rtol=0, atol=1e-3)


def test_every_weight_moves_by_the_learning_rate_and_decay_comes_first():
    p = nn.Parameter(torch.tensor([2.0, 2.0, 2.0])); p.grad = torch.tensor([1e-20, -1e20, 0])
    Lion([p], lr=0.1, weight_decay=1.0).step()
    torch.testing.assert_close(p.detach(), torch.tensor([1.7, 1.9, 1.8]))


# three paths

SHAPES = [(300, 400), (70_000,), (8, 64, 16, 16), (5, 3), (), (0, 4), (1,)]


def parameters(dtype):
    generator = torch.Generator().manual_seed(3)
    out = [torch.randn(s, generator=generator).to(dtype) for s in SHAPES]
    out[2] = out[2].contiguous(memory_format=torch.channels_last)
    out.append(torch.randn(500, 200, generator=generator).to(dtype).t())
    return [nn.Parameter(p) for p in out]


@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-6), (torch.float64, 1e-12), (torch.bfloat16, 0.02)], ids=["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("options", [{}, dict(weight_decay=0.3, maximize=True, state_dtype=torch.bfloat16), dict(lr=torch.tensor(1e-3), state_dtype=torch.float32)], ids=["plain", "maximize", "tensor"])
def test_paths_agree(dtype, atol, options):
    runs = {}
    for path, flags in PATHS.items():
        params = parameters(dtype)
        opt = Lion(params, **{"lr": 1e-3, **options, **flags})
        for step in range(10):
            gradients(params, step)
            with warnings.catch_warnings():
                warnings.simplefilter("error", RuntimeWarning)  # a fall-back would be a warning
                opt.step()
        assert all(p.dtype == dtype and opt.state[p]["exp_avg"].dtype == options.get("state_dtype", dtype) for p in params)
        assert params[2].is_contiguous(memory_format=torch.channels_last)
        runs[path] = params
    for a, b, c in zip(*runs.values()):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c, rtol=0, atol=atol)


def test_one_compilation_serves_schedules_groups_and_shapes():
    from torch._dynamo.utils import counters
    params = parameters(torch.float32)
    opt = Lion([{"params": params[:1]}, {"params": params[1:2], "lr": 0.3, "betas": (0.5, 0.6), "weight_decay": 2.0}, {"params": params[2:], "maximize": True}], lr=0.1, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 8)
    torch.compiler.reset(); counters.clear()
    for step in range(8):
        gradients(params, step); opt.step(); schedule.step()
    assert counters["stats"]["unique_graphs"] == 1
    opt.param_groups[0]["lr"] = torch.tensor(0.02)
    gradients(params, 9); opt.step()
    assert counters["stats"]["unique_graphs"] == 1


def test_without_a_compiler_it_warns_once_and_steps_all_the_same(monkeypatch, tmp_path):
    from torch._inductor import config
    monkeypatch.setattr(base, "_without_compiler", set())
    base._compiled.cache_clear()
    a, b = (nn.Parameter(torch.ones(base.SMALL)) for _ in range(2))
    a.grad, b.grad = torch.ones_like(a), torch.ones_like(b)
    one, fused = Lion([a], lr=0.1), Lion([b], lr=0.1, fused=True)
    with config.patch({"cpp.cxx": (str(tmp_path / "no-compiler"),), "force_disable_caches": True}):
        one.step()
        with pytest.warns(RuntimeWarning, match="falls back to foreach.*compiler"): fused.step()
        assert torch.equal(a, b)
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            one.step(); fused.step()
        assert torch.equal(a, b)
    base._compiled.cache_clear()


@pytest.mark.parametrize("options, error, text", [
    (dict(lr=0.0), ValueError, "lr is 0.0"), (dict(lr=-1), ValueError, "lr is -1"), (dict(lr=float("inf")), ValueError, "lr is inf"), (dict(lr="1"), TypeError, "lr is '1'"),
    (dict(lr=torch.ones(2)), ValueError, "lr is a tensor"), (dict(betas=(0.9, 1.0)), ValueError, r"betas\[1\] is 1.0"), (dict(betas=(-0.1, 0.9)), ValueError, r"betas\[0\] is -0.1"),
    (dict(betas=0.9), ValueError, "betas is 0.9"), (dict(weight_decay=-1e-9), ValueError, "weight_decay is -1e-09"), (dict(foreach=True, fused=True), ValueError, "foreach and fused"),
    (dict(fused="yes"), TypeError, "fused is 'yes'"), (dict(maximize=None), TypeError, "maximize is None"), (dict(state_dtype=torch.int8), ValueError, "state_dtype is torch.int8")])
def test_bad_arguments_are_named(options, error, text):
    with pytest.raises(error, match=text): Lion([nn.Parameter(torch.ones(2))], **options)
    opt = Lion([nn.Parameter(torch.ones(2))])
    with pytest.raises(error, match=text): opt.add_param_group({"params": [nn.Parameter(torch.ones(2))], **options})
    assert len(opt.param_groups) == 1


def test_fused_on_an_unsupported_device_is_refused():
    p = nn.Parameter(torch.ones(2, device="meta"))
    with pytest.raises(RuntimeError, match="'meta'"): Lion([p], fused=True)


def test_a_loaded_state_is_not_shared_and_older_checkpoints_load():
    p = nn.Parameter(torch.ones(3)); p.grad = torch.ones(3); one = Lion([p]); one.step()
    saved = one.state_dict(); saved["param_groups"][0].pop("state_dtype")
    other = Lion([p]); other.load_state_dict(saved)
    assert other.state[p]["exp_avg"].data_ptr() != one.state[p]["exp_avg"].data_ptr() and other.param_groups[0]["state_dtype"] is None
    other.step()
