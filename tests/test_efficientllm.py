"""Pruning-aware pretraining: groups that do nothing, saliencies by loops and finite differences, refits by least squares, optimizer states after a cut, models that are saved and loaded, wrong input."""
import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from efftrain.accounting import flops, llama_loss, without_mask
from efftrain.compress.efficientllm import PruningSchedule, StructuredPruner, least_squares_update
from efftrain.compress.efficientllm_model import VariableAttention, VariableLlamaConfig, VariableLlamaForCausalLM, count_parameters, forward_flops, layer_sizes, make_variable, rebuild, to_llama
from efftrain.models import llama, mlp
from efftrain.training import fit, lm_loss

KINDS = ("ffn", "head", "vo", "qk", "stem")


def net(kv=2, bias=False, tied=False, seed=0, mlp_bias=None):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(hidden_size=24, intermediate_size=20, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=kv, head_dim=8, vocab_size=50, initializer_range=0.3, attention_bias=bias, mlp_bias=bias if mlp_bias is None else mlp_bias,
                                            tie_word_embeddings=tied, bos_token_id=None, eos_token_id=None))


def tokens(seed=0, rows=3): return torch.randint(0, 50, (rows, 20), generator=torch.Generator().manual_seed(seed))


def step(model, pruner=None, optimizer=None, seed=0):
    model.zero_grad(); loss = lm_loss(model, tokens(seed)); loss.backward()
    if pruner: pruner.observe()
    if optimizer: optimizer.step()
    return loss  # with its graph, which must not matter


def size(model): return sum(p.numel() for p in model.parameters())


# the refit

@settings(max_examples=40, deadline=None)
@given(st.integers(2, 12), st.integers(1, 6), st.data())
def test_refit_is_numpys_least_squares_and_optimal_brain_surgery(n, out, data):
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    drop = sorted(data.draw(st.sets(st.integers(0, n - 1), min_size=1, max_size=n - 1)))
    x, W = rng.normal(size=(8 * n, n)) @ rng.normal(size=(n, n)), rng.normal(size=(out, n))
    keep = [i for i in range(n) if i not in drop]
    H = x.T @ x / len(x)
    ours = least_squares_update(torch.from_numpy(W), torch.from_numpy(H), torch.tensor(drop), 0).numpy()
    np.testing.assert_allclose(x[:, keep] @ ours.T, x[:, keep] @ np.linalg.lstsq(x[:, keep], x @ W.T, rcond=None)[0], atol=1e-6 * np.abs(x @ W.T).max())
    ridge = least_squares_update(torch.from_numpy(W), torch.from_numpy(H), torch.tensor(drop), 0.1).numpy()
    inverse = np.linalg.inv(H + 0.1 * np.trace(H) / n * np.eye(n))
    np.testing.assert_allclose(ridge, (W - W[:, drop] @ np.linalg.inv(inverse[np.ix_(drop, drop)]) @ inverse[drop])[:, keep], atol=1e-8)


def test_refit_of_singular_inputs_and_by_mask():
    x = torch.randn(4, 10, dtype=torch.float64); H = x.T @ x  # rank 4
    W = torch.randn(3, 10, dtype=torch.float64); mask = torch.arange(10) < 3
    new = least_squares_update(W, H, mask, 0)
    assert torch.allclose(x[:, ~mask] @ new.T, x @ W.T, atol=1e-3), "seven channels still span everything that was seen"
    assert torch.equal(new, least_squares_update(W, H, torch.tensor([0, 1, 2]), 0))
    for make, text in ((lambda: least_squares_update(W, H[:3], mask), "H has shape"), (lambda: least_squares_update(W, H, torch.arange(10)), "all 10"), (lambda: least_squares_update(W, H, mask, -1), "damping is -1"),
                       (lambda: least_squares_update(W, H * float("nan"), mask), "NaN")):
        with pytest.raises(ValueError, match=text): make()


# cutting

