"""WTA-CRS: enumeration and NumPy as oracles, what is kept in memory, and the places where a linear layer is used."""
import copy
import io
import itertools
import pickle
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from efftrain.memory.wtacrs import (GradientNormCache, WTACRSLinear, crs_linear, estimator_error, kept_rows, row_probabilities, sample_rows, to_linear, to_wtacrs, winners)
from efftrain.memory.wtacrs_blocks import BitDropout, BitReLU, bit_dropout, crs_matmul, output_rms_norm, pack_bits, to_wtacrs_blocks, unpack_bits
from efftrain.models import llama, mlp


def problem(rows=6, seed=0, tail=3):
    g = torch.Generator().manual_seed(seed)
    H, G = torch.randn(rows, 3, generator=g, dtype=torch.float64), torch.randn(rows, 2, generator=g, dtype=torch.float64) * torch.rand(rows, 1, generator=g, dtype=torch.float64)**tail
    return H, G


def enumerated(H, G, p, k, c):
    """Mean and summed variance of the estimate over all sequences of k - c draws: the definition of the paper in NumPy."""
    H, G, p = (np.asarray(t) for t in (H, G, p))
    order = np.argsort(-p)
    C, R = order[:c], order[c:]
    terms, rest = np.einsum("io,id->iod", G, H), 1 - p[order[:c]].sum()
    mean, second = 0, 0
    for draws in itertools.product(R, repeat=k - c):
        draws = list(draws)
        probability = np.prod(p[draws] / rest)
        estimate = terms[C].sum(0) + rest / (k - c) * (terms[draws] / p[draws, None, None]).sum(0)
        mean, second = mean + probability * estimate, second + probability * (estimate**2).sum()
    return mean, second - (mean**2).sum()


# the estimator

@settings(max_examples=40, deadline=None)
@given(st.integers(2, 6), st.data(), st.integers(0, 99))
def test_estimate_is_unbiased_and_its_variance_is_the_formula(rows, data, seed):
    H, G = problem(rows, seed)
    p = row_probabilities(H, G.norm(dim=1) if seed % 2 else None)
    k = data.draw(st.integers(1, min(rows - 1, 4)))
    c = data.draw(st.integers(0, k - 1))
    mean, variance = enumerated(H, G, p, k, c)
    np.testing.assert_allclose(mean, G.T @ H, atol=1e-10)
    assert estimator_error(H, G, p, k, deterministic=c) == pytest.approx(variance, abs=1e-9, rel=1e-7)
    if c == 0: assert estimator_error(H, G, p, k, "crs") == pytest.approx(variance, abs=1e-9, rel=1e-7)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 50), st.data(), st.integers(0, 99))
def test_winners_are_those_of_the_official_rule_and_never_worse_than_crs(rows, data, seed):
    H, G = problem(rows, seed, tail=seed % 6)
    p, k = row_probabilities(H, G.norm(dim=1)), data.draw(st.integers(1, rows - 1))
    biggest = np.sort(p.numpy())[::-1]
    scores = np.array([(1 - biggest[:c].sum()) / (k - c) for c in range(k)])
    chosen = int(winners(p, k))
    assert scores[chosen] <= scores.min() + 1e-12
    assert estimator_error(H, G, p, k) <= estimator_error(H, G, p, k, "crs") * (1 + 1e-9) + 1e-12, "theorem 2"


def test_theorem_2_condition():
    """Best probabilities and P_C > |C| / k: less variance than CRS."""
    met = 0
    for seed in range(60):
        H, G = problem(40, seed, tail=seed % 5)
        p, k = row_probabilities(H, G.norm(dim=1)), 4 + seed % 20
        for c in range(1, k):
            if p.sort().values[-c:].sum() > c / k + 1e-9: met += 1; assert estimator_error(H, G, p, k, deterministic=c) < estimator_error(H, G, p, k, "crs")
    assert met > 100


