"""SLTrain: supports, products and gradients against SciPy and autograd, ranks, layers, models, saved states, kernels, wrong input."""
import copy
import math
import zlib

import numpy as np
import pytest
import scipy.sparse
import scipy.stats
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.utils.flop_counter import FlopCounterMode

from efftrain.accounting import llama_loss, memory
from efftrain.datasets import TokenBatches, english
from efftrain.memory.galore import GaLoreAdamW8bit, per_layer
from efftrain.memory.sltrain import KERNELS, SLLinear, merge, random_support, sl_linear, to_sltrain, trainable_bytes
from efftrain.models import llama, mlp, vit
from efftrain.training import fit, lm_loss

every_kernel = pytest.mark.parametrize("kernel", KERNELS)


def case(m, n, r, density, rows, bias=True, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(*shape, dtype=dtype, generator=g).requires_grad_()
    indices = random_support(m, n, density, seed)
    return make(*rows, n), make(m, r), make(r, n), make(len(indices)), indices, make(m) if bias else None


def by_scipy(B, A, values, indices, scale, shape):
    i = indices.numpy().astype(np.int64)
    return scale * B.detach().numpy() @ A.detach().numpy() + scipy.sparse.coo_matrix((values.detach().numpy(), (i // shape[1], i % shape[1])), shape).toarray()


def random_model(model, rank=4, density=0.1, alpha=4.0, seed=0, **rest):
    torch.manual_seed(seed)
    report = to_sltrain(model, rank, density, alpha, seed=seed, **rest)
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, SLLinear): m.B.normal_(std=0.1)
    return report


# the support

@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.floats(0.001, 0.999), st.integers(0, 2**40))
def test_supports_are_sorted_different_and_of_the_asked_size(m, n, density, seed):
    if math.floor(density * m * n) < 1:
        with pytest.raises(ValueError, match="leaves no entry"): random_support(m, n, density, seed)
        return
    drawn = random_support(m, n, density, seed)
    assert drawn.dtype == torch.int32 and len(drawn) == math.floor(density * m * n) and (drawn[1:] > drawn[:-1]).all() and drawn[0] >= 0 and drawn[-1] < m * n


@pytest.mark.parametrize("density", [0.1, 0.2, 0.6])
def test_supports_are_uniform_over_sets(density):
    """Chi-square over all sets of two, four or three of the places of a small matrix, both ways of drawing."""
    shape = (4, 5) if density == 0.1 else (2, 5) if density == 0.2 else (1, 5)
    sets = math.comb(shape[0] * shape[1], math.floor(density * shape[0] * shape[1]))
    seen = {}
    for seed in range(20 * sets):
        key = tuple(random_support(*shape, density, seed).tolist()); seen[key] = seen.get(key, 0) + 1
    counts = np.array([*seen.values(), *[0] * (sets - len(seen))])
    assert len(counts) == sets and scipy.stats.chisquare(counts).pvalue > 1e-4


def test_supports_come_from_the_seed_alone():
    state = torch.get_rng_state()
    a = random_support(50, 60, 0.03, 5)
    torch.manual_seed(99); torch.set_default_dtype(torch.float64)
    try: assert torch.equal(a, random_support(50, 60, 0.03, 5)) and not torch.equal(a, random_support(50, 60, 0.03, 6))
    finally: torch.set_default_dtype(torch.float32); torch.set_rng_state(state)
    assert random_support(50, 60, 0.03, 5, device="meta").shape == a.shape
    assert random_support(2**16, 2**16, 1e-8, 0).dtype == torch.int64, "positions beyond 2^31 do not fit 32 bits"


# products and gradients

@settings(max_examples=50, deadline=None)
@given(st.integers(1, 24), st.integers(1, 24), st.data(), st.sampled_from(KERNELS), st.booleans())
def test_products_and_gradients_are_those_of_the_matrix_scipy_makes(m, n, data, kernel, bias):
    r = data.draw(st.integers(1, min(m, n))); rows = data.draw(st.sampled_from([(), (1,), (5,), (2, 30)])); density = data.draw(st.floats(1.01 / (m * n) if m * n > 1 else 0.999, 0.99)) if m * n > 2 else 0.6
    if math.floor(density * m * n) < 1: return
    x, B, A, values, indices, b = case(m, n, r, density, rows, bias)
    W = torch.tensor(by_scipy(B, A, values, indices, 0.3, (m, n)), requires_grad=True)
    upstream = torch.randn(*rows, m, dtype=torch.float64)
    y, expected = sl_linear(x, B, A, values, indices, b, 0.3, kernel), nn.functional.linear(x, W, b)
    torch.testing.assert_close(y, expected, atol=1e-10, rtol=1e-10)
    wanted = [x, B, A, values] + ([b] if bias else [])
    mine = torch.autograd.grad(y, wanted, upstream)
    dx, G, *db = torch.autograd.grad(expected, [x, W] + ([b] if bias else []), upstream)
    theirs = [dx, 0.3 * G @ A.detach().T, 0.3 * B.detach().T @ G, torch.tensor(G.numpy().reshape(-1)[indices.numpy()])] + db
    for a, c in zip(mine, theirs): torch.testing.assert_close(a, c, atol=1e-10, rtol=1e-10)


@every_kernel
def test_single_precision_at_the_size_where_sparse_products_start(kernel):
    x, B, A, values, indices, b = case(300, 260, 16, 0.02, (128,), dtype=torch.float32)
    W = torch.tensor(by_scipy(B.double(), A.double(), values.double(), indices, 0.1, (300, 260)))
    y = sl_linear(x, B, A, values, indices, b, 0.1, kernel)
    torch.testing.assert_close(y, nn.functional.linear(x.double(), W, b.double()).float(), atol=1e-4, rtol=1e-5)
    y.square().mean().backward()
    G = (2 / y.numel() * y.detach().double()).T @ x.detach().double()
    torch.testing.assert_close(values.grad, G.reshape(-1)[indices.long()].float(), atol=1e-6, rtol=1e-4)


@every_kernel
@pytest.mark.parametrize("frozen", range(5))
def test_each_gradient_is_right_when_one_is_not_wanted(kernel, frozen):
    x, B, A, values, indices, b = case(30, 20, 3, 0.1, (50,))
    inputs = [x, B, A, values, b]
    want = torch.autograd.grad(sl_linear(x, B, A, values, indices, b, 0.5, kernel).sin().sum(), inputs)
    inputs[frozen].requires_grad_(False)
    sl_linear(x, B, A, values, indices, b, 0.5, kernel).sin().sum().backward()
    for i, (t, g) in enumerate(zip(inputs, want)):
        if i == frozen: assert t.grad is None
        else: torch.testing.assert_close(t.grad, g)


@every_kernel
def test_derivatives_of_derivatives(kernel):
    x, B, A, values, indices, b = case(4, 5, 2, 0.3, (3,))
    run = lambda *t: sl_linear(*t[:4], indices, t[4], 0.5, kernel)
    assert torch.autograd.gradcheck(run, (x, B, A, values, b)) and torch.autograd.gradgradcheck(run, (x, B, A, values, b))


def test_gradients_of_single_examples_by_torch_func():
    x, B, A, values, indices, _ = case(6, 7, 2, 0.2, (4,), bias=False)
    B, A, values = B.detach(), A.detach(), values.detach()
    loss = lambda p, row: sl_linear(row[None], *p, indices, scale=0.5, kernel="dense").square().sum()
    each = torch.func.vmap(torch.func.grad(loss), (None, 0))((B, A, values), x.detach())
    for i in range(4):
        for a, b in zip(each, torch.func.grad(loss)((B, A, values), x.detach()[i])): torch.testing.assert_close(a[i], b)


def test_a_full_support_is_a_dense_layer_and_a_thin_one_low_rank():
    x, B, A, values, indices, b = case(8, 9, 2, 0.99, (4,))
    W = torch.zeros(72, dtype=torch.float64).index_put((indices.long(),), values.detach()).view(8, 9)
    torch.testing.assert_close(sl_linear(x, torch.zeros_like(B), A, values, indices, b), nn.functional.linear(x, W, b))
    low = nn.functional.linear(nn.functional.linear(x, A), 0.5 * B, b)
    torch.testing.assert_close(sl_linear(x, B, A, bias=b, scale=0.5), low)
    torch.testing.assert_close(sl_linear(x, B, A, torch.zeros(1, dtype=torch.float64), torch.tensor([5], dtype=torch.int32), b, 0.5), low)


@every_kernel
def test_no_matrix_is_kept_and_none_made_by_the_factored_product(kernel):
    x, B, A, values, indices, _ = case(512, 384, 8, 0.01, (32,), bias=False, dtype=torch.float32)
    kept, largest = [], [0]
    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, f, types, args=(), kwargs=None):
            out = f(*args, **(kwargs or {}))
            for t in torch.utils._pytree.tree_leaves(out):
                if isinstance(t, torch.Tensor) and t.layout == torch.strided: largest[0] = max(largest[0], t.numel())
            return out
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t), Watch(): sl_linear(x, B, A, values, indices, None, 1.0, kernel).sum().backward()
    assert sum(kept) == sum(t.numel() for t in (x, B, A, values, indices))
    assert (largest[0] < 512 * 384) == (kernel in ("factored", "auto")) and torch.isfinite(values.grad).all()