@torch.no_grad()
def silence(model, kind):
    a, m, body = model.model.layers[1].self_attn, model.model.layers[1].mlp, model.model
    kv, rep = a.k_proj.out_features // 8, 4 // (a.k_proj.out_features // 8)
    zero = lambda linear, rows: (linear.weight.__setitem__(rows, 0), linear.bias is not None and linear.bias.__setitem__(rows, 0))
    if kind == "ffn": zero(m.gate_proj, 3); zero(m.up_proj, 3); m.down_proj.weight[:, 3] = 0
    if kind == "head":
        for linear, rows in ((a.q_proj, 8 * rep), (a.k_proj, 8), (a.v_proj, 8)): zero(linear, slice(rows))
        a.o_proj.weight[:, :8 * rep] = 0
    if kind == "vo":
        for head in range(kv):
            c = (5 + 2 * head) % 8
            zero(a.v_proj, 8 * head + c)
            for q in range(rep): a.o_proj.weight[:, 8 * (rep * head + q) + c] = 0
    if kind == "qk":
        for head in range(kv):
            for h in (0, 4):
                c = (1 + 2 * head) % 4 + h
                zero(a.k_proj, 8 * head + c)
                for q in range(rep): zero(a.q_proj, 8 * (rep * head + q) + c)
    if kind == "stem":
        for w in {id(w): w for w in [body.embed_tokens.weight, model.lm_head.weight] + [getattr(part, n).weight for l in body.layers for part, n in ((l.self_attn, "q_proj"), (l.self_attn, "k_proj"), (l.self_attn, "v_proj"), (l.mlp, "gate_proj"), (l.mlp, "up_proj"))]}.values(): w[:, 7] = 0
        for l in body.layers: zero(l.self_attn.o_proj, 7); zero(l.mlp.down_proj, 7)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kv, bias, tied", [(4, False, True), (2, True, False), (1, False, False)])
def test_removing_what_does_nothing_changes_nothing(kind, kv, bias, tied):
    if kind == "head" and kv == 1: kv = 2
    model = net(kv, bias, tied).eval(); silence(model, kind); x = tokens()
    before, n = model(x).logits, size(model)
    pruner = StructuredPruner(model, groups=[kind], saliency="magnitude", compensate=False)
    removed = pruner.prune_to(n - 1)
    assert len(removed) == 1 and removed[0]["layer"] == (-1 if kind == "stem" else 1)
    if kind == "ffn": assert removed[0]["index"] == 3
    torch.testing.assert_close(model(x).logits, before, atol=2e-5, rtol=2e-5)
    assert count_parameters(layer_sizes(model), pruner.width, 50, tied, bias) == size(model) == pruner.n_params < n


@pytest.mark.parametrize("kv, tied, bias", [(4, True, False), (2, False, True)])
def test_any_cut_gives_the_closed_form_and_a_working_model(kv, tied, bias):
    model = net(kv, bias, tied); optimizer = torch.optim.AdamW(model.parameters(), 1e-3); n = size(model)
    pruner = StructuredPruner(model, optimizer, groups=KINDS)
    for share in (0.8, 0.6, 0.4):
        step(model, pruner, optimizer)
        pruner.prune_to(int(share * n), at_least=int((share - 0.05) * n))
        assert int((share - 0.05) * n) <= pruner.n_params <= int(share * n) and pruner.n_params == count_parameters(layer_sizes(model), pruner.width, 50, tied, bias)
        for p in model.parameters():
            for s in optimizer.state[p].values(): assert s.numel() == 1 or s.shape == p.shape
    smaller = rebuild(model)
    assert torch.equal(smaller.eval()(tokens()).logits, model.eval()(tokens()).logits)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied and (smaller.lm_head.weight is smaller.model.embed_tokens.weight) == tied


@pytest.mark.parametrize("attention, mlp", [(True, False), (False, True)])
def test_biases_of_one_kind_are_counted_as_they_are(attention, mlp):
    model = net(2, attention, mlp_bias=mlp); n, pruner = size(model), StructuredPruner(model, groups=KINDS, saliency="magnitude", compensate=False)
    assert pruner._total(layer_sizes(model), 24) == n == pruner.report()["parameters_before"]
    pruner.prune_to(int(0.7 * n))
    assert size(model) <= int(0.7 * n) and pruner.report()["parameters_after"] == size(model)