@pytest.mark.parametrize("estimator, c", [("wta", None), ("wta", 0), ("wta", 2), ("crs", None)])
def test_draws_follow_the_probabilities(estimator, c):
    p = torch.tensor([[0.4, 0.02, 0.18, 0.3, 0.1], [0.2] * 5], dtype=torch.float64)
    g = torch.Generator().manual_seed(0)
    rows, weights = sample_rows(p.repeat_interleave(4000, 0), 3, estimator, deterministic=c, generator=g)
    total = torch.zeros(8000, 5, dtype=torch.float64).scatter_add(1, rows, weights).reshape(2, 4000, 5)  # weight of each term in the estimate: must be 1 on average
    error = total.std(1) / 4000**0.5
    assert ((total.mean(1) - 1).abs() < 4.5 * error + 1e-12).all()
    n = c if c is not None else 0 if estimator == "crs" else int(winners(p[0], 3))
    sure = p[0].argsort(descending=True)[:n]
    assert torch.equal(rows[:4000, :n], sure.expand(4000, n)) and (weights[:4000, :n] == 1).all() and not torch.isin(rows[:4000, n:], sure).any()


def test_zero_norms_keep_the_estimate_finite_and_exact():
    x, w = torch.zeros(40, 4), torch.randn(3, 4, requires_grad=True)
    x[:5] = torch.randn(5, 4)
    crs_linear(x, w, budget=0.3).square().sum().backward()
    expected = torch.autograd.grad(F.linear(x, w).square().sum(), w)[0]
    torch.testing.assert_close(w.grad, expected, rtol=1e-3, atol=1e-3)  # all rows that count are winners
    w.grad = None
    crs_linear(torch.zeros(40, 4), w, budget=0.3).sum().backward()
    assert (w.grad == 0).all()
    x = torch.randn(40, 4)
    w.grad = None
    crs_linear(x, w, budget=0.3, norms=torch.zeros(40)).sum().backward()
    assert w.grad.isfinite().all()


# the layer

def test_gradients_unbiased_and_exact_where_they_must_be():
    torch.manual_seed(0)
    x, w, b, z = (t.requires_grad_() if i < 3 else t for i, t in enumerate((torch.randn(3, 20, 5), torch.randn(4, 5), torch.randn(4), torch.randn(3, 20, 4) * torch.rand(3, 20, 1)**3)))
    exact = torch.autograd.grad((F.linear(x, w, b) * z).sum(), (x, w, b))
    for estimator, norms in (("wta", z.norm(dim=-1)), ("wta", None), ("crs", z.norm(dim=-1))):
        draws = []
        for i in range(2000):
            y = crs_linear(x, w, b, 0.3, estimator, norms)
            dx, dw, db = torch.autograd.grad((y * z).sum(), (x, w, b))
            draws.append(dw)
            if i == 0: torch.testing.assert_close(y, F.linear(x, w, b)); torch.testing.assert_close(dx, exact[0]); torch.testing.assert_close(db, exact[2])
        draws = torch.stack(draws).double()
        assert ((draws.mean(0) - exact[1]).abs() < 4.5 * draws.std(0) / 2000**0.5).all()
        p = row_probabilities(x.detach().reshape(-1, 5), None if norms is None else norms.reshape(-1))
        assert float(draws.var(0).sum()) == pytest.approx(estimator_error(x.detach().reshape(-1, 5), z.reshape(-1, 4), p, 18, estimator), rel=0.12)
    for mine, theirs in zip(torch.autograd.grad((crs_linear(x, w, b, 1.0) * z).sum(), (x, w, b)), exact): torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)


