"""Pruning without retraining: scores, selections, SparseGPT and the block-by-block pass against brute force, closed forms, torch.func, PyTorch's own pruning, and wrong input."""
import copy
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.nn.utils import parametrizations, prune as torch_prune
from torch.utils.flop_counter import FlopCounterMode

from efftrain.accounting import tensor_bytes
from efftrain.compress.gblm import InputStatistics, activation_norms, gradient_norms, input_statistics, load_packed, masks, packed_state_dict, prune
from efftrain.compress.gblm_selection import METHODS, cumulative_mask, layer_mask, nm_mask, parse_sparsity, row_mask, scores
from efftrain.compress.gblm_sparsegpt import inverse_factor, sparsegpt
from efftrain.compress.masks import prunable_layers
from efftrain.models import llama, minilm, mlp
from efftrain.training import fit, lm_loss

NAME = "model.layers.1.mlp.up_proj"


def tokens(rows=6, length=12, seed=0): return torch.randint(0, 512, (rows, length), generator=torch.Generator().manual_seed(seed))


def network(seed=0, layers=2, dim=16): return llama(dim, layers, heads=2, seed=seed)


def state(model): return {k: v.clone() for k, v in model.state_dict().items()}


def same(a, b): return all(torch.equal(x, y) for x, y in zip(a.values(), b.values()))


# selections

@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 9), groups=st.integers(1, 6), share=st.floats(0, 0.999), distinct=st.integers(1, 40), pattern=st.sampled_from([(1, 2), (2, 4), (4, 8), (3, 4), (11, 24)]), seed=st.integers(0, 99))
def test_counts_are_exact_and_the_smallest_go(rows, groups, share, distinct, pattern, seed):
    n, m = pattern
    s = torch.from_numpy(np.random.default_rng(seed).integers(0, distinct, (rows, groups * m)).astype(np.float32))  # ties
    for mask, view, k in ((row_mask(s, share), (rows, 1, -1), int(groups * m * share)), (nm_mask(s, n, m), (rows, groups, m), n), (layer_mask(s, share), (1, 1, -1), int(s.numel() * share))):
        gone, values = (~mask).reshape(view), s.reshape(view)
        assert (gone.sum(-1) == k).all()
        assert (torch.where(gone, values, -1).amax(-1) <= torch.where(gone, torch.inf, values).amin(-1)).all()
    stable = np.argsort(s.numpy(), axis=1, kind="stable")[:, :int(groups * m * share)]
    expected = np.ones(s.shape, bool); np.put_along_axis(expected, stable, False, 1)
    np.testing.assert_array_equal(row_mask(s, share), expected)  # of equal ones the first go, as in a stable sort
    assert torch.equal(row_mask(s.half(), share), row_mask(s, share))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.7])
def test_cumulative_selection_is_what_bisection_finds(share):
    s = torch.rand(40, 50, generator=torch.Generator().manual_seed(1))**2
    ordered, total = s.sort(dim=1).values.cumsum(1), s.sum(1, keepdim=True)
    low, high = 0.0, 1.0
    for _ in range(60):
        t = (low + high) / 2
        low, high = (low, t) if (ordered <= t * total).float().mean() > share else (t, high)
    by_bisection = s > torch.take_along_dim(s.sort(dim=1).values, (ordered <= low * total).sum(1, keepdim=True).sub(1).clamp_min(0), 1)
    assert (cumulative_mask(s, share) != by_bisection).float().mean() < 2e-3 and (~cumulative_mask(s, share)).sum() == int(2000 * share)