def test_down_to_the_smallest_model_and_no_further():
    model = net(2); pruner = StructuredPruner(model, groups=KINDS, saliency="random", compensate=False)
    least = pruner.smallest()
    pruner.prune_to(least)
    assert layer_sizes(model) == [dict(heads=2, kv_heads=1, qk=2, vo=1, ffn=1)] * 2 and pruner.width == 1 and pruner.n_params == least
    assert torch.isfinite(model(tokens()).logits).all()
    with pytest.raises(ValueError, match="at least"): pruner.prune_to(least - 1)


def test_zeros_in_place_equal_the_cut_model():
    source = llama(32, 2, seed=1); x = torch.randint(0, 512, (2, 20))
    cut, masked = copy.deepcopy(source), copy.deepcopy(source)
    removed = StructuredPruner(cut, groups=["ffn", "head"], saliency="magnitude", compensate=False).prune_to(int(0.7 * size(source)))
    assert {r["group"] for r in removed} == {"ffn", "head"}
    for r in removed:
        l = masked.model.layers[r["layer"]]
        if r["group"] == "ffn": l.mlp.down_proj.weight.data[:, r["index"]] = 0
        else: l.self_attn.o_proj.weight.data[:, 16 * r["index"]:16 * (r["index"] + 1)] = 0
    torch.testing.assert_close(cut(x).logits, masked(x).logits, atol=1e-5, rtol=1e-5)


def test_optimizer_after_a_cut_steps_as_a_fresh_one_with_the_cut_states():
    model = net(); optimizer = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.1); pruner = StructuredPruner(model, optimizer)
    for t in range(3): step(model, pruner, optimizer, t)
    big = {n: {k: v.clone() for k, v in optimizer.state[p].items()} for n, p in model.named_parameters()}
    pruner.prune_to(int(0.6 * size(model))); pruner.finish()
    twin = copy.deepcopy(model); fresh = torch.optim.AdamW(twin.parameters(), 1e-2, weight_decay=0.1)
    for p, q in zip(model.parameters(), twin.parameters()): fresh.state[q] = {k: v.clone() for k, v in optimizer.state[p].items()}
    for n, p in model.named_parameters():
        kept, all_ = set(optimizer.state[p]["exp_avg_sq"].flatten().tolist()), set(big[n]["exp_avg_sq"].flatten().tolist())
        assert kept <= all_ and float(optimizer.state[p]["step"]) == 3, "moments are a selection of what was there"
    step(model, None, optimizer, 9); step(twin, None, fresh, 9)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters()))


def test_gradients_are_cut_with_their_weights():
    model = net(); pruner = StructuredPruner(model, groups=["ffn"], compensate=False); step(model, pruner)
    before = model.model.layers[0].mlp.up_proj.weight.grad.clone()
    removed = [r["index"] for r in pruner.prune_to(int(0.8 * size(model))) if r["layer"] == 0]
    keep = [i for i in range(20) if i not in removed]
    assert removed and torch.equal(model.model.layers[0].mlp.up_proj.weight.grad, before[keep])


# saliency

