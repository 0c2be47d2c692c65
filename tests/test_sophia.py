"""Sophia's estimates against exact curvature, its steps against independent implementations; what users expect of any torch optimizer is asked in test_optimizers.py."""
import warnings

import numpy as np
import pytest
import pytorch_optimizer
import torch
from torch import nn
from torch.nn import functional as F

from efftrain.optim import base
from efftrain.optim.sophia import SophiaG, SophiaH, gnb_loss, hutchinson, refresh_hook

PATHS = {"single": dict(foreach=False), "foreach": dict(foreach=True), "fused": dict(fused=True)}
every_path = pytest.mark.parametrize("path", PATHS)
both = pytest.mark.parametrize("cls", [SophiaG, SophiaH])


def seeded(seed): return torch.Generator().manual_seed(seed)


# the estimates

def softmax_model(seed=0, n=6, d=3, hidden=4, classes=3):
    """A small network with a hidden layer, in float64, all weights in one vector."""
    g = seeded(seed)
    x = torch.randn(n, d, generator=g, dtype=torch.float64)
    w = torch.randn(d * hidden + hidden * classes, generator=g, dtype=torch.float64).requires_grad_()
    def logits(w): return torch.tanh(x @ w[:d * hidden].reshape(d, hidden)) @ w[d * hidden:].reshape(hidden, classes)
    return w, logits, n


def within(samples, exact, errors=3.0):
    """Bonferroni would allow more: 3 standard errors of every coordinate's mean, with a fixed seed."""
    mean, se = samples.mean(0), samples.std(0) / len(samples)**0.5
    assert ((mean - exact).abs() <= errors * se + 1e-12).all(), ((mean - exact) / se).abs().max()


def test_gnb_is_an_unbiased_estimate_of_the_exact_gauss_newton_diagonal():
    w, logits, n = softmax_model()
    J = torch.autograd.functional.jacobian(logits, w.detach())  # (n, classes, weights), nothing of gnb_loss in it
    p = logits(w.detach()).softmax(-1)
    S = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    exact = torch.einsum("nci,ncd,ndi->i", J, S, J) / n
    opt, g = SophiaG([w], betas=(0.9, 0.0)), seeded(1)  # beta2 = 0: the state is one sample
    samples = []
    for _ in range(3000):
        opt.zero_grad(); gnb_loss(logits(w), generator=g).backward(); opt.update_hessian(n)
        samples.append(opt.state[w]["hessian"].clone())
    samples = torch.stack(samples)
    assert (samples >= 0).all()
    within(samples, exact)
    with pytest.raises(AssertionError): within(samples / n, exact)  # B forgotten


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
def test_hutchinson_is_an_unbiased_estimate_of_the_exact_hessian_diagonal(distribution):
    w, logits, n = softmax_model(3)
    y = torch.arange(n) % 3
    exact = torch.autograd.functional.hessian(lambda v: F.cross_entropy(logits(v), y), w.detach()).diagonal()
    assert (exact < 0).any(), "a Hessian with negative curvature, which Gauss-Newton has not"
    opt, g = SophiaH([w], betas=(0.9, 0.0), distribution=distribution), seeded(2)
    samples = []
    for _ in range(3000):
        opt.update_hessian(F.cross_entropy(logits(w), y), generator=g)
        samples.append(opt.state[w]["hessian"].clone())
    within(torch.stack(samples), exact)


def test_rademacher_is_exact_on_a_diagonal_hessian_and_gaussian_is_not():
    a, w = torch.tensor([1.0, -2.0, 30.0]), nn.Parameter(torch.ones(3))
    assert torch.equal(hutchinson((a * w**2).sum(), [w], distribution="rademacher")[0], 2 * a)
    assert not torch.equal(hutchinson((a * w**2).sum(), [w], generator=seeded(0))[0], 2 * a)


def test_hutchinson_passes_over_what_the_loss_does_not_bend():
    curved, linear, unused = (nn.Parameter(torch.ones(2)) for _ in range(3))
    one, two, three = hutchinson((curved**2).sum() + linear.sum(), [curved, linear, unused], distribution="rademacher")
    assert one.tolist() == [2, 2] and two.tolist() == three.tolist() == [0, 0] and curved.grad is None
    assert hutchinson(linear.sum(), [linear])[0].tolist() == [0, 0]