@pytest.mark.parametrize("method", [m for m in METHODS if m != "sparsegpt"])
def test_scores_against_loops(method):
    g = torch.Generator().manual_seed(0)
    w, a, G = torch.randn(5, 7, generator=g, dtype=torch.float64), torch.rand(7, generator=g, dtype=torch.float64), torch.rand(5, 7, generator=g, dtype=torch.float64)
    formula = {"magnitude": lambda w, a, G: w, "wanda": lambda w, a, G: w * a, "gradient": lambda w, a, G: w * G, "gblm": lambda w, a, G: w * a + 3 * w * G,
               "inverse_gradient": lambda w, a, G: w / (3 * G + 1e-8), "inverse_gblm": lambda w, a, G: w * a / (3 * G + 1e-8)}[method]
    ours = scores(w, a, G, method=method, alpha=3.0)
    np.testing.assert_allclose(ours, [[formula(abs(float(w[i, j])), float(a[j]), float(G[i, j])) for j in range(7)] for i in range(5)], rtol=1e-12)
    balanced = scores(w, 100 * a, G / 50, method=method, alpha=3.0, balance="mean")
    torch.testing.assert_close(balanced, scores(w, a / a.mean(), G / G.mean(), method=method, alpha=3.0), rtol=1e-6, atol=0)


def test_the_scale_of_gradient_norms():
    """N copies of a sequence: a stays, G grows as sqrt(N) for p = 2 and as N for p = 1. So the published alpha belongs to the published N."""
    model, one = network(), tokens(1)
    four = one.repeat(4, 1)
    torch.testing.assert_close(activation_norms(model, [four])[NAME], activation_norms(model, [one])[NAME])
    for p, factor in ((2, 2.0), (1, 4.0)): torch.testing.assert_close(gradient_norms(model, [four], p)[NAME], factor * gradient_norms(model, [one], p)[NAME], rtol=1e-4, atol=1e-8)


# SparseGPT

def problem(rows=8, inputs=12, count=60, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(count, inputs, generator=g, dtype=torch.float64) @ torch.randn(inputs, inputs, generator=g, dtype=torch.float64)
    return torch.randn(rows, inputs, generator=g, dtype=torch.float64), x


def refit(w, x, keep):
    """The best weights for a mask, by NumPy's least squares on the inputs themselves, a row at a time."""
    out = torch.zeros_like(w)
    for i, k in enumerate(keep): out[i, k] = torch.from_numpy(np.linalg.lstsq(x[:, k].numpy(), (x @ w[i]).numpy(), rcond=None)[0])
    return out


def error(w, v, x): return float((x @ (w - v).t()).square().sum())


@pytest.mark.parametrize("removed", [1, 5, 9])
def test_sparsegpt_where_it_is_exact(removed):
    w, x = problem(seed=removed)
    first, last = torch.ones(8, 12, dtype=torch.bool), torch.ones(8, 12, dtype=torch.bool)
    first[:, :removed] = False; last[:, 12 - removed:] = False
    v, _ = sparsegpt(w, x.t() @ x, mask=first, damping=0, block_size=4)
    torch.testing.assert_close(v, refit(w, x, first), rtol=1e-8, atol=1e-9)
    h = x.t() @ x
    torch.testing.assert_close(v[:, removed:], w @ h[:, removed:] @ torch.linalg.inv(h[removed:, removed:]), rtol=1e-9, atol=1e-10)
    assert torch.equal(sparsegpt(w, h, mask=last, damping=0)[0], w * last)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), share=st.floats(0.1, 0.9), block=st.sampled_from([3, 4, 12, 128]))
def test_sparsegpt_error_is_the_sum_of_its_steps_and_never_below_least_squares(seed, share, block):
    w, x = problem(seed=seed)
    keep = torch.rand(8, 12, generator=torch.Generator().manual_seed(seed)) > share
    h = x.t() @ x
    v, back = sparsegpt(w, h, mask=keep, damping=0, block_size=block)
    r, current, total = inverse_factor(h, 0).numpy(), w.numpy().copy(), 0.0
    for j in range(12):  # the algorithm without blocks
        e = np.where(keep[:, j], 0, current[:, j]) / r[j, j]
        current[:, j:] -= np.outer(e, r[j, j:]); total += (e**2).sum()
    np.testing.assert_allclose(v, np.where(keep, current, 0), rtol=1e-6, atol=1e-7)
    assert error(w, v, x) == pytest.approx(total, rel=1e-6) and total >= error(w, refit(w, x, keep), x) * (1 - 1e-9)
    assert torch.equal(back, keep) and (v[~keep] == 0).all()


