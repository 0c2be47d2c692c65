"""Zeroth-order fine-tuning against NumPy, torch's own optimizers, forward-mode differentiation and closed forms."""
import copy
import math
import pickle
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from efftrain.optim import zo_random
from efftrain.optim.zo import METHODS, ZOLog, ZOOptimizer, replay, rge
from efftrain.optim.zo_enhance import forward_memory, label_word_logits, magnitude_mask, magnitude_sparsity, parameter_blocks, prompts, wanda_mask
from efftrain.optim.zo_random import add_normal_, combine, keep, normal


def model(seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


X, Y = torch.randn(30, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)), torch.randn(30, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def loss(m): return F.mse_loss(m(X.to(m[0].weight.dtype)), Y.to(m[0].weight.dtype))


def flat(m): return torch.cat([p.detach().flatten() for p in m.parameters()])


def put(m, theta):
    at = 0
    with torch.no_grad():
        for p in m.parameters(): p.copy_(torch.as_tensor(theta[at:at + p.numel()]).view(p.shape)); at += p.numel()


# directions

def test_positions_have_their_numbers_in_any_order_and_on_any_path():
    whole = normal(40_000, 7, 2)
    for start, count in ((0, 3), (1, 2), (16_383, 16_390), (39_999, 1), (5, 0)): assert torch.equal(whole[start:start + count], normal(count, 7, 2, start))
    keys = (123, -456)
    for inside, count in ((0, 1000), (2**30 - 501, 500), (3, 1)):
        torch.testing.assert_close(torch.from_numpy(zo_random._normal_numpy(inside, count, keys)), zo_random._normal_torch(inside, count, keys, torch.device("cpu")), rtol=0, atol=3e-6)
    assert not torch.equal(normal(100, 7), normal(100, 8)) and not torch.equal(normal(100, 7, 0), normal(100, 7, 1))


def test_the_window_border_is_crossed_alike():
    start = 2**30 - 1000
    a = normal(3000, 5, 0, start)
    b = torch.cat([normal(1000, 5, 0, start), normal(2000, 5, 0, 2**30)])
    assert torch.equal(a, b) and not torch.equal(b[1000:], normal(2000, 5, 0, 0))
    torch.testing.assert_close(add_normal_(torch.zeros(5000), 1.0, 5, start=start, fused=True)[:3000], a, rtol=0, atol=3e-6)


def test_numbers_are_normal_and_independent():
    from scipy.stats import chi2, kstest
    z = normal(400_000, 2024).double().numpy()
    assert kstest(z, "norm").pvalue > 1e-4
    pairs = np.histogram2d(*(zo_random_uniform(z[i::2]) for i in (0, 1)), bins=16, range=[[0, 1], [0, 1]])[0]  # cosine and sine of the same radius
    assert chi2.sf(((pairs - len(z) / 512) ** 2 / (len(z) / 512)).sum(), 255) > 1e-4
    block = normal(256 * 256, 3).view(256, 256).double()
    spectrum = torch.linalg.svdvals(block).square() / 256
    assert 3.5 < spectrum.max() < 4.3  # Marchenko-Pastur ends at 4


def zo_random_uniform(z):
    from scipy.stats import norm
    return norm.cdf(z)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", [{}, dict(sparsity=0.7, mask_seed=3), dict(start=11)], ids=["dense", "sparse", "shifted"])
def test_compiled_and_plain_additions_agree(dtype, options):
    start = torch.linspace(-1, 1, 9000).to(dtype)
    plain, kernel = (add_normal_(start.clone(), 0.1, 9, 4, fused=f, **options) for f in (False, True))
    torch.testing.assert_close(plain, kernel, rtol=0, atol={torch.float32: 1e-6, torch.float64: 1e-6}.get(dtype, 0.01))
    expected = start.double() + 0.1 * normal(9000, 9, 4, options.get("start", 0)).double() * (keep(9000, 0.7, combine(3), 4).double() if "sparsity" in options else 1)
    torch.testing.assert_close(plain.double(), expected, rtol=0, atol=1e-6 if dtype in (torch.float32, torch.float64) else 5e-3)


def test_layouts_masks_and_what_is_refused():
    for x in (torch.zeros(6, 4, 3, 3).contiguous(memory_format=torch.channels_last), torch.zeros(70, 80).t(), torch.zeros(()), torch.zeros(0, 3)):
        strides = x.stride(); add_normal_(x, 1.0, 1)
        assert x.stride() == strides and (x.numel() == 0 or (x != 0).all())
    mask = torch.arange(6000) % 3 == 0
    for fused in (False, True): assert torch.equal(add_normal_(torch.zeros(6000), 1.0, 1, mask=mask, fused=fused) != 0, mask)
    with pytest.raises(ValueError, match="gaps"): add_normal_(torch.zeros(10, 4)[:, :2], 1.0, 1)
    with pytest.raises(ValueError, match="sparsity is 1.0"): add_normal_(torch.zeros(4), 1.0, 1, sparsity=1.0)
    with pytest.raises(ValueError, match="mask is torch.float32"): add_normal_(torch.zeros(4), 1.0, 1, mask=torch.zeros(4))
    with pytest.raises(ValueError, match="int64"): add_normal_(torch.zeros(4, dtype=torch.int64), 1.0, 1)
    with pytest.raises(ValueError, match="count is -1"): normal(-1, 0)


# the estimator

@pytest.mark.parametrize("two_sided", [True, False])
def test_estimates_average_to_the_gradient_of_the_smoothed_function(two_sided):
    """E cos(a(x + eps z)) = exp(-(a eps)^2 / 2) cos(a x)."""
    x, a, eps = torch.linspace(-1, 1, 6, dtype=torch.float64), 1.5, 0.8
    parts = torch.stack([rge(lambda p: (a * p).cos().sum(1), x, eps=eps, queries=2000, two_sided=two_sided, seed=s, batched=True) for s in range(50)])
    expected = -a * math.exp(-(a * eps) ** 2 / 2) * (a * x).sin()
    assert ((parts.mean(0) - expected) / (parts.std(0) / math.sqrt(50))).abs().max() < 4
    assert (parts.mean(0) + a * (a * x).sin()).abs().max() > 0.2  # and not the gradient of the function itself


def test_rge_equals_the_sum_by_hand_batched_or_not():
    x, f = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), lambda p: (p**3).sum() + p[0, 0]
    z = normal(3 * 12, 5).view(3, 4, 3).double()
    hand = sum((f(x + 1e-2 * d) - f(x - 1e-2 * d)) / 2e-2 * d for d in z) / 3
    torch.testing.assert_close(rge(f, x, eps=1e-2, queries=3, seed=5), hand)
    torch.testing.assert_close(rge(lambda p: torch.stack([f(q) for q in p]), x, eps=1e-2, queries=3, seed=5, batched=True, chunk=2), hand)
    one = sum((f(x + 1e-2 * d) - f(x)) / 1e-2 * d for d in z) / 3
    torch.testing.assert_close(rge(f, x, eps=1e-2, queries=3, seed=5, two_sided=False), one)
    gradient = 3 * x**2; gradient[0, 0] += 1
    torch.testing.assert_close(rge(f, x, queries=3, seed=5, forward_grad=True), sum((gradient * d).sum() * d for d in z) / 3)
    for options, text in ((dict(eps=0.0), "eps is 0.0"), (dict(queries=0), "queries is 0")):
        with pytest.raises(ValueError, match=text): rge(f, x, **options)
    with pytest.raises(TypeError, match="int64"): rge(f, torch.ones(3, dtype=torch.int64))