@pytest.mark.parametrize("call, kind, text", [
    (lambda x, B, A, v, i, b: sl_linear(x.tolist(), B, A), TypeError, "x is a list"), (lambda x, B, A, v, i, b: sl_linear(x, A, B), ValueError, "they must be"), (lambda x, B, A, v, i, b: sl_linear(x[:, 1:], B, A), ValueError, "last axis must be 9"),
    (lambda x, B, A, v, i, b: sl_linear(x, B, A, v), ValueError, "together"), (lambda x, B, A, v, i, b: sl_linear(x, B, A, v, i[1:]), ValueError, "values has shape"), (lambda x, B, A, v, i, b: sl_linear(x, B, A, v, i.float()), TypeError, "indices has dtype"),
    (lambda x, B, A, v, i, b: sl_linear(x, B, A, v, i, b[1:]), ValueError, r"bias has shape \(7,\)"), (lambda x, B, A, v, i, b: sl_linear(x, B, A, v, i, b, kernel="fast"), ValueError, "kernel is 'fast'"),
    (lambda *_: random_support(4, 5, 0.0), ValueError, "density is 0.0"), (lambda *_: random_support(4, 5, 1.0), ValueError, "density is 1.0"), (lambda *_: random_support(4, 5, float("nan")), ValueError, "density"), (lambda *_: random_support(4, 5, "a"), TypeError, "density"),
    (lambda *_: random_support(4.0, 5, 0.5), TypeError, "out_features is 4.0"), (lambda *_: random_support(4, 0, 0.5), ValueError, "in_features is 0"), (lambda *_: random_support(4, 5, 0.5, -1), ValueError, "seed is -1"), (lambda *_: random_support(4, 5, 0.5, 1.5), TypeError, "seed is 1.5"),
    (lambda *_: SLLinear(9, 8, 0), ValueError, "rank is 0"), (lambda *_: SLLinear(9, 8, 9), ValueError, r"rank is 9 for a 8 x 9 matrix; it must lie in \[1, 8\]"), (lambda *_: SLLinear(9, 8, True), TypeError, "rank is True"), (lambda *_: SLLinear(9, 8, 2, 0.001), ValueError, "leaves no entry"),
    (lambda *_: SLLinear(9, 8, 2, alpha=0), ValueError, "alpha is 0"), (lambda *_: SLLinear(9, 8, 2, alpha=math.inf), ValueError, "alpha is inf"), (lambda *_: SLLinear(9, 8, 2, alpha="1"), TypeError, "alpha is '1'"), (lambda *_: SLLinear(9, 8, 2, kernel="x"), ValueError, "kernel is 'x'"),
    (lambda *_: SLLinear(0, 8, 2, None), ValueError, "in_features is 0"), (lambda *_: SLLinear(9, 8, 2, None).reset_parameters(0.0), ValueError, "std is 0.0"), (lambda *_: SLLinear(9, 8, 2, None).sparse(), ValueError, "no sparse part"),
    (lambda *_: trainable_bytes([]), TypeError, "model is a list"), (lambda *_: to_sltrain([]), TypeError, "model is a list"), (lambda *_: merge([]), TypeError, "model is a list"), (lambda *_: merge(mlp([4, 4])), ValueError, "no sparse plus low-rank layer"),
    (lambda *_: merge(SLLinear(4, 4, 1, 0.5)), ValueError, "model is itself"), (lambda *_: to_sltrain(mlp([4, 4]), targets=5), TypeError, "targets is a int"), (lambda *_: to_sltrain(mlp([4, 4]), targets=[""]), TypeError, "targets holds ''"), (lambda *_: to_sltrain(mlp([4, 4]), exclude=None), TypeError, "exclude is a NoneType"),
])
def test_wrong_input(call, kind, text):
    with pytest.raises(kind, match=text): call(*case(8, 9, 2, 0.3, (4,)))


