"""AdaGrad-Norm, gradient moments, batch-size tests and the sampler against independent computations; what users expect of any torch optimizer is asked in test_optimizers.py."""
import copy
import math
import pickle
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler, SequentialSampler, TensorDataset, WeightedRandomSampler

from efftrain.models import cnn, llama, mlp, vit
from efftrain.optim.adadagrad import TESTS, AdaGradNorm, AdaptiveBatchSampler, BatchSizeController
from efftrain.optim.adadagrad_gradients import GradientMoments, GradientRecorder, gradient_moments, gradient_variance, per_sample_gradients
from efftrain.training import classification_loss, lm_loss

PATHS = {"single": dict(foreach=False), "foreach": dict(foreach=True), "fused": dict(fused=True)}
every_path = pytest.mark.parametrize("path", PATHS)


def normal(*shape, seed=0, dtype=torch.float32): return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def pictures(n=12, seed=1): return normal(n, 1, 28, 28, seed=seed), torch.randint(10, (n,), generator=torch.Generator().manual_seed(seed))


# AdaGrad-Norm

def numpy_adagrad_norm(groups, steps, b0, maximize):
    """groups: (weights, lr, decay); steps: for each step the gradients of all weights, None for none."""
    b2, groups = b0**2, [([w.copy() for w in ws], lr, decay) for ws, lr, decay in groups]
    for grads in steps:
        grads, directions = iter(grads), []
        for ws, _, decay in groups: directions.append([None if (g := next(grads)) is None else (-g if maximize else g) + decay * w for w in ws])
        b2 += sum((d**2).sum() for ds in directions for d in ds if d is not None)
        for (ws, lr, _), ds in zip(groups, directions):
            for w, d in zip(ws, ds):
                if d is not None: w -= lr / math.sqrt(b2) * d
    return [w for ws, _, _ in groups for w in ws], b2


@pytest.mark.parametrize("path, maximize", [("single", False), ("single", True), ("foreach", True), ("fused", False)])
def test_equals_numpy_with_one_sum_over_groups(path, maximize):
    shapes = [(300, 250), (9,), (), (0, 3), (7, 5)]
    start = [normal(*s, seed=i, dtype=torch.float64) for i, s in enumerate(shapes)]
    ps = [nn.Parameter(w.clone()) for w in start]
    opt = AdaGradNorm([dict(params=ps[:3], lr=0.3, weight_decay=0.1), dict(params=ps[3:])], lr=0.8, b0=0.4, maximize=maximize, **PATHS[path])
    steps = []
    for k in range(15):
        grads = [None if (k + i) % 4 == 0 else normal(*s, seed=100 * k + i, dtype=torch.float64) for i, s in enumerate(shapes)]
        for p, g in zip(ps, grads): p.grad = None if g is None else g.clone()
        opt.step(); steps.append([None if g is None else g.numpy() for g in grads])
    ws, b2 = numpy_adagrad_norm([([w.numpy() for w in start[:3]], 0.3, 0.1), ([w.numpy() for w in start[3:]], 0.8, 0.0)], steps, 0.4, maximize)
    for p, w in zip(ps, ws): np.testing.assert_allclose(p.detach().numpy(), w, rtol=0, atol=1e-12)
    assert all(abs(opt.state[p]["sum"].item() / b2 - 1) < 1e-14 for p in ps)


@every_path
def test_single_numbers_with_their_own_sums_are_torch_adagrad(path):
    ours, theirs = ([nn.Parameter(torch.tensor(float(i))) for i in range(6)] for _ in range(2))
    one, other = AdaGradNorm(ours, lr=0.3, b0=0.2, weight_decay=0.05, scope="tensor", **PATHS[path]), torch.optim.Adagrad(theirs, lr=0.3, initial_accumulator_value=0.04, eps=0, weight_decay=0.05)
    for k in range(60):
        for i, (p, q) in enumerate(zip(ours, theirs)): p.grad = normal(seed=k * 10 + i); q.grad = p.grad.clone()
        one.step(); other.step()
    for p, q in zip(ours, theirs): torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