def test_sparsegpt_beats_zeroing_with_its_own_masks_and_counts_exactly():
    for seed in range(5):
        w, x = problem(48, 64, 300, seed)
        h = x.t() @ x
        for sparsity in (0.3, 0.5, "2:4", "4:8"):
            v, keep = sparsegpt(w, h, sparsity, damping=0, block_size=32)
            assert error(w, v, x) < error(w, w * keep, x)
            if isinstance(sparsity, float): assert all(int((~keep[:, s:s + 32]).sum()) == int(48 * 32 * sparsity) for s in (0, 32))
            else:
                n, m = parse_sparsity(sparsity)
                assert ((~keep).reshape(48, -1, m).sum(-1) == n).all()
                assert error(w, v, x) < error(w, w * nm_mask(scores(w, x.square().sum(0).sqrt(), method="wanda"), n, m), x)


def test_sparsegpt_ignores_the_scale_of_the_hessian_and_drops_dead_inputs():
    w, x = problem(16, 24, 100)
    x[:, 7] = 0
    h = x.t() @ x
    v, keep = sparsegpt(w, h, 0.5)
    assert (v[:, 7] == 0).all() and not keep[:, 7].any() and sparsegpt(w.float(), h.float(), 0.5)[0].dtype == torch.float32
    torch.testing.assert_close(sparsegpt(w, 2 / 7 * h, 0.0)[0], sparsegpt(w, h, 0.0)[0])


# calibration

def test_gradient_norms_are_those_of_single_sequences_whatever_the_batches():
    model, x = network(), tokens()
    each = []
    for row in x:
        model.zero_grad(); lm_loss(model, row[None]).backward()
        each.append({n: m.weight.grad.clone() for n, m in prunable_layers(model).items()})
    model.zero_grad()
    for p in (1, 2):
        for batches in ([x], [x[:1], x[1:]], list(x)):
            for n, g in gradient_norms(model, batches, p).items(): torch.testing.assert_close(g, torch.stack([e[n] for e in each]).norm(p=p, dim=0), rtol=1e-4, atol=1e-7)


def test_calibration_leaves_the_model_as_it_was():
    model = network(); before = state(model)
    model.model.embed_tokens.weight.requires_grad_(False); model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    lm_loss(model, tokens()).backward()
    model.train(); model.model.layers[1].eval()
    kept = {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    assert NAME in gradient_norms(model, [tokens()]) and NAME in activation_norms(model, [tokens()])
    assert same(before, state(model)) and model.training and not model.model.layers[1].training
    assert [p.requires_grad for n, p in model.named_parameters() if "embed" in n or n == "model.layers.0.mlp.up_proj.weight"] == [False, False]
    assert all((p.grad is None) == (kept[n] is None) and (p.grad is None or torch.equal(p.grad, kept[n])) for n, p in model.named_parameters())
    assert not model._forward_pre_hooks and not any(m._forward_pre_hooks or "forward" in m.__dict__ for m in model.modules())


def test_dropout_is_off():
    from transformers import GPT2Config, GPT2LMHeadModel
    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=512, n_positions=32, resid_pdrop=0.5, bos_token_id=None, eos_token_id=None)).train()
    a, b = (gradient_norms(model, [tokens()]) for _ in range(2))
    assert all(torch.equal(a[n], b[n]) for n in a)
    reports = [prune(copy.deepcopy(model), [tokens()], "gblm", 0.5).layers for _ in range(2)]
    assert reports[0].equals(reports[1]) and model.training