# the layer

def test_start_is_the_published_one():
    torch.manual_seed(0)
    layer = SLLinear(256, 128, 32, 0.05, alpha=8)
    assert layer.B.count_nonzero() == 0 and layer.scale == 0.25
    for t, bound in ((layer.A, 1 / 16), (layer.values, 1 / 16), (layer.bias, 128**-0.5)):
        assert t.abs().max() <= bound and scipy.stats.kstest(t.detach().flatten().numpy() / bound, scipy.stats.uniform(-1, 2).cdf).pvalue > 1e-3
    torch.testing.assert_close(layer.weight, layer.sparse().to_dense())


@pytest.mark.parametrize("n, r", [(60, 1), (100, 20)])
def test_the_sum_has_full_rank_above_the_threshold_and_not_below(n, r):
    ranks = {c: [] for c in (0.3, 3.0)}
    for c in ranks:
        for seed in range(6):
            torch.manual_seed(seed)
            layer = SLLinear(n, n, r, c * math.log(n) / n, bias=False, seed=seed, dtype=torch.float64)
            with torch.no_grad(): layer.B.normal_()
            ranks[c].append(int(torch.linalg.matrix_rank(layer.weight)))
            empty = n - len(np.unique(layer.indices.numpy() // n))
            assert ranks[c][-1] <= n - empty + r, "empty rows can be filled by the product alone"
    assert min(ranks[3.0]) == n and max(ranks[0.3]) < n


def test_the_support_outlives_everything(tmp_path):
    from safetensors.torch import load_file, save_model
    layer = SLLinear(40, 30, 4, 0.1, seed=1)
    with torch.no_grad(): layer.B.normal_()
    x, support = torch.randn(6, 40), layer.indices.clone()
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
    for _ in range(5): optimizer.zero_grad(); layer(x).square().sum().backward(); optimizer.step()
    assert torch.equal(layer.indices, support) and layer.values.grad.count_nonzero() > 0
    for other in (copy.deepcopy(layer), copy.deepcopy(layer).double().float(), copy.deepcopy(layer).to("meta").to_empty(device="cpu"), SLLinear(40, 30, 4, 0.1, seed=2)):
        other.load_state_dict(layer.state_dict())
        assert torch.equal(other.indices, support) and other.indices.dtype == torch.int32 and torch.equal(other(x), layer(x))
    save_model(layer, tmp_path / "layer.safetensors"); torch.save(layer.state_dict(), tmp_path / "layer.pt"); torch.save(layer, tmp_path / "whole.pt")
    for state in (load_file(tmp_path / "layer.safetensors"), torch.load(tmp_path / "layer.pt", weights_only=True), torch.load(tmp_path / "whole.pt", weights_only=False).state_dict()):
        other = SLLinear(40, 30, 4, 0.1, seed=2); other.load_state_dict(state); assert torch.equal(other(x), layer(x))
    empty = SLLinear(40, 30, 4, 0.1, seed=1, device="meta").to_empty(device="cpu"); empty.reset_parameters()
    assert torch.equal(empty.indices, support) and empty.A.isfinite().all()
    assert layer.bfloat16().indices.dtype == torch.int32


def test_states_that_are_none_are_refused():
    layer = SLLinear(40, 30, 4, 0.1); state = layer.state_dict()
    for change, text in ((dict(indices=state["indices"].half()), "no support"), (dict(indices=state["indices"].flip(0)), "no support"), (dict(indices=state["indices"] + 1200), "no support"), (dict(indices=torch.zeros_like(state["indices"])), "no support"),
                         (dict(_extra_state=torch.tensor([4.0])), "alpha 4 and this one 16"), (dict(B=state["B"][:, 1:]), "size mismatch"), (dict(values=state["values"][1:]), "size mismatch")):
        before = layer.indices.clone()
        with pytest.raises((RuntimeError, ValueError), match=text): layer.load_state_dict({**state, **change})
        assert torch.equal(layer.indices, before)


def test_without_a_sparse_part_it_is_low_rank():
    layer = SLLinear(20, 12, 3, None, alpha=6)
    with torch.no_grad(): layer.B.normal_()
    x = torch.randn(5, 20)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, 2 * layer.B @ layer.A, layer.bias))
    assert layer.values is None and layer.indices is None and torch.linalg.matrix_rank(layer.weight) == 3 and set(layer.state_dict()) == {"B", "A", "bias", "_extra_state"}
    layer(x).sum().backward(); assert layer.A.grad is not None
    for _ in range(3): assert float(SLLinear(128, 256, 16, None).weight.std()) == pytest.approx(1 / math.sqrt(3 * 128), rel=0.15), "as nn.Linear"
    layer.reset_parameters(std=0.02); assert 0.01 < float(layer.weight.std()) < 0.03
    assert SLLinear(1, 1, 1, None)(torch.ones(2, 1)).shape == (2, 1)


