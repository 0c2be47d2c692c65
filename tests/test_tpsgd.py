"""tpSGD against autograd, NumPy and finite differences; its baselines; memory; scikit-learn's contract."""
import copy
import math
import pickle

import numpy as np
import pytest
import torch
from sklearn.utils.estimator_checks import check_estimator
from torch import nn
from torch.nn import functional as F

from efftrain.optim.tpsgd import LOCAL_LOSSES, PROJECTIONS, TPSGD, TPSGDClassifier, drtp, peak_bytes, projection_matrix, saved_bytes
from efftrain.optim.tpsgd_feedback import RULES, Feedback
from efftrain.optim.tpsgd_stages import Recurrent, cut, local_step


def batch(*shape, classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64), torch.randint(classes, (shape[0],), generator=generator)


def mlp(*sizes, activation=nn.Tanh, seed=0):
    torch.manual_seed(seed)
    layers = [m for a, b in zip(sizes, sizes[1:]) for m in (nn.Linear(a, b), activation())]
    return nn.Sequential(*layers[:-1]).double()


# one block of each kind with what comes before it: (stages before the output layer, input shape, features of the output layer)
BLOCKS = {"linear": (lambda: [nn.Sequential(nn.Linear(6, 5), nn.Tanh())], (4, 6), 5), "linear without activation": (lambda: [nn.Linear(6, 5)], (4, 6), 5), "leaky": (lambda: [nn.Sequential(nn.Linear(6, 5), nn.LeakyReLU(0.2))], (4, 6), 5),
          "normalised": (lambda: [nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.ReLU())], (4, 6), 5), "conv": (lambda: [nn.Sequential(nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.Sigmoid()), nn.Flatten()], (4, 2, 7, 7), 64),
          "batch norm": (lambda: [nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), nn.AdaptiveAvgPool2d(1), nn.Flatten()], (4, 2, 7, 7), 4),
          **{c.__name__: (lambda c=c: [Recurrent(c(3, 5))], (4, 6, 3), 5) for c in (nn.RNNCell, nn.LSTMCell, nn.GRUCell)}}
LOSSES = {"mse": lambda h, t: 0.5 * (h - t).square().sum(), "l1": lambda h, t: (h - t).abs().sum(), "linear": lambda h, t: (h * t).sum(), "ce": lambda h, t: F.cross_entropy(h.flatten(1), t.expand_as(h).flatten(1).softmax(1), reduction="sum")}


def reference_step(stages, trainer, x, y, lr, loss):
    """New weights by ordinary SGD on the sum of the local losses, each layer behind a detach."""
    total, params = 0, [p for s in stages for p in s.parameters()]
    for i, module in enumerate(stages[:-1]):
        stage = trainer.stages[i]
        if isinstance(module, Recurrent):
            state = module.start(x)
            for step in x.unbind(1):
                state = module.advance(step, tuple(s.detach() for s in state))
                total = total + loss(state[0], trainer.target(stage, state[0], y)) / (len(x) * x.shape[1])
            h = state[0]
        else:
            h = module(x)
            if stage.params: total = total + loss(h, trainer.target(stage, h.detach(), y)) / (len(x) * (h[0, 0].numel() if h.ndim > 2 else 1))
        x = h.detach()
    total = total + F.cross_entropy(stages[-1](x), y)
    return [p - lr * g for p, g in zip(params, torch.autograd.grad(total, params))]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("block", BLOCKS)
def test_a_step_is_sgd_on_the_local_losses(block, loss):
    make, shape, features = BLOCKS[block]
    torch.manual_seed(1)
    stages = [m.double() for m in [*make(), nn.Linear(features, 3)]]
    copies, (x, y) = copy.deepcopy(stages), batch(*shape)
    trainer = TPSGD(stages, "ce", 0.3, local_loss=loss)
    trainer.fit_batch(x, y)
    twin = TPSGD(copies, "ce", 0.3, local_loss=loss)
    for p, q in zip((p for s in stages for p in s.parameters()), reference_step(copies, twin, x, y, 0.3, LOSSES[loss])): torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