def test_squared_length_and_blocks_have_their_closed_form():
    g = torch.arange(1.0, 9.0, dtype=torch.float64)
    ratio = torch.stack([rge(lambda p: p @ g, torch.zeros(8, dtype=torch.float64), queries=3, seed=s, batched=True).square().sum() for s in range(3000)]) / g.square().sum()
    assert abs(ratio.mean() - (8 + 3 + 1) / 3) < 4 * ratio.std() / math.sqrt(3000)


# the optimizer against NumPy

def numpy_run(method, steps, lr, eps=1e-3, queries=1, two_sided=True, decay=0.0, seed=0, mu=0.9):
    m, theta = model(), flat(model()).numpy()
    sizes = [p.numel() for p in m.parameters()]
    def f(t): put(m, t); return loss(m).item()
    momentum = first = second = np.zeros_like(theta)
    for t in range(steps):
        g = np.zeros_like(theta)
        for k in range(queries):
            z = np.concatenate([normal(n, combine(combine(seed, t), k, 0), i).numpy() for i, n in enumerate(sizes)]).astype(float)
            rho = (f(theta + eps * z) - (f(theta - eps * z) if two_sided else f(theta))) / (2 * eps if two_sided else eps)
            g += (np.sign(rho) if method == "scalar_sign" else rho) * z / queries
        if method == "conservative":
            choices = [theta, theta - lr * g, theta + lr * g]
            theta = choices[int(np.argmin([f(c) for c in choices]))]
            continue
        if method == "sign": g = np.sign(g)
        if method == "momentum": g = momentum = mu * momentum + g
        if method == "adam":
            first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g * g
            g = first / (1 - 0.9 ** (t + 1)) / (np.sqrt(second / (1 - 0.999 ** (t + 1))) + 1e-8)
        theta = theta * (1 - lr * decay) - lr * g
    return theta


