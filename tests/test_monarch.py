"""Monarch: multiplication, projection, layers, models, schedule and transforms against independent implementations, brute force, wrong input and saved states."""
import copy
import math

import numpy as np
import pytest
import scipy.fft
import scipy.linalg
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.nn.utils import prune

from efftrain.compress.masks import prunable_layers
from efftrain.compress.monarch import MonarchLinear, MonarchSchedule, monarch_dense, monarch_multiply, monarch_project, monarch_shapes, to_dense, to_monarch
from efftrain.compress.monarch_transforms import monarch_convolution, monarch_dft, monarch_dft2, monarch_hadamard, monarch_star_dense, monarch_star_factor, monarch_star_multiply
from efftrain.datasets import TokenBatches, english
from efftrain.models import llama, mlp, vit
from efftrain.training import fit, lm_loss


def permutation(rows, columns):
    """Takes a table stored row by row to the same stored column by column."""
    return np.eye(rows * columns)[np.arange(rows * columns).reshape(rows, columns).T.ravel()]


def written_out(L, R):
    """P L P^T R in NumPy, every matrix in full."""
    (l, s, r), (k, q, p) = L.shape, R.shape
    return permutation(l, s) @ scipy.linalg.block_diag(*L) @ permutation(r, l) @ scipy.linalg.block_diag(*R)


def slices_error(W, nblocks):
    """Squared error of the best Monarch matrix, from singular values of slices one at a time in NumPy."""
    (l, s, r), (k, q, p) = monarch_shapes(W.shape[1], W.shape[0], nblocks)
    return sum((np.linalg.svd(W[b::l, a * p:(a + 1) * p], compute_uv=False)[sum(t % l == b for t in range(a * q, (a + 1) * q)):]**2).sum() for a in range(k) for b in range(l))


factor_sizes = st.tuples(*[st.integers(1, 5)] * 4, st.integers(1, 3)).map(lambda v: ((v[0], v[1] * v[2], v[3]), (v[1], v[4], v[0] * v[2])))  # R (k, q, p), L (l, s, r) with k q = l r


# multiplication

@settings(max_examples=60, deadline=None)
@given(factor_sizes, st.integers(0, 3), st.booleans())
def test_multiply_is_the_product_of_written_out_matrices(sizes, rows, is_complex):
    g = torch.Generator().manual_seed(0)
    dtype = torch.complex128 if is_complex else torch.float64
    R, L = (torch.randn(s, dtype=dtype, generator=g) for s in sizes)
    x = torch.randn(rows, sizes[0][0] * sizes[0][2], dtype=dtype, generator=g)
    full = written_out(L.numpy(), R.numpy())
    np.testing.assert_allclose(monarch_multiply(x, L, R).numpy(), x.numpy() @ full.T, atol=1e-10)
    np.testing.assert_allclose(monarch_dense(L, R).numpy(), full, atol=1e-10)


def test_multiply_is_the_same_as_grouped_convolutions_and_einsum():
    torch.manual_seed(0)
    for layer in (MonarchLinear(24, 40, 4), MonarchLinear(40, 24, 8, bias=False), MonarchLinear(36, 36, (4, 9))):
        x = torch.randn(5, layer.in_features)
        torch.testing.assert_close(layer.to_torch()(x), layer(x))
    L, R = torch.randn(4, 4, 4), torch.randn(4, 4, 4)
    x = torch.randn(3, 16)
    torch.testing.assert_close(monarch_multiply(x, L, R), torch.einsum("bkp,kqp,qsk->bsq", x.reshape(3, 4, 4), R, L).reshape(3, 16))


def test_gradients():
    torch.manual_seed(0)
    for dtype in (torch.float64, torch.complex128):
        x, L, R = (torch.randn(s, dtype=dtype, requires_grad=True) for s in ((3, 2, 12), (2, 5, 6), (3, 4, 4)))
        assert torch.autograd.gradcheck(monarch_multiply, (x, L, R))
    layer, x = MonarchLinear(12, 20, 4).double(), torch.randn(7, 12, dtype=torch.float64)
    layer(x).square().sum().backward(); mine = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad(); nn.functional.linear(x, layer.weight, layer.bias).square().sum().backward()
    for a, b in zip(mine, layer.parameters()): torch.testing.assert_close(a, b.grad)