def groups_of(model, kind, i=0, j=0):
    """(parameter, index) pairs of one group, written out by hand; kv = 2 and two query heads each."""
    a, m = model.model.layers[i].self_attn, model.model.layers[i].mlp
    if kind == "ffn": return [(m.gate_proj.weight, (j,)), (m.up_proj.weight, (j,)), (m.gate_proj.bias, (j,)), (m.up_proj.bias, (j,)), (m.down_proj.weight, (slice(None), j))]
    if kind == "head": return [(p, (slice(16 * j, 16 * j + 16),)) for p in (a.q_proj.weight, a.q_proj.bias)] + [(p, (slice(8 * j, 8 * j + 8),)) for l in (a.k_proj, a.v_proj) for p in (l.weight, l.bias)] + [(a.o_proj.weight, (slice(None), slice(16 * j, 16 * j + 16)))]
    if kind == "vo": return [(a.v_proj.weight, (8 + j,)), (a.v_proj.bias, (8 + j,)), (a.o_proj.weight, (slice(None), [16 + j, 24 + j]))]
    if kind == "qk": return [(p, ([16 + j, 20 + j, 24 + j, 28 + j],)) for p in (a.q_proj.weight, a.q_proj.bias)] + [(p, ([8 + j, 12 + j],)) for p in (a.k_proj.weight, a.k_proj.bias)]
    out = [(model.model.embed_tokens.weight, (slice(None), j)), (model.lm_head.weight, (slice(None), j)), (model.model.norm.weight, (j,))]
    for l in model.model.layers:
        out += [(n.weight, (j,)) for n in (l.input_layernorm, l.post_attention_layernorm)] + [(p.weight, (slice(None), j)) for p in (l.self_attn.q_proj, l.self_attn.k_proj, l.self_attn.v_proj, l.mlp.gate_proj, l.mlp.up_proj)]
        out += [(t, (j,)) for p in (l.self_attn.o_proj, l.mlp.down_proj) for t in (p.weight, p.bias)]
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_saliencies_by_loop_and_by_finite_differences(kind):
    model = net(2, bias=True).double()
    with torch.no_grad():
        for n, p in model.named_parameters():
            if n.endswith("bias"): p.normal_(0, 0.3)
    fisher, taylor, magnitude = (StructuredPruner(model, ema=0.0, saliency=s, groups=KINDS, compensate=False) for s in ("fisher", "taylor", "magnitude"))
    loss = lambda: lm_loss(model, tokens()).item()
    model.zero_grad(); lm_loss(model, tokens()).backward(); fisher.observe(); taylor.observe()
    key = (kind, -1 if kind == "stem" else 0)
    at = lambda s, j: s[1, j] if kind in ("vo", "qk") else s[j]
    for j in ((0, 1) if kind == "head" else (0, 3)):
        group = groups_of(model, kind, j=j)
        assert at(fisher.saliencies()[key], j).item() == pytest.approx(sum(0.5 * (p.grad[i]**2 * p.data[i]**2).sum().item() for p, i in group), rel=1e-6)
        assert at(magnitude.saliencies()[key], j).item() == pytest.approx(sum((p.data[i]**2).sum().item() for p, i in group), rel=1e-6)
        assert at(taylor.saliencies()[key], j).item() == pytest.approx(abs(sum((p.grad[i] * p.data[i]).sum().item() for p, i in group)), rel=1e-6)
        n = sum(p.data[i].numel() for p, i in group)
        assert fisher._group_size(*key) == n, "parameters that go with it"
        with torch.no_grad():
            saved = [p.data[i].clone() for p, i in group]
            ends = []
            for factor in (1 + 1e-2, 1 - 1e-2):
                for (p, i), w in zip(group, saved): p.data[i] = factor * w
                ends.append(loss())
            for (p, i), w in zip(group, saved): p.data[i] = w
        assert abs(ends[0] - ends[1]) / 2e-2 == pytest.approx(at(taylor.saliencies()[key], j).item(), rel=0.05, abs=2e-5)  # logits are single precision


def test_wanda_is_the_columns_norm_times_the_inputs():
    model = net(4); pruner = StructuredPruner(model, groups=("ffn", "head"), saliency="wanda", ema=0.0); step(model, pruner)
    seen = {}
    m = model.model.layers[0].mlp; h = m.down_proj.register_forward_pre_hook(lambda _, a: seen.update(x=a[0].detach())); model(tokens()); h.remove()
    expected = m.down_proj.weight.abs().sum(0) * seen["x"].reshape(-1, 20).pow(2).mean(0).sqrt()
    torch.testing.assert_close(pruner.saliencies()["ffn", 0], expected.detach(), rtol=1e-4, atol=1e-6)


def test_averages_decay():
    model = net(); pruner = StructuredPruner(model, ema=0.9, compensate=True); w = model.model.layers[0].mlp.up_proj.weight; expected = 0
    for t in range(4): step(model, pruner, seed=t); expected = 0.9 * expected + 0.1 * w.grad**2
    torch.testing.assert_close(pruner._fisher[w], expected)