def test_without_a_sparse_part_and_with_B_at_zero_blocks_get_no_gradient():
    """The trap that the sparse part, or drawing B, avoids."""
    ids = torch.randint(512, (2, 16), generator=torch.Generator().manual_seed(0))
    def largest(density, zero):
        model = llama(32, 2); torch.manual_seed(0); to_sltrain(model, 8, density, 4.0)
        for m in model.modules():
            if zero and isinstance(m, SLLinear): nn.init.zeros_(m.B)
        model(input_ids=ids, labels=ids).loss.backward()
        return max(float(p.grad.abs().max()) for n, p in model.named_parameters() if "layers." in n)
    assert largest(None, True) == 0 < min(largest(None, False), largest(0.05, True), largest(0.05, False))
    model = llama(64, 1); std = float(model.model.layers[0].mlp.up_proj.weight.std()); to_sltrain(model, 16, None, 4.0)
    assert float(model.model.layers[0].mlp.up_proj.weight.std()) == pytest.approx(std, rel=0.15), "starts as large as the old weights"


def test_compile_autocast_and_half_precision():
    layer, x = SLLinear(32, 64, 4, 0.1), torch.randn(5, 32)
    with torch.no_grad(): layer.B.normal_()
    layer(x).square().sum().backward(); plain = {n: p.grad.clone() for n, p in layer.named_parameters()}; layer.zero_grad()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x)); compiled(x).square().sum().backward()
    for n, p in layer.named_parameters(): torch.testing.assert_close(p.grad, plain[n], atol=1e-4, rtol=1e-4)
    layer.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16): y = layer(x)
    assert y.dtype == torch.bfloat16; y.float().square().sum().backward()
    for n, p in layer.named_parameters(): assert p.grad.dtype == torch.float32 and (p.grad - plain[n]).norm() < 0.03 * plain[n].norm(), n
    half = copy.deepcopy(layer).bfloat16()
    torch.testing.assert_close(half(x.bfloat16()).float(), layer(x), atol=0.2, rtol=0.05)
    with torch.autocast("cpu", dtype=torch.bfloat16): assert layer.weight.isfinite().all() and layer.weight.dtype == torch.bfloat16
    assert SLLinear(32, 64, 4, 0.1, device="meta")(torch.empty(3, 32, device="meta")).shape == (3, 64)
    wide = SLLinear(512, 512, 16, 0.01).bfloat16()
    assert wide(torch.randn(64, 512).bfloat16()).dtype == torch.bfloat16, "no sparse product in bfloat16 on a CPU: the dense one is taken"


