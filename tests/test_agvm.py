"""AGVM against numpy, closed forms and two processes, and what users expect of a torch optimizer, for a wrapper: SGD, AdamW and Lion inside."""
import copy
import io
import math
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from efftrain.optim.agvm import AGVM, module_groups
from efftrain.optim.lion import Lion

INSIDE = {"sgd": lambda groups, **o: torch.optim.SGD(groups, **{"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3, **o}),
          "adamw": lambda groups, **o: torch.optim.AdamW(groups, **{"lr": 1e-2, **o}),
          "lion": lambda groups, **o: Lion(groups, **{"lr": 1e-3, **o})}
every_inside = pytest.mark.parametrize("inside", INSIDE.values(), ids=INSIDE)
SHAPES = [[(7, 5), (3,), ()], [(11,), (2, 0)], [(4, 4), (6,)]]  # three modules


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 10), nn.Tanh(), nn.Linear(10, 3))


def batch(step, rows=16, classes=3):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(rows, 6, generator=generator), torch.randn(rows, classes, generator=generator)


def train(model, opt, first, last, scheduler=None):
    """Steps `first` to `last` with two micro-batches each, also for an optimizer that is not AGVM."""
    for step in range(first, last):
        for half, (x, y) in enumerate(zip(*(part.chunk(2) for part in batch(step)))):
            ((model(x) - y).square().mean() / 2).backward()
            if isinstance(opt, AGVM): opt.observe(half)
        opt.step(); opt.zero_grad()
        if scheduler: scheduler.step()


def equal(a, b): return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))


def modules(dtype=torch.float32, shapes=SHAPES):
    generator = torch.Generator().manual_seed(3)
    return [[nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in group] for group in shapes]