def test_scopes_share_what_they_say():
    for scope, equal in (("all", [1, 1, 1]), ("group", [1, 1, 2]), ("tensor", [1, 2, 3])):
        ps = [nn.Parameter(torch.zeros(2)) for _ in range(3)]
        opt = AdaGradNorm([dict(params=ps[:2]), dict(params=ps[2:])], b0=1.0, scope=scope)
        for i, p in enumerate(ps): p.grad = torch.tensor([3.0, 4.0]) * (i + 1)
        opt.step()
        squares = {"all": [351.0] * 3, "group": [126.0, 126.0, 226.0], "tensor": [26.0, 101.0, 226.0]}[scope]
        assert [opt.state[p]["sum"].item() for p in ps] == squares
        for i, p in enumerate(ps): torch.testing.assert_close(p.detach(), -torch.tensor([3.0, 4.0]) * (i + 1) / squares[i] ** 0.5)


def test_parameters_that_join_later_take_the_sum_that_there_is():
    a, b = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    opt = AdaGradNorm([a], b0=1.0)
    a.grad = torch.tensor([2.0]); opt.step(); a.grad = None
    opt.add_param_group({"params": [b]}); b.grad = torch.tensor([2.0]); opt.step()
    assert opt.state[a]["sum"] == opt.state[b]["sum"] == 9 and abs(b.item() + 2 / 3) < 1e-6
    a.grad, b.grad = torch.tensor([4.0]), None; opt.step()
    assert opt.state[a]["sum"] == opt.state[b]["sum"] == 25 and abs(a.item() + 2 / 5**0.5 + 4 / 5) < 1e-6


@pytest.mark.parametrize("path", ["single", "foreach"])
def test_the_norm_of_a_large_gradient_is_exact(path):
    p = nn.Parameter(torch.zeros(5_000_003)); p.grad = 1 + normal(5_000_003)
    opt = AdaGradNorm([p], b0=1e-6, **PATHS[path]); opt.step()
    exact = p.grad.double().square().sum().item()
    assert abs(opt.state[p]["sum"].item() / exact - 1) < 1e-6


def test_the_first_step_is_no_longer_than_the_rate():
    for size in (1e-6, 1.0, 1e8):
        p = nn.Parameter(torch.zeros(100)); p.grad = size * normal(100)
        AdaGradNorm([p], lr=0.5).step()
        assert p.norm() <= 0.5 * (1 + 1e-6) and (size < 1 or p.norm() > 0.49)


@pytest.mark.parametrize("options, error, text", [(dict(b0=0), ValueError, "b0 is 0"), (dict(b0="1"), TypeError, "b0 is '1'"), (dict(b0=math.inf), ValueError, "b0 is inf"), (dict(scope="layer"), ValueError, "scope is 'layer'"), (dict(weight_decay=-1), ValueError, "weight_decay is -1")])
def test_bad_arguments_are_named(options, error, text):
    with pytest.raises(error, match=text): AdaGradNorm([nn.Parameter(torch.ones(2))], **options)


def test_one_sum_over_groups_compiles_and_resumes():
    make = lambda: [nn.Parameter(torch.ones(40, 30)), nn.Parameter(torch.ones(30))]
    options = lambda ps: [dict(params=ps[:1], lr=torch.tensor(0.1)), dict(params=ps[1:], lr=torch.tensor(0.3))]
    a, b = make(), make(); one, other = AdaGradNorm(options(a)), AdaGradNorm(options(b))
    torch.compiler.reset(); compiled = torch.compile(other.step, backend="aot_eager", fullgraph=True)
    for k in range(4):
        for i, (p, q) in enumerate(zip(a, b)): p.grad = normal(*p.shape, seed=10 * k + i); q.grad = p.grad.clone()
        one.step(); compiled()
    for p, q in zip(a, b): torch.testing.assert_close(p, q, rtol=0, atol=1e-6)
    c = [nn.Parameter(p.detach().clone()) for p in a]; again = AdaGradNorm(options(c)); again.load_state_dict(copy.deepcopy(one.state_dict()))
    for i, (p, q) in enumerate(zip(a, c)): p.grad = normal(*p.shape, seed=i + 99); q.grad = p.grad.clone()
    one.step(); again.step()
    assert all(torch.equal(p, q) and torch.equal(one.state[p]["sum"], again.state[q]["sum"]) for p, q in zip(a, c))