# models

@pytest.mark.parametrize("make", [lambda: vit(32, 1), lambda: llama(32, 1), lambda: nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), lambda: mlp([8, 16, 4])])
def test_there_and_back_again(make):
    model = make()
    x = torch.randn(2, 1, 28, 28) if hasattr(model, "vit") else torch.arange(6)[None] if hasattr(model, "lm_head") else torch.randn(2, 5, 16) if hasattr(model, "self_attn") else torch.randn(3, 8)
    out = lambda m: m(x).logits if hasattr(m(x), "logits") else m(x)
    shapes = {n: p.shape for n, p in model.named_parameters()}
    report = random_model(model)
    for mode in (True, False):
        model.train(mode); twin = copy.deepcopy(model); back = merge(twin); assert twin.training == mode
        with torch.no_grad(): torch.testing.assert_close(out(model.eval()), out(twin.eval()), atol=1e-5, rtol=1e-4)
    assert {n: p.shape for n, p in twin.named_parameters()} == shapes and not any(isinstance(m, SLLinear) for m in twin.modules())
    assert report.bytes_before == back.bytes_after and report.bytes_after == back.bytes_before and report.flops_before == back.flops_after


def test_gpt2_conv1d_becomes_conv1d_again():
    from transformers import GPT2Config, GPT2LMHeadModel
    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=11, n_positions=8)).eval()
    shapes, bias = {n: tuple(v.shape) for n, v in model.state_dict().items()}, model.transformer.h[0].mlp.c_fc.bias
    assert len(random_model(model).layers) == 4
    layer, logits = model.transformer.h[0].mlp.c_fc, model(torch.arange(6)[None]).logits
    assert (layer.in_features, layer.out_features) == (16, 64) and layer.bias is bias
    merge(model)
    torch.testing.assert_close(model(torch.arange(6)[None]).logits, logits, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model.transformer.h[0].mlp.c_fc.weight, layer.weight.T)
    assert {n: tuple(v.shape) for n, v in model.state_dict().items()} == shapes


