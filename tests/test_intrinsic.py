"""Intrinsic dimension: the transforms against matrices written down, problems whose dimension is known, and any module people bring."""
import math
import os

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.linalg import hadamard
from scipy.stats import norm as normal
from torch import nn

from efftrain.models import llama, mlp, vit
from efftrain.peft.intrinsic import IntrinsicModel, d90, layer_of
from efftrain.peft.projection import Dense, Fastfood, PROJECTIONS, Sparse, fastfood, make_projection, walsh_hadamard

every_kind = pytest.mark.parametrize("kind", PROJECTIONS)
every_method = pytest.mark.parametrize("method", ["did", "said"])


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def matrix_of(projection):
    """The D x d matrix, column by column."""
    return torch.stack([projection(e) for e in torch.eye(projection.d, dtype=torch.float64)], 1)


def minimise(model, loss, steps=300):
    optimizer = torch.optim.LBFGS([p for p in model.parameters() if p.requires_grad], max_iter=steps, tolerance_grad=1e-13, tolerance_change=1e-18, line_search_fn="strong_wolfe")
    def closure():
        optimizer.zero_grad()
        value = loss(model)
        value.backward()
        return value
    optimizer.step(closure)
    return loss(model).item()


# the Walsh-Hadamard transform

@pytest.mark.parametrize("bits", range(13))
def test_walsh_hadamard_equals_scipy(bits):
    x = random(2, 3, 2**bits, seed=bits)
    torch.testing.assert_close(walsh_hadamard(x), x @ torch.from_numpy(hadamard(2**bits)).double(), rtol=0, atol=1e-10)


def test_twice_is_n_times_the_identity_and_gradients_are_right():
    x = random(4, 256)
    torch.testing.assert_close(walsh_hadamard(walsh_hadamard(x)), 256 * x)
    x = random(2, 32).requires_grad_()
    assert torch.autograd.gradcheck(walsh_hadamard, x) and torch.autograd.gradgradcheck(walsh_hadamard, x)


def test_walsh_hadamard_takes_strided_and_half_precision_input():
    x = random(64, 5).T
    torch.testing.assert_close(walsh_hadamard(x), walsh_hadamard(x.contiguous()))
    torch.testing.assert_close(walsh_hadamard(x.bfloat16()).double(), walsh_hadamard(x), rtol=0.05, atol=0.5)
    assert walsh_hadamard(torch.zeros(0, 8)).shape == (0, 8)


@pytest.mark.parametrize("x, error", [(torch.ones(3), ValueError), (torch.ones(2, 0), ValueError), (torch.tensor(1.0), ValueError), (torch.ones(4, dtype=torch.long), TypeError)])
def test_walsh_hadamard_refuses(x, error):
    with pytest.raises(error, match="^x "): walsh_hadamard(x)


# projections

@pytest.mark.parametrize("d, D", [(1, 1), (1, 7), (5, 37), (8, 64), (13, 13), (64, 65), (33, 400)])
def test_fastfood_equals_its_definition(d, D):
    p = Fastfood(d, D, seed=d, dtype=torch.float64)
    n, H = p.n, torch.from_numpy(hadamard(p.n)).double()
    assert n == 2 ** math.ceil(math.log2(d)) and len(p.signs) == math.ceil(D / n)
    blocks = [H @ torch.diag(g) @ torch.eye(n, dtype=torch.float64)[o.long() % n] @ H @ torch.diag(s.double()) for s, g, o in zip(p.signs, p.gauss, p.order)]
    P = torch.cat(blocks)[:D, :d] / math.sqrt(n * D)
    torch.testing.assert_close(matrix_of(p), P)
    y = random(D, seed=1)
    torch.testing.assert_close(p.transpose(y), P.T @ y)


@every_kind
def test_projection_is_linear_and_its_gradient_the_transpose(kind):
    p = make_projection(kind, 6, 150, seed=2, dtype=torch.float64)
    P, x, y = matrix_of(p), random(6), random(150, seed=1)
    torch.testing.assert_close(p(x), P @ x)
    x.requires_grad_()
    assert torch.autograd.gradcheck(p, x) and torch.autograd.gradgradcheck(p, x)
    torch.testing.assert_close(torch.autograd.grad(p(x), x, y)[0], P.T @ y)