@pytest.mark.parametrize("method", [m for m in METHODS if m != "forward_grad"])
@pytest.mark.parametrize("options", [{}, dict(queries=3), dict(two_sided=False, queries=2), dict(decay=0.5)], ids=["plain", "queries", "one-sided", "decay"])
def test_equals_numpy_over_15_steps(method, options):
    if method == "conservative" and "decay" in options: pytest.skip("the reference has no decay")
    m, given = model(), {"weight_decay" if k == "decay" else k: v for k, v in options.items()}
    opt = ZOOptimizer(m.parameters(), 1e-2, method=method, **given)
    for _ in range(15): opt.step(lambda: loss(m))
    np.testing.assert_allclose(flat(m).numpy(), numpy_run(method, 15, 1e-2, **options), rtol=0, atol=1e-7)


@pytest.mark.parametrize("method, make", [("sgd", lambda p: torch.optim.SGD(p, lr=0.02)), ("momentum", lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9)), ("adam", lambda p: torch.optim.Adam(p, lr=0.02))])
def test_equals_torchs_optimizers_fed_with_the_estimate(method, make):
    a, b = model(), model()
    ours, theirs = ZOOptimizer(a.parameters(), 0.02, method=method, seed=4), make(b.parameters())
    for t in range(20):
        ours.step(lambda: loss(a))
        for i, p in enumerate(b.parameters()): p.grad = ours.log.scalars[t][0] * normal(p.numel(), combine(combine(4, t), 0, 0), i).double().view(p.shape)
        theirs.step()
    torch.testing.assert_close(flat(a), flat(b), rtol=0, atol=1e-9)


def test_forward_grad_is_the_exact_directional_derivative():
    m = model(); opt = ZOOptimizer(m.parameters(), 1e-3, method="forward_grad", queries=2, seed=3)
    names, params = zip(*m.named_parameters())
    for k in range(2):
        z = tuple(normal(p.numel(), combine(combine(3, 0), k, 0), i).double().view(p.shape) for i, p in enumerate(params))
        expected = torch.func.jvp(lambda *ps: F.mse_loss(torch.func.functional_call(m, dict(zip(names, ps)), (X,)), Y), tuple(p.detach() for p in params), z)[1]
        before = flat(m).clone()
        if k == 0: fresh = copy.deepcopy(m); probe = ZOOptimizer(fresh.parameters(), 1e-3, method="forward_grad", queries=2, seed=3); probe.step(lambda: loss(fresh))
        assert abs(probe.log.scalars[0][k] - expected.item()) < 1e-12 and torch.equal(flat(m), before)
    with pytest.raises(ValueError, match="differentiably"): opt.step(lambda: loss(m).item())


