"""LAMB and LARS against independent implementations and their defining properties; what users expect of any torch optimizer is asked in test_optimizers.py."""
import math
import warnings

import numpy as np
import pytest
import pytorch_optimizer
import torch
import torch_optimizer
from torch import nn

from efftrain.optim import base, lamb, lars
from efftrain.optim.lamb import Lamb, scale_for_batch, trust_ratio, warmup_for_batch, whole_norms
from efftrain.optim.lars import Lars

PATHS = {"single": dict(foreach=False), "foreach": dict(foreach=True), "fused": dict(fused=True)}
every_path = pytest.mark.parametrize("path", PATHS)


def gradients(params, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in params: p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)


def pair(*shapes, dtype=torch.float32):
    torch.manual_seed(0)
    start = [torch.randn(s, dtype=dtype) for s in shapes]
    return tuple([nn.Parameter(s.clone()) for s in start] for _ in range(2))


def run(ours, theirs, a, b, steps=100, atol=2e-6):
    for step in range(steps):
        for params in (a, b): gradients(params, step)
        ours.step(); theirs.step()
        for p, q in zip(a, b): torch.testing.assert_close(p, q, rtol=1e-6, atol=atol)


# against other packages

@pytest.mark.parametrize("decay", [0.0, 0.2])
@pytest.mark.parametrize("lr", [1e-3, 0.05])
@pytest.mark.parametrize("peer", [torch_optimizer.Lamb, lambda p, **options: pytorch_optimizer.Lamb(p, weight_decouple=False, adam_debias=True, **options)], ids=["torch_optimizer", "pytorch_optimizer"])
def test_lamb_equals_the_peers_without_bias_correction(peer, lr, decay):
    a, b = pair((13, 7), (29,), (60, 40))  # the last norm is above the peers' bound of 10
    options = dict(lr=lr, betas=(0.9, 0.99), weight_decay=decay)
    run(Lamb(a, **options, bias_correction=False, phi=(0, 10), always_adapt=True), peer(b, **options), a, b)
    assert b[2].norm() > 10


def test_lamb_without_adaptation_is_adamw():
    """With a decay of zero also without saying so: such groups are not adapted."""
    a, b = pair((13, 7), (29,), dtype=torch.float64)
    run(Lamb(a, lr=1e-2, eps=1e-6, weight_decay=0.3, adapt=False), torch.optim.AdamW(b, lr=1e-2, eps=1e-6, weight_decay=0.3), a, b, atol=1e-11)
    a, b = pair((13, 7), (29,), dtype=torch.float64)
    run(Lamb(a, lr=1e-2, weight_decay=0.0), torch.optim.Adam(b, lr=1e-2, eps=1e-6), a, b, atol=1e-11)