def test_report_counts_bytes_and_operations():
    model = llama(64, 1)
    dense = copy.deepcopy(model)
    report = random_model(model, rank=8, density=0.05)
    size = lambda m: sum(t.nbytes for t in (*m.parameters(), *m.buffers()))
    assert report.bytes_before == size(dense) and report.bytes_after == size(model) and len(report.layers) == len(report.table()) == 7
    for r in report.layers:
        layer, old = model.get_submodule(r["name"]), dense.get_submodule(r["name"])
        m, n = old.weight.shape
        assert r["nonzeros"] == int(0.05 * m * n) == layer.values.numel() and r["bytes_before"] == 4 * m * n and r["bytes_after"] == 4 * (8 * (m + n) + 2 * r["nonzeros"])
        assert r["flops_before"] == 2 * m * n and r["flops_after"] == 2 * (8 * (m + n) + r["nonzeros"]) and math.isnan(r["error"])
    assert trainable_bytes(model) == 4 * sum(p.numel() for p in model.parameters())
    with FlopCounterMode(display=False) as counter: model.model.layers[0].mlp.up_proj(torch.zeros(100, 64))
    assert counter.get_total_flops() == 2 * 100 * 64 * 176 + 2 * 8 * 64 * 176, "a small matrix is added up and multiplied"