# gradients of single examples

def looped(model, loss, batch, n):
    out = []
    for i in range(n):
        grads = torch.autograd.grad(loss(model, tuple(t[i:i + 1] for t in batch) if isinstance(batch, tuple) else batch[i:i + 1]), [p for p in model.parameters() if p.requires_grad])
        out.append([g.detach() for g in grads])
    return [torch.stack(g) for g in zip(*out)]


@pytest.mark.parametrize("name", ["cnn", "vit", "llama", "frozen"])
def test_per_sample_gradients_equal_a_loop(name):
    model = {"cnn": lambda: cnn(4, norm=False, residual=True), "vit": lambda: vit(dim=16, layers=1), "llama": lambda: llama(16, 1, heads=1), "frozen": lambda: cnn(4)}[name]()
    batch, loss = (torch.randint(512, (5, 8), generator=torch.Generator().manual_seed(0)), lm_loss) if name == "llama" else (pictures(5), classification_loss)
    if name == "frozen": model.eval(); model[0].weight.requires_grad_(False)
    ours = per_sample_gradients(model, loss, batch, chunk=2)
    assert list(ours) == [n for n, p in model.named_parameters() if p.requires_grad]
    for a, b in zip(ours.values(), looped(model, loss, batch, 5)): torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    assert all(p.grad is None for p in model.parameters())


def test_per_sample_gradients_and_moments_equal_opacus():
    from opacus.grad_sample import GradSampleModule
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 6, 5, stride=2, padding=1), nn.Tanh(), nn.Conv2d(6, 8, 3, groups=2), nn.Tanh(), nn.Conv2d(8, 8, 3, dilation=2, bias=False), nn.Flatten(), nn.Linear(392, 20), nn.Tanh(), nn.Linear(20, 10))
    batch = pictures(16)
    ours, recorded = per_sample_gradients(model, classification_loss, batch), gradient_variance(model, classification_loss, batch, method="layers", coordinates=True)
    wrapped = GradSampleModule(copy.deepcopy(model), loss_reduction="mean")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        classification_loss(wrapped, batch).backward()
    theirs = [p.grad_sample for p in wrapped._module.parameters()]
    for a, b in zip(ours.values(), theirs): torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    flat = np.concatenate([g.flatten(1).double().numpy() for g in theirs], 1); mean = flat.mean(0)
    expected = dict(squared_norm=(mean**2).sum(), variance=flat.var(0, ddof=1).sum(), along=(flat @ mean).var(ddof=1))
    for key, value in expected.items(): assert abs(getattr(recorded, key) / value - 1) < 2e-5, key
    np.testing.assert_allclose(1 / (1 + recorded.coordinates.numpy()), 1 / (1 + flat.var(0, ddof=1) / mean**2), rtol=0, atol=1e-5)


def test_moments_equal_numpy_and_the_orthogonal_part_equals_the_vectors():
    parts = [normal(20, 7, 3, seed=1) + 0.3, normal(20, seed=2)[:, None] - 0.2, normal(20, 0, seed=3)]
    m = gradient_moments({"a": parts[0], "b": parts[1], "c": parts[2]}, coordinates=True)
    flat = torch.cat([p.flatten(1) for p in parts], 1).double().numpy(); mean = flat.mean(0); inner = flat @ mean
    beside = flat - np.outer(inner, mean) / (mean @ mean)
    for have, want in ((m.squared_norm, mean @ mean), (m.variance, flat.var(0, ddof=1).sum()), (m.along, inner.var(ddof=1)), (m.orthogonal, beside.var(0, ddof=1).sum())): assert abs(have / want - 1) < 1e-5
    np.testing.assert_allclose(m.coordinates.numpy(), flat.var(0, ddof=1) / mean**2, rtol=1e-4)
    micro = gradient_moments([p.unflatten(0, (5, 4)).mean(1) for p in parts], rows=4)
    rows = flat.reshape(5, 4, -1).mean(1)
    assert micro.samples == 20 and abs(micro.variance / (4 * rows.var(0, ddof=1).sum()) - 1) < 1e-5 and abs(micro.along / (4 * (rows @ mean).var(ddof=1)) - 1) < 1e-5