# properties

VARIANTS = [dict(), dict(method="sign", queries=2), dict(method="adam", lr=1e-3), dict(method="momentum", lr=1e-3, sparsity=0.5, mask_every=3), dict(method="conservative", blocks=2), dict(two_sided=False, weight_decay=0.1, queries=3),
            dict(blocks=4, block_mode="cycle"), dict(blocks=2, block_mode="joint", method="scalar_sign", lr=1e-3), dict(method="forward_grad", queries=2), dict(sparsity=0.9, fused=True)]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_replay_makes_the_same_bits(options, tmp_path):
    m = model(dtype=torch.float32); opt = ZOOptimizer(m.parameters(), **{"lr": 1e-2, "seed": 9, **options})
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 25)
    for _ in range(25): opt.step(lambda: loss(m)); schedule.step()
    opt.log.save(tmp_path / "log.npz"); log = ZOLog.load(tmp_path / "log.npz")
    again, near = model(dtype=torch.float32), model(dtype=torch.float32)
    done = replay(again, log)
    assert torch.equal(flat(again), flat(m)) and not torch.equal(flat(m), flat(model(dtype=torch.float32))) and len(done.log) == 25 and done.evaluations == 0
    replay(near, log, exact=False)
    torch.testing.assert_close(flat(near), flat(m), rtol=0, atol=1e-5)
    assert log.nbytes < 25 * 8 * 16


def test_replay_refuses_what_does_not_fit():
    m = model(); opt = ZOOptimizer(m.parameters(), 1e-2); opt.step(lambda: loss(m))
    with pytest.raises(ValueError, match="2 trainable parameters, the run had 4"): replay(nn.Linear(2, 2), opt.log)
    with pytest.raises(ValueError, match="method is 'sign', was 'sgd'"): replay(ZOOptimizer(model().parameters(), 1e-2, method="sign"), opt.log)
    with pytest.raises(TypeError, match="target is a list"): replay([], opt.log)
    m = model(); opt = ZOOptimizer(m[0].parameters(), 1e-2, hybrid=torch.optim.SGD(m[2].parameters(), lr=0.1)); opt.step(lambda: loss(m))
    with pytest.raises(ValueError, match="hybrid"): replay(m, opt.log)


@pytest.mark.parametrize("options", [o for o in VARIANTS if "fused" not in o], ids=str)
def test_state_dict_deepcopy_and_pickle_go_on_bit_for_bit(options):
    options = {"lr": 1e-2, "seed": 2, **options}
    m = model(dtype=torch.float32); opt = ZOOptimizer(m.parameters(), **options)
    for _ in range(7): opt.step(lambda: loss(m))
    b = copy.deepcopy(m); loaded = ZOOptimizer(b.parameters(), **options); loaded.load_state_dict(copy.deepcopy(opt.state_dict()))
    (c, copied), (d, pickled) = copy.deepcopy((m, opt)), pickle.loads(pickle.dumps((m, opt)))
    for other, o in ((m, opt), (b, loaded), (c, copied), (d, pickled)):
        for _ in range(7): o.step(lambda: loss(other))
    for other in (b, c, d): assert torch.equal(flat(other), flat(m))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("at", [1, 2, 3, 4, 5])
def test_an_exception_or_nan_puts_the_parameters_back(method, at):
    for fault in (KeyboardInterrupt, None):
        m = model(); opt, before, calls = ZOOptimizer(m.parameters(), 0.1, method=method, queries=1), flat(m), []
        def closure():
            calls.append(1)
            if len(calls) < at: return loss(m)
            if fault: raise fault
            return torch.tensor(math.inf)
        if at > {"conservative": 5, "forward_grad": 1}.get(method, 2): continue
        with pytest.raises(fault or (FloatingPointError if method != "forward_grad" else ValueError)): opt.step(closure)
        torch.testing.assert_close(flat(m), before, rtol=0, atol=1e-15)
        assert len(opt.log) == 0 and opt.param_groups[0]["step"] == 0
        opt.step(lambda: loss(m))