def test_the_least_salient_a_parameter_goes_first():
    model = net(4); pruner = StructuredPruner(model, groups=["ffn"], saliency="magnitude", compensate=False)
    s = torch.cat([pruner.saliencies()["ffn", i] for i in (0, 1)]); lowest = {(int(j) // 20, int(j) % 20) for j in s.argsort()[:6]}
    removed = pruner.prune_to(size(model) - 6 * 3 * 24)
    assert {(r["layer"], r["index"]) for r in removed} == lowest


def test_refit_repairs_what_the_layer_computed():
    model = llama(32, 2, seed=2); batches = lambda t: torch.randint(0, 512, (8, 32), generator=torch.Generator().manual_seed(t))
    fit(model, lm_loss, batches, torch.optim.AdamW(model.parameters(), 3e-3), 30, device="cpu")
    errors = {}
    for compensate in (False, True):
        copy_ = copy.deepcopy(model); pruner = StructuredPruner(copy_, groups=["ffn"], saliency="magnitude", compensate=compensate, ema=0.0, damping=1e-4)
        copy_.train(); lm_loss(copy_, batches(99)).backward()
        if compensate: pruner.observe()
        pruner.prune_to(int(0.85 * size(model)))
        errors[compensate] = float((copy_(batches(99)).logits - model(batches(99)).logits).detach().norm())
    assert errors[True] < 0.8 * errors[False]


def test_layers_keep_their_frequencies():
    model = net(2, seed=3); pruner = StructuredPruner(model, groups=["qk"], saliency="random", compensate=False); pruner.prune_to(pruner.n_params - 24 * 4 * 3)
    pairs = [l.self_attn.pairs for l in model.model.layers]
    assert all(p.shape[1] < 4 and (p.sort(1).values == p).all() for p in pairs if p.shape[1] < 4) and min(p.shape[1] for p in pairs) < 4
    x = tokens(); shifted = model(x[:, :10], position_ids=torch.arange(10)[None] + 7).logits
    torch.testing.assert_close(shifted, model(x[:, :10]).logits, atol=1e-4, rtol=1e-4)  # only distances matter, also with fewer frequencies


# schedule, model, use

def test_schedule():
    s = PruningSchedule(10_000, 3_000, 50, 250, 10)
    sizes = [s.params(t) for t in range(300)]
    assert sizes[:60] == [10_000] * 60 and set(sizes[250:]) == {3_000} and sizes == sorted(sizes, reverse=True)
    steps = np.diff(np.log([s.params(t) for t in range(50, 251, 10)])); np.testing.assert_allclose(steps, steps.mean(), rtol=0.05)
    for make, text in ((lambda: PruningSchedule(10, 10, 0, 1), "end_params is 10"), (lambda: PruningSchedule(10, 5, 3, 2), "start is 3"), (lambda: PruningSchedule(10, 5, 0, 2, 0), "every is 0")):
        with pytest.raises(ValueError, match=text): make()


@pytest.mark.parametrize("kv", [4, 2, 1])
def test_variable_attention_is_llamas(kv):
    model = net(kv, bias=True).eval(); x = tokens(); mask = torch.ones_like(x); mask[1, :5] = 0
    before, masked = model(x).logits, model(x, attention_mask=mask).logits
    make_variable(make_variable(model))
    torch.testing.assert_close(model(x).logits, before, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model(x, attention_mask=mask).logits[mask.bool()], masked[mask.bool()], atol=1e-5, rtol=1e-5)


def test_saved_loaded_copied_compiled_generated(tmp_path):
    model = net(2); pruner = StructuredPruner(model, groups=KINDS); step(model, pruner); pruner.prune_to(int(0.6 * size(model)), at_least=int(0.55 * size(model))); pruner.finish()
    final = rebuild(model).eval(); x = tokens()
    final.save_pretrained(tmp_path); loaded = VariableLlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(x).logits, model.eval()(x).logits) and loaded.config.layer_sizes == layer_sizes(model) and (tmp_path / "model.safetensors").stat().st_size < 4 * size(model) + 20_000
    assert torch.equal(copy.deepcopy(final)(x).logits, final(x).logits)
    torch.testing.assert_close(torch.compile(final, backend="aot_eager")(x).logits, final(x).logits, atol=1e-5, rtol=1e-5)
    with torch.autocast("cpu", torch.bfloat16): assert torch.isfinite(final(x).logits).all()
    a, b = (final.generate(x[:1, :4], max_new_tokens=6, do_sample=False, use_cache=c, pad_token_id=0) for c in (True, False))
    assert torch.equal(a, b)
    again = StructuredPruner(loaded, compensate=False, saliency="magnitude"); again.prune_to(int(0.9 * size(loaded)))
    assert again.n_params < size(final), "a loaded model is pruned further"


def test_a_rebuilt_model_keeps_what_is_frozen_and_how_it_generates():
    model = net(2); model.generation_config.max_new_tokens, model.generation_config.pad_token_id = 7, 3; model.model.norm.weight.requires_grad_(False)
    for new in (rebuild(model), to_llama(model)):
        assert new.generation_config.max_new_tokens == 7 and new.generation_config.pad_token_id == 3 and new.generation_config is not model.generation_config
        assert [n for n, p in new.named_parameters() if not p.requires_grad] == ["model.norm.weight"]


def test_a_model_in_a_file_holds_no_inputs():
    model = net(2); pruner = StructuredPruner(model); step(model, pruner); lm_loss(model, tokens())
    kept = lambda m: [h.store for part in m.modules() for h in part._forward_pre_hooks.values()]
    assert all(kept(model)) and len(kept(model)) == 4
    for copied in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)): assert not any(kept(copied)) and torch.equal(copied(tokens()).logits, model(tokens()).logits)