@every_kind
def test_projection_keeps_lengths_on_average(kind):
    x = random(20)
    lengths = np.array([(make_projection(kind, 20, 3000, seed=s, dtype=torch.float64)(x).norm() / x.norm()).item() ** 2 for s in range(80)])
    assert abs(lengths.mean() - 1) < 4 * lengths.std() / math.sqrt(80) + 1e-9
    assert abs(lengths.mean() - 1) < 0.1


def test_fastfood_blocks_are_independent_and_gaussian_like():
    p = Fastfood(256, 256 * 40, seed=5, dtype=torch.float64)
    P = matrix_of(p) * math.sqrt(p.D)
    assert len({tuple(row.tolist()) for row in (p.order.long() % p.n)}) == 40
    quantiles = torch.quantile(P.flatten()[:1_000_000], torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], dtype=torch.float64))
    np.testing.assert_allclose(quantiles, normal.ppf([0.05, 0.25, 0.5, 0.75, 0.95]), atol=0.05)


@every_kind
def test_projection_is_determined_by_the_seed_alone(kind):
    x = torch.ones(9)
    make = lambda seed: make_projection(kind, 9, 500, seed)(x)
    state = torch.get_rng_state()
    first = make(3)
    assert torch.equal(state, torch.get_rng_state()), "the caller's generator must not move"
    torch.manual_seed(99)
    assert torch.equal(first, make(3)) and not torch.equal(first, make(4))


def test_fastfood_treats_chunks_as_one():
    from efftrain.peft import projection
    whole = Fastfood(50, 5000, seed=1)
    x, y = torch.randn(50), torch.randn(5000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(projection, "_CHUNK", 256)
        cut = Fastfood(50, 5000, seed=1)
        results = cut(x), cut.transpose(y)
    torch.testing.assert_close(results[0], whole(x)); torch.testing.assert_close(results[1], whole.transpose(y))
    torch.testing.assert_close(fastfood(x, 5000, seed=1), whole(x))


def test_memory_is_linear_and_no_matrix_exists():
    D = 2**20
    for d in (3, 1000, 50_000):
        p = Fastfood(d, D)
        assert sum(b.nbytes for b in p.buffers()) <= 13 * (D + p.n)
    assert sum(b.nbytes for b in Sparse(100, D).buffers()) <= 12 * 100 * (round(math.sqrt(D)) + 1)
    Q = Dense(20, 300, dtype=torch.float64).matrix
    torch.testing.assert_close(Q.T @ Q, torch.eye(20, dtype=torch.float64))


@pytest.mark.parametrize("kind, d, D, text", [("gauss", 1, 2, "projection is 'gauss'"), ("fastfood", 0, 5, "d is 0"), ("sparse", 6, 5, "d is 6"), ("dense", 1, 0, "D is 0"),
                                             ("fastfood", True, 5, "d is True"), ("fastfood", 2.0, 5, "d is 2.0"), ("dense", 2**15, 2**15, "d = 32768")])
def test_projections_refuse(kind, d, D, text):
    with pytest.raises(ValueError, match=text.replace("(", r"\(")): make_projection(kind, d, D)


def test_projection_refuses_the_wrong_length():
    for kind in PROJECTIONS:
        with pytest.raises(ValueError, match="x has shape"): make_projection(kind, 4, 10)(torch.ones(5))


# the model

class Sums(nn.Module):
    """Li et al. 2018, section 2: ten sums of a hundred numbers each must be 1 to 10; the intrinsic dimension is 10."""
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1000, dtype=torch.float64))

    def forward(self): return (self.w.view(10, 100).sum(1) - torch.arange(1, 11)).square().mean()


@every_kind
def test_the_toy_has_dimension_ten(kind):
    residual = {d: minimise(IntrinsicModel(Sums(), d, "did", kind, seed=d), lambda m: m()) for d in (9, 10)}
    assert residual[9] > 1e-5 and residual[10] < 1e-7