@pytest.mark.parametrize("targets", ["map", "channel"])
def test_a_function_as_local_loss_equals_the_built_in_one(targets):
    x, y = batch(4, 2, 7, 7)
    runs = []
    for loss in ("mse", lambda h, t: 0.5 * (h - t).square().sum()):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(100, 3)).double()
        TPSGD(net, lr=0.5, local_loss=loss, conv_targets=targets).fit_batch(x, y)
        runs.append(list(net.parameters()))
    for p, q in zip(*runs): torch.testing.assert_close(p, q, rtol=0, atol=1e-14)


def test_a_local_loss_with_a_constant_gradient():
    net, (x, y) = mlp(4, 5, 3), batch(6, 4)
    before, h = net[0].bias.detach().clone(), net[:2](x).detach()
    TPSGD(net, lr=0.5, local_loss=lambda h, t: h.sum()).fit_batch(x, y)  # autograd hands out an expanded tensor
    torch.testing.assert_close(net[0].bias, before - 0.5 * (1 - h**2).mean(0))


def test_the_gradient_by_finite_differences():
    net, (x, y) = mlp(4, 6, 3), batch(5, 4)
    trainer = TPSGD(net, lr=1.0)
    t = trainer.target(trainer.stages[0], torch.zeros(5, 6).double(), y)
    local = lambda w: 0.5 * (torch.tanh(x @ w.T + net[0].bias) - t).square().sum(1).mean().item()
    w, eps = net[0].weight.detach().clone(), 1e-6
    numeric = torch.zeros_like(w)
    with torch.no_grad():
        for i in range(w.numel()):
            e = torch.zeros(w.numel()).double(); e[i] = eps
            numeric.view(-1)[i] = (local(w + e.view_as(w)) - local(w - e.view_as(w))) / (2 * eps)
        trainer.fit_batch(x, y)
    torch.testing.assert_close(w - net[0].weight, numeric, rtol=0, atol=1e-8)


@pytest.mark.parametrize("classes, activation", [(3, nn.Tanh), (5, nn.Sigmoid)])
def test_drtp_is_its_formula(classes, activation):
    net = mlp(5, 7, 6, classes, activation=activation)
    W, trainer, rng = [p.detach().numpy().copy() for p in net.parameters()], drtp(net, "ce", 0.2, seed=4), np.random.default_rng(0)
    sigma, slope = (np.tanh, lambda h: 1 - h**2) if activation is nn.Tanh else (lambda z: 1 / (1 + np.exp(-z)), lambda h: h * (1 - h))
    for _ in range(15):
        x, y = rng.normal(size=(8, 5)), rng.integers(0, classes, 8)
        trainer.fit_batch(torch.from_numpy(x), torch.from_numpy(y))
        one_hot, a = np.eye(classes)[y], x
        for l in range(2):
            h = sigma(a @ W[2 * l].T + W[2 * l + 1])
            delta = one_hot @ trainer.targets()[l].numpy() * slope(h) / 8
            W[2 * l], W[2 * l + 1], a = W[2 * l] - 0.2 * delta.T @ a, W[2 * l + 1] - 0.2 * delta.sum(0), h
        z = a @ W[4].T + W[5]; e = (np.exp(z) / np.exp(z).sum(1, keepdims=True) - one_hot) / 8
        W[4], W[5] = W[4] - 0.2 * e.T @ a, W[5] - 0.2 * e.sum(0)
    for p, w in zip(net.parameters(), W): np.testing.assert_allclose(p.detach().numpy(), w, rtol=0, atol=1e-12)
    bound = math.sqrt(6 / 7)  # Kaiming's bound for a fan-in of the 7 units
    assert 0.5 * bound < trainer.targets()[0].abs().max() <= bound


# targets