def test_a_step_on_fake_tensors_is_the_real_one():
    """Bytes by part, counted and allocated; and what is kept for the backward pass is what the dense model keeps, or less."""
    def make(density=0.05):
        model = llama(64, 1); to_sltrain(model, 16, density, 4.0); return model
    adam = lambda m: torch.optim.AdamW(m.parameters())
    fake, real, dense = (memory(f, adam, llama_loss(4, 32), fake=k) for f, k in ((make, True), (make, False), (lambda: llama(64, 1), True)))
    assert (fake.parameters, fake.weights, fake.gradients, fake.buffers) == (real.parameters, real.weights, real.gradients, real.buffers) and fake.optimizer == pytest.approx(real.optimizer, abs=200)
    assert fake.weights < dense.weights and fake.gradients < dense.gradients and fake.activations <= dense.activations


def test_targets_and_exclusions():
    model = llama(32, 2)
    assert {r["name"].rsplit(".", 1)[1] for r in to_sltrain(model, 4, targets=("attn", "mlp"), exclude=("o_proj", "layers.1")).layers} == {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"}
    assert isinstance(model.model.layers[1].mlp.up_proj, nn.Linear) and isinstance(model.model.layers[0].self_attn.o_proj, nn.Linear) and isinstance(model.lm_head, nn.Linear)
    more = to_sltrain(model, 64, targets=lambda name, layer: "layers.1" in name, seed=3)
    assert len(more.layers) == 7 and {r["rank"] for r in more.layers} == {32}, "cut to the shorter side"
    a, b = (random_model(m := llama(32, 2), exclude=e) and {n: l.indices for n, l in m.named_modules() if isinstance(l, SLLinear)} for e in ((), "layers.0"))
    assert len(a) == 14 and len(b) == 7 and all(torch.equal(a[n], b[n]) for n in b), "a support depends on the seed and on the layer's name"
    assert len({tuple(v.tolist()) for n, v in a.items() if n.endswith(("q_proj", "k_proj", "v_proj", "o_proj"))}) == 8
    name, layer = next((n, l) for n, l in model.named_modules() if isinstance(l, SLLinear) and l.seed >= 3 * 2**32)
    assert torch.equal(layer.indices, random_support(layer.out_features, layer.in_features, 0.03, 3 * 2**32 + zlib.crc32(name.encode())))


def test_settings_of_layers_stay():
    model = mlp([16, 32, 8]).double(); model[0].weight.requires_grad_(False); model[0].eval(); bias = model[0].bias
    to_sltrain(model, 4, 0.1)
    assert not any(p.requires_grad for p in (model[0].A, model[0].B, model[0].values)) and model[0].bias is bias and bias.requires_grad and not model[0].training and model[2].training and model[2].A.requires_grad and model[0].A.dtype == torch.float64
    merge(model)
    assert not model[0].weight.requires_grad and model[0].bias is bias and not model[0].training and model[2].weight.requires_grad and model[0].weight.dtype == torch.float64


def tied():
    m = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8), "c": nn.Linear(8, 8)}); m["b"].weight = m["a"].weight
    return m

def changed(change, sizes=(8, 8)):
    m = mlp(list(sizes)); change(m); return m

def adapted():
    import peft
    return peft.get_peft_model(llama(16, 1, heads=2), peft.LoraConfig(r=2, target_modules=["v_proj"]))