def test_labels_are_drawn_from_the_softmax_and_padding_does_not_count():
    logits = torch.tensor([0.5, -1.0, 2.0]).expand(20_000, 3).clone().requires_grad_()
    gnb_loss(logits, generator=seeded(0)).backward()
    frequencies = logits.softmax(-1)[0].detach() - logits.grad.sum(0)  # the gradient of a mean of cross-entropies is p - frequencies
    torch.testing.assert_close(frequencies, logits[0].softmax(-1).detach(), rtol=0, atol=0.011)  # 3 standard errors
    x, mask = torch.randn(4, 5, 7, generator=seeded(1)).requires_grad_(), torch.zeros(4, 5, dtype=torch.bool)
    mask[1, :3] = mask[3, 4] = True
    gnb_loss(x, mask, generator=seeded(2)).backward()
    assert torch.equal(x.grad.abs().sum(-1) > 0, mask)
    assert torch.equal(gnb_loss(x, mask, generator=seeded(2)), gnb_loss(x[mask], generator=seeded(2)))
    assert gnb_loss(x.to(torch.bfloat16)).dtype == torch.float32


@pytest.mark.parametrize("call, error, text", [
    (lambda: gnb_loss(torch.ones(2, 3, dtype=torch.long)), TypeError, "logits is torch.int64"), (lambda: gnb_loss([1.0]), TypeError, "logits is list"), (lambda: gnb_loss(torch.ones(())), ValueError, "logits has the shape"),
    (lambda: gnb_loss(torch.ones(2, 3), torch.ones(2)), ValueError, "mask is torch.float32"), (lambda: gnb_loss(torch.ones(2, 3), torch.ones(3, dtype=torch.bool)), ValueError, r"mask is torch.bool of shape \(3,\)"),
    (lambda: gnb_loss(torch.ones(2, 3), torch.zeros(2, dtype=torch.bool)), ValueError, "no position"), (lambda: gnb_loss(torch.ones(0, 3)), ValueError, "no position"),
    (lambda: hutchinson(torch.ones(()), [nn.Parameter(torch.ones(1))]), ValueError, "no graph"), (lambda: hutchinson(1.0, []), TypeError, "loss is a float"),
    (lambda: hutchinson(nn.Parameter(torch.ones(2)), []), ValueError, r"loss has the shape \(2,\)"), (lambda: hutchinson(nn.Parameter(torch.ones(())).square(), [nn.Parameter(torch.ones(1))]), ValueError, "none of the parameters"),
    (lambda: hutchinson(torch.ones(()), [], distribution="uniform"), ValueError, "distribution is 'uniform'")])
def test_bad_input_of_the_estimates_is_named(call, error, text):
    with pytest.raises(error, match=text): call()


def test_a_loss_without_second_derivative_says_what_to_do():
    q = nn.Parameter(torch.randn(1, 2, 8, 16))
    attention = lambda: F.scaled_dot_product_attention(q, q, q, is_causal=True).square().sum()
    with pytest.raises(RuntimeError, match="sdpa_kernel"): hutchinson(attention(), [q])
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH): assert hutchinson(attention(), [q])[0].isfinite().all()


# the step

def numpy_sophia(w, grads, refreshes, lr, betas, rho, decay, maximize=False):
    """The paper's algorithm 3 with estimates from outside, {step: estimate}, used before the step."""
    m, h = np.zeros_like(w), np.zeros_like(w)
    for t, g in enumerate(grads):
        if t in refreshes: h = betas[1] * h + (1 - betas[1]) * refreshes[t]
        m = betas[0] * m + (1 - betas[0]) * (-g if maximize else g)
        w = w - lr * decay * w
        w = w - lr * np.clip(m / np.maximum(rho * h, 1e-15), -1, 1)
    return w