@pytest.mark.parametrize("layer, shape", [(nn.Linear(6, 4), (8, 6)), (nn.Linear(40, 30), (8, 3, 40)), (nn.Linear(3, 2), (8, 4, 5, 3)), (nn.Conv1d(4, 6, 3, 2, 1, groups=2), (8, 4, 11)), (nn.Conv2d(2, 3, (3, 2), (1, 2), (2, 1), (1, 2), padding_mode="reflect"), (8, 2, 7, 9)),
                                          (nn.Conv3d(2, 4, 2, bias=False), (8, 2, 3, 4, 5))], ids=str)
@pytest.mark.parametrize("frozen", [(), ("weight",), ("bias",)], ids=["all", "bias only", "weight only"])
def test_every_layer_is_recorded_like_vmap(layer, shape, frozen):
    layer = copy.deepcopy(layer)
    for name, p in layer.named_parameters(): p.requires_grad_(name not in frozen)
    if not any(p.requires_grad for p in layer.parameters()): return
    x = normal(*shape); w = normal(*layer(x).shape, seed=1)
    loss = lambda m, b: (m(b[0]).sin() * b[1]).flatten(1).sum(1).mean()
    a, b = (gradient_variance(layer, loss, (x, w), method=method, coordinates=True) for method in ("layers", "vmap"))
    for key in ("squared_norm", "variance", "along"): assert abs(getattr(a, key) / getattr(b, key) - 1) < 1e-4, key
    torch.testing.assert_close(1 / (1 + a.coordinates), 1 / (1 + b.coordinates), rtol=0, atol=1e-4)


def test_recording_leaves_training_alone_and_chunks_do_not_matter(monkeypatch):
    from efftrain.optim import adadagrad_gradients as module
    model, batch = cnn(4, norm=False, activation="relu"), pictures(30)
    classification_loss(model, batch).backward(); plain = [p.grad.clone() for p in model.parameters()]
    found = []
    for chunk in (2**21, 500):
        monkeypatch.setattr(module, "_CHUNK", chunk)
        model.zero_grad()
        with GradientRecorder(model, coordinates=True) as recorder:
            with torch.no_grad(): model(batch[0])  # an evaluation in between is not recorded
            recorder.active = False; classification_loss(model, batch); recorder.active = True
            classification_loss(model, batch).backward(); found.append(recorder.moments())
        assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), plain))
    assert abs(found[0].variance / found[1].variance - 1) < 1e-5
    with GradientRecorder(model, along=False) as recorder: classification_loss(model, batch).backward(); short = recorder.moments()
    assert short.variance == pytest.approx(found[1].variance, rel=1e-6) and math.isnan(short.along) and BatchSizeController("norm").required(short) > 0
    with pytest.raises(ValueError, match="along=True"): BatchSizeController("augmented").required(short)
    classification_loss(model, batch).backward()  # no hooks are left
    assert not any(m._forward_hooks for m in model.modules())


def test_a_part_of_the_rows_gives_the_mean_of_all_and_an_unbiased_variance():
    net, x, y = mlp([6, 3]), normal(2000, 6, seed=3), torch.randint(3, (2000,), generator=torch.Generator().manual_seed(4))
    ratio = []
    for i in range(150):
        pick = torch.randint(2000, (64,), generator=torch.Generator().manual_seed(i))
        whole, part = (gradient_variance(net, classification_loss, (x[pick], y[pick]), method="layers", limit=limit) for limit in (None, 8))
        assert part.squared_norm == whole.squared_norm and part.samples == 64
        ratio.append((part.variance / whole.variance, part.along / whole.along))
    ratio = np.array(ratio)
    assert (np.abs(ratio.mean(0) - 1) < 4 * ratio.std(0) / 150**0.5).all() and (ratio.std(0) > 0.01).all()