def kept(function, without):
    """Bytes saved for the backward pass, parameters left out."""
    skip, sizes = {t.untyped_storage()._cdata for t in without}, {}
    def pack(t):
        s = t.untyped_storage()
        if s._cdata not in skip: sizes[s._cdata] = s.nbytes()
        return t
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t): out = function()
    return sum(sizes.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_saved_bytes(dtype):
    layer, x = nn.Linear(64, 128, dtype=dtype), torch.randn(10, 50, 64, dtype=dtype)
    dense, size = kept(lambda: layer(x), layer.parameters()), torch.tensor([], dtype=dtype).element_size()
    assert dense == 500 * 64 * size
    for budget in (0.5, 0.3, 0.1): assert kept(lambda: crs_linear(x, layer.weight, layer.bias, budget), layer.parameters()) == kept_rows(500, budget) * (64 * size + 4)
    assert kept(lambda: crs_linear(x, layer.weight, layer.bias, 1.0), layer.parameters()) == dense
    layer.requires_grad_(False)
    assert kept(lambda: crs_linear(x.requires_grad_(), layer.weight, layer.bias, 0.3), layer.parameters()) == 0, "a frozen weight needs no input"


def test_peak_memory_of_a_stack_of_layers_falls():
    from efftrain.accounting import memory
    def make(budget):
        def f():
            net = nn.Sequential(*[m for _ in range(6) for m in (nn.Linear(64, 64), nn.Hardtanh())])
            if budget < 1: to_wtacrs(net, budget)
            return net
        return f
    for fake in (True, False):
        sizes = [memory(make(b), lambda m: None, lambda m: m(torch.ones(2000, 64)).sum(), fake=fake) for b in (1.0, 0.3)]
        saved = 6 * 2000 * 64 * 4 - 6 * 600 * (64 * 4 + 4)
        assert sizes[0].activations - sizes[1].activations <= saved and sizes[0].activations > sizes[1].activations
        assert sizes[1].peak < sizes[0].peak


def test_eval_no_grad_and_attributes():
    layer, x = WTACRSLinear(8, 4, budget=0.3), torch.randn(20, 8)
    plain = nn.Linear(8, 4); plain.load_state_dict(layer.state_dict())
    layer.eval()
    layer(x).sum().backward(); plain(x).sum().backward()
    torch.testing.assert_close(layer.weight.grad, plain.weight.grad)
    layer.train()
    with torch.no_grad(): assert torch.equal(layer(x), plain(x))
    assert layer(torch.randn(0, 8)).shape == (0, 4) and layer(torch.randn(8)).shape == (4,)
    layer(torch.randn(0, 8)).sum().backward()
    assert "budget=0.3" in repr(layer)
    layer.budget = 1.0; layer.weight.grad = plain.weight.grad = None
    layer(x).square().sum().backward(); plain(x).square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, plain.weight.grad)


def test_second_derivative_is_refused():
    w = torch.randn(2, 3, requires_grad=True)
    g = torch.autograd.grad(crs_linear(torch.randn(20, 3), w, budget=0.5).square().sum(), w, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"): g.sum().backward()


def test_generator_makes_draws_repeat():
    x, w = torch.randn(50, 3), torch.randn(2, 3, requires_grad=True)
    grads = [torch.autograd.grad(crs_linear(x, w, budget=0.2, generator=torch.Generator().manual_seed(s)).square().sum(), w)[0] for s in (1, 1, 2)]
    assert torch.equal(grads[0], grads[1]) and not torch.equal(grads[0], grads[2])


# the cache

def test_cache_follows_the_samples_through_shuffling():
    net, cache = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)), GradientNormCache(50, dtype=torch.float32)
    to_wtacrs(net, 0.3)
    x, index = torch.randn(8, 5, 4), torch.arange(10, 18)
    seen = {}
    net[0].register_forward_hook(lambda m, i, o: o.register_hook(lambda g: seen.update(g=g.norm(dim=-1))) and None)
    with cache.batch(index): net(x).square().sum().backward()
    order = torch.tensor([3, 0, 7])
    with cache.batch(index[order]): torch.testing.assert_close(cache.read("0", 15).reshape(3, 5), seen["g"][order])
    with cache.batch([11, 40]):  # one known, one not: the mean of what is known
        found = cache.read("0", 10).reshape(2, 5)
        torch.testing.assert_close(found[0], seen["g"][1]); torch.testing.assert_close(found[1], seen["g"][1].mean().expand(5))
    with cache.batch([40, 41]): assert cache.read("0", 10) is None
    with cache.batch([10]):  # a longer padding: known tokens keep their place
        assert torch.equal(cache.read("0", 7)[:5], seen["g"][0]) and torch.allclose(cache.read("0", 7)[5:], seen["g"][0].mean())
        assert torch.equal(cache.read("0", 3), seen["g"][0, :3])
    with cache.batch([10, 45]): net(torch.randn(2, 9, 4)).sum().backward()
    assert cache.norms["0"].shape == (50, 9)
    other = GradientNormCache(50, dtype=torch.float32); other.load_state_dict(pickle.loads(pickle.dumps(cache.state_dict())))
    assert all(torch.equal(other.norms[n], cache.norms[n]) for n in cache.norms) and cache.nbytes() == 2 * 50 * 9 * 4