@pytest.mark.parametrize("make, options, text", [
    (tied, {}, r"'a' shares its weight with \['b'\]"), (lambda: changed(lambda m: prune.l1_unstructured(m[0], "weight", 0.5)), {}, "'0' is compressed"), (lambda: changed(lambda m: to_sltrain(m, 2, 0.1)), {}, r"\['0'\] are sparse plus low-rank already"),
    (lambda: changed(lambda m: parametrize.register_parametrization(m[0], "weight", nn.Identity())), {}, "'0' is compressed or parametrised"), (adapted, {}, "v_proj.base_layer' belongs to an adapter"), (adapted, dict(targets="lora_A"), "belongs to an adapter"),
    (lambda: nn.Linear(8, 8), {}, "model is itself"), (lambda: llama(16, 1, heads=2), dict(targets="lm_head"), "'lm_head' shares its weight"), (lambda: mlp([8, 8]), dict(targets="9"), "no layer to replace; its linear layers are"), (lambda: mlp([8, 8]), dict(exclude="0"), "no layer to replace"),
    (lambda: nn.LayerNorm(3), {}, "no layer to replace"), (lambda: mlp([8, 2, 4]), dict(density=0.1), "layer '2': density is 0.1, which leaves no entry of 4 x 2"), (lambda: mlp([8, 8]), dict(rank=0), "rank is 0"), (lambda: mlp([8, 8]), dict(density=1.0), "density is 1.0"),
    (lambda: mlp([8, 8]), dict(alpha=-1.0), "alpha is -1.0"), (lambda: mlp([8, 8]), dict(seed=2**31), "seed is 2147483648"), (lambda: mlp([8, 8]), dict(kernel="fast"), "kernel is 'fast'")])
def test_what_cannot_be_replaced_is_named_and_nothing_changes(make, options, text):
    model = make()
    before, types = {n: v.clone() for n, v in model.state_dict().items() if torch.is_tensor(v)}, [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=text): to_sltrain(model, **{"rank": 2, **options})
    assert types == [type(m) for m in model.modules()] and all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


def test_a_layer_used_twice_stays_one_and_shared_factors_are_refused():
    model = nn.ModuleDict({"a": SLLinear(8, 8, 2, 0.1)}); model["b"] = model["a"]
    W = model["a"].weight.detach().clone()
    merge(model)
    assert model["a"] is model["b"] and torch.equal(model["b"].weight, W)
    model = nn.ModuleDict({"a": SLLinear(8, 8, 2, 0.1), "b": SLLinear(8, 8, 2, 0.1)}); model["b"].A = model["a"].A
    with pytest.raises(ValueError, match="'b' shares a factor with 'a'"): merge(model)
    assert all(isinstance(m, SLLinear) for m in model.values())


def test_a_run_that_is_resumed_goes_on_as_it_was(tmp_path):
    def start():
        model = llama(16, 1, heads=2); torch.manual_seed(0); to_sltrain(model, 4, 0.1, 4.0)
        return model, torch.optim.AdamW(model.parameters(), lr=1e-2)
    batches = TokenBatches(english(), 4, 32, 0)
    (whole, o), (first, p), (second, q) = start(), start(), start()
    a = fit(whole, lm_loss, batches, o, 20, device="cpu", seed=0)
    def stop(model, step):
        if step > 10: raise InterruptedError
    with pytest.raises(InterruptedError): fit(first, lm_loss, batches, p, 20, device="cpu", seed=0, save_to=tmp_path, save_every=10, after_backward=stop)
    b = fit(second, lm_loss, batches, q, 20, device="cpu", seed=0, save_to=tmp_path, save_every=10, resume=True)
    assert a.loss.iloc[-1] == b.loss.iloc[-1] and all(torch.equal(u, v) for u, v in zip(whole.state_dict().values(), second.state_dict().values()))
    assert a.loss.iloc[-3:].mean() < a.loss.iloc[:3].mean() - 0.3


def test_with_eight_bit_moments_and_updates_inside_the_backward_pass():
    """The published 7B setting in small: every gradient is used and freed at once."""
    model = llama(32, 1); torch.manual_seed(0); to_sltrain(model, 8, 0.05, 8.0)
    optimizer = per_layer(model, lambda named: GaLoreAdamW8bit(named, lr=5e-3, min_8bit_size=64))
    ids = torch.randint(512, (4, 16), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(30): loss = model(input_ids=ids, labels=ids).loss; loss.backward(); losses.append(loss.item())
    assert losses[-1] < losses[0] - 1 and all(p.grad is None for p in model.parameters())
    states = [s for o in optimizer.optimizers.values() for s in o.state.values()]
    assert any(s["exp_avg"].dtype == torch.uint8 for s in states)