class Tied(nn.Module):
    def __init__(self): super().__init__(); self.a = nn.Linear(4, 4); self.b = nn.Linear(4, 4); self.b.weight = self.a.weight

    def forward(self, x): return self.b(self.a(x))


class Twice(nn.Module):
    def __init__(self): super().__init__(); self.a = nn.Linear(4, 4)

    def forward(self, x): return self.a(self.a(x))


def test_what_cannot_be_measured_is_refused_by_name():
    x, y = normal(6, 4), torch.randint(4, (6,), generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="'1', a BatchNorm2d"): per_sample_gradients(cnn(4), classification_loss, pictures(4))
    with pytest.raises(ValueError, match="BatchNorm"): GradientRecorder(cnn(4))
    with pytest.raises(ValueError, match="BatchNorm"): gradient_variance(cnn(4), classification_loss, pictures(4))
    with pytest.raises(ValueError, match="LayerNorm"): gradient_variance(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), classification_loss, (x, y), method="layers")
    with pytest.raises(ValueError, match="'a.weight' and as 'b.weight'|'a.weight'"): GradientRecorder(Tied())
    twice = Twice()
    with GradientRecorder(twice), pytest.raises(RuntimeError, match="'a' was called twice"): twice(x)
    for model in (Tied(), nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))):  # the general way serves them
        assert gradient_variance(model, classification_loss, (x, y)).variance > 0
    net = nn.Linear(4, 4)
    with GradientRecorder(net) as r:
        with pytest.raises(RuntimeError, match="no forward and backward pass"): r.moments()
        classification_loss(net, (x[:1], y[:1])).backward()
        with pytest.raises(ValueError, match="1 example.*at least 2"): r.moments()
        classification_loss(net, (x, y)).backward(); r.moments()
    with pytest.raises(ValueError, match="limit is 1"): GradientRecorder(net, limit=1)
    with pytest.raises(ValueError, match="method is 'jacobian'"): gradient_variance(net, classification_loss, (x, y), method="jacobian")
    with pytest.raises(ValueError, match="1 example"): gradient_variance(net, classification_loss, (x[:1], y[:1]))
    with pytest.raises(ValueError, match=r"first dimensions \[5, 6\]"): per_sample_gradients(net, classification_loss, (x, y[:5]))
    with pytest.raises(ValueError, match="1 row"): gradient_moments(torch.ones(1, 3))
    with pytest.raises(ValueError, match="same first dimension"): gradient_moments([torch.ones(3, 3), torch.ones(2)])
    with pytest.raises(TypeError, match="gradients is"): gradient_moments("abc")
    with pytest.raises(ValueError, match="rows is 0"): gradient_moments(torch.ones(2, 3), rows=0)


# tests of the batch