@every_path
@pytest.mark.parametrize("dtype, atol", [(torch.float64, 1e-12), (torch.float32, 2e-5)], ids=["float64", "float32"])
def test_sophia_g_equals_numpy_over_100_steps(path, dtype, atol):
    n, steps, B = base.SMALL + 17, 100, 40
    rng = np.random.default_rng(0)
    start, scale = rng.normal(size=n), 10.0**rng.uniform(-2, 0.5, n)
    w = nn.Parameter(torch.tensor(start, dtype=dtype)); opt = SophiaG([w], lr=1e-3, rho=0.3, weight_decay=0.7, **PATHS[path])
    grads, refreshes, rates = [], {}, []
    for t in range(steps):
        if opt.hessian_due:
            sampled = torch.tensor(scale * rng.normal(size=n) / B**0.5, dtype=dtype)
            w.grad = sampled; opt.update_hessian(B); refreshes[t] = B * sampled.double().numpy()**2
        w.grad = torch.tensor(scale * rng.normal(size=n), dtype=dtype); grads.append(w.grad.double().numpy()); opt.step(); rates.append(opt.win_rate)
    assert sorted(refreshes) == list(range(0, 100, 10)) and 0.05 < np.mean(rates) < 0.95
    expected = numpy_sophia(start.astype(np.float32) if dtype == torch.float32 else start, grads, refreshes, 1e-3, (0.965, 0.99), 0.3, 0.7)
    np.testing.assert_allclose(w.detach().double().numpy(), expected, rtol=0, atol=atol)


def test_sophia_g_equals_the_official_form():
    """There the average is of g^2 alone, and B comes with each step; refreshes follow every tenth step."""
    n, steps, B, rho = 300, 100, 64, 0.4
    rng = np.random.default_rng(1)
    scale, w = 10.0**rng.uniform(-3, 1, n), rng.normal(size=n)
    p = nn.Parameter(torch.tensor(w)); opt = SophiaG([p], lr=1e-2, rho=rho, weight_decay=0.2)
    m, s = np.zeros(n), np.zeros(n)
    for t in range(steps):
        g = scale * rng.normal(size=n)
        w = w * (1 - 1e-2 * 0.2); m = 0.965 * m + (1 - 0.965) * g
        w = w - 1e-2 * np.sign(m) * np.minimum(np.abs(m) / (rho * B * s + 1e-15), 1)
        p.grad = torch.tensor(g); opt.step()
        assert opt.win_rate == pytest.approx((np.abs(m) < rho * B * s).mean())
        if t % 10 == 9:
            g = scale * rng.normal(size=n) / 8
            s = 0.99 * s + (1 - 0.99) * g * g
            p.grad = torch.tensor(g); opt.update_hessian(B)
    np.testing.assert_allclose(p.detach().numpy(), w, rtol=0, atol=1e-8)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_sophia_h_equals_pytorch_optimizer(decay):
    """There the step is lr * clip(m / max(h, eps), p): ours with lr * p and rho = p. Vectors are the same, the products ours come from double backward."""
    g = seeded(5)
    Q = torch.randn(20, 20, generator=g, dtype=torch.float64); A = Q @ torch.diag(torch.logspace(-2, 2, 20, dtype=torch.float64)) @ Q.t() / 20
    start, p, rate = torch.randn(20, generator=g, dtype=torch.float64), 3.0, 0.02
    a, b = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    ours, theirs, rates = SophiaH([a], lr=rate * p, rho=p, weight_decay=decay / p, update_period=5), pytorch_optimizer.SophiaH([b], lr=rate, betas=(0.965, 0.99), p=p, weight_decay=decay, update_period=10**9), []
    for t in range(100):
        if ours.hessian_due: ours.update_hessian(0.5 * a @ A @ a, generator=seeded(t))
        a.grad, b.grad = (A @ a).detach(), (A @ b).detach()
        u = torch.randn(20, generator=seeded(t), dtype=torch.float64)
        ours.step(); rates.append(ours.win_rate)
        theirs.step(hessian=[u * (A @ u)] if t % 5 == 0 else [theirs.state[b]["hessian_moment"].clone()])
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
    assert 0.1 < np.mean(rates) < 0.9