def test_backward_after_the_block_writes_to_the_right_samples_and_blocks_nest():
    net, cache = mlp([4, 6, 2]), GradientNormCache(20)
    to_wtacrs(net, 0.5)
    with cache.batch([3, 4]): first = net(torch.randn(2, 5, 4)).sum()
    with cache.batch([7, 8]): first.backward()
    assert (cache.norms["0"][[3, 4]] >= 0).all() and (cache.norms["0"][[7, 8]] < 0).all()
    outer = GradientNormCache(20)
    with outer.batch([0, 1]):
        with cache.batch([5]): net(torch.randn(1, 5, 4)).sum().backward()
        net(torch.randn(2, 5, 4)).sum().backward()
    assert (outer.norms["0"][:2] >= 0).all() and (cache.norms["0"][5] >= 0).all()
    net(torch.randn(2, 5, 4)).sum().backward()  # outside: no cache


def test_overflow_leaves_the_cache_alone():
    net, cache = nn.Sequential(nn.Linear(4, 3)), GradientNormCache(4)
    to_wtacrs(net, 0.5)
    with cache.batch([0, 1]): net(torch.randn(2, 6, 4)).sum().backward()
    before = cache.norms["0"].clone()
    with cache.batch([0, 1]): (net(torch.randn(2, 6, 4)).sum() * float("inf")).backward()
    assert torch.equal(before, cache.norms["0"])


# models

TARGETS = ["o_proj", "gate_proj", "up_proj", "down_proj"]


def test_transform_and_back_keeps_everything():
    model = llama(32, 2, 64)
    hooked = []
    handle = model.model.layers[0].mlp.down_proj.register_forward_hook(lambda *_: hooked.append(1))
    ids, state, parameters = torch.randint(0, 64, (4, 16)), copy.deepcopy(model.state_dict()), list(model.parameters())
    loss = model(input_ids=ids, labels=ids).loss; loss.backward()
    exact = [p.grad.clone() for p in parameters]
    report = to_wtacrs(model, 0.3, TARGETS)
    assert len(report.converted) == 8 and not report.skipped and model.state_dict().keys() == state.keys()
    assert all(a is b for a, b in zip(model.parameters(), parameters))
    torch.testing.assert_close(model(input_ids=ids, labels=ids).loss, loss)
    assert len(hooked) == 2
    handle.remove()
    with pytest.raises(ValueError, match="is sampled already"): to_wtacrs(model, 0.5, TARGETS)
    twin = copy.deepcopy(model); buffer = io.BytesIO(); torch.save(model, buffer); buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    for other in (twin, loaded): assert other.model.layers[1].mlp.up_proj.budget == 0.3; torch.testing.assert_close(other(input_ids=ids, labels=ids).loss, loss)
    assert to_linear(model) == report.converted
    model.zero_grad(); model(input_ids=ids, labels=ids).loss.backward()
    for a, p in zip(exact, parameters): torch.testing.assert_close(p.grad, a)
    assert all(type(m) is nn.Linear for m in model.modules() if isinstance(m, nn.Linear))