@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("units, classes", [(3000, 10), (4, 10), (1, 1)])
def test_projections_have_the_scale_and_depend_on_the_seed_alone(projection, units, classes):
    state = torch.get_rng_state()
    P = projection_matrix(units, classes, projection, 0.5, seed=7)
    assert torch.equal(torch.get_rng_state(), state) and P.shape == (units, classes) and P.isfinite().all()
    assert torch.equal(P, projection_matrix(units, classes, projection, 0.5, seed=7))
    if units > 1: assert not torch.equal(P, projection_matrix(units, classes, projection, 0.5, seed=8))
    if units == 3000: assert abs(P.std() - 0.5) < 0.01 and abs(P.mean()) < 0.02
    if projection == "orthogonal" and units > 1:
        gram = P.T @ P if units > classes else P @ P.T
        torch.testing.assert_close(gram, 0.25 * max(units, classes) * torch.eye(len(gram)), rtol=0, atol=2e-3)


@pytest.mark.parametrize("f, reference", [("match", torch.tanh), ("identity", lambda t: t), ("sign", torch.sign), ("tanh", torch.tanh), ("sigmoid", torch.sigmoid), ("relu", torch.relu), (lambda t: 0.9 * t.sign(), lambda t: 0.9 * t.sign())])
def test_targets_of_classes_and_of_label_vectors_agree(f, reference):
    trainer, raw, y, h = TPSGD(mlp(4, 6, 3), target_activation=f), TPSGD(mlp(4, 6, 3), target_activation="identity"), torch.tensor([2, 0]), torch.zeros(2, 6).double()
    by_class = trainer.target(trainer.stages[0], h, y)
    torch.testing.assert_close(by_class, reference(raw.target(raw.stages[0], h, y)))
    torch.testing.assert_close(trainer.target(trainer.stages[0], h, F.one_hot(y, 3).double()), by_class)
    torch.testing.assert_close(trainer.target(trainer.stages[0], h, y), by_class)  # and back again
    mixed = trainer.target(trainer.stages[0], h, torch.tensor([[0.5, 0.5, 0], [0, 0, 1.0]]))
    torch.testing.assert_close(mixed[0], reference((raw.target(raw.stages[0], h, torch.tensor([0, 1])).sum(0)) / 2))


def test_stages_and_seeds_have_targets_of_their_own():
    tables = [TPSGD(mlp(4, 6, 6, 3), seed=s) for s in (0, 0, 1)]
    for t in tables: t.fit_batch(*batch(5, 4))
    (a, b), again, other = (t.targets() for t in tables)
    assert torch.equal(a, again[0]) and torch.equal(b, again[1]) and not torch.equal(a, b) and not torch.equal(a, other[0]) and not torch.equal(b, other[0])


def test_label_vectors_train_on_soft_labels_as_on_classes():
    x, y = batch(6, 4)
    for loss in ("ce", "mse"):
        one, other = mlp(4, 6, 3), mlp(4, 6, 3)
        a, b = TPSGD(one, loss, 0.3).fit_batch(x, y), TPSGD(other, loss, 0.3).fit_batch(x, F.one_hot(y, 3).double())
        torch.testing.assert_close(a, b)
        for p, q in zip(one.parameters(), other.parameters()): torch.testing.assert_close(p, q)


# nothing leaks, nothing is kept

def test_the_update_of_a_stage_does_not_depend_on_what_follows():
    x, y = batch(6, 4)
    firsts = []
    for tail in ([nn.Linear(6, 3)], [nn.Sequential(nn.Linear(6, 9), nn.ReLU()), nn.Dropout(), nn.Linear(9, 3)]):
        torch.manual_seed(5); first = nn.Linear(4, 6)
        TPSGD([m.double() for m in [nn.Sequential(first, nn.Tanh()), *tail]], lr=0.5).fit_batch(x, y); firsts.append(first.weight)
    assert torch.equal(*firsts)