def test_whole_orthonormal_space_has_the_optimum_of_full_fine_tuning():
    A, b = random(40, 12), random(40, 1, seed=1)
    start = nn.Linear(12, 1, bias=False).double()
    for d, equal in ((12, True), (11, False)):
        model = IntrinsicModel(start.requires_grad_(True), d, "did", "dense", seed=3)
        minimise(model, lambda m: (m(A) - b).square().mean())
        exact = torch.linalg.lstsq(A, b).solution[:, 0]
        assert torch.allclose(model.materialize().weight[0], exact, atol=1e-6) == equal


def test_gradients_of_theta_and_lambdas_are_right():
    model = IntrinsicModel(mlp([3, 5, 2], activation="tanh").double(), 9, "said", seed=1)
    x = random(4, 3)
    with torch.no_grad(): model.theta.copy_(random(7, seed=2)); model.lambdas.add_(random(2, seed=3))
    def loss(theta, lambdas): return torch.func.functional_call(model, {"theta": theta, "lambdas": lambdas}, (x,)).square().sum()
    assert torch.autograd.gradcheck(loss, (model.theta.detach().clone().requires_grad_(), model.lambdas.detach().clone().requires_grad_()))


@every_method
def test_starts_at_the_original_and_trains_d_numbers(method):
    x, original = random(5, 4, dtype=torch.float32), mlp([4, 6, 3])
    before, weights = original(x).detach(), {k: v.clone() for k, v in original.state_dict().items()}
    model = IntrinsicModel(original, 11, method)
    assert torch.equal(model(x), before) and sum(p.numel() for p in model.parameters() if p.requires_grad) == 11
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.1)
    for _ in range(5):
        optimizer.zero_grad(); model(x).square().sum().backward(); optimizer.step()
    assert model(x).square().sum() < before.square().sum()
    assert all(torch.equal(v, weights[k]) for k, v in original.state_dict().items()), "the original's weights must stay"
    torch.testing.assert_close(model.materialize()(x), model(x))


def test_said_scales_each_layer_by_its_own_number():
    model = IntrinsicModel(mlp([4, 6, 3]), 10, "said", seed=1)
    with torch.no_grad(): model.theta.normal_(); model.lambdas.copy_(torch.tensor([2.0, 0.0]))
    start = dict(model.model.named_parameters())
    step = {n: (v - start[n]).detach() for n, v in model.weights().items()}
    same = IntrinsicModel(mlp([4, 6, 3]), 8, "did", seed=1)
    with torch.no_grad(): same.theta.copy_(model.theta)
    plain = {n: (v - start[n]).detach() for n, v in same.weights().items()}
    for n in step: torch.testing.assert_close(step[n], plain[n] * (2.0 if layer_of(n) == "0" else 0.0), rtol=1e-4, atol=1e-6)


def test_kept_weights_follow_every_change():
    model, x = IntrinsicModel(mlp([4, 6, 3]), 10, "said"), random(5, 4, dtype=torch.float32)
    with torch.no_grad():
        seen = [model(x)]
        for change in (lambda: model.theta.add_(1), lambda: model.lambdas.mul_(2), lambda: setattr(model.theta, "data", torch.zeros(8)), lambda: model.model[0].weight.add_(1)):
            change(); seen.append(model(x))
            torch.testing.assert_close(seen[-1], model.materialize()(x))
    assert all(not torch.allclose(a, b) for a, b in zip(seen, seen[1:]))


@every_method
def test_tied_weights_move_once_and_together(method):
    tied = llama(32, 1, tied=True)
    D = sum(p.numel() for p in tied.parameters())
    model, ids = IntrinsicModel(tied, 40, method, seed=2), torch.randint(512, (2, 8), generator=torch.Generator().manual_seed(0))
    assert model.D == D
    with torch.no_grad():
        model.theta.normal_()
        out = model.materialize()
        assert out.lm_head.weight is out.model.embed_tokens.weight
        torch.testing.assert_close(model(input_ids=ids).logits, out(input_ids=ids).logits)
    model(input_ids=ids).logits.square().mean().backward()
    with torch.no_grad(): model.theta.add_(model.theta.grad, alpha=-1e-3)
    assert IntrinsicModel(llama(32, 1, tied=False), 40, method).D == D + 512 * 32