def test_checkpoints_go_both_ways(tmp_path):
    model = llama(32, 1, 64)
    to_wtacrs(model, 0.3)
    model.save_pretrained(tmp_path / "whole")
    plain = type(model).from_pretrained(tmp_path / "whole")
    ids = torch.randint(0, 64, (2, 8))
    torch.testing.assert_close(plain(input_ids=ids).logits, model.eval()(input_ids=ids).logits)
    net = mlp([4, 8, 2]); to_wtacrs(net, 0.3)
    save_file(net.state_dict(), tmp_path / "net.safetensors")
    other = mlp([4, 8, 2], seed=1); other.load_state_dict(load_file(tmp_path / "net.safetensors"))
    torch.testing.assert_close(other(torch.ones(3, 4)), net(torch.ones(3, 4)))


def test_autocast_and_checkpointing():
    from torch.utils.checkpoint import checkpoint
    net = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4)); to_wtacrs(net, 0.4)
    x = torch.randn(4, 30, 8)
    cache = GradientNormCache(4)
    with torch.autocast("cpu", torch.bfloat16), cache.batch(range(4)):
        y = net(x)
        assert y.dtype == torch.bfloat16
        y.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in net.parameters())
    plain = copy.deepcopy(net); to_linear(plain)
    with torch.autocast("cpu", torch.bfloat16): reference = plain(x)
    torch.testing.assert_close(y, reference)
    plain.zero_grad(); plain(x).square().sum().backward()
    for reentrant in (False, True):
        draws = []
        for _ in range(300):
            net.zero_grad()
            with cache.batch(range(4)): checkpoint(net, x.requires_grad_(), use_reentrant=reentrant).square().sum().backward()
            draws.append(net[0].weight.grad.clone())
        torch.testing.assert_close(net[2].bias.grad, plain[2].bias.grad, rtol=1e-4, atol=1e-4)
        draws = torch.stack(draws)
        assert ((draws.mean(0) - plain[0].weight.grad).abs() < 5 * draws.std(0) / 300**0.5 + 1e-5).all()


def test_compiles_whole_without_the_cache_and_says_why_not_with_it():
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)); to_wtacrs(net, 0.3)
    torch._dynamo.reset()
    compiled, x = torch.compile(net, fullgraph=True, backend="aot_eager"), torch.randn(4, 20, 8)
    torch.testing.assert_close(compiled(x), net(x))
    plain = copy.deepcopy(net); to_linear(plain); plain(x).square().sum().backward()
    draws = []
    for _ in range(200):
        net.zero_grad(); compiled(x).square().sum().backward(); draws.append(net[0].weight.grad.clone())
    draws = torch.stack(draws)
    assert ((draws.mean(0) - plain[0].weight.grad).abs() < 5 * draws.std(0) / 200**0.5 + 1e-5).all()
    torch._dynamo.reset()
    cache = GradientNormCache(4)
    with pytest.raises(Exception, match="cache of gradient norms"), cache.batch(range(4)): torch.compile(net, fullgraph=True, backend="aot_eager")(x)
    torch._dynamo.reset()
    with cache.batch(range(4)): torch.compile(net, backend="aot_eager")(x).sum().backward()
    assert set(cache.norms) == {"0", "2"}
    torch._dynamo.reset()


def test_compiles_with_sizes_left_open():
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)); to_wtacrs(net, 0.3)
    torch._dynamo.reset()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    for rows in (20, 33, 40):  # the second size makes the graph one for any size
        x = torch.randn(4, rows, 8)
        net.zero_grad(); y = compiled(x); y.square().sum().backward()
        torch.testing.assert_close(y, net(x)); assert net[0].weight.grad.abs().sum() > 0
    torch._dynamo.reset()