@pytest.mark.parametrize("block", ["linear", "conv", "RNNCell"])
def test_no_bytes_are_saved_for_a_backward_pass(block):
    make, shape, features = BLOCKS[block]
    stages, (x, y) = [m.double() for m in [*make(), nn.Linear(features, 3)]], batch(*shape)
    trainer, kept = TPSGD(stages), [x, *(p for s in stages for p in s.parameters())]
    assert saved_bytes(lambda: trainer.fit_batch(x, y), kept) == 0
    net = nn.Sequential(*stages)
    assert saved_bytes(lambda: net(x), kept) > 0  # the counter does count
    assert all(p.grad is None and p.is_leaf for p in net.parameters())


def test_peak_memory_is_flat_in_depth_and_in_time():
    def peaks(make_net, x, y):
        out = []
        for size in (2, 4, 8):
            net = make_net(size); trainer = TPSGD(net)
            inputs = x(size); trainer.fit_batch(inputs, y)
            kept = [inputs, y, *net.parameters(), *trainer.targets()]
            back = lambda: F.cross_entropy(net(inputs), y).backward()
            out.append((peak_bytes(lambda: trainer.fit_batch(inputs, y), kept), peak_bytes(back, kept)))
        return list(zip(*out))
    y = torch.randint(3, (64,))
    deep = lambda d: mlp(*[32] * (d + 1), 3)
    ours, back = peaks(deep, lambda _: torch.randn(64, 32).double(), y)
    assert ours[0] == ours[1] == ours[2] and back[2] > 2 * back[0] > ours[0]
    ours, back = peaks(lambda _: nn.Sequential(Recurrent(nn.RNNCell(5, 32)), nn.Linear(32, 3)), lambda t: torch.randn(64, 4 * t, 5), y)
    assert ours[0] == ours[1] == ours[2] and back[2] > 2 * back[0]


def test_a_sequence_of_stages_is_the_network_and_stages_are_cut_before_weights():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.Tanh(), nn.Flatten(), nn.Linear(150, 8), nn.GELU(), nn.Dropout(), nn.Linear(8, 3), nn.LogSoftmax(1)).eval()
    stages, x = cut(net), torch.randn(2, 1, 16, 16)
    out = x
    for s in stages: out = s(out)
    torch.testing.assert_close(out, net(x))
    assert [s.kind for s in stages] == ["conv", "plain", "other", "plain", "linear", "plain", "other"]
    net[0].requires_grad_(False)
    assert cut(net)[0].kind == "plain"


def test_frozen_weights_and_hooks_are_respected():
    net, seen, (x, y) = mlp(4, 5, 5, 3), [], batch(6, 4)
    net[0].bias.requires_grad_(False); bias = net[0].bias.clone()
    net[2].register_forward_hook(lambda *_: seen.append(1))
    assert [s.kind for s in cut(net)] == ["linear", "other", "linear"]
    TPSGD(net, lr=0.5).fit_batch(x, y)
    assert torch.equal(net[0].bias, bias) and seen == [1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_residual_network_with_batch_norm_trains_in_its_own_dtype(dtype):
    from efftrain.models import cnn
    net = cnn(4, residual=True).to(dtype)
    before = [p.detach().clone() for p in net.parameters()]
    trainer = TPSGD(net, lr=0.05, conv_targets="channel")
    losses = [trainer.fit_batch(torch.randn(8, 1, 12, 12, generator=torch.Generator().manual_seed(0)).to(dtype), torch.arange(8)) for _ in range(12)]
    assert all(l.dtype == dtype for l in losses) and losses[-1] < losses[0] and all(p.dtype == dtype and not torch.equal(p, q) for p, q in zip(net.parameters(), before))


# optimizers, rates, state

def test_a_torch_sgd_for_each_stage_is_the_plain_step_and_schedules_reach_it():
    x, y = batch(6, 4)
    nets = [mlp(4, 5, 3) for _ in range(2)]
    plain, torchs = TPSGD(nets[0], lr=0.3), TPSGD(nets[1], lr=0.3, optimizer=torch.optim.SGD)
    for lr in (0.3, 0.1, 0.05):
        for t in (plain, torchs): t.lr = lr; t.fit_batch(x, y)
    for p, q in zip(*(n.parameters() for n in nets)): torch.testing.assert_close(p, q)
    with pytest.raises(ValueError, match="lr is -1"): plain.lr = -1


def test_rates_by_kind():
    x, y = batch(4, 2, 7, 7)
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(100, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    moved = lambda lr: [(p - q).norm().item() for p, q in zip(stepped(net, lr).parameters(), net.parameters())][::2]
    def stepped(net, lr):
        other = copy.deepcopy(net); TPSGD(other, lr=lr).fit_batch(x, y); return other
    a, b = moved(0.1), moved({"conv": 0.2, "linear": 0.1, "output": 0.05})
    np.testing.assert_allclose(np.array(b) / a, [2, 1, 0.5], rtol=1e-9)


def test_state_continues_bit_for_bit():
    make = lambda net: TPSGD(net, lr=0.1, optimizer=lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9), seed=3)
    one = mlp(4, 5, 3); a = make(one)
    for i in range(5): a.fit_batch(*batch(6, 4, seed=i))
    two = copy.deepcopy(one); b = make(two); b.load_state_dict(pickle.loads(pickle.dumps(a.state_dict())))
    for i in range(5, 9): a.fit_batch(*batch(6, 4, seed=i)); b.fit_batch(*batch(6, 4, seed=i))
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters()))
    with pytest.raises(ValueError, match="seed was 3 and is 4"): TPSGD(two, seed=4).load_state_dict(a.state_dict())