@pytest.mark.parametrize("call, kind, text", [
    (lambda: monarch_multiply(torch.ones(3, 5), torch.ones(2, 2, 2), torch.ones(2, 2, 3)), ValueError, "its last axis must be 2 x 3 = 6"),
    (lambda: monarch_multiply(torch.tensor(1.0), torch.ones(2, 2, 2), torch.ones(2, 2, 3)), ValueError, "x has shape"),
    (lambda: monarch_multiply(torch.ones(3, 6), torch.ones(2, 2, 3), torch.ones(2, 2, 3)), ValueError, "the two must be equal"),
    (lambda: monarch_dense(torch.ones(4, 4), torch.ones(2, 2, 3)), ValueError, "L has shape"), (lambda: monarch_dense([1], torch.ones(2, 2, 3)), TypeError, "L is a list"),
    (lambda: monarch_shapes(64, 176, 5), ValueError, r"nblocks is 5.*64 and out_features 176, which 1, 2, 4, 8, 16 do"), (lambda: monarch_shapes(64, 64, 0), ValueError, "at least 1"),
    (lambda: monarch_shapes(64, 12, (3, 4)), ValueError, "allowed: 1, 2, 4, 8, 16, 32, 64"), (lambda: monarch_shapes(64, 64, 2.0), TypeError, "nblocks is 2.0"),
    (lambda: monarch_shapes(64, 64, True), TypeError, "nblocks is True"), (lambda: monarch_project(torch.ones(4, 4, 4), 2), ValueError, "W has shape"),
    (lambda: monarch_project(torch.ones(4, 4).long(), 2), TypeError, "dtype"), (lambda: monarch_project(np.ones((4, 4)), 2), TypeError, "ndarray"),
    (lambda: monarch_project(torch.full((4, 4), float("nan")), 2), ValueError, "not finite"), (lambda: MonarchLinear(12, 10, 4), ValueError, "1, 2 do"),
    (lambda: MonarchLinear(8, 8, 4, std=-1), ValueError, "std is -1"), (lambda: MonarchLinear(8, 8, 4).set_weight(torch.ones(8, 4)), ValueError, "W has shape"),
    (lambda: MonarchLinear(8, 8, 4, std="a"), ValueError, "std is 'a'"), (lambda: MonarchLinear(8, 8, 4).set_weight([1.0]), TypeError, "W is a list"), (lambda: to_monarch(mlp([4, 4]), 2, targets=5), TypeError, "targets is a int"),
    (lambda: MonarchSchedule(10, 0.0), ValueError, "share is 0.0"), (lambda: MonarchSchedule(10).hooks(clip=-1.0), ValueError, "clip is -1.0"), (lambda: to_dense(MonarchLinear(8, 8, 4)), ValueError, "model is itself"),
    (lambda: MonarchSchedule(0), ValueError, "steps is 0"), (lambda: MonarchSchedule(10, 1.5), ValueError, "share is 1.5"), (lambda: MonarchSchedule(10, float("nan")), ValueError, "share"),
    (lambda: to_dense(mlp([4, 4])), ValueError, "no Monarch layer"), (lambda: to_monarch(mlp([4, 4]), 2, init="zero"), ValueError, "init is 'zero'"), (lambda: to_monarch("model"), TypeError, "model is a str"),
    (lambda: monarch_dft(12, 5), ValueError, "1, 2, 3, 4, 6, 12"), (lambda: monarch_dft(12, dtype=torch.float32), ValueError, "complex"), (lambda: monarch_dft(0), ValueError, "n is 0"),
    (lambda: monarch_dft(8, 2.0), ValueError, "nblocks is 2.0"), (lambda: monarch_dft2(0, 4), ValueError, "height is 0"), (lambda: monarch_dft2(4, 4, dtype=torch.float64), ValueError, "complex"),
    (lambda: monarch_star_multiply(torch.ones(3, 5), *monarch_convolution(torch.ones(4))), ValueError, "its last axis must be 2 x 2 = 4"), (lambda: monarch_convolution([1.0, 2.0]), TypeError, "kernel is a list"),
    (lambda: monarch_star_multiply(torch.ones(3, 4), monarch_convolution(torch.ones(9))[0], monarch_convolution(torch.ones(4))[1]), ValueError, "M1 takes 3 x 3 = 9"),
    (lambda: monarch_star_factor(np.eye(4), 2), TypeError, "A is a ndarray"), (lambda: monarch_star_factor(torch.full((4, 4), float("nan")), 2), ValueError, "16 numbers that are not finite"),
    (lambda: monarch_star_dense([1], torch.ones(2, 2, 2), torch.ones(2, 2, 2)), TypeError, "L1 is a list"), (lambda: monarch_star_dense(torch.ones(2, 2), torch.ones(2, 2, 2), torch.ones(2, 2, 2)), ValueError, "L1 has shape"),
    (lambda: monarch_hadamard(12), ValueError, "powers of two"), (lambda: monarch_convolution(torch.ones(3, 3)), ValueError, "kernel has shape"),
    (lambda: monarch_star_factor(torch.ones(4, 5), 2), ValueError, "square"), (lambda: monarch_star_factor(torch.zeros(4, 4), 2), ValueError, "singular"),
    (lambda: monarch_star_factor(torch.randn(16, 16), 4), ValueError, "not in MM"), (lambda: monarch_star_dense(torch.ones(2, 2, 2), torch.ones(3, 2, 2), torch.ones(2, 2, 2)), ValueError, "L1, R, L2"),
])
def test_wrong_input(call, kind, text):
    torch.manual_seed(0)
    with pytest.raises(kind, match=text): call()