def test_nesterov_without_adaptation_is_nadam_with_a_constant_momentum():
    """Written out, for torch's NAdam cannot hold its momentum: its schedule starts at β1 / 2."""
    p, = pair((40,), dtype=torch.float64)[0]
    w = p.detach().numpy().copy()
    for kind, ahead in (("first", 0), ("both", 1)):
        p.data.copy_(torch.from_numpy(w)); x, m, v = w.copy(), np.zeros(40), np.zeros(40)
        opt = Lamb([p], lr=0.02, eps=1e-8, weight_decay=0.0, nesterov=kind)
        for t in range(1, 31):
            gradients([p], t); opt.step(); g = p.grad.numpy()
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            top = 0.9 * m / (1 - 0.9 ** (t + 1)) + 0.1 * g / (1 - 0.9**t)
            below = 0.999 * v / (1 - 0.999 ** (t + ahead)) + ahead * 0.001 * g * g / (1 - 0.999**t)
            x = x - 0.02 * top / (np.sqrt(below) + 1e-8)
        np.testing.assert_allclose(p.detach().numpy(), x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("peer", [torch_optimizer.LARS, pytorch_optimizer.LARS], ids=["torch_optimizer", "pytorch_optimizer"])
def test_lars_with_local_rates_equals_the_peers(peer, nesterov):
    a, b = pair((13, 7), (29, 3), (2, 3, 4, 5))
    options = dict(lr=3.0, momentum=0.9, weight_decay=0.02, trust_coefficient=0.01, nesterov=nesterov)
    run(Lars(a, form="local_rate", **options), peer(b, **options), a, b)


def test_lars_without_adaptation_is_sgd():
    a, b = pair((13, 7), (29,), dtype=torch.float64)
    run(Lars(a, lr=0.1, momentum=0.9, weight_decay=0.05, form="local_rate", nesterov=True, adapt=False), torch.optim.SGD(b, lr=0.1, momentum=0.9, weight_decay=0.05, nesterov=True), a, b, atol=1e-11)
    a, b = pair((13, 7), (29,), dtype=torch.float64)  # the form of 2020 averages gradients: a tenth of torch's sum
    run(Lars(a, lr=0.1, momentum=0.9, weight_decay=0.05, adapt=False), torch.optim.SGD(b, lr=0.01, momentum=0.9, weight_decay=0.05), a, b, atol=1e-11)


# against NumPy in float64

def norms(w, u, norm, phi):
    size = np.linalg.norm(w.ravel(), norm)
    size, length = np.clip(size, *phi) if phi else size, np.linalg.norm(u.ravel(), norm)
    return size / length if size and length else 1.0


@every_path
@pytest.mark.parametrize("norm", [1, 2, math.inf])
@pytest.mark.parametrize("options", [{}, dict(bias_correction=False, phi=(0.5, 3.0)), dict(nesterov="first"), dict(nesterov="both", maximize=True)], ids=["plain", "uncorrected", "N-LAMB", "NN-LAMB"])
def test_lamb_equals_numpy(path, norm, options):
    (p,), _ = pair((base.SMALL + 17,), dtype=torch.float64)
    w, m, v = p.detach().numpy().copy(), 0.0, 0.0
    opt = Lamb([p], lr=1e-2, betas=(0.8, 0.95), weight_decay=0.3, norm=norm, **options, **PATHS[path])
    correct, nesterov = options.get("bias_correction", True), options.get("nesterov")
    for t in range(1, 9):
        gradients([p], t); opt.step()
        g = p.grad.numpy() * (-1 if options.get("maximize") else 1)
        m, v = 0.8 * m + 0.2 * g, 0.95 * v + 0.05 * g * g
        of = lambda beta, k: 1 - beta**k if correct else 1.0
        top, below = m / of(0.8, t), v / of(0.95, t)
        if nesterov: top, below = 0.8 * m / of(0.8, t + 1) + 0.2 * g / of(0.8, t), 0.95 * below
        if nesterov == "both": below = 0.95 * v / of(0.95, t + 1) + 0.05 * g * g / of(0.95, t)
        u = top / (np.sqrt(below) + 1e-6) + 0.3 * w
        ratio = norms(w, u, norm, options.get("phi"))
        w = w - 1e-2 * ratio * u
        assert opt.trust_ratios()["0.0"] == pytest.approx(ratio, rel=1e-6)
    np.testing.assert_allclose(p.detach().numpy(), w, rtol=0, atol=1e-11)


@every_path
@pytest.mark.parametrize("norm", [1, 2, math.inf])
@pytest.mark.parametrize("form", ["unit_momentum", "local_rate"])
def test_lars_equals_numpy(path, norm, form):
    (p,), _ = pair((base.SMALL + 17,), dtype=torch.float64)
    w, b = p.detach().numpy().copy(), 0.0
    opt = Lars([p], lr=0.05, momentum=0.7, weight_decay=0.2, norm=norm, phi=(0.1, 2.0), form=form, trust_coefficient=0.3, nesterov=form == "local_rate", **PATHS[path])
    for t in range(8):
        gradients([p], t); opt.step(); g = p.grad.numpy()
        if form == "unit_momentum":
            b = 0.7 * b + 0.3 * (g + 0.2 * w); w = w - 0.05 * norms(w, b, norm, (0.1, 2.0)) * b
        else:
            size = np.linalg.norm(w, norm)
            change = 0.3 * np.clip(size, 0.1, 2.0) / (np.linalg.norm(g, norm) + 0.2 * size + 1e-8) * (g + 0.2 * w)
            b = 0.7 * b + change; w = w - 0.05 * (change + 0.7 * b)
    np.testing.assert_allclose(p.detach().numpy(), w, rtol=0, atol=1e-11)


# what defines the methods

@every_path
@pytest.mark.parametrize("make", [lambda p, **f: Lamb(p, lr=0.05, weight_decay=0.0, always_adapt=True, **f), lambda p, **f: Lars(p, lr=0.05, weight_decay=0.0, always_adapt=True, **f)], ids=["lamb", "lars"])
def test_every_step_has_the_relative_length_of_the_rate(make, path):
    a, _ = pair((300, 250), (40,), (2, 3, 4))
    opt = make(a, **PATHS[path])
    for step in range(6):
        before = [p.detach().clone() for p in a]
        gradients(a, step); opt.step()
        for p, q in zip(a, before): assert ((p - q).norm() / q.norm()).item() == pytest.approx(0.05, rel=1e-4)


@pytest.mark.parametrize("c", [1e-3, 30.0])
@pytest.mark.parametrize("make", [lambda p: Lamb(p, lr=0.05, weight_decay=0.0, always_adapt=True, eps=1e-12), lambda p: Lars(p, lr=0.05, weight_decay=0.0, always_adapt=True), lambda p: Lars(p, lr=0.5, weight_decay=0.0, always_adapt=True, form="local_rate", eps=0.0)], ids=["lamb", "unit", "local"])
def test_scales_of_weights_and_gradients(make, c):
    a, b = pair((13, 7), (29,), dtype=torch.float64)
    with torch.no_grad(): torch._foreach_mul_(b, c)
    one, other = make(a), make(b)
    for step in range(20):
        for params in (a, b): gradients(params, step)
        one.step(); other.step()
    for p, q in zip(a, b): torch.testing.assert_close(c * p, q, rtol=1e-6, atol=1e-9)
    a, b = pair((13, 7), (29,), dtype=torch.float64)
    one, other = make(a), make(b)
    for step in range(20):
        for params in (a, b): gradients(params, step)
        torch._foreach_mul_([p.grad for p in b], c)
        one.step(); other.step()
    for p, q in zip(a, b): torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


@every_path
def test_the_ratio_is_one_where_a_norm_is_zero(path):
    """Zero weights move by Adam's step, zero gradients without decay move nothing; bounds of φ apply before."""
    zero, still, bounded = (nn.Parameter(torch.full((base.SMALL,), x)) for x in (0.0, 2.0, 0.0))
    opt = Lamb([dict(params=[("zero", zero), ("still", still)]), dict(params=[("bounded", bounded)], phi=(0.5, 10.0))], lr=0.1, weight_decay=0.0, always_adapt=True, **PATHS[path])
    for p in (zero, bounded): p.grad = torch.ones_like(p)
    still.grad = torch.zeros_like(still)
    opt.step()
    torch.testing.assert_close(zero.detach(), torch.full((base.SMALL,), -0.1), rtol=1e-5, atol=0)
    assert (still == 2).all() and opt.trust_ratios() == {"zero": 1.0, "still": 1.0, "bounded": pytest.approx(0.5 / math.sqrt(base.SMALL), rel=1e-5)}
    torch.testing.assert_close(bounded.detach().norm(), torch.tensor(0.05), rtol=1e-5, atol=0)
    assert trust_ratio(torch.tensor([0.0, 3.0, 3.0]), torch.tensor([2.0, 0.0, 2.0])).tolist() == [1, 1, 1.5]


@every_path
@pytest.mark.parametrize("cls", [Lamb, Lars])
def test_global_clipping_is_that_of_torch_and_leaves_gradients_alone(cls, path):
    a, b = pair((300, 250), (29,))
    groups = lambda params: [dict(params=params[:1]), dict(params=params[1:], lr=0.01)]
    ours, theirs = (cls(groups(params), lr=0.02, weight_decay=0.1, clip_global_norm=clip, **PATHS[path]) for params, clip in ((a, 3.0), (b, None)))
    for step in range(5):
        for params in (a, b): gradients(params, step)
        if step == 2:
            for p in (*a, *b): p.grad *= 1e-4  # below the bound: untouched
        kept = a[0].grad.clone()
        nn.utils.clip_grad_norm_(b, 3.0)
        ours.step(); theirs.step()
        assert torch.equal(kept, a[0].grad)
        for p, q in zip(a, b): torch.testing.assert_close(p, q, rtol=0, atol=1e-5)


def test_counts_are_those_of_each_parameter():
    """A layer that joins later starts with its own bias correction."""
    a, b = pair((5, 4), (7,))
    together, apart = Lamb(a, lr=0.1, weight_decay=0.1, foreach=True), [Lamb([p], lr=0.1, weight_decay=0.1) for p in b]
    for step in range(8):
        gradients(a, step); gradients(b, step)
        if step < 3: a[1].grad = None
        together.step(); apart[0].step()
        if step >= 3: apart[1].step()
    for p, q in zip(a, b): torch.testing.assert_close(p, q, rtol=0, atol=1e-6)
    assert together.state[a[1]]["step"] == 5 and together.state[a[0]]["step"] == 8


def test_low_precision_weights_with_wide_state():
    p = nn.Parameter(torch.randn(base.SMALL, generator=torch.Generator().manual_seed(1)).bfloat16())
    for path in PATHS:
        opt = Lamb([p], lr=0.1, state_dtype=torch.float32, **PATHS[path])
        gradients([p], 0); opt.step()
        assert {k: v.dtype for k, v in opt.state[p].items()} == {"exp_avg": torch.float32, "exp_avg_sq": torch.float32, "step": torch.float32, "trust_ratio": torch.float32} and p.dtype == torch.bfloat16


# norms

@pytest.mark.parametrize("norm", [1, 2, math.inf])
def test_norms_of_large_strided_and_empty_tensors(norm):
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(2**21, generator=generator), torch.randn(700, 1100, generator=generator).t(), torch.randn(8, 64, 40, 40, generator=generator).contiguous(memory_format=torch.channels_last), torch.tensor(-3.0), torch.zeros(0, 4)]
    expected = [np.linalg.norm(t.double().numpy().ravel(), norm) if t.numel() else 0.0 for t in tensors]
    np.testing.assert_allclose(whole_norms(tensors, norm=norm).numpy(), expected, rtol=1e-6)
    assert whole_norms([]).shape == (0,)