# baselines

def test_backpropagation_and_shallow():
    net, (x, y) = mlp(4, 6, 5, 3), batch(7, 4)
    for rule in ("bp", "shallow"):
        other, loss = copy.deepcopy(net), F.cross_entropy(net(x), y)
        value = Feedback(other, lr=0.4, rule=rule).fit_batch(x, y)
        torch.testing.assert_close(value, loss.detach())
        for i, (p, q, g) in enumerate(zip(other.parameters(), net.parameters(), torch.autograd.grad(loss, list(net.parameters())))):
            torch.testing.assert_close(p, q if rule == "shallow" and i < 4 else q - 0.4 * g)


def test_feedback_alignment_is_its_formula_and_bp_when_the_weights_are_tied():
    net, (x, y) = mlp(4, 6, 5, 3), batch(7, 4)
    W, trainer = [p.detach().numpy().copy() for p in net.parameters()], Feedback(net, lr=0.4, rule="fa")
    B = [trainer._back[id(net[i].weight)].numpy() for i in (0, 2, 4)]
    assert not any(np.allclose(b, w) for b, w in zip(B, W[::2]))
    trainer.fit_batch(x, y)
    h1 = np.tanh(x.numpy() @ W[0].T + W[1]); h2 = np.tanh(h1 @ W[2].T + W[3]); z = h2 @ W[4].T + W[5]
    e = (np.exp(z) / np.exp(z).sum(1, keepdims=True) - np.eye(3)[y]) / 7
    d2 = e @ B[2] * (1 - h2**2); d1 = d2 @ B[1] * (1 - h1**2)
    for p, w, d, a in zip(list(net.parameters())[::2], W[::2], (d1, d2, e), (x.numpy(), h1, h2)): np.testing.assert_allclose(p.detach().numpy(), w - 0.4 * d.T @ a, atol=1e-13)


@pytest.mark.parametrize("block", BLOCKS)
def test_feedback_alignment_with_tied_weights_is_backpropagation(block):
    make, shape, features = BLOCKS[block]
    torch.manual_seed(1)
    net, (x, y) = nn.Sequential(*make(), nn.Linear(features, 3)).double(), batch(*shape)
    other = copy.deepcopy(net)
    fa, bp = Feedback(net, lr=0.4, rule="fa"), Feedback(other, lr=0.4)
    fa._back = {id(p): p.detach().clone() for p in net.parameters() if id(p) in fa._back}
    fa.fit_batch(x, y); bp.fit_batch(x, y)
    for p, q in zip(net.parameters(), other.parameters()): torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", [dict(kernel_size=4, padding="same", dilation=2), dict(kernel_size=3, padding="same"), dict(kernel_size=(1, 4), padding="same"), dict(kernel_size=3, padding="valid", stride=2), dict(kernel_size=3, padding=1, padding_mode="reflect")], ids=str)