def regression(n, delta, sigma, seed=0):
    """Gradients of single examples of least squares with standard normal inputs, at distance delta from the truth."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, len(delta), generator=g, dtype=torch.float64)
    return x * (x @ delta - sigma * torch.randn(n, generator=g, dtype=torch.float64))[:, None]


@pytest.mark.parametrize("sigma", [0.0, 0.5, 3.0])
@pytest.mark.parametrize("test", TESTS)
def test_linear_regression_with_known_noise_asks_for_the_batch_of_the_closed_form(test, sigma):
    delta = torch.tensor([0.6, -0.4, 0.5, 0.3, -0.7, 0.45], dtype=torch.float64); d, D = 6, delta.square().sum().item()
    inner = (2 + sigma**2 / D) / 0.25
    wanted = {"norm": ((d + 1) * D + d * sigma**2) / D / 0.25, "coordinate": ((D + delta**2 + sigma**2) / delta**2).max().item() / 0.25, "inner_product": inner, "augmented": max(inner, ((d + 1) * D + d * sigma**2 - 2 * D - sigma**2) / D / 0.8**2)}[test]
    controller = BatchSizeController(test, 0.5, maximum=10**6, orthogonality=0.8)
    controller.observe(regression(300_000, delta, sigma))
    assert abs(controller.needed / wanted - 1) < 0.06 and controller.size == 32


@pytest.mark.parametrize("test", TESTS)
def test_the_next_batch_is_the_smallest_that_would_pass(test):
    rows = regression(40, torch.linspace(0.5, 1.0, 5, dtype=torch.float64), 4.0)
    m = gradient_moments(rows, coordinates=True)
    def passes(b):
        if test == "norm": return m.variance / b <= 0.09 * m.squared_norm
        if test == "coordinate": return bool((m.coordinates / b <= 0.09).all())
        ok = m.along / b <= 0.09 * m.squared_norm**2
        return ok if test == "inner_product" else ok and m.orthogonal / b <= m.squared_norm
    size = BatchSizeController(test, 0.3, maximum=10**9).observe(m)
    assert size > 40 and passes(size) and not passes(size - 1)


@pytest.mark.parametrize("test", TESTS)
def test_without_variance_it_never_grows_and_without_gradient_it_takes_the_most(test):
    controller = BatchSizeController(test, 0.01)
    for seed in range(20): controller.observe(normal(1, 50, seed=seed).expand(16, 50))
    assert controller.size == 32
    controller.observe(torch.zeros(8, 5)); assert controller.size == 32
    controller.observe(torch.cat([torch.eye(20), -torch.eye(20)])); assert controller.size == 8192 and not controller.due


def test_the_size_never_shrinks_is_capped_rounded_and_tested_when_due():
    noisy = lambda need: GradientMoments(16, 1.0, 0.25 * need, 0.0)  # threshold 0.5
    c = BatchSizeController("norm", 0.5, initial=32, maximum=400, every=3, multiple=8, scale_lr="sqrt")
    sizes = []
    for need in (100, 1, 1, 50, 1, 1, 203, 1, 1, 1e9, 1): sizes.append(c.observe(noisy(need) if c.due else None))
    assert sizes == [104] * 6 + [208] * 3 + [400] * 2 and c.steps == 11 and not c.due and abs(c.lr_factor - (400 / 32) ** 0.5) < 1e-12
    c = BatchSizeController("norm", 0.5, every=2)
    with pytest.raises(ValueError, match="gradients is None"): c.observe()
    c.observe(noisy(20)); assert c.size == 32  # asked for more than the 16 that were seen, but not for more than there are
    c.observe(); c.observe(GradientMoments(16, math.nan, 1.0, 0.0)); assert c.size == 32 and c.needed == 20  # an overflow changes nothing
    d = BatchSizeController("norm", 0.5, every=2); d.load_state_dict(c.state_dict()); assert (d.size, d.steps, d.needed, d.due) == (c.size, c.steps, c.needed, c.due)
    assert pickle.loads(pickle.dumps(c)).state_dict() == c.state_dict() and BatchSizeController(scale_lr="linear").lr_factor == 1
    with pytest.raises(ValueError, match="state has size 8"): d.load_state_dict(dict(size=8, steps=0, needed=1.0))


def test_dead_coordinates_pass_and_a_share_may_fail():
    rows = normal(64, 100) + 3; rows[:, :10] = 0; rows[:, 10] -= 3
    m = gradient_moments(rows, coordinates=True)
    needs = [BatchSizeController("coordinate", 0.5, share=s).required(m) for s in (1.0, 0.95, 0.05)]
    assert needs[0] > 30 > 2 > needs[1] > 0.1 and needs[2] == 0
    with pytest.raises(ValueError, match="coordinates=True"): BatchSizeController("coordinate").observe(gradient_moments(rows))


@pytest.mark.parametrize("options, error, text", [
    (dict(threshold=0), ValueError, "threshold is 0"), (dict(threshold=1.0), ValueError, "threshold is 1.0"), (dict(threshold="a"), TypeError, "threshold is 'a'"), (dict(test="variance"), ValueError, "test is 'variance'"), (dict(initial=64, maximum=32), ValueError, "initial is 64 and maximum is 32"),
    (dict(initial=1), ValueError, "initial is 1.*no variance"), (dict(initial=2.0), TypeError, "initial is 2.0"), (dict(every=0), ValueError, "every is 0"), (dict(share=0), ValueError, "share is 0"), (dict(orthogonality=-1), ValueError, "orthogonality is -1"),
    (dict(multiple=24), ValueError, "initial is 32; it must be a multiple"), (dict(scale_lr="cube"), ValueError, "scale_lr is 'cube'")])
def test_bad_arguments_of_the_controller_are_named(options, error, text):
    with pytest.raises(error, match=text): BatchSizeController(**options)


# the sampler

def draw(sampler, count, grow=3):
    """`count` batches; the size grows after every few of an epoch's position."""
    out = []
    while True:
        for batch in sampler:
            out.append(batch); c = sampler.controller; c.steps += 1
            if c.steps % grow == 0: c.size = min(c.size + 7, c.maximum)
            if len(out) == count: return out