def _worker(rank, world, store):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("a", "b"))
    generator = torch.Generator().manual_seed(0)
    full = [torch.randn(s, generator=generator) for s in ((5, 3), (1, 4), (6,), (400, 330))]  # uneven shards, empty ones, and one that only some would run as a kernel
    full_grads = [torch.randn(t.shape, generator=generator) for t in full]
    for placements in ((Shard(0), Replicate()), (Shard(0), Shard(0)), (Replicate(), Shard(0))):
        sharded = [distribute_tensor(t, mesh, placements) for t in full]
        for norm in (1, 2, math.inf): torch.testing.assert_close(whole_norms(sharded, norm=norm), whole_norms(full, norm=norm), rtol=1e-5, atol=0)
        for make in (lambda p, **f: Lamb(p, lr=0.1, clip_global_norm=1.0, **f), lambda p, **f: Lars(p, lr=0.1, norm=math.inf, **f), lambda p, **f: Lars(p, lr=3.0, form="local_rate", clip_global_norm=1.0, **f)):
            plain = [nn.Parameter(t.clone()) for t in full]; reference = make(plain)
            for flags in (dict(foreach=False), dict(foreach=True), dict(fused=True)):
                for p, t in zip(plain, full): p.data.copy_(t)
                reference, mine = make(plain), [nn.Parameter(distribute_tensor(t, mesh, placements)) for t in full]
                opt = make(mine, **flags)
                for step in range(2):
                    for p, q, g in zip(plain, mine, full_grads): p.grad, q.grad = g * (step + 1), distribute_tensor(g * (step + 1), mesh, placements)
                    reference.step(); opt.step()
                for p, q in zip(plain, mine): torch.testing.assert_close(p.detach(), q.full_tensor().detach(), rtol=0, atol=1e-6)
                for x, y in zip(reference.trust_ratios().values(), opt.trust_ratios().values()): assert x == pytest.approx(y, rel=1e-5)
    dist.destroy_process_group()