def test_both_sides_draw_the_same_dropout():
    m = nn.Sequential(nn.Linear(5, 50), nn.Dropout(0.5), nn.Linear(50, 1)).double()
    opt = ZOOptimizer(m.parameters(), 1e-6, eps=1e-5); torch.manual_seed(0)
    scalars = []
    for _ in range(20): opt.step(lambda: m(X).square().mean()); scalars.append(opt.log.scalars[-1][0])
    assert np.abs(scalars).max() < 100  # unequal masks give differences of order 1 / eps
    after = torch.rand(1)
    torch.manual_seed(0); assert not torch.equal(torch.rand(1), after)  # and the random state moves on


def test_groups_blocks_masks_and_hybrid_move_what_they_should():
    m = model(); opt = ZOOptimizer([dict(params=m[0].parameters(), lr=1e-2), dict(params=m[2].parameters(), lr=torch.tensor(1e-30))], 1.0)
    tail = m[2].weight.detach().clone(); opt.step(lambda: loss(m)); torch.testing.assert_close(m[2].weight.detach(), tail, rtol=0, atol=1e-14); assert not torch.equal(m[0].weight, model()[0].weight)
    m = model(); mask = {p: torch.rand(p.shape, generator=torch.Generator().manual_seed(i)) < 0.5 for i, p in enumerate(m.parameters())}
    opt = ZOOptimizer(m.parameters(), 1e-2, mask=mask, method="adam")
    for _ in range(3): opt.step(lambda: loss(m))
    for p, q in zip(m.parameters(), model().parameters()): assert torch.equal(p[~mask[p]], q[~mask[p]]) and (p[mask[p]] != q[mask[p]]).all()
    m = model(); opt = ZOOptimizer(m.parameters(), 1e-2, blocks=[list(m[0].parameters()), list(m[2].parameters())], block_mode="cycle")
    opt.step(lambda: loss(m)); assert torch.equal(m[2].weight, model()[2].weight) and not torch.equal(m[0].weight, model()[0].weight)
    opt.step(lambda: loss(m)); assert not torch.equal(m[2].weight, model()[2].weight) and opt.evaluations == 4


def test_coordinate_blocks_are_steps_one_after_the_other():
    a, b = model(), model()
    opt = ZOOptimizer(a.parameters(), 1e-2, blocks=[list(a[0].parameters()), list(a[2].parameters())])
    opt.step(lambda: loss(a))
    theta, sizes, first = flat(b).numpy().copy(), [p.numel() for p in b.parameters()], 0
    for number, (low, high) in enumerate(((0, sizes[0] + sizes[1]), (sizes[0] + sizes[1], sum(sizes)))):
        z = np.concatenate([normal(n, combine(combine(0, 0), 0, number), i).numpy() for i, n in enumerate(sizes)]).astype(float)
        z[:low] = z[high:] = 0
        put(b, theta + 1e-3 * z); plus = loss(b).item(); put(b, theta - 1e-3 * z); minus = loss(b).item()
        theta = theta - 1e-2 * (plus - minus) / 2e-3 * z
    np.testing.assert_allclose(flat(a).numpy(), theta, rtol=0, atol=1e-9)


def test_maximize_scores_and_a_schedule():
    a, b = model(), model()
    for m, sign in ((a, 1), (b, -1)):
        opt = ZOOptimizer(m.parameters(), 1e-2, maximize=sign < 0)
        for _ in range(5): opt.step(lambda: sign * loss(m).item())
    assert torch.equal(flat(a), flat(b))