@every_path
@both
def test_before_a_refresh_it_is_sign_momentum(cls, path):
    p = nn.Parameter(torch.zeros(base.SMALL)); opt = cls([p], lr=0.5, betas=(0.0, 0.99), weight_decay=0.0, **PATHS[path])
    assert np.isnan(opt.win_rate)
    p.grad = torch.randn(base.SMALL, generator=seeded(0)) * 1e-6; p.grad[:7] = 0
    opt.step()
    torch.testing.assert_close(p.detach(), -0.5 * p.grad.sign(), rtol=0, atol=0)
    assert opt.win_rate == 0


@both
def test_no_weight_moves_by_more_than_the_rate(cls):
    p = nn.Parameter(torch.randn(1000, generator=seeded(0), dtype=torch.float64)); opt = cls([p], lr=0.01, rho=0.1, weight_decay=0.0)
    for t in range(30):
        p.grad = torch.randn(1000, generator=seeded(t), dtype=torch.float64) * torch.logspace(-8, 8, 1000, dtype=torch.float64)
        if t % 3 == 0: opt.update_hessian(10) if cls is SophiaG else opt.update_hessian((torch.logspace(-8, 8, 1000) * p**2 * torch.linspace(-1, 1, 1000)).sum())
        before = p.detach().clone(); opt.step()
        assert (p - before).abs().max() <= 0.01 * (1 + 1e-5)


def test_steps_on_a_quadratic_do_not_depend_on_the_condition_number():
    """Liu et al. 2023, section 4.3; sign descent, at the best of 200 rates, needs more in proportion to its root."""
    def ours(condition, limit=100):
        h = torch.logspace(0, np.log10(condition), 10, dtype=torch.float64)
        w = nn.Parameter(h.rsqrt()); opt = SophiaH([w], lr=0.5, rho=1.0, betas=(0, 0), weight_decay=0, update_period=1, distribution="rademacher")
        for t in range(limit):
            loss = 0.5 * (h * w**2).sum()
            if loss.item() <= 1e-3 * 5: return t
            opt.update_hessian(0.5 * (h * w**2).sum())
            opt.zero_grad(); loss.backward(); opt.step()
        return limit

    def sign_descent(condition, limit=3000):
        h, rates = np.geomspace(1, condition, 10), np.geomspace(1e-4, 0.9, 200)[:, None]
        w = np.repeat((h**-0.5 * np.random.default_rng(0).uniform(0.5, 1.5, 10))[None], len(rates), 0)
        losses = [(w**2 * h).sum(1).min()]
        while losses[-1] > 1e-3 * losses[0] and len(losses) <= limit:
            w = w - rates * np.sign(w); losses.append((w**2 * h).sum(1).min())
        return len(losses) - 1
    assert ours(1) == ours(100) == ours(10_000) < 10
    few, more, many = map(sign_descent, (10, 100, 1000))
    assert more > 2 * few and 3000 > many > 2 * more


# precision, maximize, groups, sharded and parallel

def test_curvature_of_half_precision_weights_is_kept_in_float32():
    for dtype in (torch.float16, torch.bfloat16):
        p = nn.Parameter(torch.ones(4, dtype=dtype)); opt = SophiaG([p], lr=1e-2)
        p.grad = torch.tensor([1e-5, 0, 1e-3, 1.0], dtype=dtype)
        opt.update_hessian(100); opt.step()
        assert opt.state[p]["hessian"].dtype == torch.float32 and opt.state[p]["exp_avg"].dtype == dtype and p.isfinite().all()
        assert opt.state[p]["hessian"][0] > 0, "1e-10 is nothing in float16"


def test_maximize_turns_the_hessian_and_leaves_the_squares():
    a, b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    up, down = SophiaH([a], lr=0.1, maximize=True), SophiaH([b], lr=0.1)
    c = torch.tensor([1.0, 2.0, -3.0])
    for t in range(5):
        up.update_hessian(-(c * a**2).sum(), generator=seeded(t)); down.update_hessian((c * b**2).sum(), generator=seeded(t))
        a.grad, b.grad = -2 * c * a.detach(), 2 * c * b.detach()
        up.step(); down.step()
    assert torch.equal(a, b) and torch.equal(up.state[a]["hessian"], down.state[b]["hessian"])
    p = nn.Parameter(torch.ones(1)); opt = SophiaG([p], maximize=True); p.grad = torch.ones(1); opt.update_hessian(5)
    assert opt.state[p]["hessian"].item() == pytest.approx(0.05)