SOURCES = {"number": lambda: 100, "sequential": lambda: SequentialSampler(range(100)), "random": lambda: RandomSampler(range(100), generator=torch.Generator().manual_seed(5)), "weighted": lambda: WeightedRandomSampler([1.0] * 100, 100, generator=torch.Generator().manual_seed(5)),
           "distributed": lambda: DistributedSampler(range(200), 2, 1, seed=3)}


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("source", SOURCES)
def test_a_sampler_resumes_at_every_batch(source, drop_last):
    make = lambda: AdaptiveBatchSampler(SOURCES[source](), BatchSizeController(initial=8, maximum=64), seed=7, drop_last=drop_last)
    whole = draw(make(), 30)
    assert whole == draw(make(), 30) and len({len(b) for b in whole}) > 3
    for stop in (1, 3, 7, 8, 9, 10, 15, 29):
        first = make(); part = draw(first, stop)
        state = pickle.loads(pickle.dumps(first.state_dict()))
        again = make(); again.load_state_dict(state)
        assert part + draw(again, 30 - stop) == whole, stop


def test_an_epoch_has_every_example_once_and_epochs_differ():
    s = AdaptiveBatchSampler(100, BatchSizeController(initial=8))
    a, b = list(s), list(s)
    assert sorted(sum(a, [])) == sorted(sum(b, [])) == list(range(100)) and a != b and s.epoch == 1 and len(s) == len(a) == 13
    s.set_epoch(0); assert list(s) == a
    assert [len(x) for x in AdaptiveBatchSampler(100, BatchSizeController(initial=8), drop_last=True)] == [8] * 12
    assert [len(x) for x in AdaptiveBatchSampler(10, BatchSizeController(initial=32), drop_last=True)] == [10]  # never an empty epoch


def test_batches_that_a_loader_fetched_ahead_are_seen_after_resuming():
    data = TensorDataset(torch.arange(120))
    def train(sampler, stop=None):
        out = []
        for n, (b,) in enumerate(DataLoader(data, batch_sampler=sampler, num_workers=2, prefetch_factor=2)):
            out.append(b.tolist()); sampler.controller.size = min(sampler.controller.size + 5, 40)
            if n + 1 == stop: return out, sampler.state_dict(consumed=stop)
        return out, sampler.state_dict()
    make = lambda: AdaptiveBatchSampler(120, BatchSizeController(initial=8, maximum=40))
    whole, end = train(make())
    part, state = train(make(), 3)
    assert len(state["pending"]) > 0  # the loader was ahead of training
    again = make(); again.load_state_dict(state)
    rest = [data[i][0].tolist() for i in next(iter(again))]
    assert part == whole[:3] and rest == whole[3] and end["over"]


def test_processes_share_a_batch():
    data = list(range(96))
    parts = [list(AdaptiveBatchSampler(DistributedSampler(data, 3, r, seed=1), BatchSizeController(initial=24, maximum=96, multiple=3))) for r in range(3)]
    assert all(len(b) == 8 for p in parts for b in p) and sorted(i for p in parts for b in p for i in b) == data