def halves(params, seed, noise=0.7, dtype=torch.float64):
    """Gradients of two halves for every module, in float64."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda p: torch.randn(p.shape, generator=generator, dtype=torch.float64)
    mean = [[draw(p) for p in group] for group in params]
    return [[[m + noise * (i + 1) * draw(m) for m in group] for i, group in enumerate(mean)] for _ in range(2)]


def feed(opt, params, pair, scale=1.0):
    """Two halves, accumulated as autograd does it."""
    for half, gradients in enumerate(pair):
        for group, gs in zip(params, gradients):
            for p, g in zip(group, gs):
                if g is not None: p.grad = g.mul(scale).to(p.dtype) if p.grad is None else p.grad + g.mul(scale).to(p.dtype)
        opt.observe(half, scale=scale)


def flat(group): return np.concatenate([np.asarray(g, np.float64).ravel() for g in group])


def cosine_distance(a, b):
    a, b = flat(a), flat(b)
    return 1 - a @ b / math.sqrt((a @ a) * (b @ b))


# the rule

@pytest.mark.parametrize("dtype, rtol", [(torch.float32, 1e-5), (torch.float64, 1e-6), (torch.bfloat16, 0.05)], ids=["float32", "float64", "bfloat16"])
def test_variances_equal_the_definition(dtype, rtol):
    params = modules(dtype)
    opt = AGVM(torch.optim.SGD([{"params": g} for g in params], lr=0.1), interval=1, start=0)
    for seed in range(5):
        pair = halves(params, seed)
        feed(opt, params, pair)
        np.testing.assert_allclose(opt.variances, [cosine_distance(a, b) for a, b in zip(*pair)], rtol=rtol)
        opt.step(); opt.zero_grad()


@pytest.mark.parametrize("noise", [1e-1, 1e-3, 1e-5])
def test_small_variances_keep_their_digits(noise):
    """cos differs from 1 by 1e-10 at the smallest noise: float32 cannot hold that difference."""
    generator = torch.Generator().manual_seed(0)
    mean, p, q = torch.randn(4000, generator=generator), nn.Parameter(torch.zeros(4000)), nn.Parameter(torch.zeros(4000))
    pair = [[[(mean + noise * torch.randn(4000, generator=generator)).float().double()] for _ in range(2)] for _ in range(2)]
    opt = AGVM(torch.optim.SGD([{"params": [p]}, {"params": [q]}], lr=0.1), interval=1, start=0)
    feed(opt, [[p], [q]], pair)
    np.testing.assert_allclose(opt.variances, [cosine_distance(a, b) for a, b in zip(*pair)], rtol=2e-2)


def test_factors_and_weights_equal_numpy_over_a_run():
    """Momentum, intervals, clipping, start and stop, written again without torch."""
    params = modules(torch.float64)
    settings = dict(interval=3, start=4, stop=15, momentum=0.8, bounds=(0.6, 1.7), eps=1e-3, anchor=1)
    opt = AGVM(torch.optim.SGD([{"params": g} for g in params], lr=0.1, momentum=0.9), **settings)
    w, m, f, clipped = [flat([p.detach() for p in g]) for g in params], [0.0] * 3, np.ones(3), 0
    for step in range(22):
        pair = halves(params, step)
        feed(opt, params, pair)
        a, b = ([flat(g) for g in half] for half in pair)
        if 4 <= step <= 15 and step % 3 == 0:
            phi = np.array([1 - x @ y / np.sqrt(x @ x * (y @ y)) for x, y in zip(a, b)])
            ratio = (phi[1] + 1e-3) / (phi + 1e-3)
            clipped += ((ratio < 0.6) | (ratio > 1.7)).sum()
            f = 0.8 * f + 0.2 * np.sqrt(np.clip(ratio, 0.6, 1.7))
        for i in range(3):
            m[i] = 0.9 * m[i] + a[i] + b[i]
            w[i] = w[i] - 0.1 * (f[i] if 4 <= step <= 15 else 1) * m[i]
        opt.step(); opt.zero_grad()
        np.testing.assert_allclose(opt.factors, f, rtol=1e-10)
        for i in range(3): np.testing.assert_allclose(flat([p.detach() for p in params[i]]), w[i], rtol=1e-9, atol=1e-12)
    assert clipped and f[1] == 1 and abs(f[0] - 1) > 0.02


@pytest.mark.parametrize("name", ["adamw", "nadam", "explicit"])
def test_adam_compares_preconditioned_gradients(name):
    params = modules()
    make = {"adamw": torch.optim.AdamW, "nadam": torch.optim.NAdam, "explicit": torch.optim.RAdam}[name]
    opt = AGVM(make([{"params": g} for g in params], lr=1e-3, betas=(0.8, 0.95), eps=1e-4), interval=1, start=1, precondition=True if name == "explicit" else None)
    v = [np.zeros_like(flat([p.detach() for p in g])) for g in params]
    for step in range(4):
        pair = halves(params, step)
        feed(opt, params, pair)
        if step:
            g = [[2 * flat(x) for x in half] for half in pair]  # a half of the batch has gradients of the batch's size
            u = [[x / (np.sqrt(0.95 * y + 0.05 * x**2) + 1e-4) for x, y in zip(half, v)] for half in g]
            np.testing.assert_allclose(opt.variances, [cosine_distance([a], [b]) for a, b in zip(*u)], rtol=1e-4)
        v = [0.95 * y + 0.05 * flat([a + b for a, b in zip(*two)])**2 for y, two in zip(v, zip(*pair))]
        opt.step(); opt.zero_grad()
    plain = AGVM(torch.optim.AdamW([{"params": g} for g in params]), interval=1, start=0, precondition=False)
    feed(plain, params, pair)
    np.testing.assert_allclose(plain.variances, [cosine_distance(a, b) for a, b in zip(*pair)], rtol=1e-5)


@pytest.mark.parametrize("ratio", [0.1, 1.0, 10.0])
def test_expected_cosine_of_known_noise(ratio):
    generator = torch.Generator().manual_seed(2)
    size, values = 5000, []
    mu = torch.nn.functional.normalize(torch.randn(size, generator=generator, dtype=torch.float64), dim=0) * math.sqrt(size)
    params = [[nn.Parameter(torch.zeros(size))] for _ in range(4)]
    opt = AGVM(torch.optim.SGD([{"params": g} for g in params], lr=0.1), interval=1, start=0)
    for _ in range(50):
        feed(opt, params, [[[mu + math.sqrt(ratio) * torch.randn(size, generator=generator, dtype=torch.float64)] for _ in params] for _ in range(2)])
        values += [1 - v for v in opt.variances]; opt.step(); opt.zero_grad()
    assert abs(np.mean(values) - 1 / (1 + ratio)) < 4 * np.std(values) / math.sqrt(len(values)) + 1 / size


@every_inside
def test_equal_modules_follow_the_base_optimizer_bit_for_bit(inside):
    def run(wrap):
        params = [[nn.Parameter(torch.linspace(-1, 1, 30))] for _ in range(3)]
        base = inside([{"params": g} for g in params])
        opt = AGVM(base, interval=2, start=0) if wrap else base
        for step in range(20):
            shared = halves(params[:1], step)
            pair = [half * 3 for half in shared]
            if wrap: feed(opt, params, pair)
            else:
                for (p,) in params: p.grad = (pair[0][0][0]).float() + (pair[1][0][0]).float()
            opt.step(); opt.zero_grad()
        return params, opt
    (a, opt), (b, _) = run(True), run(False)
    assert opt.factors == [1.0] * 3 and all(torch.equal(p, q) for (p,), (q,) in zip(a, b))


@every_inside
def test_outside_of_start_and_stop_it_is_the_base_optimizer(inside):
    a, b, c = network(), network(), network()
    train(a, inside(module_groups(a)), 0, 12)
    train(b, AGVM(inside(module_groups(b)), start=12, interval=1), 0, 12)
    opt = AGVM(inside(module_groups(c)), start=0, interval=1, stop=3); train(c, opt, 0, 12)
    assert equal(a, b) and not equal(a, c)
    kept = list(opt.factors)
    d = copy.deepcopy(c); other = inside(module_groups(d)); other.load_state_dict(copy.deepcopy(opt.optimizer.state_dict()))
    train(c, opt, 12, 14); train(d, other, 12, 14)
    assert equal(c, d) and opt.factors == kept != [1.0] * 3


# gradients of all sorts

def test_a_module_without_gradients_keeps_its_factor_and_one_sided_gradients_count_as_a_right_angle():
    params = modules()
    opt = AGVM(torch.optim.SGD([{"params": g} for g in params], lr=0.1), interval=1, start=0, momentum=0.5)
    first, second = halves(params, 0)
    feed(opt, params, [[first[0], [None] * 2, first[2]], [second[0], [None] * 2, [torch.zeros_like(g) for g in second[2]]]])
    assert math.isnan(opt.variances[1]) and opt.variances[2] == 1.0
    opt.step(); opt.zero_grad()
    assert opt.factors[:2] == [1.0, 1.0]
    # a parameter that the first half did not reach
    opt.zero_grad(); first[0][0] = None
    feed(opt, params, [first, second])
    known = [torch.zeros_like(second[0][0])] + first[0][1:]
    np.testing.assert_allclose(opt.variances[0], cosine_distance(known, second[0]), rtol=1e-5)
    opt.step(); opt.zero_grad()
    # the anchor is frozen: nothing to compare with
    before = list(opt.factors)
    feed(opt, params, [[[None] * 3, *first[1:]], [[None] * 3, *second[1:]]])
    opt.step()
    assert opt.factors == before and opt.steps == 3


def test_infinite_gradients_leave_the_factors_alone():
    params = modules()
    opt = AGVM(torch.optim.SGD([{"params": g} for g in params], lr=0.1), interval=1, start=0)
    pair = halves(params, 0); pair[1][2][0][0] = math.inf
    feed(opt, params, pair); opt.step()
    assert math.isnan(opt.variances[2]) and opt.factors[2] == 1 != opt.factors[1]


def test_sparse_and_complex_gradients_are_rejected_by_name():
    model = nn.ModuleDict({"table": nn.Embedding(5, 3, sparse=True), "head": nn.Linear(3, 1)})
    opt = AGVM(torch.optim.SGD(module_groups(model), lr=0.1), start=0)
    model["head"](model["table"](torch.tensor([1, 2]))).sum().backward()
    with pytest.raises(RuntimeError, match="AGVM does not take sparse gradients.*'table.weight'"): opt.observe(0)
    z = nn.Parameter(torch.ones(2, dtype=torch.complex64)); z.grad = torch.ones_like(z)
    opt = AGVM(torch.optim.SGD([{"params": [nn.Parameter(torch.ones(1))]}, {"params": [z]}], lr=0.1), start=0)
    with pytest.raises(RuntimeError, match="AGVM does not take complex gradients.*parameter 0 of group 1"): opt.observe(0)


def test_one_copy_of_the_gradients_and_only_when_due():
    params = modules()
    opt = AGVM(torch.optim.SGD([{"params": g} for g in params], lr=0.1), interval=4, start=2)
    size, held = sum(p.numel() for g in params for p in g), []
    for step in range(10):
        for half in range(2):
            feed_half = halves(params, step)[half]
            for group, gs in zip(params, feed_half):
                for p, g in zip(group, gs): p.grad = g.float() if p.grad is None else p.grad + g.float()
            opt.observe(half); held.append(sum(a.numel() for _, a in opt._first))
        opt.step(); opt.zero_grad()
    assert held == [size if (i // 2) in (4, 8) and i % 2 == 0 else 0 for i in range(20)]


# a torch optimizer

@every_inside
def test_state_dict_deepcopy_and_pickle_go_on_bit_for_bit(inside):
    build = lambda m: AGVM(inside(module_groups(m)), interval=3, start=2, momentum=0.5)
    a = network(); one = build(a); train(a, one, 0, 7)
    file = io.BytesIO(); torch.save({"model": a.state_dict(), "optimizer": one.state_dict()}, file); file.seek(0)
    saved = torch.load(file, weights_only=True)
    b = network(1); other = build(b); b.load_state_dict(saved["model"]); other.load_state_dict(saved["optimizer"])
    c, copied = copy.deepcopy((a, one)); d, pickled = pickle.loads(pickle.dumps((a, one)))
    assert other.factors == one.factors and other.steps == 7 and copied.optimizer is not one.optimizer
    for model, opt in ((a, one), (b, other), (c, copied), (d, pickled)): train(model, opt, 7, 16)
    for model, opt in ((b, other), (c, copied), (d, pickled)): assert equal(a, model) and opt.factors == one.factors and opt.variances == one.variances
    assert one.factors != [1.0] * 3


def test_a_checkpoint_of_something_else_is_refused_and_changes_nothing():
    a = network(); opt = AGVM(torch.optim.SGD(module_groups(a), lr=0.1, momentum=0.9), start=0, interval=1); train(a, opt, 0, 3)
    before = copy.deepcopy(opt.state_dict())
    with pytest.raises(ValueError, match="no 'agvm'.*agvm.optimizer.load_state_dict"): opt.load_state_dict(opt.optimizer.state_dict())
    with pytest.raises(ValueError, match="2 modules; this optimizer has 3"): opt.load_state_dict({**before, "agvm": {**before["agvm"], "factors": [1.0, 1.0]}})
    assert opt.factors == before["agvm"]["factors"] and opt.steps == 3


SCHEDULES = {"cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 20), "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda k: 1 / (k + 1)),
             "onecycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=20),
             "sequential": lambda o: torch.optim.lr_scheduler.SequentialLR(o, [torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=4), torch.optim.lr_scheduler.ExponentialLR(o, 0.9)], [4])}


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.filterwarnings("error:Detected call of")
@pytest.mark.parametrize("outside", [True, False], ids=["wrapper", "inside"])
def test_schedules_see_plain_rates(schedule, outside):
    """The same rates as without AGVM, to the last bit, whether the scheduler is given the wrapper or the optimizer inside."""
    a, b = network(), network()
    plain, opt = INSIDE["sgd"](module_groups(a)), AGVM(INSIDE["sgd"](module_groups(b)), start=1, interval=1, momentum=0.5)
    one, other = schedule(plain), schedule(opt if outside else opt.optimizer)
    for step in range(15):
        train(a, plain, step, step + 1, one); train(b, opt, step, step + 1, other)
        assert [g["lr"] for g in plain.param_groups] == [g["lr"] for g in opt.param_groups] == other.get_last_lr()
    assert opt.factors[1] != 1


def test_the_step_inside_sees_scaled_rates_and_hooks_fire():
    model, seen = network(), []
    opt = AGVM(torch.optim.SGD(module_groups(model), lr=0.1), start=2, interval=1, momentum=0.5)
    opt.register_step_pre_hook(lambda o, *_: seen.append([g["lr"] for g in o.param_groups])); posts = []
    opt.register_step_post_hook(lambda *_: posts.append(1))
    train(model, opt, 0, 4)
    assert seen[:2] == [[0.1] * 3] * 2 and seen[3] == [0.1 * f for f in opt.factors] and len(posts) == 4 and [g["lr"] for g in opt.param_groups] == [0.1] * 3


@pytest.mark.parametrize("inside", [lambda g, lr: torch.optim.SGD(g, lr=lr, momentum=0.9), lambda g, lr: torch.optim.AdamW(g, lr=lr), lambda g, lr: Lion(g, lr=lr)], ids=["sgd", "adamw", "lion"])
def test_a_tensor_is_a_learning_rate_like_a_number(inside):
    a, b = network(), network(); rate = torch.tensor(1e-2)
    one = AGVM(inside(module_groups(a), 1e-2), start=0, interval=1, momentum=0.5)
    other = AGVM(inside(module_groups(b), rate), start=0, interval=1, momentum=0.5)
    train(a, one, 0, 6); train(b, other, 0, 6)
    for p, q in zip(a.parameters(), b.parameters()): torch.testing.assert_close(p, q, rtol=0, atol=1e-6)
    assert all(torch.equal(g["lr"], torch.tensor(1e-2)) for g in other.param_groups) and torch.equal(rate, torch.tensor(1e-2))


def test_rates_come_back_when_the_step_fails():
    model = network(); opt = AGVM(torch.optim.SGD(module_groups(model), lr=0.1), start=0, interval=1)
    train(model, opt, 0, 2)
    def fail(*_): raise FloatingPointError
    opt.register_step_pre_hook(fail)
    with pytest.raises(FloatingPointError): train(model, opt, 2, 3)
    assert [g["lr"] for g in opt.param_groups] == [0.1] * 3 and opt.steps == 2


def test_closure_is_called_once_with_gradients_enabled():
    a, b, calls = network(), network(), []
    one, other = (AGVM(INSIDE["sgd"](module_groups(m)), start=1, interval=1, momentum=0.5) for m in (a, b))
    train(a, one, 0, 4)
    for step in range(4):
        def closure():
            assert torch.is_grad_enabled()
            calls.append(step); other.zero_grad(); total = 0
            for half, (x, y) in enumerate(zip(*(part.chunk(2) for part in batch(step)))):
                loss = (b(x) - y).square().mean() / 2; loss.backward(); other.observe(half); total += loss.item()
            return total
        with torch.no_grad(): assert other.step(closure) > 0
    assert equal(a, b) and calls == [0, 1, 2, 3]


@pytest.mark.parametrize("inside", ["sgd", "adamw"])
def test_grad_scaler_unscales_and_skips_overflow(inside):
    a, b = network(), network()
    one, scaled = (AGVM(INSIDE[inside](module_groups(m)), start=0, interval=1, momentum=0.5) for m in (a, b))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(6):
        if step == 3:  # an overflow in the second half: the step is skipped and does not count
            for half, (x, y) in enumerate(zip(*(part.chunk(2) for part in batch(99)))):
                scaler.scale((b(x) - y).square().mean() * (math.inf if half else 1)).backward(); scaled.observe(half, scale=scaler.get_scale())
            scaler.step(scaled); scaler.update(); scaled.zero_grad()
            assert scaled.steps == 3 and scaler.get_scale() == 2.0**9
        train(a, one, step, step + 1)
        for half, (x, y) in enumerate(zip(*(part.chunk(2) for part in batch(step)))):
            scaler.scale((b(x) - y).square().mean() / 2).backward(); scaled.observe(half, scale=scaler.get_scale())
        scaler.step(scaled); scaler.update(); scaled.zero_grad()
    np.testing.assert_allclose(scaled.factors, one.factors, rtol=1e-6)
    for p, q in zip(a.parameters(), b.parameters()): torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


def test_a_module_can_be_added():
    model, extra = network(), nn.Linear(3, 2)
    opt = AGVM(INSIDE["sgd"](module_groups(model)), start=0, interval=1, momentum=0.5); train(model, opt, 0, 3)
    opt.add_param_group({"params": list(extra.named_parameters())})
    whole = nn.Sequential(model, extra)
    for half, (x, y) in enumerate(zip(*(part.chunk(2) for part in batch(5, classes=2)))): (whole(x) - y).square().mean().backward(); opt.observe(half)
    opt.step()
    assert len(opt.factors) == 4 and opt.factors[3] != 1 and math.isfinite(opt.variances[3])
    assert "factors=" in repr(opt) and "SGD" in repr(opt)


def test_in_the_training_loop_of_the_package():
    """The first half inside the loss function, the second by `fit`: the same as by hand."""
    from efftrain.training import cosine_schedule, fit
    a, b = network(), network()
    one, other = (AGVM(INSIDE["adamw"](module_groups(m)), start=2, interval=2, momentum=0.5) for m in (a, b))
    train(a, one, 0, 12, cosine_schedule(one, 12))
    def loss_fn(model, both):
        (x, y), (u, v) = zip(*(part.chunk(2) for part in both))
        first = (model(x) - y).square().mean() / 2; first.backward(); other.observe(0)
        return (model(u) - v).square().mean() / 2 + first.detach()
    history = fit(b, loss_fn, batch, other, 12, scheduler=cosine_schedule(other, 12), after_backward=lambda *_: other.observe(1), device="cpu")
    assert equal(a, b) and one.factors == other.factors and len(history) == 12


# groups

def test_module_groups_cover_every_parameter_once():
    model = nn.ModuleDict({"backbone": nn.Linear(2, 3), "heads": nn.ModuleDict({"a": nn.Linear(3, 1), "b": nn.Linear(3, 1)}), "act": nn.Tanh()})
    assert [g["name"] for g in module_groups(model)] == ["backbone", "heads"]
    names = [[n for n, _ in g["params"]] for g in module_groups(model, ["heads.a", "heads.b", "backbone"])]
    assert names == [["heads.a.weight", "heads.a.bias"], ["heads.b.weight", "heads.b.bias"], ["backbone.weight", "backbone.bias"]]
    for bad, text in ((["backbone"], "leaves out the parameters"), (["backbone", "heads", "heads.a"], "belongs to 'heads' and to 'heads.a'"), (["neck"], "'neck', which is no submodule"), (["act", "backbone", "heads"], "'act', which has no parameters")):
        with pytest.raises(ValueError, match=text): module_groups(model, bad)
    model["heads"].requires_grad_(False)
    assert [g["name"] for g in module_groups(model)] == ["backbone"]


@pytest.mark.parametrize("options, error, text", [
    (dict(anchor=3), ValueError, "anchor is 3"), (dict(anchor=-1), ValueError, "anchor is -1"), (dict(anchor="backbone"), TypeError, "anchor is 'backbone'"), (dict(interval=0), ValueError, "interval is 0"), (dict(interval=2.0), TypeError, "interval is 2.0"),
    (dict(start=-1), ValueError, "start is -1"), (dict(start=True), TypeError, "start is True"), (dict(start=10, stop=9), ValueError, "stop is 9"), (dict(momentum=1.0), ValueError, "momentum is 1.0"), (dict(bounds=2), ValueError, "bounds is 2"),
    (dict(bounds=(0, 10)), ValueError, r"bounds\[0\] is 0"), (dict(bounds=(0.5, 0.9)), ValueError, r"bounds\[1\] is 0.9"), (dict(eps=0.0), ValueError, "eps is 0.0"), (dict(precondition="yes"), TypeError, "precondition is 'yes'"),
    (dict(precondition=True), ValueError, "precondition is True, but SGD has no betas"), (dict(halves="both"), ValueError, "halves is 'both'"), (dict(halves="workers"), RuntimeError, "init_process_group")])
def test_bad_arguments_are_named(options, error, text):
    with pytest.raises(error, match=text): AGVM(torch.optim.SGD([{"params": g} for g in modules()], lr=0.1), **options)


def test_the_optimizer_must_have_modules():
    one = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1)
    with pytest.raises(ValueError, match="1 parameter group.*at least two"): AGVM(one)
    with pytest.raises(TypeError, match="optimizer is a Linear"): AGVM(nn.Linear(2, 2))
    two = torch.optim.SGD([{"params": g} for g in modules()], lr=0.1)
    with pytest.raises(TypeError, match="optimizer is a AGVM"): AGVM(AGVM(two))


def test_calls_out_of_order_are_errors_and_change_nothing():
    model = network(); opt = AGVM(INSIDE["sgd"](module_groups(model)), start=0, interval=2)
    before = copy.deepcopy(model)
    x, y = batch(0)
    with pytest.raises(RuntimeError, match="step 0 measures, but observe was not called"): opt.step()
    (model(x) - y).square().mean().backward()
    with pytest.raises(RuntimeError, match=r"observe\(1\) was called before observe\(0\)"): opt.observe(1)
    opt.observe(0)
    with pytest.raises(RuntimeError, match="called once, for half 0"): opt.step()
    with pytest.raises(RuntimeError, match="no gradient was added"): opt.observe(1)
    for bad in (2, None, "a"):
        with pytest.raises(ValueError, match="half is"): opt.observe(bad)
    with pytest.raises(ValueError, match="scale is 0"): opt.observe(1, scale=0)
    assert equal(model, before) and opt.steps == 0
    (model(-x) - y).square().mean().backward(); opt.observe(1)
    with pytest.raises(RuntimeError, match="called twice"): opt.observe(1)
    opt.step()
    opt.step()  # step 1 does not measure
    assert opt.steps == 2


# processes

def _worker(rank, world, store):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel as DDP
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    settings = dict(interval=2, start=1, momentum=0.5)
    mesh = init_device_mesh("cpu", (world,))
    lone = [dist.new_group([r]) for r in range(world)]
    with pytest.raises(ValueError, match="with 1 processes; an even number"): AGVM(INSIDE["sgd"](module_groups(network())), halves="workers", process_group=lone[rank])
    for inside in ("sgd", "adamw"):
        plain = network(); reference = AGVM(INSIDE[inside](module_groups(plain)), **settings)
        models = {"workers": network(), "batches": network(), "sharded": network()}
        for layer in (models["sharded"][0], models["sharded"][2], models["sharded"][4]): fully_shard(layer, mesh=mesh)  # the last layer has 3 rows: shards of 2 and 1
        fully_shard(models["sharded"], mesh=mesh)
        wrapped = {k: m if k == "sharded" else DDP(m) for k, m in models.items()}
        optimizers = {"workers": AGVM(INSIDE[inside](module_groups(models["workers"])), halves="workers", **settings),
                      "batches": AGVM(INSIDE[inside](module_groups(models["batches"])), process_group=dist.group.WORLD, **settings),
                      "sharded": AGVM(INSIDE[inside](module_groups(models["sharded"])), **settings)}
        error = lambda m, x, y: (m(x) - y).square().mean()
        for step in range(8):
            if step == 5:
                for k, o in optimizers.items():
                    state, optimizers[k] = copy.deepcopy(o.state_dict()), AGVM(INSIDE[inside](module_groups(models[k])), **settings, **(dict(halves="workers") if k == "workers" else dict(process_group=dist.group.WORLD) if k == "batches" else {}))
                    optimizers[k].load_state_dict(state)
            parts = list(zip(*(part.chunk(2) for part in batch(step))))
            for half, (x, y) in enumerate(parts): (error(plain, x, y) / 2).backward(); reference.observe(half)
            with optimizers["workers"].no_sync(wrapped["workers"]): error(wrapped["workers"], *parts[rank]).backward()
            optimizers["workers"].observe(rank)
            for k in ("batches", "sharded"):  # each process has half of each half
                for half, (x, y) in enumerate(parts):
                    with wrapped[k].no_sync() if k == "batches" and half == 0 else torch.enable_grad(): (error(wrapped[k], x.chunk(world)[rank], y.chunk(world)[rank]) / 2).backward()
                    optimizers[k].observe(half)
            for o in (reference, *optimizers.values()): o.step(); o.zero_grad()
            for k, m in models.items():
                np.testing.assert_allclose(optimizers[k].factors, reference.factors, rtol=1e-4, err_msg=f"{inside}, {k}, step {step}")
                for p, q in zip(plain.parameters(), m.parameters()):
                    torch.testing.assert_close(p, q.full_tensor() if hasattr(q, "full_tensor") else q, rtol=1e-4, atol=1e-5, msg=lambda text: f"{inside}, {k}, step {step}: {text}")
        assert reference.factors[1] != 1
        for o in optimizers.values():
            every = [None] * world; dist.all_gather_object(every, o.factors)
            assert every[0] == every[1], "factors must be the same bits in every process, or weights drift apart"
    sharded = AGVM(INSIDE["sgd"](module_groups(models["sharded"])), halves="workers", start=0)
    with pytest.raises(RuntimeError, match="sharded.*use halves='batches'"): sharded.observe()
    # gradients that DDP has averaged already
    model = DDP(network()); opt = AGVM(INSIDE["sgd"](module_groups(model.module)), halves="workers", start=0, interval=1)
    x, y = batch(rank); (model(x) - y).square().mean().backward()
    with pytest.raises(RuntimeError, match="averaged before observe"): opt.observe()
    with pytest.raises(ValueError, match=f"this process is in half {rank}"): opt.observe(1 - rank)
    opt.zero_grad()
    with pytest.raises(RuntimeError, match=r"observe\(\) was not called"): opt.step()
    dist.destroy_process_group()


def test_two_processes_equal_two_micro_batches(tmp_path):
    torch.multiprocessing.spawn(_worker, (2, str(tmp_path / "store")), nprocs=2)