def test_norms_and_steps_of_tensors_sharded_over_processes(tmp_path):
    torch.multiprocessing.spawn(_worker, (2, str(tmp_path / "store")), nprocs=2)


# arguments and rules

@pytest.mark.parametrize("cls, options, text", [
    *[(cls, options, text) for cls in (Lamb, Lars) for options, text in [(dict(norm=3), "norm is 3"), (dict(norm="2"), "norm is '2'"), (dict(phi=(-1.0, 2.0)), r"phi\[0\] is -1.0"), (dict(phi=(2.0, 1.0)), r"phi is \(2.0, 1.0\)"), (dict(phi=5), "phi is 5"),
                                                         (dict(phi=(0, float("nan"))), r"phi\[1\] is nan"), (dict(clip_global_norm=0.0), "clip_global_norm is 0.0"), (dict(adapt=None), "adapt is None"), (dict(always_adapt=1), "always_adapt is 1"),
                                                         (dict(state_dtype=torch.int8), "state_dtype is torch.int8"), (dict(weight_decay=-1), "weight_decay is -1")]],
    (Lamb, dict(nesterov=True), "nesterov is True"), (Lamb, dict(eps=-1), "eps is -1"), (Lamb, dict(betas=(0.9, 1)), r"betas\[1\] is 1"), (Lamb, dict(bias_correction=0), "bias_correction is 0"),
    (Lars, dict(form="2017"), "form is '2017'"), (Lars, dict(momentum=1.0), "momentum is 1.0"), (Lars, dict(trust_coefficient=0), "trust_coefficient is 0"), (Lars, dict(nesterov=True), "nesterov is True"),
    (Lars, dict(nesterov=True, momentum=0.0, form="local_rate"), "nesterov is True")])