@pytest.mark.parametrize("make, inputs", [(lambda: vit(32, 1), lambda: torch.ones(2, 1, 28, 28)), (lambda: nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.LazyLinear(2)), lambda: torch.ones(2, 1, 6, 6))])
def test_any_module(make, inputs):
    model = make()
    model(inputs())  # lazy layers become real
    small = IntrinsicModel(model, 12, "said", seed=1)
    out = small(inputs())
    getattr(out, "logits", out).square().sum().backward()
    assert small.theta.grad.norm() > 0


def test_buffers_move_as_in_the_original_and_dropout_follows_the_mode():
    x = random(8, 4, dtype=torch.float32)
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    small = IntrinsicModel(net, 6, "did")
    small(x)
    assert net[1].num_batches_tracked == 1 and net[1].running_mean.abs().sum() > 0
    small.eval()
    assert torch.equal(small(x), small(x)) and net[1].num_batches_tracked == 1


def test_hugging_face_classifier_learns_in_the_training_loop():
    from efftrain.datasets import ArrayBatches, digits
    from efftrain.training import classification_loss, evaluate_accuracy, fit
    (x, y), test = digits("train"), digits("test")
    shape = lambda a: torch.from_numpy(a).view(-1, 1, 8, 8)
    model = IntrinsicModel(vit(32, 1, patch=2, image=8), 300, "said", seed=0)
    history = fit(model, classification_loss, ArrayBatches((shape(x), y), 64, 0), torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.05), 300, seed=0)
    assert history.loss.tail(5).mean() < 0.6 * history.loss.head(5).mean() and evaluate_accuracy(model, (shape(test[0]), test[1])) > 0.4


def test_frozen_parameters_stay_and_do_not_count():
    net = mlp([4, 6, 3])
    net[0].requires_grad_(False)
    small = IntrinsicModel(net, 5, "said")
    assert small.D == 21 and small.lambdas.numel() == 1
    with torch.no_grad(): small.theta.normal_()
    out = small.materialize()
    assert torch.equal(out[0].weight, net[0].weight) and not out[0].weight.requires_grad and not torch.equal(out[2].weight, net[2].weight) and out[2].weight.requires_grad


def test_layers():
    names = {"bert.encoder.layer.3.output.dense.bias": "bert.encoder.layer.3", "bert.embeddings.LayerNorm.bias": "bert.embeddings", "classifier.weight": "classifier", "0.weight": "0", "w": "w"}
    assert {n: layer_of(n) for n in names} == names
    assert IntrinsicModel(mlp([4, 6, 3]), 10, layers="tensor").lambdas.numel() == 4


# saved

@every_method
@every_kind
def test_a_saved_task_is_small_and_whole(method, kind, tmp_path):
    model = IntrinsicModel(mlp([20, 30, 5]), 33, method, kind, seed=7)
    with torch.no_grad():
        for p in (model.theta, model.lambdas):
            if p is not None: p.normal_()
    path = tmp_path / "task.safetensors"
    model.save(path)
    again = IntrinsicModel.load(path, mlp([20, 30, 5]))
    assert all(torch.equal(a, b) for a, b in zip(model.weights().values(), again.weights().values()))
    assert path.stat().st_size < 4 * 33 + 500 and os.listdir(tmp_path) == ["task.safetensors"]