def test_plain_llama_where_the_result_is_uniform():
    model = net(2); pruner = StructuredPruner(model, groups=["ffn"], saliency="magnitude", compensate=False)
    with torch.no_grad():
        for l in model.model.layers: l.mlp.gate_proj.weight[:5] *= 1e-3; l.mlp.up_proj.weight[:5] *= 1e-3; l.mlp.down_proj.weight[:, :5] *= 1e-3
    pruner.prune_to(size(model) - 10 * 72)
    plain = to_llama(model)
    assert type(plain) is LlamaForCausalLM and plain.config.intermediate_size == 15 and not any(isinstance(m, VariableAttention) for m in plain.modules())
    torch.testing.assert_close(plain(tokens()).logits, model(tokens()).logits, atol=1e-5, rtol=1e-5)
    pruner.prune_to(size(model) - 1)
    with pytest.raises(ValueError, match="layers differ"): to_llama(model)


def test_operations_and_report_equal_the_counter():
    model = net(2); pruner = StructuredPruner(model, groups=KINDS, saliency="random", compensate=False); start = (layer_sizes(model), pruner.width); pruner.prune_to(int(0.5 * size(model)))
    config = rebuild(model).config
    counted = flops(lambda: without_mask(VariableLlamaForCausalLM(config)), llama_loss(2, 16), backward=False)
    angles = 2 * 2 * 16 * 4  # the outer product of positions and frequencies
    report = pruner.report(16)
    assert counted - 2 * 16 * report["flops_after"] in (0, angles, angles // 2) and report["flops_before"] == forward_flops(*start, 50, 16)
    assert report["bytes_after"] == 4 * size(model) == 4 * report["parameters_after"] < report["bytes_before"]


def test_training_under_fit_prunes_along_the_schedule():
    model = llama(32, 2); optimizer = torch.optim.AdamW(model.parameters(), 3e-3, fused=True); n = size(model)
    pruner, schedule = StructuredPruner(model, optimizer), PruningSchedule(n, n // 2, 0, 12, 3)
    def after_step(m, optimizer, t):
        if schedule.params(t) < pruner.n_params: pruner.prune_to(schedule.params(t), at_least=int(0.48 * n))
    history = fit(model, lm_loss, lambda t: torch.randint(0, 512, (4, 32)), optimizer, 16, clip=1.0, device="cpu", after_backward=lambda *_: pruner.observe(), after_step=after_step)
    assert 0.48 * n <= size(model) <= n // 2 and np.isfinite(history.loss).all()


@pytest.mark.parametrize("make, text, kind", [
    (lambda m: StructuredPruner(m, groups=["layer"]), "groups is", ValueError), (lambda m: StructuredPruner(m, groups=[]), "at least one", ValueError), (lambda m: StructuredPruner(m, saliency="hessian"), "saliency is 'hessian'", ValueError),
    (lambda m: StructuredPruner(m, saliency="wanda"), "wanda", ValueError), (lambda m: StructuredPruner(m, ema=1.0), "ema is 1.0", ValueError), (lambda m: StructuredPruner(m, damping=-1), "damping is -1", ValueError),
    (lambda m: StructuredPruner(m, torch.optim.SGD(mlp([2, 2]).parameters(), 0.1)), "does not hold", ValueError), (lambda m: StructuredPruner(mlp([2, 2])), "only the layout", TypeError),
    (lambda m: StructuredPruner(m).prune_to(size(m)), "below the present", ValueError), (lambda m: StructuredPruner(m).prune_to(100), "at least", ValueError), (lambda m: StructuredPruner(m).prune_to(size(m) - 1), "observe", ValueError),
    (lambda m: StructuredPruner(m).prune_to(size(m) - 5, at_least=size(m)), "at_least", ValueError), (lambda m: StructuredPruner(m).observe(), "no gradient", ValueError), (lambda m: to_llama(mlp([2, 2])), "LlamaForCausalLM", TypeError)])
def test_wrong_input_leaves_the_model_as_it_was(make, text, kind):
    model = net(); before = copy.deepcopy(model.state_dict())
    with pytest.raises(kind, match=text): make(model)
    after = model.state_dict()
    assert all(torch.equal(v, after[k]) for k, v in before.items())


def test_inputs_that_overflowed_are_refused_before_anything_is_cut():
    model = net(); pruner = StructuredPruner(model, saliency="magnitude")
    model.train(); model(inputs_embeds=torch.full((1, 4, 24), float("nan"))); pruner.observe()
    before, sizes = copy.deepcopy(model.state_dict()), layer_sizes(model)
    with pytest.raises(ValueError, match="inputs of o in layer 0.*not finite"): pruner.prune_to(int(0.7 * size(model)))
    assert layer_sizes(model) == sizes and all(torch.equal(v, model.state_dict()[k]) for k, v in before.items()) and torch.isfinite(model(tokens()).logits).all()


@pytest.mark.parametrize("make, text, kind", [
    (lambda: PruningSchedule("10", 5, 0, 1), "start_params is '10'", TypeError), (lambda: PruningSchedule(10, 5.5, 0, 1), "end_params is 5.5", TypeError), (lambda: StructuredPruner(net(), ema="0.5"), "ema is '0.5'", TypeError),
    (lambda: StructuredPruner(net(), damping=float("nan")), "damping is nan", ValueError), (lambda: StructuredPruner(net(), groups=3), "groups is 3", TypeError), (lambda: StructuredPruner(net(), "adam"), "optimizer is a str", TypeError),
    (lambda: least_squares_update(torch.ones(3, 4), torch.eye(4), torch.tensor([7])), r"drop is \[7\]", ValueError), (lambda: least_squares_update(torch.ones(3, 4), torch.eye(4), torch.tensor([True, False])), r"drop is \[True, False\]", ValueError)])
def test_wrong_types_and_indices_are_named(make, text, kind):
    with pytest.raises(kind, match=text): make()


def test_compressed_layers_and_factored_states_are_refused():
    model = net(); model.model.layers[1].mlp.down_proj = nn.Sequential(nn.Linear(20, 3, bias=False), nn.Linear(3, 24, bias=False))
    with pytest.raises(ValueError, match="down_proj is a Sequential"): StructuredPruner(model)
    model = net(); optimizer = torch.optim.Adafactor(model.parameters()); pruner = StructuredPruner(model, optimizer); step(model, pruner, optimizer); n = size(model)
    with pytest.raises(ValueError, match="optimizer keeps"): pruner.prune_to(n // 2)
    assert size(model) == n