# projection

@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 6), st.booleans(), st.integers(0, 99))
def test_projection_is_optimal_slice_by_slice_and_idempotent(b, s, p, is_complex, seed):
    W = torch.randn(b * s, b * p, dtype=torch.complex128 if is_complex else torch.float64, generator=torch.Generator().manual_seed(seed))
    M = monarch_dense(*monarch_project(W, b))
    assert float((W - M).abs().square().sum()) == pytest.approx(slices_error(W.numpy(), b), abs=1e-9)
    torch.testing.assert_close(monarch_dense(*monarch_project(M, b)), M, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(torch.sum((W - M).conj() * M).abs(), torch.zeros((), dtype=torch.float64), atol=1e-9, rtol=0)  # the residual is orthogonal to a projection


@pytest.mark.parametrize("out, in_, nblocks", [(12, 12, 2), (9, 9, 3), (8, 16, 4), (10, 15, 5), (12, 6, (3, 4))])
def test_no_optimiser_beats_the_projection(out, in_, nblocks):
    """Alternating least squares in NumPy on the written-out matrices, from random starts: each half is the exact optimum for the other factor."""
    rng = np.random.default_rng(0)
    W = rng.normal(size=(out, in_))
    left, right = monarch_shapes(in_, out, nblocks)
    closed = float((torch.tensor(W) - monarch_dense(*monarch_project(torch.tensor(W), nblocks))).square().sum())
    def best(which, L, R):
        """The factor `which` that is optimal given the other, by least squares over the matrices of its unit entries."""
        shape = left if which == "L" else right
        units = np.eye(math.prod(shape)).reshape(-1, *shape)
        columns = np.stack([(written_out(u, R) if which == "L" else written_out(L, u)).ravel() for u in units], 1)
        return np.linalg.lstsq(columns, W.ravel(), rcond=None)[0].reshape(shape)
    errors = []
    for _ in range(2):
        R = rng.normal(size=right)
        for _ in range(15): L = best("L", None, R); R = best("R", L, None)
        errors.append(((W - written_out(L, R))**2).sum())
    assert closed <= min(errors) + 1e-9 and min(errors) < closed * 1.02


def test_projection_keeps_dtype_and_balances_factors():
    W = torch.randn(64, 32)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        L, R = monarch_project(W.to(dtype), 4)
        assert L.dtype == R.dtype == dtype
    L, R = monarch_project(W.double(), 4)
    assert float(torch.linalg.norm(L)) == pytest.approx(float(torch.linalg.norm(R)))
    assert all(f.count_nonzero() == 0 for f in monarch_project(torch.zeros(8, 8), 4))


# the layer and models

@pytest.mark.parametrize("sizes", [(256, 256, 4), (256, 128, 16), (128, 512, 4)])
def test_variance_of_outputs_is_that_of_a_dense_layer(sizes):
    torch.manual_seed(1)
    x, dense = torch.randn(400, sizes[0]), nn.Linear(*sizes[:2])
    ratio = np.mean([float((MonarchLinear(*sizes)(x).var() / dense(x).var()).detach()) for _ in range(8)])
    assert 0.85 < ratio < 1.15
    assert float(MonarchLinear(*sizes, std=0.02).weight.detach().std()) == pytest.approx(0.02, rel=0.1)


def test_report_counts_bytes_and_operations_and_errors():
    model = llama(32, 2)
    dense = {n: m.weight.detach().clone() for n, m in prunable_layers(model).items()}
    before = sum(p.numel() for p in model.parameters()) * 4
    report = to_monarch(model, 4)
    assert report.bytes_before == before and report.bytes_after == sum(p.numel() for p in model.parameters()) * 4
    for r in report.layers:
        layer, W = model.get_submodule(r["name"]), dense[r["name"]]
        assert r["bytes_before"] == 4 * W.numel() and r["flops_before"] == 2 * W.numel() and r["flops_after"] == 2 * (layer.L.numel() + layer.R.numel()) and r["bytes_after"] == 2 * r["flops_after"]
        assert r["error"] == pytest.approx(math.sqrt(slices_error(W.double().numpy(), 4)) / float(torch.linalg.norm(W)), rel=1e-4)
    assert report.table().shape[0] == len(dense) == 14 and report.flops_after < report.flops_before


@pytest.mark.parametrize("make", [lambda: vit(32, 1), lambda: llama(32, 1), lambda: nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)])
def test_there_and_back_again(make):
    model = make()
    x = torch.randn(2, 1, 28, 28) if hasattr(model, "vit") else torch.arange(6)[None] if hasattr(model, "lm_head") else torch.randn(2, 5, 16)
    out = lambda m: m(x).logits if hasattr(m(x), "logits") else m(x)
    to_monarch(model, 4)
    for mode in (True, False):
        model.train(mode); twin = copy.deepcopy(model).eval(); to_dense(twin)
        with torch.no_grad(): torch.testing.assert_close(out(model.eval()), out(twin), atol=1e-5, rtol=1e-4)
    assert not any(isinstance(m, MonarchLinear) for m in twin.modules())