def test_lora_of_peft_and_gpt2():
    import peft
    from transformers import GPT2Config, GPT2LMHeadModel
    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=50, n_positions=32, bos_token_id=None, eos_token_id=None, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0))
    ids = torch.randint(0, 50, (4, 12))
    loss = model(input_ids=ids, labels=ids).loss; loss.backward()
    exact = model.transformer.h[0].mlp.c_fc.bias.grad.clone(), model.transformer.h[0].mlp.c_fc.weight.grad.clone()
    assert "transformer.h.0.mlp.c_fc" in to_wtacrs(model, 0.5, ["c_fc", "c_proj"]).converted
    draws = []
    for _ in range(200): model.zero_grad(); model(input_ids=ids, labels=ids).loss.backward(); draws.append(model.transformer.h[0].mlp.c_fc.weight.grad.clone())
    torch.testing.assert_close(model.transformer.h[0].mlp.c_fc.bias.grad, exact[0])
    draws = torch.stack(draws)
    assert ((draws.mean(0) - exact[1]).abs() < 5 * draws.std(0) / 200**0.5 + 1e-6).all()
    assert pickle.loads(pickle.dumps(model.transformer.h[0].mlp.c_fc)).budget == 0.5
    to_linear(model)
    adapted = peft.get_peft_model(llama(32, 1, 64), peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    report = to_wtacrs(adapted, 0.3)
    assert all("lora_" in n for n in report.converted) and any("frozen" in r for r in report.skipped.values())
    ids = torch.randint(0, 64, (2, 10))
    adapted(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)
    base = llama(32, 1, 64); to_wtacrs(base, 0.3)  # adapters on top of sampled layers
    late = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    late(input_ids=ids, labels=ids).loss.backward()


def test_what_is_left_alone():
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 2))
    report = to_wtacrs(model, 0.5)
    assert report.converted == ["1"] and set(report.skipped) == {"0.self_attn.out_proj", "0.linear1", "0.linear2"}
    model(torch.randn(2, 5, 8)).sum().backward()
    shared = nn.Linear(4, 4)
    twice = nn.Sequential(shared, nn.Tanh(), shared)
    assert to_wtacrs(twice, 0.5).converted == ["0"]
    twice(torch.randn(30, 4)).sum().backward()
    replaced = mlp([4, 4]); replaced[0].forward = lambda x: x
    with pytest.raises(ValueError, match="forward method replaced"): to_wtacrs(replaced, 0.5)


# the rest of the block

def test_matmul_unbiased_and_small():
    torch.manual_seed(0)
    a, b, z = torch.randn(2, 2, 12, 4, requires_grad=True), torch.randn(2, 2, 4, 10, requires_grad=True), torch.randn(2, 2, 12, 10) * torch.rand(2, 2, 12, 1)**2
    exact = torch.autograd.grad(((a @ b) * z).sum(), (a, b))
    norms = []
    draws = [torch.autograd.grad((crs_matmul(a, b, 0.4, record=lambda r, c: norms.append((r, c))) * z).sum(), (a, b)) for _ in range(1500)]
    for mine, theirs in zip(map(torch.stack, zip(*draws)), exact): assert ((mine.mean(0) - theirs).abs() < 5 * mine.std(0) / 1500**0.5 + 1e-6).all()
    torch.testing.assert_close(norms[0][0], z.norm(dim=-1)); torch.testing.assert_close(norms[0][1], z.norm(dim=-2))
    for mine, theirs in zip(torch.autograd.grad((crs_matmul(a, b, 1.0) * z).sum(), (a, b)), exact): torch.testing.assert_close(mine, theirs)
    assert kept(lambda: crs_matmul(a, b, 0.4), ()) == 4 * (4 * 4 * 4 + 4 * 4) * 2  # 4 heads: 4 rows of a and 4 columns of b, 4 numbers each, and their places


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 5), max_size=3), st.integers(0, 9))
def test_bits_round_trip(shape, seed):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    assert torch.equal(unpack_bits(pack_bits(mask), mask.shape), mask) and pack_bits(mask).nbytes == -(-mask.numel() // 8)


def test_lossless_parts_against_torch():
    torch.manual_seed(0)
    x, w = torch.randn(4, 9, requires_grad=True), torch.randn(9, requires_grad=True)
    for mine, theirs in ((BitReLU()(x), torch.relu(x)), (output_rms_norm(x, w), F.rms_norm(x, (9,), w, 1e-6))):
        torch.testing.assert_close(mine, theirs)
        for a, b in zip(*(torch.autograd.grad(y.cos().sum(), (x, w), allow_unused=True) for y in (mine, theirs))): assert a is b is None or torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5) is None
    assert torch.autograd.gradcheck(lambda x, w: output_rms_norm(x, w), (x.detach().double().requires_grad_(), w.detach().double().requires_grad_()))
    y = bit_dropout(x, 0.5)
    g, = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(y, x * g)
    assert set(g.unique().tolist()) == {0.0, 2.0} and torch.equal(BitDropout(0.5).eval()(x), x) and (bit_dropout(x, 1.0) == 0).all() and bit_dropout(x, 0.0) is x