def test_bad_arguments_of_the_sampler_are_named():
    c = BatchSizeController()
    for source, error, text in ((0, ValueError, "source is 0"), ([1, 2], TypeError, "source is"), (RandomSampler(range(5)), ValueError, "RandomSampler without a generator")):
        with pytest.raises(error, match=text): AdaptiveBatchSampler(source, c)
    for options, text in ((dict(seed=-1), "seed is -1"), (dict(drop_last=None), "drop_last is None")):
        with pytest.raises((ValueError, TypeError), match=text): AdaptiveBatchSampler(5, c, **options)
    with pytest.raises(TypeError, match="controller is 3"): AdaptiveBatchSampler(5, 3)
    s = AdaptiveBatchSampler(5, c)
    with pytest.raises(ValueError, match="consumed is 4"): s.state_dict(consumed=4)


# several processes

def _worker(rank, world, store):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    x, y = normal(16, 6), torch.randint(3, (16,), generator=torch.Generator().manual_seed(5))
    mine = slice(0, 6) if rank == 0 else slice(6, 16)
    # moments of rows that lie in two places, unequal shares
    rows = [normal(16, 4, 3, seed=8), normal(16, 5, seed=9) + 1]
    here, whole = gradient_moments([r[mine] for r in rows], coordinates=True, process_group=dist.group.WORLD), gradient_moments(rows, coordinates=True)
    for key in ("samples", "squared_norm", "variance", "along"): assert abs(getattr(here, key) / getattr(whole, key) - 1) < 1e-5, key
    torch.testing.assert_close(here.coordinates, whole.coordinates, rtol=1e-4, atol=1e-4)
    net = lambda: mlp([6, 8, 3], seed=1)
    whole = gradient_variance(net(), classification_loss, (x, y))
    for method in ("layers", "vmap"):
        here = gradient_variance(net(), classification_loss, (x[mine], y[mine]), method=method, process_group=dist.group.WORLD)
        for key in ("samples", "squared_norm", "variance", "along"): assert abs(getattr(here, key) / getattr(whole, key) - 1) < 1e-4, (method, key)
    # a recorder under DDP, and one gradient a worker
    half = slice(8 * rank, 8 * rank + 8)
    model = net(); ddp = DistributedDataParallel(model)
    with GradientRecorder(model, process_group=dist.group.WORLD) as recorder:
        classification_loss(ddp, (x[half], y[half])).backward(); here = recorder.moments()
    assert abs(here.variance / whole.variance - 1) < 1e-4
    c = BatchSizeController("norm", 0.3)
    plain = net(); grads = torch.autograd.grad(classification_loss(plain, (x[half], y[half])), list(plain.parameters()))
    size = c.observe([g[None] for g in grads], rows=8, process_group=dist.group.WORLD)
    sizes = [None] * world; dist.all_gather_object(sizes, size)
    both = [torch.autograd.grad(classification_loss(plain, (x[8 * r:8 * r + 8], y[8 * r:8 * r + 8])), list(plain.parameters())) for r in range(2)]
    assert sizes == [size] * world and size == BatchSizeController("norm", 0.3).observe([torch.stack(g) for g in zip(*both)], rows=8)
    # the norm runs over the shards, one sum over groups, in both scopes
    mesh = init_device_mesh("cpu", (world,))
    for scope in ("all", "tensor"):
        reference, sharded = net(), net()
        fully_shard(sharded[0], mesh=mesh); fully_shard(sharded[2], mesh=mesh)
        make = lambda m: AdaGradNorm([dict(params=m[0].parameters(), lr=0.5), dict(params=m[2].parameters())], lr=1.0, scope=scope, weight_decay=0.01)
        one, other = make(reference), make(sharded)
        for _ in range(4):
            for m, o, part in ((reference, one, slice(None)), (sharded, other, half)): o.zero_grad(); classification_loss(m, (x[part], y[part])).backward(); o.step()
        for p, q in zip(reference.parameters(), sharded.parameters()):
            torch.testing.assert_close(p, q.full_tensor(), rtol=0, atol=2e-6)
            assert abs(one.state[p]["sum"].item() / other.state[q]["sum"].item() - 1) < 1e-5
    dist.destroy_process_group()


def test_two_processes(tmp_path):
    torch.multiprocessing.spawn(_worker, (2, str(tmp_path / "store")), nprocs=2)