def test_gpt2_conv1d_becomes_conv1d_again():
    from transformers import GPT2Config, GPT2LMHeadModel
    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=11, n_positions=8)).eval()
    original = copy.deepcopy(model)
    assert len(to_monarch(model, 1).layers) == 4  # one block loses nothing where a side is square; here the rank is full
    with torch.no_grad(): torch.testing.assert_close(model(torch.arange(6)[None]).logits, original(torch.arange(6)[None]).logits, atol=1e-4, rtol=1e-3)
    to_dense(model)
    W = model.transformer.h[0].mlp.c_fc.weight.detach().clone()
    to_monarch(model, 4); torch.testing.assert_close(model.transformer.h[0].mlp.c_fc.weight, monarch_dense(*monarch_project(W.T, 4))); to_dense(model)  # a Conv1D's weight is (in, out)
    torch.testing.assert_close(model.transformer.h[0].mlp.c_fc.weight, monarch_dense(*monarch_project(W.T, 4)).T)
    assert {n: tuple(v.shape) for n, v in model.state_dict().items()} == {n: tuple(v.shape) for n, v in original.state_dict().items()}
    original.load_state_dict(model.state_dict())


def test_state_dict_safetensors_and_deepcopy(tmp_path):
    from safetensors.torch import load_file, save_model
    a, b = vit(32, 1, seed=0), vit(32, 1, seed=1)
    to_monarch(a, 4); to_monarch(b, 4, init="random")
    assert sum("L" == n.rsplit(".", 1)[-1] for n in a.state_dict()) == 6
    b.load_state_dict(a.state_dict()); x = torch.randn(2, 1, 28, 28)
    assert torch.equal(a(x).logits, b(x).logits) and torch.equal(a(x).logits, copy.deepcopy(a)(x).logits)
    save_model(a, tmp_path / "vit.safetensors"); c = vit(32, 1, seed=2); to_monarch(c, 4, init="random"); c.load_state_dict(load_file(tmp_path / "vit.safetensors"))
    assert torch.equal(a(x).logits, c(x).logits)
    d, e = llama(32, 1, seed=0), llama(32, 1, seed=1)
    to_monarch(d, 8); to_monarch(e, 8, init="random")
    d.save_pretrained(tmp_path); assert e.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False).missing_keys in ([], ["lm_head.weight"])
    assert torch.equal(d(torch.arange(5)[None]).logits, e(torch.arange(5)[None]).logits)