def test_bad_arguments_are_named(cls, options, text):
    with pytest.raises((ValueError, TypeError), match=text): cls([nn.Parameter(torch.ones(2))], **options)
    opt = cls([nn.Parameter(torch.ones(2))])
    with pytest.raises((ValueError, TypeError), match=text): opt.add_param_group({"params": [nn.Parameter(torch.ones(2))], **options})
    with pytest.raises(ValueError, match="params is empty"): opt.add_param_group({"params": []})
    assert len(opt.param_groups) == 1


def test_without_a_compiler_it_warns_and_steps_all_the_same(monkeypatch, tmp_path):
    from torch._inductor import config
    for cls in (Lamb, Lars):
        monkeypatch.setattr(base, "_without_compiler", set()); base._compiled.cache_clear()
        a, b = (nn.Parameter(torch.linspace(1, 2, base.SMALL)) for _ in range(2))
        a.grad, b.grad = torch.ones_like(a), torch.ones_like(b)
        one, fused = cls([a], lr=0.1), cls([b], lr=0.1, fused=True)
        with config.patch({"cpp.cxx": (str(tmp_path / "no-compiler"),), "force_disable_caches": True}):
            one.step()
            with pytest.warns(RuntimeWarning, match="falls back to foreach.*compiler"): fused.step()
            with warnings.catch_warnings():
                warnings.simplefilter("error", RuntimeWarning)
                one.step(); fused.step()
        assert torch.equal(a, b)
    base._compiled.cache_clear()


def test_rules_for_the_batch():
    rates = [scale_for_batch(5 / (2**3 * 1e3), 512, 512 * 2**k) for k in range(7)]
    assert rates == pytest.approx([5 / (2 ** (3 - k / 2) * 1e3) for k in range(7)]) and warmup_for_batch(1 / 320, 512, 32_768) == pytest.approx(1 / 5)
    assert scale_for_batch(0.1, 32, 256, rule="linear") == pytest.approx(0.8) and warmup_for_batch(0.1, 32, 1024) == 0.5
    for call, text in ((lambda: scale_for_batch(0.1, 0, 8), "base_batch is 0"), (lambda: scale_for_batch(0.1, 8, -8), "batch is -8"), (lambda: scale_for_batch(0.1, 8, 8, rule="log"), "rule is 'log'"), (lambda: warmup_for_batch(2, 8, 8), "warmup is 2")):
        with pytest.raises(ValueError, match=text): call()


@pytest.mark.parametrize("nesterov", [None, "first", "both"])
def test_tensors_too_long_for_the_cache(nesterov, monkeypatch):
    """A second computation of the update gives the step that a stored update gives."""
    monkeypatch.setattr("efftrain.optim.lamb._LONG", base.SMALL)
    called = []
    measuring = lamb.run_measuring
    monkeypatch.setattr(lamb, "run_measuring", lambda kernel, *rest: called.append(kernel.__name__) or measuring(kernel, *rest))
    a, b = pair((base.SMALL + 5,), (3, 4))
    long, plain = (Lamb(params, lr=0.05, weight_decay=0.1, nesterov=nesterov, clip_global_norm=1.0, **flag) for params, flag in ((a, dict(fused=True)), (b, dict(foreach=False))))
    for step in range(6):
        gradients(a, step); gradients(b, step)
        long.step(); plain.step()
    for p, q in zip(a, b): torch.testing.assert_close(p, q, rtol=0, atol=1e-6)
    assert called.count("_moving_kernel" if nesterov else "_moving_kernel_without_gradient") == 6 == called.count("_sums_kernel")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(3,), (512,), (70_001,), (300, 400), (4, 16, 32, 33)])
def test_norm_by_rows(shape, dtype):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    for y in (x, x.transpose(0, -1), x.to(memory_format=torch.channels_last) if x.ndim == 4 else x[..., ::2]):
        assert lars._norm_by_rows(y) == pytest.approx(y.double().norm().item(), rel=5e-7)
    constant = torch.full((2**20 + 7,), 1e-3)
    assert lars._norm_by_rows(constant) == pytest.approx(constant.double().norm().item(), rel=5e-7)
    assert math.isnan(lars._norm_by_rows(torch.full(shape, float("nan"), dtype=dtype)))