def test_blocks_of_t5_are_exact_at_budget_1_and_keep_less():
    from transformers import T5Config, T5ForConditionalGeneration
    def make():
        torch.manual_seed(0)
        return T5ForConditionalGeneration(T5Config(d_model=16, d_ff=32, num_layers=1, num_heads=2, d_kv=8, vocab_size=40, decoder_start_token_id=0, dropout_rate=0.0, attn_implementation="eager"))
    ids = torch.randint(1, 40, (4, 12)); mask = torch.ones(4, 12); mask[1, 7:] = 0
    def gradients(model):
        model.zero_grad(); out = model(input_ids=ids, attention_mask=mask, labels=ids); out.loss.backward()
        return out.loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])
    plain, lossless, sampled = make(), make(), make()
    report = to_wtacrs_blocks(lossless, 1.0, ["o", "wi", "wo"])
    assert (report.attention, report.norms, report.relus) == (3, 7, 2) and report.dropouts > 0
    for a, b in zip(gradients(plain), gradients(lossless)): torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    to_wtacrs_blocks(sampled, 0.3, ["o", "wi", "wo"])
    sizes = [kept(lambda: m(input_ids=ids, attention_mask=mask, labels=ids), m.parameters()) for m in (plain, lossless, sampled)]
    assert sizes[0] > sizes[1] > sizes[2]
    with GradientNormCache(4).batch(range(4)) as cache: torch.testing.assert_close(gradients(sampled)[0], gradients(plain)[0])
    assert any("scores" in n for n in cache.norms) and any("values" in n for n in cache.norms)
    pickle.loads(pickle.dumps(sampled.encoder.block[0].layer[0].layer_norm))
    bad = make(); bad.encoder.final_layer_norm.weight.data[3] = 0
    with pytest.raises(ValueError, match="exactly 0"): to_wtacrs_blocks(bad, 0.3)
    assert not any(isinstance(m, WTACRSLinear) for m in bad.modules()), "as before"
    with pytest.raises(ValueError, match="attention=False"): to_wtacrs_blocks(mlp([4, 4]), 0.3)


# wrong input

LAYER = dict(x=torch.ones(6, 3), weight=torch.ones(2, 3))