def test_an_interrupted_save_leaves_the_old_file(tmp_path, monkeypatch):
    model, path = IntrinsicModel(mlp([4, 6, 3]), 10), tmp_path / "task.safetensors"
    model.save(path)
    before = path.read_bytes()
    with torch.no_grad(): model.theta.add_(1)
    def broken(*_): raise OSError("disk full")
    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(OSError): model.save(path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["task.safetensors"]


def test_load_refuses_what_does_not_fit(tmp_path):
    from safetensors.torch import save_file
    path = tmp_path / "task.safetensors"
    IntrinsicModel(mlp([4, 6, 3]), 10).save(path)
    with pytest.raises(ValueError, match="51 trainable"): IntrinsicModel.load(path, mlp([4, 7, 3]))
    with pytest.raises(ValueError, match="other parameters"): IntrinsicModel.load(path, mlp([6, 6, 1, 1]))
    with pytest.raises(ValueError, match="other weights"): IntrinsicModel.load(path, mlp([4, 6, 3], seed=1))
    save_file({"x": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="not written by"): IntrinsicModel.load(tmp_path / "other.safetensors", mlp([4, 6, 3]))
    (tmp_path / "broken.safetensors").write_bytes(path.read_bytes()[:40])
    with pytest.raises(ValueError, match="broken.safetensors"): IntrinsicModel.load(tmp_path / "broken.safetensors", mlp([4, 6, 3]))


def test_state_dict_and_pickle_carry_the_learned_numbers():
    import copy
    model = IntrinsicModel(mlp([4, 6, 3]), 10, "said", seed=3)
    with torch.no_grad(): model.theta.normal_()
    fresh = IntrinsicModel(mlp([4, 6, 3]), 10, "said", seed=3)
    fresh.load_state_dict(model.state_dict())
    x = random(2, 4, dtype=torch.float32)
    with torch.no_grad(): assert torch.equal(fresh(x), model(x)) and torch.equal(copy.deepcopy(model)(x), model(x))


@pytest.mark.parametrize("options, text", [(dict(d=0), "d is 0"), (dict(d=2), r"d is 2; .*\[3, 51\].*2 layers"), (dict(d=4, layers="tensor"), r"\[5, 51\]"), (dict(d=52, method="did"), r"\[1, 51\]"),
                                          (dict(d=True, method="did"), "d is True"), (dict(d=3.0), "d is 3.0"), (dict(d=9, method="lora"), "method is 'lora'"),
                                          (dict(d=9, projection="hash"), "projection is 'hash'"), (dict(d=9, layers="block"), "layers is 'block'")])
def test_model_refuses(options, text):
    net = mlp([4, 6, 3])
    with pytest.raises(ValueError, match=text): IntrinsicModel(net, **options)
    assert all(p.requires_grad for p in net.parameters()), "a refused model must be left as it was"


def test_model_refuses_other_models():
    with pytest.raises(ValueError, match="no parameters"): IntrinsicModel(mlp([4, 6, 3]).requires_grad_(False), 5)
    with pytest.raises(ValueError, match="no parameters"): IntrinsicModel(nn.ReLU(), 5)
    with pytest.raises(ValueError, match="several kinds"): IntrinsicModel(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double()), 5)
    with pytest.raises(TypeError, match="model is a str"): IntrinsicModel("bert", 5)


# d90

def curve(values, seeds=3, noise=0.0):
    rng = np.random.default_rng(0)
    return pd.DataFrame([dict(d=d, seed=s, score=v + noise * rng.normal()) for d, v in values for s in range(seeds)])


def test_d90_interpolates_in_log_d():
    table = curve([(1, 0.5), (10, 0.6), (100, 0.8), (1000, 0.9)])
    found = d90(table.sample(frac=1, random_state=0), 0.75 / 0.9)  # the order of rows does not matter
    assert found["mean"] == pytest.approx(10 ** 1.75) and found["low"] == found["high"] == pytest.approx(found["mean"]) and found["n"] == 3
    assert d90(table, 0.9, share=1)["mean"] == pytest.approx(1000)
    assert d90(table, 0.5)["mean"] == 1 and d90(table, 2.0)["mean"] == math.inf


def test_d90_interval_covers_the_truth():
    """Scores with noise around a line in log d: a 90% interval must cover the true crossing about that often."""
    hits, dims = 0, [1, 10, 100, 1000]
    for trial in range(60):
        rng = np.random.default_rng(trial)
        table = pd.DataFrame([dict(d=d, seed=s, score=0.3 + 0.2 * math.log10(d) + 0.03 * rng.normal()) for d in dims for s in range(12)])
        found = d90(table, 0.6 / 0.9, n=200, level=0.9)
        hits += found["low"] <= 10 ** 1.5 <= found["high"]
    assert 45 <= hits <= 60


def test_d90_refuses():
    table = curve([(1, 0.5), (10, 0.6)])
    for bad, text in (((table.drop(columns="score"), 0.9), "score"), ((table.iloc[:0], 0.9), "0 rows"), ((table, 0.0), "full_score"), ((table, [0.9, math.nan]), "full_score"), ((table.iloc[1:], 0.9), "lacks scores"), ((pd.concat([table, table]), 0.9), "several")):
        with pytest.raises(ValueError, match=text): d90(*bad)
    with pytest.raises(ValueError, match="share"): d90(table, 0.9, share=1.5)