def test_padding_counts_nowhere():
    model, x = network(), tokens()
    padded = {"input_ids": torch.cat([x, torch.full((6, 5), 9)], 1), "attention_mask": torch.cat([torch.ones(6, 12), torch.zeros(6, 5)], 1).long()}
    for method in ("gblm", "sparsegpt"):
        a, b = (prune(copy.deepcopy(model), d, method, 0.5).layers for d in ([x], [padded]))
        np.testing.assert_allclose(a.error, b.error, rtol=2e-2)
    for n, s in input_statistics(model, [padded], gram=True).items():
        torch.testing.assert_close(s.norm, input_statistics(model, [x])[n].norm, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(s.gram.diagonal(), s.squares)


# pruning

@pytest.mark.parametrize("sparsity", [0.3, 0.5, "2:4", "4:8"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_reaches_the_sparsity_and_touches_only_the_blocks(method, sparsity):
    model = network(); before = state(model)
    report = prune(model, [tokens()], method, sparsity)
    for n, m in prunable_layers(model).items():
        gone = m.weight == 0
        if isinstance(sparsity, str): assert (gone.reshape(len(gone), -1, int(sparsity[2:])).sum(-1) == int(sparsity[0])).all()
        elif method in ("magnitude", "sparsegpt"): assert gone.sum() == int(gone.numel() * sparsity)
        else: assert (gone.sum(1) == int(gone.shape[1] * sparsity)).all()
        if method != "sparsegpt": assert torch.equal(m.weight[~gone], before[n + ".weight"][~gone]), "what stays keeps its bits"
    names = {n + ".weight" for n in prunable_layers(model)}
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items() if k not in names)
    assert list(report.layers.layer) == list(prunable_layers(model)) and report.layers.error.between(0, 1.5).all()
    assert report.layers.zeros.sum() == sum(int((m.weight == 0).sum()) for m in prunable_layers(model).values())


def test_magnitude_is_that_of_pytorch():
    ours, theirs = network(), network()
    prune(ours, method="magnitude", sparsity=0.5)
    for n, m in prunable_layers(theirs).items():
        torch_prune.l1_unstructured(m, "weight", amount=0.5); torch_prune.remove(m, "weight")
        assert torch.equal(m.weight, ours.get_submodule(n).weight)


def test_blocks_see_the_pruned_model_before_them():
    """By hand: statistics of the whole model, of which the blocks before are pruned, one block after the other."""
    model, x = network(layers=3), tokens()
    gradients = gradient_norms(model, [x])
    by_hand = copy.deepcopy(model)
    for i in range(3):
        layers = {n: m for n, m in prunable_layers(by_hand).items() if f"layers.{i}." in n}
        norms, seen = {}, []
        handles = [m.register_forward_pre_hook(lambda _, a, n=n: norms.__setitem__(n, (a[0].square().sum((0, 1)) / len(x)).sqrt())) for n, m in layers.items()]
        with torch.no_grad():
            by_hand(x)
            for h in handles: h.remove()
            for n, m in layers.items():
                s = m.weight.abs() * (norms[n] + 5 * gradients[n])
                for row, order in zip(m.weight, s.argsort(dim=1, stable=True)): row[order[:int(s.shape[1] * 0.6)]] = 0
    ours = copy.deepcopy(model); prune(ours, [x[:2], x[2:]], "gblm", 0.6, alpha=5.0)
    agree = [float(((a.weight == 0) == (b.weight == 0)).float().mean()) for a, b in zip(prunable_layers(ours).values(), prunable_layers(by_hand).values())]
    assert min(agree) > 0.999
    dense = copy.deepcopy(model); prune(dense, [x], "gblm", 0.6, alpha=5.0, sequential=False)
    assert any(not torch.equal(a, b) for a, b in zip(dense.parameters(), ours.parameters())), "the dense model's inputs are others"


def test_alpha_zero_is_wanda_and_shared_statistics_change_nothing():
    model, x = network(), tokens()
    for sparsity in (0.5, "2:4"):
        a, b = (copy.deepcopy(model) for _ in range(2))
        prune(a, [x], "gblm", sparsity, alpha=0); prune(b, [x], "wanda", sparsity)
        assert same(state(a), state(b))
    gradients, statistics = gradient_norms(model, [x]), input_statistics(model, [x], gram=True)
    for method in ("gblm", "sparsegpt"):
        a, b = (copy.deepcopy(model) for _ in range(2))
        prune(a, [x], method, 0.5, sequential=False); prune(b, None, method, 0.5, sequential=False, gradients=gradients, statistics=statistics)
        assert same(state(a), state(b))


def test_an_input_that_is_never_active_goes_first():
    model = network(layers=1)
    with torch.no_grad():
        model.model.layers[0].post_attention_layernorm.weight[5] = 0
        model.model.layers[0].mlp.up_proj.weight[:, 5] = 1.0
    for method, gone in (("wanda", True), ("gblm", True), ("sparsegpt", True), ("magnitude", False)):
        twin = copy.deepcopy(model); prune(twin, [tokens()], method, 0.25)
        assert bool((twin.model.layers[0].mlp.up_proj.weight[:, 5] == 0).all()) is gone


def test_reported_error_bytes_and_flops_are_measured():
    model, x = network(), tokens(4)
    dense = copy.deepcopy(model)
    report = prune(model, [x], "wanda", 0.5, sequential=False)
    seen = []
    handle = dense.get_submodule(NAME).register_forward_pre_hook(lambda _, a: seen.append(a[0]))
    dense(x); handle.remove()
    with torch.no_grad(): change = (seen[0] @ (dense.get_submodule(NAME).weight - model.get_submodule(NAME).weight).t()).norm() / (seen[0] @ dense.get_submodule(NAME).weight.t()).norm()
    assert float(report.layers.set_index("layer").error[NAME]) == pytest.approx(float(change), rel=1e-4)
    assert report.bytes_before == tensor_bytes(m.weight.detach() for m in prunable_layers(model).values())
    assert report.bytes_after == tensor_bytes(v for k, v in packed_state_dict(model).items() if k.endswith((".values", ".kept")))
    with FlopCounterMode(display=False) as counter:
        for m in prunable_layers(dense).values(): m(torch.zeros(1, m.in_features))
    assert report.flops_before == counter.get_total_flops() and report.flops_after == 2 * masks(model).n_active


def test_other_models():
    from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=512, n_positions=32, bos_token_id=None, eos_token_id=None))
    for method in METHODS:
        twin = copy.deepcopy(gpt2); prune(twin, [tokens()], method, "2:4")
        for m in prunable_layers(twin).values(): assert ((m.weight.t() == 0).reshape(m.weight.shape[1], -1, 4).sum(-1) == 2).all(), "groups are of inputs, whichever way the matrix lies"
    twin = copy.deepcopy(gpt2); assert gpt2.config.use_cache and prune(twin, [tokens()], "wanda", 0.0).layers.error.max() == 0
    dense = activation_norms(gpt2, [tokens()])
    stepwise = prune(copy.deepcopy(gpt2), [tokens()], "wanda", 0.0).layers.set_index("layer")
    for n, a in dense.items(): assert np.median(scores(gpt2.get_submodule(n).weight.t(), a, method="wanda").detach()) == pytest.approx(stepwise.score_50[n], rel=1e-3)
    bert = BertForMaskedLM(BertConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=512, max_position_embeddings=32))
    with pytest.raises(ValueError, match="labels"): gradient_norms(bert, [tokens()])
    report = prune(bert, [{"input_ids": tokens(), "labels": tokens()}], "gblm", 0.5)
    assert report.sparsity == 0.5 and len(report.layers) == 12 and (bert.cls.predictions.transform.dense.weight != 0).all()
    encoder, tokenizer = minilm()
    text = dict(tokenizer(["short", "one that is longer"], padding=True, return_tensors="pt"))
    assert len(prune(encoder, [text], "sparsegpt", "4:8").layers) == 36 and (encoder.pooler.dense.weight != 0).all()