def test_compile_autocast_and_half_precision():
    layer, x = MonarchLinear(32, 64, 4), torch.randn(5, 32)
    torch.testing.assert_close(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), layer(x))
    with torch.autocast("cpu", dtype=torch.bfloat16): y = layer(x); assert y.dtype == torch.bfloat16; y.float().sum().backward()
    assert layer.L.grad.dtype == torch.float32 and torch.isfinite(layer.R.grad).all()
    torch.testing.assert_close(y.float(), layer(x), atol=5e-2, rtol=5e-2)
    model = mlp([32, 64, 8]).to(torch.bfloat16); to_monarch(model, 4)
    assert model(x.bfloat16()).dtype == torch.bfloat16 and model[0].L.dtype == torch.bfloat16


def test_settings_of_layers_stay():
    model = mlp([16, 32, 8]); model[0].weight.requires_grad_(False); model[0].eval(); bias = model[0].bias
    to_monarch(model, 4)
    assert not model[0].L.requires_grad and not model[0].R.requires_grad and model[0].bias is bias and bias.requires_grad and not model[0].training and model[2].training and model[2].L.requires_grad
    to_dense(model)
    assert not model[0].weight.requires_grad and model[0].bias is bias and not model[0].training and model[2].weight.requires_grad
    to_monarch(model, 4, lambda name, layer: name == "2")
    assert isinstance(model[0], nn.Linear) and isinstance(model[2], MonarchLinear)


def tied():
    m = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8), "c": nn.Linear(8, 8)}); m["b"].weight = m["a"].weight
    return m

def same_module_twice():
    m = nn.ModuleDict({"a": nn.Linear(8, 8)}); m["b"] = m["a"]
    return m

def pruned():
    m = mlp([8, 8]); prune.l1_unstructured(m[0], "weight", 0.5)
    return m

def monarch():
    m = mlp([8, 8]); to_monarch(m, 2)
    return m

def broken():
    m = mlp([8, 8, 8]); m[2].weight.data[0, 0] = math.inf
    return m


@pytest.mark.parametrize("make, targets, text", [
    (tied, None, "'a' shares its weight with \\['b'\\]"), (same_module_twice, None, "'a' shares its weight"), (pruned, None, "'0' is compressed"), (monarch, None, "\\['0'\\] are Monarch layers already"),
    (monarch, "0", "Monarch layers already"), (broken, None, "'2' has weights that are not finite"), (lambda: mlp([8, 6, 8]), None, "layer '0'.*1, 2 do"), (lambda: nn.Linear(8, 8), None, "model is itself"),
    (lambda: llama(16, 1, heads=2), ["lm_head"], "'lm_head' shares its weight with"), (lambda: mlp([8, 8]), ["9"], "targets names \\['9'\\]"), (lambda: mlp([8, 8, 8]), ["1"], "'1' is a ReLU"),
    (lambda: nn.LayerNorm(3), None, "no linear layer")])
def test_what_cannot_be_replaced_is_named_and_nothing_changes(make, targets, text):
    model = make()
    before, types = {n: v.clone() for n, v in model.state_dict().items()}, [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=text): to_monarch(model, 4, targets)
    assert types == [type(m) for m in model.modules()] and all(torch.equal(v, before[n]) or v.isinf().any() for n, v in model.state_dict().items())