@pytest.mark.parametrize("call, kind, text", [
    (lambda: crs_linear(**LAYER, budget=0.0), ValueError, "budget is 0.0"), (lambda: crs_linear(**LAYER, budget=1.1), ValueError, "budget is 1.1"), (lambda: crs_linear(**LAYER, budget="a"), TypeError, "budget is 'a'"),
    (lambda: crs_linear(**LAYER, budget=float("nan")), ValueError, "budget is nan"), (lambda: crs_linear(**LAYER, budget=True), TypeError, "budget is True"), (lambda: crs_linear(**LAYER, estimator="best"), ValueError, "estimator is 'best'"),
    (lambda: crs_linear([1.0], torch.ones(2, 3)), TypeError, "x is a list"), (lambda: crs_linear(torch.ones(6, 4), torch.ones(2, 3)), ValueError, r"x has shape \(6, 4\)"),
    (lambda: crs_linear(**LAYER, norms=torch.ones(5)), ValueError, "each of the 6 rows"), (lambda: crs_linear(**LAYER, norms=-torch.ones(6)), ValueError, "negative or not finite"), (lambda: crs_linear(**LAYER, norms=[1.0] * 6), TypeError, "norms is a list"),
    (lambda: WTACRSLinear(3, 2, budget=2), ValueError, "budget is 2"), (lambda: WTACRSLinear(3, 2, estimator="x"), ValueError, "estimator is 'x'"),
    (lambda: GradientNormCache(0), ValueError, "n_samples is 0"), (lambda: GradientNormCache(2.5), TypeError, "n_samples is 2.5"), (lambda: GradientNormCache(5, dtype=torch.int64), ValueError, "dtype is torch.int64"),
    (lambda: GradientNormCache(5).batch([5]).__enter__(), ValueError, r"indices lie in \[5, 5\]"), (lambda: GradientNormCache(5).batch([-1, 2]).__enter__(), ValueError, r"must lie in \[0, 4\]"),
    (lambda: GradientNormCache(5).batch([[1]]).__enter__(), ValueError, "indices has shape"), (lambda: GradientNormCache(5).batch([]).__enter__(), ValueError, "indices has shape"), (lambda: GradientNormCache(5).batch([1.0]).__enter__(), TypeError, "whole numbers"),
    (lambda: GradientNormCache(5).load_state_dict(dict(n_samples=4, norms={})), ValueError, "this cache has 5"),
    (lambda: sample_rows(torch.full((4,), 0.25), 5), ValueError, r"k is 5; it must be in \[1, 4\]"), (lambda: sample_rows(torch.full((4,), 0.25), 2, deterministic=2), ValueError, "deterministic is 2"), (lambda: winners(torch.full((4,), 0.25), 0), ValueError, "k is 0"),
    (lambda: estimator_error(torch.ones(4, 2), torch.ones(3, 2), torch.full((4,), 0.25), 2), ValueError, "gradients"), (lambda: estimator_error(torch.ones(4, 2), torch.ones(4, 2), torch.full((4,), 0.25), 9), ValueError, "k is 9"),
    (lambda: to_wtacrs("model"), TypeError, "model is a str"), (lambda: to_wtacrs(mlp([4, 4]), 0), ValueError, "budget is 0"), (lambda: to_wtacrs(mlp([4, 4]), 0.3, "0"), TypeError, "targets is '0'"), (lambda: to_wtacrs(mlp([4, 4]), 0.3, [1]), TypeError, "targets is"),
    (lambda: to_wtacrs(mlp([4, 4]), 0.3, ["7"]), ValueError, "match no layer"), (lambda: to_wtacrs(mlp([4, 4, 4]), 0.3, ["1"]), ValueError, "is a ReLU, not a plain linear layer"), (lambda: to_wtacrs(nn.Sequential(nn.ReLU())), ValueError, "no linear layer"),
    (lambda: to_linear(mlp([4, 4])), ValueError, "no sampled layer"), (lambda: to_linear(3), TypeError, "model is a int"),
    (lambda: crs_matmul(torch.ones(2, 3), torch.ones(2, 3)), ValueError, "a has shape"), (lambda: crs_matmul(torch.ones(2, 3), torch.ones(3, 2), row_norms=torch.ones(3)), ValueError, "row_norms has shape"), (lambda: bit_dropout(torch.ones(2), 1.5), ValueError, "p is 1.5"),
])
def test_wrong_input(call, kind, text):
    with pytest.raises(kind, match=text): call()


def test_a_refused_call_leaves_the_model_as_it_was():
    model = mlp([4, 8, 8, 2])
    for targets in (["0", "1"], ["0", "nothing"]):
        with pytest.raises(ValueError): to_wtacrs(model, 0.3, targets)
        assert not any(isinstance(m, WTACRSLinear) for m in model.modules())
    net, cache = mlp([4, 2]), GradientNormCache(9)
    to_wtacrs(net, 0.5)
    with pytest.raises(ValueError, match="same number of rows"), cache.batch([0, 1, 2]): net(torch.randn(4, 4))


def test_less_than_one_row_says_so():
    with pytest.warns(UserWarning, match="less than one; 1 row is kept"): assert kept_rows(5, 0.1) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error"); assert (kept_rows(10, 0.3), kept_rows(100, 0.29), kept_rows(7, 1.0), kept_rows(0, 0.5)) == (3, 29, 7, 0)