@pytest.mark.parametrize("frozen", [False, True])
def test_feedback_alignment_takes_every_padding_and_frozen_convolutions(options, frozen):
    torch.manual_seed(1)
    net, (x, y) = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, groups=2, **options), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3)).double(), batch(5, 2, 9, 9)
    if frozen: net[2].requires_grad_(False)
    other, before = copy.deepcopy(net), net[2].weight.clone()
    fa, bp = Feedback(net, lr=0.4, rule="fa"), Feedback(other, lr=0.4)
    fa._back = {id(p): p.detach().clone() for p in net.parameters() if id(p) in fa._back}
    fa.fit_batch(x, y); bp.fit_batch(x, y)
    for p, q in zip(net.parameters(), other.parameters()): torch.testing.assert_close(p, q, rtol=0, atol=1e-12)
    assert torch.equal(before, net[2].weight) == frozen


@pytest.mark.parametrize("rule", ["dfa", "sdfa"])
def test_direct_feedback_is_its_formula(rule):
    net, (x, y) = mlp(4, 6, 5, 3), batch(7, 4)
    W, trainer = [p.detach().numpy().copy() for p in net.parameters()], Feedback(net, lr=0.4, rule=rule)
    trainer.fit_batch(x, y)
    h1 = np.tanh(x.numpy() @ W[0].T + W[1]); h2 = np.tanh(h1 @ W[2].T + W[3]); z = h2 @ W[4].T + W[5]
    e = (np.exp(z) / np.exp(z).sum(1, keepdims=True) - np.eye(3)[y]) / 7
    sent = np.sign(e) / 7 if rule == "sdfa" else e
    d1, d2 = (sent @ trainer._back[l].numpy() * (1 - h**2) for l, h in ((0, h1), (1, h2)))
    for p, w, d, a in zip(list(net.parameters())[::2], W[::2], (d1, d2, e), (x.numpy(), h1, h2)): np.testing.assert_allclose(p.detach().numpy(), w - 0.4 * d.T @ a, atol=1e-13)


@pytest.mark.parametrize("method", [*RULES, "drtp", "tpsgd"])
@pytest.mark.parametrize("block", ["linear", "conv", "LSTMCell"])
def test_every_method_lowers_the_loss_of_every_kind(method, block):
    make, shape, features = BLOCKS[block]
    torch.manual_seed(2)
    net, (x, y) = nn.Sequential(*make(), nn.Linear(features, 3)).double(), batch(24, *shape[1:])
    trainer = {"drtp": drtp, "tpsgd": TPSGD}.get(method, lambda n, lr: Feedback(n, lr=lr, rule=method))(net, lr=0.05)
    losses = [trainer.fit_batch(x, y).item() for _ in range(60)]
    assert losses[-1] < losses[0] and all(map(math.isfinite, losses))


# bad input

class Pair(nn.Linear):
    def forward(self, x): return super().forward(x), x


class Residual(nn.Sequential):
    def forward(self, x): return x + super().forward(x)


class Both(nn.Module):
    def forward(self, x): return x, x