def test_tied_layers_left_out_are_no_obstacle():
    model = tied(); to_monarch(model, 4, ["c"])
    assert isinstance(model["c"], MonarchLinear) and model["a"].weight is model["b"].weight


def test_a_layer_used_twice_stays_one_and_shared_factors_are_refused():
    model = nn.ModuleDict({"a": MonarchLinear(8, 8, 2)}); model["b"] = model["a"]
    W = model["a"].weight.detach().clone()
    to_dense(model)
    assert model["a"] is model["b"] and torch.equal(model["b"].weight, W)
    model = nn.ModuleDict({"a": MonarchLinear(8, 8, 2), "b": MonarchLinear(8, 8, 2)}); model["b"].R = model["a"].R
    with pytest.raises(ValueError, match="'b' shares a factor with 'a'"): to_dense(model)
    assert all(isinstance(m, MonarchLinear) for m in model.values())


def test_conversion_draws_no_random_numbers_and_runs_no_hooks():
    model, calls = mlp([16, 8]), []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    torch.manual_seed(0); state = torch.get_rng_state()
    assert to_monarch(model, np.int64(4)).layers[0]["nblocks"] == "4" and model[0].L.shape == (4, 2, 2)
    assert torch.equal(torch.get_rng_state(), state) and not calls


# reverse sparsification

@pytest.mark.parametrize("optimizer", [lambda p: torch.optim.AdamW(p, lr=1e-3), lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9)])
def test_schedule_expands_once_without_a_jump_and_the_optimizer_follows(optimizer):
    torch.manual_seed(0)
    model, x = mlp([16, 32, 16]), torch.randn(8, 16)
    to_monarch(model, 4, init="random")
    groups = [dict(params=[p for n, p in model.named_parameters() if "bias" not in n], weight_decay=0.01), dict(params=[p for n, p in model.named_parameters() if "bias" in n], weight_decay=0.0)]
    opt, schedule = optimizer(groups), MonarchSchedule(10, 0.6)
    for step in range(1, 11):
        opt.zero_grad(); model(x).square().mean().backward(); opt.step()
        before = model(x).detach()
        schedule.after_step(model, opt, step)
        torch.testing.assert_close(model(x).detach(), before, atol=1e-6, rtol=1e-5)
        assert any(isinstance(m, MonarchLinear) for m in model.modules()) == (not schedule.is_dense(step)) == (step < 6)
    assert [len(g["params"]) for g in opt.param_groups] == [2, 2] and {id(p) for p in opt.param_groups[0]["params"]} == {id(model[0].weight), id(model[2].weight)}
    assert {id(p) for p in opt.state} == {id(p) for p in model.parameters()}


def test_schedule_refuses_split_factors_and_counts_compute():
    model = mlp([8, 8]); to_monarch(model, 4)
    opt = torch.optim.SGD([dict(params=[model[0].L]), dict(params=[model[0].R, model[0].bias])], lr=0.1)
    with pytest.raises(ValueError, match="same parameter group"): MonarchSchedule.expand(model, opt)
    assert isinstance(model[0], MonarchLinear)
    assert MonarchSchedule(10, 0.01).switch_step == 1, "at least one update with factors, as after_step does it"
    assert MonarchSchedule(100).compute(1, 2) == 110 and MonarchSchedule(100, 1.0).compute(1, 2) == 100 and MonarchSchedule(100).switch_step == 90


def test_schedule_with_fit_learns():
    model = llama(16, 1, heads=2); to_monarch(model, 2, init="random")
    opt = torch.optim.AdamW(model.parameters(), lr=6e-3)
    losses = fit(model, lm_loss, TokenBatches(english(), 4, 32, 0), opt, 30, device="cpu", **MonarchSchedule(30, 0.5).hooks(clip=1.0)).loss
    assert not any(isinstance(m, MonarchLinear) for m in model.modules()) and losses.iloc[-5:].mean() < losses.iloc[:5].mean() - 0.3


# transforms