@both
def test_the_refresh_schedule_is_of_the_whole_optimizer_and_travels(cls):
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    refresh = lambda opt: opt.update_hessian(3) if cls is SophiaG else opt.update_hessian((a**2).sum())
    opt, due = cls([a], update_period=3), []
    for t in range(8):
        a.grad = torch.ones(2)
        if t == 4: opt.add_param_group({"params": [b], "rho": 0.5, "update_period": 99}); b.grad = torch.ones(2)
        if opt.hessian_due: refresh(opt); due.append(t)
        opt.step()
    assert due == [0, 3, 6] and {g["update_period"] for g in opt.param_groups} == {3} and [g["since_refresh"] for g in opt.param_groups] == [2, 2]
    other = cls([{"params": [a]}, {"params": [b]}], update_period=3); other.load_state_dict(opt.state_dict())
    assert not other.hessian_due
    other.step(); assert other.hessian_due and not opt.hessian_due


@both
def test_a_forgotten_refresh_is_warned_about_once(cls):
    p = nn.Parameter(torch.ones(2)); p.grad = torch.ones(2); opt = cls([p], update_period=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.step(); opt.step()
    with pytest.warns(RuntimeWarning, match=f"{cls.__name__} has made 3 steps without update_hessian") as caught:
        for _ in range(10): opt.step()
    assert len(caught) == 1


@pytest.mark.parametrize("options, error, text", [
    (dict(rho=0.0), ValueError, "rho is 0.0"), (dict(rho=-1), ValueError, "rho is -1"), (dict(rho=float("inf")), ValueError, "rho is inf"), (dict(rho="1"), TypeError, "rho is '1'"), (dict(eps=0), ValueError, "eps is 0"),
    (dict(betas=(0.9,)), ValueError, "betas is"), (dict(betas=(0.9, 1.0)), ValueError, r"betas\[1\] is 1.0"), (dict(weight_decay=-0.1), ValueError, "weight_decay is -0.1"), (dict(lr=0), ValueError, "lr is 0")])
@both
def test_bad_arguments_are_named(cls, options, error, text):
    with pytest.raises(error, match=text): cls([nn.Parameter(torch.ones(2))], **options)
    opt = cls([nn.Parameter(torch.ones(2))])
    with pytest.raises(error, match=text): opt.add_param_group({"params": [nn.Parameter(torch.ones(2))], **options})
    assert len(opt.param_groups) == 1


def test_bad_arguments_of_the_refresh_are_named():
    p = nn.Parameter(torch.ones(2))
    for bad, error in ((0, ValueError), (-1, ValueError), (2.0, TypeError), (True, TypeError), (None, TypeError)):
        with pytest.raises(error, match="update_period is"): SophiaG([p], update_period=bad)
        p.grad = torch.ones(2); opt = SophiaG([p])
        with pytest.raises(error, match="batch_size is"): opt.update_hessian(bad)
        assert not opt.state
    p.grad = None
    with pytest.raises(RuntimeError, match="no gradients"): SophiaG([p]).update_hessian(4)
    with pytest.raises(ValueError, match="distribution is 1"): SophiaH([p], distribution=1)
    with pytest.raises(TypeError, match="optimizer is a SGD"): refresh_hook(torch.optim.SGD([p], lr=1), lambda s: s, lambda m, b: b)
    with pytest.raises(TypeError, match="batches is 3"): refresh_hook(SophiaG([p]), 3, lambda m, b: b)
    table = nn.Embedding(5, 3, sparse=True); table(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse"): SophiaG(table.parameters()).update_hessian(4)


@both
def test_fit_with_the_hook_refreshes_on_time_and_resumes_bit_for_bit(cls, tmp_path):
    from efftrain.models import llama
    from efftrain.training import fit, lm_loss
    batches = lambda step: torch.randint(0, 512, (4, 16), generator=seeded(step))
    outputs, sizes = (lambda m, b: (m(b).logits, F.pad(torch.ones(b.shape[0], b.shape[1] - 1, dtype=torch.bool), (0, 1)))) if cls is SophiaG else lm_loss, []

    def run(steps_now, folder):
        model = llama(16, 1, heads=1); opt = cls(model.parameters(), lr=1e-3, update_period=3)
        original = opt.update_hessian
        opt.update_hessian = lambda first, **k: (sizes.append(first), original(first, **k))
        hook = refresh_hook(opt, lambda s: batches(10_000 + s)[:2], outputs)
        interrupted = steps_now < 8

        def after(model, o, step):
            hook(model, o, step)
            if interrupted and step == steps_now + 1: raise KeyboardInterrupt
        try: fit(model, lm_loss, batches, opt, 8, device="cpu", seed=0, after_step=after, save_to=folder, save_every=1, resume=True)
        except KeyboardInterrupt: pass
        return torch.cat([p.detach().flatten() for p in model.parameters()]), opt
    whole, opt = run(8, tmp_path / "a")
    assert len(sizes) == 3 and opt.param_groups[0]["since_refresh"] == 1  # after steps 1, 4 and 7
    if cls is SophiaG: assert sizes == [2 * 15] * 3
    run(5, tmp_path / "b"); again, _ = run(8, tmp_path / "b")
    assert torch.equal(whole, again)


def _worker(rank, world, store):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    network = lambda: (torch.manual_seed(0), nn.Sequential(nn.Linear(6, 30), nn.Tanh(), nn.Linear(30, 3)))[1]
    x, labels = torch.randn(8, 6, generator=seeded(5)), torch.arange(8) % 3
    mine, my_labels = x.chunk(world)[rank], labels.chunk(world)[rank]
    plain, sharded = network(), fully_shard(network(), mesh=init_device_mesh("cpu", (world,)))
    models = {"plain": (plain, x, labels), "ddp": (DistributedDataParallel(network()), mine, my_labels), "fsdp": (sharded, mine, my_labels)}
    optimizers = {k: SophiaG(m.parameters(), lr=1e-2, rho=5.0) for k, (m, _, _) in models.items()}
    for step in range(4):
        for k, (m, a, y) in models.items():
            for refresh in (True, False):  # the same labels for all, so that only the sums differ
                optimizers[k].zero_grad(); F.cross_entropy(m(a), y).backward()
                optimizers[k].update_hessian(8) if refresh else optimizers[k].step()
    rates = {k: o.win_rate for k, o in optimizers.items()}
    assert 0 < rates["plain"] < 1 and rates["plain"] == pytest.approx(rates["fsdp"]) == pytest.approx(rates["ddp"]), rates
    for k in ("ddp", "fsdp"):
        for p, q in zip(plain.parameters(), models[k][0].parameters()):
            torch.testing.assert_close(p, q.full_tensor() if hasattr(q, "full_tensor") else q, rtol=0, atol=2e-6)
    with pytest.raises(RuntimeError, match="sharded"): SophiaH(sharded.parameters()).update_hessian(torch.ones((), requires_grad=True) * 1)
    w = nn.Parameter(torch.ones(3)); opt = SophiaH([w], distribution="rademacher")
    opt.update_hessian((rank + 1) * (torch.tensor([1.0, 2.0, 3.0]) * w**2).sum(), process_group=dist.group.WORLD)  # the mean of H is 1.5 times the first
    torch.testing.assert_close(opt.state[w]["hessian"], 0.01 * 3 * torch.tensor([1.0, 2.0, 3.0]))
    g = SophiaG([w]); w.grad = torch.full((3,), float(rank)); g.update_hessian(4, process_group=dist.group.WORLD)
    torch.testing.assert_close(g.state[w]["hessian"], torch.full((3,), 0.01 * 4 * 0.25))
    dist.destroy_process_group()


def test_refreshes_on_two_processes(tmp_path):
    torch.multiprocessing.spawn(_worker, (2, str(tmp_path / "store")), nprocs=2)