@pytest.mark.parametrize("call, error, text", [
    (lambda n: TPSGD(nn.Transformer(8, 2, 1, 1)), TypeError, "model is a Transformer"), (lambda n: TPSGD("net"), TypeError, "model is a str"), (lambda n: TPSGD([nn.Linear(4, 3), "tanh"]), TypeError, "stage 1 of model is a str"),
    (lambda n: TPSGD(Residual(nn.Linear(4, 4))), TypeError, "model is a Residual"), (lambda n: TPSGD(n).fit_batch(torch.zeros(0, 4).double(), torch.zeros(0).long()), ValueError, "x holds no examples"),
    (lambda n: TPSGD([nn.LSTM(4, 3), nn.Linear(3, 2)]), TypeError, "stage 0 of model is a LSTM"), (lambda n: TPSGD(nn.Sequential(nn.Tanh())), ValueError, "no trainable weights"), (lambda n: TPSGD([Recurrent(nn.RNNCell(4, 3))]), ValueError, "last stage"),
    (lambda n: TPSGD([nn.Conv2d(1, 3, 2), nn.Flatten()]), ValueError, "classes is None"), (lambda n: TPSGD(n, lr=0), ValueError, "lr is 0"), (lambda n: TPSGD(n, lr={"linear": 0.1, "output": -1}), ValueError, r"lr\['output'\] is -1"),
    (lambda n: TPSGD(n, lr={"dense": 0.1}), ValueError, "key 'dense'"), (lambda n: TPSGD(n, lr={"linear": 0.1}), ValueError, "no 'output'"), (lambda n: TPSGD(n, projection="hadamard"), ValueError, "projection is 'hadamard'"),
    (lambda n: TPSGD(n, local_loss="hinge"), ValueError, "local_loss is 'hinge'"), (lambda n: TPSGD(n, "bce"), ValueError, "loss is 'bce'"), (lambda n: TPSGD(n, target_activation="gelu"), ValueError, "target_activation is 'gelu'"),
    (lambda n: TPSGD(n, target_activation=3), TypeError, "target_activation is 3"), (lambda n: TPSGD(n, scale=0), ValueError, "scale is 0"), (lambda n: TPSGD(n, conv_targets="pixel"), ValueError, "conv_targets is 'pixel'"),
    (lambda n: TPSGD(n, seed=-1), ValueError, "seed is -1"), (lambda n: TPSGD(n, optimizer="sgd"), TypeError, "optimizer is 'sgd'"),
    (lambda n: TPSGD(n).fit_batch(torch.zeros(2, 4).double(), torch.tensor([0, 3])), ValueError, "class 3; classes are 0 to 2"), (lambda n: TPSGD(n).fit_batch(torch.zeros(2, 4).double(), torch.tensor([-1, 0])), ValueError, "class -1"),
    (lambda n: TPSGD(n).fit_batch(torch.zeros(2, 4).double(), torch.tensor([0])), ValueError, r"y has shape \(1,\)"), (lambda n: TPSGD(n).fit_batch(torch.zeros(2, 4).double(), torch.tensor([0, 1]).int()), TypeError, "y is torch.int32"),
    (lambda n: TPSGD(n).fit_batch(torch.zeros(2, 4).double(), torch.zeros(2, 5)), ValueError, r"\(2, 3\)"), (lambda n: TPSGD(n).fit_batch([[0.0]], torch.tensor([0])), TypeError, "x is a list"),
    (lambda n: TPSGD([Pair(4, 3), nn.Linear(3, 3)]).fit_batch(torch.zeros(2, 4), torch.tensor([0, 1])), TypeError, "stage 0 .Pair. returned a tuple"), (lambda n: TPSGD([Both(), nn.Linear(4, 3)]).fit_batch(torch.zeros(2, 4), torch.tensor([0, 1])), TypeError, "stage 0 .Both. returned a tuple"),
    (lambda n: Recurrent(nn.Linear(2, 2)), TypeError, "cell is a Linear"), (lambda n: Recurrent(nn.RNNCell(2, 2), output="first"), ValueError, "output is 'first'"), (lambda n: Recurrent(nn.RNNCell(2, 2))(torch.zeros(2, 2)), ValueError, r"x has shape \(2, 2\)"),
    (lambda n: Feedback(n, rule="dtp"), ValueError, "rule is 'dtp'"), (lambda n: Feedback(n, lr=-1), ValueError, "lr is -1"), (lambda n: Feedback(n).fit_batch(torch.zeros(2, 4).double(), torch.tensor([0, 3])), ValueError, "class 3")])