@settings(max_examples=30, deadline=None)
@given(st.integers(1, 60), st.data())
def test_fourier_for_every_split(n, data):
    nblocks = data.draw(st.sampled_from([None] + [d for d in range(1, n + 1) if n % d == 0]))
    x = torch.randn(2, n, dtype=torch.complex128)
    L, R, order = monarch_dft(n, nblocks)
    torch.testing.assert_close(monarch_multiply(x[:, order], L, R), torch.fft.fft(x), atol=1e-10, rtol=1e-10)
    L, R, order = monarch_dft(n, nblocks, inverse=True)
    torch.testing.assert_close(monarch_multiply(x[:, order], L, R), torch.fft.ifft(x), atol=1e-10, rtol=1e-10)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12))
def test_fourier_in_two_dimensions(height, width):
    x = torch.randn(2, height, width, dtype=torch.complex128)
    np.testing.assert_allclose(monarch_multiply(x.flatten(1), *monarch_dft2(height, width)).numpy().reshape(x.shape), np.fft.fft2(x.numpy()), atol=1e-10)
    np.testing.assert_allclose(monarch_multiply(x.flatten(1), *monarch_dft2(height, width, inverse=True)).numpy().reshape(x.shape), scipy.fft.ifft2(x.numpy()), atol=1e-10)


def test_hadamard_and_convolution_against_scipy():
    for n, nblocks in ((1, None), (16, None), (64, 2), (256, 16)): assert np.array_equal(monarch_dense(*monarch_hadamard(n, nblocks)).numpy(), scipy.linalg.hadamard(n))
    rng = np.random.default_rng(0)
    for n, nblocks in ((12, 3), (25, None), (64, 16)):
        kernel, x = rng.normal(size=(2, n))
        first, second = monarch_convolution(torch.tensor(kernel), nblocks)
        np.testing.assert_allclose(monarch_star_multiply(torch.tensor(x), first, second).numpy(), scipy.linalg.circulant(kernel) @ x, atol=1e-10)
        np.testing.assert_allclose(monarch_dense(*first).numpy() @ monarch_dense(*second).numpy().conj().T, scipy.linalg.circulant(kernel), atol=1e-10)


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 5), st.integers(2, 5), st.integers(0, 99))
def test_members_of_the_star_class_are_factored(b, m, seed):
    g = torch.Generator().manual_seed(seed)
    L1, L2, R = (torch.eye(s[-1], dtype=torch.float64) + 0.3 * torch.randn(s, dtype=torch.float64, generator=g) for s in ((b, m, m), (b, m, m), (m, b, b)))
    P = permutation(b, m)
    A = P @ scipy.linalg.block_diag(*L1.numpy()) @ P.T @ scipy.linalg.block_diag(*R.numpy()) @ P @ scipy.linalg.block_diag(*L2.numpy()) @ P.T
    np.testing.assert_allclose(monarch_star_dense(L1, R, L2).numpy(), A, atol=1e-12)
    try: found = monarch_star_factor(torch.tensor(A), b)
    except ValueError as error: assert "singular" in str(error); return
    np.testing.assert_allclose(monarch_star_dense(*found).numpy(), A, atol=1e-6 * np.abs(A).max())


def test_star_factors_are_found_through_rounding():
    """In single precision, divisions by badly conditioned blocks enlarge the rounding a thousandfold; the least-squares updates bring it back. Equal eigenvalues and a matrix of the class that is exact stay so."""
    g = torch.Generator().manual_seed(0)
    L1, L2, R = (torch.randn(s, dtype=torch.float64, generator=g) for s in ((16, 16, 16), (16, 16, 16), (16, 16, 16)))
    A = monarch_star_dense(L1, R, L2)
    error = lambda A, found: float(torch.linalg.norm(monarch_star_dense(*found) - A) / torch.linalg.norm(A.double()))
    assert error(A, monarch_star_factor(A, 16)) < 1e-11 and error(A, monarch_star_factor(A.float(), 16)) < 2e-5
    R[1] = R[0]
    B, H = monarch_star_dense(L1, R, L2), torch.tensor(scipy.linalg.hadamard(64))
    assert error(B, monarch_star_factor(B, 16)) < 1e-9 and error(H, monarch_star_factor(H, 8)) < 1e-12
    with pytest.raises(ValueError, match="not in MM"): monarch_star_factor(torch.randn(64, 64, generator=g), 8)