def test_half_precision_autocast_compile_and_copies():
    model = network().to(torch.bfloat16)
    prune(model, [tokens()], "gblm", 0.5)
    assert all(m.weight.dtype == torch.bfloat16 and ((m.weight == 0).sum(1) == m.in_features // 2).all() for m in prunable_layers(model).values())
    model = network(); compiled = torch.compile(model, backend="eager")
    prune(compiled, [tokens()], "wanda", 0.5)
    with torch.no_grad(): torch.testing.assert_close(compiled(tokens()).logits, copy.deepcopy(model)(tokens()).logits)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad(): assert torch.isfinite(model(tokens()).logits).all()


def test_masks_hold_through_further_training():
    model = network(); prune(model, [tokens()], "gblm", 0.5)
    held = masks(model)
    gone = {n: m.weight == 0 for n, m in held.layers.items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(5):
        optimizer.zero_grad(); lm_loss(model, tokens()).backward(); held.project_gradients(); optimizer.step(); held.project()
    assert all(torch.equal(m.weight == 0, gone[n]) for n, m in held.layers.items())


def test_saved_and_loaded(tmp_path):
    from safetensors.torch import load_file, save_file
    model = network(); prune(model, [tokens()], "sparsegpt", 0.6)
    packed = packed_state_dict(model)
    save_file(packed, tmp_path / "packed.safetensors")
    again = network(seed=5); load_packed(again, load_file(tmp_path / "packed.safetensors"))
    assert same(state(model), state(again)) and tensor_bytes(packed.values()) < 0.8 * tensor_bytes(model.state_dict().values())
    model.save_pretrained(tmp_path / "plain")
    assert same(state(model), state(type(model).from_pretrained(tmp_path / "plain")))
    other = network(dim=32); before = state(other)
    for wrong in (packed, {k: v for k, v in packed.items() if "norm" not in k}):
        with pytest.raises(ValueError, match="state"): load_packed(other if wrong is packed else again, wrong)
    assert same(before, state(other)) and same(state(model), state(again))


def test_results_are_usable_as_torch_sparse_tensors():
    """Without this package: CSR products, and the storage of sparse tensor cores (values of half the size and metadata), there and back."""
    from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass, sparse_semi_structured_to_dense_cutlass
    model = network(layers=1, dim=64); prune(model, [tokens()], "gblm", "2:4")
    stored = 0
    for m in prunable_layers(model).values():
        w, x = m.weight.detach(), torch.randn(m.in_features, 3)
        torch.testing.assert_close(w.to_sparse_csr() @ x, w @ x)
        if len(w) % 32 or w.shape[1] % 64: continue  # what the format allows for 16-bit numbers
        values, places = sparse_semi_structured_from_dense_cutlass(w.half())
        assert values.numel() == w.numel() // 2 and torch.equal(sparse_semi_structured_to_dense_cutlass(values, places), w.half())
        stored += 1
    assert stored >= 4


@pytest.mark.parametrize("method", METHODS)
def test_under_inference_mode_and_with_narrow_integers(method):
    model, twin = network(), network()
    prune(twin, [tokens()], method, 0.5)
    with torch.inference_mode(): prune(model, [tokens().int()], method, 0.5)  # the batch is an inference tensor
    assert same(state(model), state(twin)) and not any(p.is_inference() for p in model.parameters())
    with torch.inference_mode(): made = network()
    if method in ("gblm", "gradient"):
        with pytest.raises(ValueError, match="q_proj.*inference_mode"): prune(made, [tokens()], method, 0.5)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("sequential", [True, False])
def test_inputs_that_are_not_finite_are_refused_by_name(method, sequential):
    model = network()
    with torch.no_grad(): model.model.layers[0].mlp.up_proj.weight.mul_(1e22); model.model.layers[0].mlp.gate_proj.weight.mul_(1e22)  # products overflow when squared
    with pytest.raises(ValueError, match="layers.0.mlp.down_proj.*not finite"): prune(model, [tokens()], method, 0.5, sequential=sequential)
    assert sequential or all((m.weight != 0).all() for m in prunable_layers(model).values())


def test_packed_states_hold_views_and_odd_names():
    class Odd(nn.Module):
        """A buffer that is the beginning of a weight, and parameters named as the packed format names its parts."""
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(8, 8, bias=False)])
            self.values = nn.Parameter(torch.randn(3)); self.kept = nn.Parameter(torch.randn(2)); self.inner = nn.Module(); self.inner.values = nn.Parameter(torch.randn(2))
            self.register_buffer("zfirst", self.layers[0].weight.detach()[:2])
        def forward(self, x): return self.layers[0](x)
    model, again = Odd(), Odd()
    prune(model, [torch.randn(9, 8)], "wanda", 0.5)
    again.zfirst = torch.zeros(2, 8)
    load_packed(again, packed_state_dict(model))
    assert same(state(model), state(again))


# wrong input

class Twice(nn.Module):
    """Blocks that run twice: their inputs cannot be followed one after another."""
    def __init__(self): super().__init__(); self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    def forward(self, x):
        for b in [*self.layers, *self.layers]: x = b(x)
        return x


def changed(model, f): f(model); return model


@pytest.mark.parametrize("make, text", [
    (lambda m: prune(m, [tokens()], "obs"), "method is 'obs'"), (lambda m: prune(m, [tokens()], sparsity=1.0), "sparsity is 1.0"), (lambda m: prune(m, [tokens()], sparsity=-0.1), "sparsity is -0.1"),
    (lambda m: prune(m, [tokens()], sparsity="4:2"), "sparsity is '4:2'"), (lambda m: prune(m, [tokens()], "wanda", "1:3"), "'model.layers.0.self_attn.q_proj'"),
    (lambda m: prune(m, [tokens()], "sparsegpt", "2:4", block_size=6), "block_size is 6"), (lambda m: prune(m, [tokens()], "sparsegpt", damping=-1), "damping is -1"),
    (lambda m: prune(m, [tokens()], alpha=-1), "alpha is -1"), (lambda m: prune(m, [tokens()], alpha=float("nan")), "alpha is nan"), (lambda m: prune(m, [tokens()], norm=3), "norm is 3"),
    (lambda m: prune(m, [tokens()], balance="sum"), "balance is 'sum'"), (lambda m: prune(m, [tokens()], group="column"), "group is 'column'"), (lambda m: prune(m, [tokens()], sparsity="2:4", group="row"), "group is 'row'"),
    (lambda m: prune(m), "batches is None"), (lambda m: prune(m, []), "batches is empty"), (lambda m: prune(m, [tokens(), tokens(length=9)]), "without attention_mask"),
    (lambda m: prune(m, [tokens()], targets=["lm_head"], sequential=False), "share one weight"), (lambda m: prune(m, [tokens()], targets=["nowhere"]), "targets names 'nowhere'"),
    (lambda m: prune(m, [tokens()], gradients={}), "gradients has nothing"), (lambda m: prune(m, [tokens()], statistics={}), "sequential=False"),
    (lambda m: prune(m, [tokens()], statistics=input_statistics(m, [tokens()]), method="sparsegpt", sequential=False), "gram=True"),
    (lambda m: prune(m, [tokens(length=1)]), "loss of a calibration sequence"), (lambda m: gradient_norms(m, [tokens()], 0), "p is 0"), (lambda m: InputStatistics(3).hessian, "gram")])
def test_wrong_calls_change_nothing(make, text):
    model = network(); before = state(model)
    with pytest.raises(ValueError, match=text): make(model)
    assert same(before, state(model)) and not any(m._forward_pre_hooks or "forward" in m.__dict__ for m in model.modules())


@pytest.mark.parametrize("make, text", [
    (lambda: changed(network(), lambda m: prune(m, method="magnitude")), "already compressed"),
    (lambda: changed(network(), lambda m: torch_prune.l1_unstructured(m.model.layers[0].mlp.up_proj, "weight", 0.5)), "computed at each call"),
    (lambda: changed(network(), lambda m: parametrizations.weight_norm(m.model.layers[0].mlp.up_proj)), "computed at each call"),
    (lambda: changed(network(), lambda m: m.model.layers[0].mlp.up_proj.weight.data.fill_(float("nan"))), "not finite"),
    (lambda: changed(network(), lambda m: setattr(m.model.layers[1].mlp, "up_proj", m.model.layers[0].mlp.up_proj)), "share one weight"),
    (lambda: network().to("meta"), "meta"), (lambda: mlp([8, 8, 8]), "no nn.ModuleList"), (Twice, "one after another"), (lambda: nn.LayerNorm(8), "no nn.ModuleList"),
    (lambda: nn.ModuleDict({"layers": nn.ModuleList([nn.TransformerEncoderLayer(8, 2, 16)])}), "never called")])
def test_models_that_cannot_be_pruned(make, text):
    model = make()
    data = [tokens()] if "Llama" in type(model).__name__ else [torch.randn(3, 4 if isinstance(model, Twice) else 8)]
    with pytest.raises(ValueError, match=text): prune(model, data, "wanda", 0.5)


def test_quantised_weights_are_refused_by_name():
    model = network()
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = nn.Parameter(layer.weight.detach().mul(100).to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="up_proj.*int8"): prune(model, [tokens()], "wanda", 0.5)


def test_a_tied_pair_of_layers_is_refused_by_name():
    model = network()
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    with pytest.raises(ValueError, match="layers.0.mlp.up_proj.*layers.1.mlp.up_proj.*share one weight"): prune(model, [tokens()], "wanda", 0.5)


@pytest.mark.parametrize("call, text", [
    (lambda: prune(network(), 3), "batches is a int"), (lambda: prune(network(), ["text"]), "holds a str"), (lambda: prune(network(), [{"input_ids": [[1, 2]]}]), "holds a dict")])
def test_wrong_types(call, text):
    with pytest.raises(TypeError, match=text): call()


@pytest.mark.parametrize("call, text", [
    (lambda: scores(torch.ones(2, 3), method="sparsegpt"), "method is 'sparsegpt'"), (lambda: scores(torch.ones(3), method="magnitude"), "must be a matrix"),
    (lambda: scores(torch.ones(2, 3), torch.ones(2), method="wanda"), r"needs norms of shape \(3,\)"), (lambda: row_mask(torch.tensor([[1.0, float("nan")]]), 0.5), "NaN"),
    (lambda: nm_mask(torch.tensor([[1.0, float("nan")]]), 1, 2), "NaN"), (lambda: nm_mask(torch.ones(2, 6), 2, 4), "must divide"), (lambda: nm_mask(torch.ones(2, 6), 4, 3), "n, m is 4, 3"),
    (lambda: row_mask(torch.ones(2, 4), "2:4"), "takes a number"), (lambda: sparsegpt(torch.ones(2, 3), torch.eye(4)), "hessian has shape"),
    (lambda: sparsegpt(torch.ones(2, 3), torch.eye(3), mask=torch.ones(2, 3)), "must be boolean"), (lambda: sparsegpt(torch.ones(2, 6), torch.eye(6), "2:4"), "must divide"),
    (lambda: sparsegpt(torch.randn(2, 3), -torch.eye(3), 0.5), "not positive definite")])
def test_wrong_arguments_of_the_parts(call, text):
    with pytest.raises(ValueError, match=text): call()