def test_bad_input_is_named(call, error, text):
    with pytest.raises(error, match=text): call(mlp(4, 5, 3))


def test_a_feature_map_of_another_size_is_refused_for_map_targets_and_taken_for_channels():
    make = lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    for targets in ("map", "channel"):
        trainer = TPSGD(make(), conv_targets=targets)
        trainer.fit_batch(torch.randn(2, 1, 8, 8), torch.tensor([0, 1]))
        if targets == "channel": trainer.fit_batch(torch.randn(2, 1, 9, 9), torch.tensor([0, 1]))
        else:
            with pytest.raises(ValueError, match="196 units"): trainer.fit_batch(torch.randn(2, 1, 9, 9), torch.tensor([0, 1]))


# scikit-learn

def test_check_estimator():
    for result in check_estimator(TPSGDClassifier(random_state=0), on_fail=None):
        assert result["status"] in ("passed", "skipped"), (result["check_name"], result["exception"])


def test_classifier_is_deterministic_and_its_parameters_are_checked():
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(60, 4)), np.array(["a", "b", "c"])[rng.integers(0, 3, 60)]
    state = torch.get_rng_state()
    one, two = (TPSGDClassifier((8,), max_iter=5, random_state=1).fit(X, y) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state) and np.array_equal(one.predict_proba(X), two.predict_proba(X)) and one.n_iter_ == len(one.loss_curve_) == 5
    assert np.allclose(pickle.loads(pickle.dumps(one)).predict_proba(X), one.predict_proba(X))
    more = TPSGDClassifier((8,), random_state=1)
    for _ in range(5): more.partial_fit(X, y, ["a", "b", "c"])
    assert np.array_equal(more.predict_proba(X), one.predict_proba(X))
    with pytest.raises(ValueError, match="class 'd'; classes are"): more.partial_fit(X[:1], ["d"])
    for name, value, error in (("batch_size", 0, ValueError), ("activation", "swish", ValueError), ("hidden_layer_sizes", (8, -1), ValueError), ("lr", -1, ValueError), ("max_iter", 2.5, TypeError), ("tol", -1, ValueError)):
        with pytest.raises(error, match=f"{name}.* is "): TPSGDClassifier(**{"hidden_layer_sizes": (8,), name: value}).fit(X, y)


def run(make, net, X, y, steps):
    trainer, generator = make(net), torch.Generator().manual_seed(0)
    for _ in range(steps):
        rows = torch.randint(len(X), (32,), generator=generator)
        trainer.fit_batch(X[rows], y[rows])
    return net


def test_narrow_hidden_layers_learn_digits_far_better_than_random_ones():
    from efftrain.datasets import digits
    (X, y), (Xt, yt) = (map(torch.from_numpy, digits(s)) for s in ("train", "test"))
    accuracy = lambda make: (run(make, mlp(64, 12, 12, 10).float(), X, y, 400)(Xt).argmax(1) == yt).float().mean().item()
    assert accuracy(lambda n: TPSGD(n, lr=0.1)) > max(0.75, accuracy(lambda n: Feedback(n, lr=0.1, rule="shallow")) + 0.1)


def test_exclusive_or_is_invisible_to_local_targets():
    """Every hidden unit regresses its target on its own inputs; where the classes have no linear part the layer tends to a constant. Backpropagation has no such limit."""
    X = torch.rand(500, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1
    y = (X[:, 0] * X[:, 1] > 0).long()
    start, local, back = mlp(2, 16, 16, 2), run(lambda n: TPSGD(n, lr={"linear": 0.05, "output": 0.2}), mlp(2, 16, 16, 2), X, y, 1500), run(lambda n: Feedback(n, lr=0.5), mlp(2, 16, 16, 2), X, y, 2500)
    with torch.no_grad():
        assert local[:2](X).std(0).mean() < 0.3 * start[:2](X).std(0).mean()
        assert (local(X).argmax(1) == y).float().mean() < 0.7 < 0.9 < (back(X).argmax(1) == y).float().mean()