def test_fused_and_plain_runs_agree():
    a, b = (nn.Parameter(torch.linspace(-1, 1, 8000)) for _ in range(2))
    for w, fused in ((a, False), (b, True)):
        opt = ZOOptimizer([w], 1e-6, fused=fused)
        for _ in range(10): opt.step(lambda: (w.double() ** 2).sum())
    torch.testing.assert_close(a, b, rtol=0, atol=2e-6)


def test_without_a_compiler_it_warns_once_and_goes_on(monkeypatch, tmp_path):
    from torch._inductor import config
    monkeypatch.setattr(zo_random, "_without_compiler", set()); zo_random._compiled.cache_clear()
    x = torch.zeros(5000)
    with config.patch({"cpp.cxx": (str(tmp_path / "no-compiler"),), "force_disable_caches": True}):
        with pytest.warns(RuntimeWarning, match="falls back to the plain path"): add_normal_(x, 1.0, 1, fused=True)
        with warnings.catch_warnings(): warnings.simplefilter("error", RuntimeWarning); add_normal_(x, 1.0, 2, fused=True)
    torch.testing.assert_close(x, normal(5000, 1) + normal(5000, 2), rtol=0, atol=1e-6)
    zo_random._compiled.cache_clear()


@pytest.mark.parametrize("method", ["sgd", "sign", "adam", "conservative"])
def test_no_second_copy_of_the_weights(method):
    from torch.utils._python_dispatch import TorchDispatchMode
    big = nn.Parameter(torch.randn(1500, 2048)); made = []
    opt = ZOOptimizer([big], 1e-3, method=method); opt.step(lambda: 0.0)

    class See(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            held = {big.untyped_storage().data_ptr()} | {t.untyped_storage().data_ptr() for s in opt.state.values() for t in s.values() if torch.is_tensor(t)}
            made.extend(t.untyped_storage().nbytes() for t in (out if isinstance(out, (tuple, list)) else [out]) if torch.is_tensor(t) and t.untyped_storage().data_ptr() not in held)
            return out
    with See(): opt.step(lambda: float(big.detach()[0, 0]))
    assert made and max(made) <= 4 * 2**20 < big.nbytes / 2
    assert sum(t.nbytes for s in opt.state.values() for t in s.values() if torch.is_tensor(t)) == {"adam": 2, "momentum": 1}.get(method, 0) * big.nbytes


def _worker(rank, world, store):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    for method in ("sgd", "adam", "sign"):
        plain, copied, sharded = model(), model(), model()
        for layer in (sharded[0], sharded[2]): fully_shard(layer, mesh=init_device_mesh("cpu", (world,)))  # 3 rows of the last layer: shards of 2 and 1
        fully_shard(sharded, mesh=init_device_mesh("cpu", (world,)))
        mine = lambda m: F.mse_loss(m(X.chunk(world)[rank]), Y.chunk(world)[rank])
        opts = [ZOOptimizer(plain.parameters(), 1e-2, method=method), ZOOptimizer(copied.parameters(), 1e-2, method=method, process_group="world"), ZOOptimizer(sharded.parameters(), 1e-2, method=method, process_group="world")]
        for _ in range(5): opts[0].step(lambda: loss(plain)); opts[1].step(lambda: mine(copied)); opts[2].step(lambda: mine(sharded))
        torch.testing.assert_close(flat(copied), flat(plain), rtol=0, atol=1e-9)
        for p, q in zip(copied.parameters(), sharded.parameters()): torch.testing.assert_close(q.full_tensor(), p, rtol=0, atol=1e-9)
    dist.destroy_process_group()


def test_data_parallel_and_sharded_on_two_processes(tmp_path):
    torch.multiprocessing.spawn(_worker, (2, str(tmp_path / "store")), nprocs=2)


# blocks, masks, label words, memory

def test_parameter_blocks_partition_the_model():
    from efftrain.models import llama, mlp
    m = llama(32, 3, heads=2)
    for level, count in (("layer", 5), ("module", 3 * 9 + 2), ("tensor", 29)):
        blocks = parameter_blocks(m, level)
        assert len(blocks) == count and sorted(id(p) for b in blocks for p in b) == sorted(id(p) for p in m.parameters())
    assert [len(b) for b in parameter_blocks(mlp([3, 4, 2]))] == [2, 2]
    with pytest.raises(ValueError, match="level is 'row'"): parameter_blocks(m, "row")
    with pytest.raises(ValueError, match="no trainable"): parameter_blocks(nn.ReLU())


def test_masks_against_sorting():
    params = [nn.Parameter(torch.randn(s, generator=torch.Generator().manual_seed(i)) * (i + 1)) for i, s in enumerate([(20, 30), (50,)])]
    order = torch.cat([p.detach().abs().flatten() for p in params]).sort().values
    mask = magnitude_mask(params, 0.6)
    assert sum(m.sum().item() for m in mask.values()) == 260 and min(p.detach().abs()[mask[p]].min().item() for p in params) == order[390].item()
    share = magnitude_sparsity(params, 0.6)
    for p in params: assert abs(share[p] - (~mask[p]).float().mean().item()) < 1e-6
    layer = nn.Linear(10, 7); x = torch.randn(40, 10)
    got = wanda_mask(layer, lambda: layer(x), 0.5)[layer.weight]
    score = layer.weight.detach().numpy().__abs__() * np.linalg.norm(x.numpy(), axis=0)
    for i in range(7): assert set(np.argsort(score[i])[5:]) == set(np.flatnonzero(got[i].numpy()))
    for f in (lambda: magnitude_mask(params, 1.0), lambda: magnitude_sparsity(params, -0.1), lambda: wanda_mask(layer, lambda: None, 2.0)):
        with pytest.raises(ValueError, match="sparsity is"): f()


def test_label_words_are_the_models_own_logits():
    from efftrain.datasets import english_tokenizer
    from efftrain.models import llama
    m, tokenizer = llama(32, 2, 4096, heads=2), english_tokenizer(4096)
    ids, last = prompts(tokenizer, ["a long text about many things that has to be cut somewhere", "short"], " It was", 10)
    tail = tokenizer.encode(" It was").ids
    for row, l in zip(ids, last): assert row[l + 1 - len(tail):l + 1].tolist() == tail
    assert ids.shape == (2, 10) and last[0] == 9 and ids[1, last[1] + 1:].sum() == 0
    words = torch.tensor([5, 77, 300])
    torch.testing.assert_close(label_word_logits(m, ids, last, words), m(input_ids=ids).logits[torch.arange(2), last][:, words])
    with pytest.raises(ValueError, match="length is 2"): prompts(tokenizer, ["x"], " It was", 2)


def test_forward_memory_counts_what_is_really_alive():
    make, f = lambda: nn.Sequential(nn.Linear(100, 200, bias=False), nn.Linear(200, 300, bias=False), nn.Linear(300, 1, bias=False)), lambda m: m(torch.zeros(50, 100)).mean()
    found = forward_memory(make, f)
    weights = 4 * (100 * 200 + 200 * 300 + 300)
    assert found == forward_memory(make, f, fake=False) and found["weights"] == weights and found["tangents"] == 0
    assert weights + 4 * 50 * (200 + 300) <= found["peak"] <= weights + 4 * 50 * (100 + 200 + 300) + 1024
    dual = forward_memory(make, f, tangents=True)
    assert dual["tangents"] == weights and dual["peak"] >= 2 * weights + 2 * 4 * 50 * 300


# bad input

@pytest.mark.parametrize("options, error, text", [
    (dict(lr=0.0), ValueError, "lr is 0.0"), (dict(lr=torch.ones(2)), ValueError, "lr is a tensor"), (dict(eps=0), ValueError, "eps is 0"), (dict(eps=math.inf), ValueError, "eps is inf"), (dict(queries=0), ValueError, "queries is 0"), (dict(queries=True), TypeError, "queries is True"),
    (dict(method="zo"), ValueError, "method is 'zo'"), (dict(block_mode="x"), ValueError, "block_mode is 'x'"), (dict(blocks=3), ValueError, "blocks is 3"), (dict(blocks=[[]]), ValueError, r"blocks\[0\] is empty"), (dict(blocks=0), ValueError, "blocks is 0"),
    (dict(sparsity=1), ValueError, "sparsity is 1"), (dict(sparsity=-0.1), ValueError, "sparsity is -0.1"), (dict(mask=[1]), TypeError, "mask is a list"), (dict(mask_every=0), ValueError, "mask_every is 0"), (dict(hybrid=1), TypeError, "hybrid is a int"),
    (dict(momentum=1.0), ValueError, "momentum is 1.0"), (dict(betas=(0.9, 1)), ValueError, r"betas\[1\]"), (dict(adam_eps=0), ValueError, "adam_eps is 0"), (dict(weight_decay=-1), ValueError, "weight_decay is -1"), (dict(seed=-1), ValueError, "seed is -1"), (dict(seed=0.5), TypeError, "seed is 0.5"),
    (dict(maximize=None), TypeError, "maximize is None"), (dict(fused=1), TypeError, "fused is 1"), (dict(two_sided="yes"), TypeError, "two_sided is 'yes'"), (dict(method="conservative", blocks=1, block_mode="joint"), ValueError, "block_mode is 'joint'")])
def test_bad_arguments_are_named(options, error, text):
    with pytest.raises(error, match=text): ZOOptimizer([nn.Parameter(torch.ones(3))], **{"lr": 1e-3, **options})


def test_bad_closures_parameters_and_masks():
    w = nn.Parameter(torch.ones(3)); opt = ZOOptimizer([w], 1e-3)
    with pytest.raises(TypeError, match="closure is None"): opt.step(None)
    with pytest.raises(ValueError, match=r"shape \(3,\)"): opt.step(lambda: w.detach() * 1)
    with pytest.warns(RuntimeWarning, match="builds a graph"):
        def graph():
            with torch.enable_grad(): return w.sum()
        opt.step(graph)
    with pytest.raises(ValueError, match="complex64"): ZOOptimizer([nn.Parameter(torch.ones(2, dtype=torch.complex64))], 1e-3)
    with pytest.raises(ValueError, match="not optimized here"): ZOOptimizer([w], 1e-3, sparsity={nn.Parameter(torch.ones(1)): 0.5})
    with pytest.raises(ValueError, match="mask of a parameter"): ZOOptimizer([w], 1e-3, mask={w: torch.ones(2, dtype=torch.bool)})
    with pytest.raises(ValueError, match="also trained by hybrid"): ZOOptimizer([w], 1e-3, hybrid=torch.optim.SGD([w], lr=0.1))
    v = nn.Parameter(torch.ones(3)); opt = ZOOptimizer([v], 1e-3, hybrid=torch.optim.SGD([w], lr=0.1))
    with pytest.raises(ValueError, match="without a graph"): opt.step(lambda: 1.0)
    assert w.requires_grad and v.requires_grad and len(opt.log) == 0
    groups = len(opt.param_groups)
    with pytest.raises(ValueError, match="lr is -1"): opt.add_param_group(dict(params=nn.Parameter(torch.ones(1)), lr=-1))
    assert len(opt.param_groups) == groups


def test_frozen_and_gappy_parameters_are_refused_before_anything_moves():
    """ZOOptimizer needs no gradients, so it would move frozen weights as well; a tensor with gaps has no order of memory."""
    w, frozen, gappy = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2), requires_grad=False), nn.Parameter(torch.randn(6, 6)[:, ::2])
    for bad, text in ((frozen, r"shape \(2,\) is frozen"), (gappy, r"strides \(6, 2\)")):
        with pytest.raises(ValueError, match=text): ZOOptimizer([w, bad], 1e-3)
        opt = ZOOptimizer([w], 1e-3)
        with pytest.raises(ValueError, match=text): opt.add_param_group(dict(params=bad))
        assert len(opt.param_groups) == 1 and len(opt._slots) == 1
    ZOOptimizer([nn.Parameter(torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last))], 1e-3)
