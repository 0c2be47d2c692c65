"""GradNormLoRP: the layer against autograd and closed forms, trajectories against peft's DoRA and LoRA, against GaLore and a NumPy reference, models and checkpoints, wrong input."""
import copy
import io
import pickle
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from efftrain.accounting import parameter_bytes, state_bytes
from efftrain.memory.galore import GaLoreAdamW
from efftrain.memory.gradnormlorp import GradNormLoRPAdamW, WeightNormLowRank, gradient_condition, gradnormlorp, gradnormlorp_param_groups, merge, restart, save_adapter
from efftrain.models import llama, minilm, mlp

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft

KINDS = {"normalised": dict(), "norm differentiated": dict(detach_norm=False), "lora": dict(normalize=False)}
every_kind = pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)


def ids(seed=0, rows=4, length=16): return torch.randint(512, (rows, length), generator=torch.Generator().manual_seed(seed))


def moved(model, seed=0):
    """Factors and magnitudes as after some training."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for m in model.modules():
            if not isinstance(m, WeightNormLowRank): continue
            m.lora_B.copy_(torch.randn(m.lora_B.shape, generator=g) / 4)
            if m.magnitude is not None: m.magnitude.mul_(1 + 0.1 * torch.randn(m.magnitude.shape, generator=g))
    return model


def converted(width=32, rank=4, seed=0, dtype=torch.float32, **options):
    model = llama(width, 1, seed=seed).to(dtype)
    gradnormlorp(model, rank, **options)
    return model


def learn(model, optimizer, steps, begin=0):
    losses = []
    for step in range(begin, begin + steps):
        optimizer.zero_grad(); x = ids(step % 2)
        loss = model(input_ids=x, labels=x).loss
        loss.backward(); optimizer.step(); losses.append(loss.item())
    return losses


def factors(model): return [p for m in model.modules() if isinstance(m, WeightNormLowRank) for p in (m.lora_A, m.lora_B)]


# the layer

@every_kind
@pytest.mark.parametrize("bias", [True, False])
def test_starts_as_the_linear_layer(options, bias):
    torch.manual_seed(0)
    base, x = nn.Linear(9, 5, bias=bias), torch.randn(2, 3, 9)
    layer = WeightNormLowRank(base, 2, **options)
    torch.testing.assert_close(layer(x), base(x), atol=1e-6, rtol=0)
    torch.testing.assert_close(layer.weight, base.weight, atol=1e-6, rtol=0)


@pytest.mark.parametrize("shape", [(9, 5), (5, 9), (6, 6)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_norms_without_the_matrix(shape, dtype, tolerance):
    torch.manual_seed(0)
    layer = moved(nn.Sequential(WeightNormLowRank(nn.Linear(*shape).to(dtype), 3)))[0]
    V = layer.base.weight.double() + layer.scaling * layer.lora_B.double() @ layer.lora_A.double()
    assert layer.norms().dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(layer.norms().double(), torch.linalg.norm(V, dim=1), rtol=tolerance, atol=tolerance)
    directions = (layer.weight.double() / layer.magnitude.double()[:, None]).norm(dim=1)
    torch.testing.assert_close(directions, torch.ones(shape[1], dtype=torch.float64), rtol=tolerance, atol=tolerance)


@every_kind
def test_gradients_are_those_of_autograd_and_of_the_closed_form(options):
    """Weight normalisation, equation 3 of Salimans & Kingma; without the projection when the norm is a constant."""
    torch.manual_seed(0)
    base, x, t = nn.Linear(9, 5).double(), torch.randn(7, 9, dtype=torch.float64), torch.randn(7, 5, dtype=torch.float64)
    layer = moved(nn.Sequential(WeightNormLowRank(base, 3, **options)))[0]
    ((layer(x) - t) ** 2).sum().backward()
    W0, A, B = base.weight.detach(), layer.lora_A.detach(), layer.lora_B.detach()
    v, one = W0 + layer.scaling * B @ A, torch.ones(5, dtype=torch.float64)
    m, n = (one, one) if layer.magnitude is None else (layer.magnitude.detach(), torch.linalg.norm(v, dim=1))
    W = (m / n)[:, None] * v
    G = 2 * (x @ W.T + base.bias.detach() - t).T @ x
    grad_v = (m / n)[:, None] * G
    if layer.magnitude is not None and not layer.detach_norm: grad_v = (m / n)[:, None] * (G - v * ((G * v).sum(1) / n**2)[:, None])
    torch.testing.assert_close(layer.lora_A.grad, layer.scaling * B.T @ grad_v)
    torch.testing.assert_close(layer.lora_B.grad, layer.scaling * grad_v @ A.T)
    if layer.magnitude is not None: torch.testing.assert_close(layer.magnitude.grad, (G * v).sum(1) / n)
    if layer.magnitude is not None and not layer.detach_norm:
        trained = (layer.lora_A, layer.lora_B, layer.magnitude)
        def f(A, B, m): return torch.func.functional_call(layer, {"lora_A": A, "lora_B": B, "magnitude": m}, (x,))
        assert torch.autograd.gradcheck(f, trained)


def test_the_exact_gradient_leaves_the_length_of_a_direction():
    """With the norm differentiated, the gradient of V is orthogonal to V, row by row."""
    torch.manual_seed(0)
    layer = moved(nn.Sequential(WeightNormLowRank(nn.Linear(4, 6).double(), 4, detach_norm=False)))[0]
    (layer.weight * torch.randn(6, 4, dtype=torch.float64)).sum().backward()
    A = layer.lora_A.detach()  # square: the gradient of V can be had back from that of B
    V, grad_v = layer.base.weight + layer.scaling * layer.lora_B @ A, layer.lora_B.grad @ torch.linalg.inv(A.T) / layer.scaling
    assert grad_v.norm() > 0.1
    torch.testing.assert_close((V * grad_v).sum(1), torch.zeros(6, dtype=torch.float64))
    # growing W_0 and B A together changes nothing
    out = layer.weight.detach()
    with torch.no_grad(): layer.base.weight.mul_(3); layer.lora_B.mul_(3)
    torch.testing.assert_close(layer.weight, out)


def test_dropout_touches_the_low_rank_part_in_training_only():
    torch.manual_seed(0)
    layer = moved(nn.Sequential(WeightNormLowRank(nn.Linear(64, 8), 2, dropout=0.5)))[0]
    x = torch.randn(3, 64)
    layer.train(); a = layer(x)
    layer.eval(); b = layer(x)
    assert not torch.allclose(a, b) and torch.equal(b, layer(x))
    with torch.no_grad(): layer.lora_B.zero_()
    layer.train(); first = layer(x); layer.eval()
    torch.testing.assert_close(first, layer(x))


# against peft

def twins(dora, rank=4, dtype=torch.float64):
    ours = llama(32, 1).to(dtype); theirs = copy.deepcopy(ours)
    gradnormlorp(ours, rank, normalize=dora)
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", use_dora=dora, exclude_modules=["lm_head"]))
    for name, m in ours.named_modules():
        if isinstance(m, WeightNormLowRank): theirs.get_submodule(f"base_model.model.{name}").lora_A["default"].weight.data.copy_(m.lora_A)
    return ours, theirs


@pytest.mark.parametrize("dora", [True, False])
def test_walks_as_peft_does_without_projection(dora):
    ours, theirs = twins(dora)
    assert sum(p.requires_grad * p.numel() for p in ours.parameters()) == sum(p.requires_grad * p.numel() for p in theirs.parameters())
    a = learn(ours, GradNormLoRPAdamW(ours, 1e-2, proj_rank=None, eps=1e-30, weight_decay=0.1), 25)
    b = learn(theirs, torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], 1e-2, eps=1e-30, weight_decay=0.1), 25)
    assert a[0] - a[-1] > 0.05
    assert max(abs(x - y) for x, y in zip(a, b)) < 1e-3  # decay comes after the update here and before it there
    ours, theirs = twins(dora)
    a = learn(ours, GradNormLoRPAdamW(ours, 1e-2, proj_rank=None, eps=1e-30), 25)
    b = learn(theirs, torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], 1e-2, eps=1e-30, weight_decay=0.0), 25)
    assert max(abs(x - y) for x, y in zip(a, b)) < 1e-7


@pytest.mark.parametrize("dora", [True, False])
def test_an_adapter_of_peft(dora, tmp_path):
    model = llama(32, 1); original = copy.deepcopy(model)
    gradnormlorp(model, 4, normalize=dora); moved(model)
    save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(original, tmp_path).eval()
    torch.testing.assert_close(theirs(input_ids=ids()).logits, model.eval()(input_ids=ids()).logits, atol=1e-5, rtol=1e-5)
    plain = theirs.merge_and_unload(); merge(model)
    for (_, a), (_, b) in zip(plain.named_parameters(), model.named_parameters()): torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


# against GaLore and NumPy

@pytest.mark.parametrize("proj_type", ["std", "full"])
def test_without_normalisation_it_is_galore_on_the_factors(proj_type):
    a, b = (converted(normalize=False) for _ in range(2))
    with torch.no_grad():
        for model in (a, b): moved(model)  # no gradient of zeros, which GaLore keeps a subspace of
    ours = GradNormLoRPAdamW(a, 1e-2, proj_rank=4, proj_type=proj_type, scale=0.5, update_proj_gap=7)
    theirs = GaLoreAdamW([dict(params=factors(b), rank=4, update_proj_gap=7, scale=0.5, proj_type=proj_type)], 1e-2)
    assert learn(a, ours, 20) == learn(b, theirs, 20)
    for p, q in zip(factors(a), factors(b)): assert torch.equal(p, q)


@pytest.mark.parametrize("proj_type", ["std", "full"])
def test_walks_as_the_formula_in_numpy(proj_type):
    """U rho(U^T D V) V^T with Adam for rho, subspaces every 4 updates and the second step's for A, lengths by plain Adam."""
    torch.manual_seed(0)
    base, x, t = nn.Linear(8, 6, bias=False).double(), torch.randn(30, 8, dtype=torch.float64), torch.randn(30, 6, dtype=torch.float64)
    net = nn.Sequential(base); W0 = base.weight.detach().numpy().copy()
    gradnormlorp(net, 3, alpha=3.0)
    lr, scale, rank, T, (b1, b2), eps = 0.02, 2.0, 2, 4, (0.9, 0.999), 1e-6
    optimizer = GradNormLoRPAdamW(net, lr, proj_rank=rank, scale=scale, update_proj_gap=T, proj_type=proj_type, betas=(b1, b2), eps=eps)
    A, B, m = (p.detach().numpy().copy() for p in (net[0].lora_A, net[0].lora_B, net[0].magnitude))
    X, Y, state, blank = x.numpy(), t.numpy(), {}, True
    for step in range(15):
        optimizer.zero_grad(); ((net(x) - t) ** 2).mean().backward(); optimizer.step()
        V = W0 + B @ A
        n = np.linalg.norm(V, axis=1)
        G = 2 * (X @ ((m / n)[:, None] * V).T - Y).T @ X / Y.size
        D = {"A": B.T @ ((m / n)[:, None] * G), "B": ((m / n)[:, None] * G) @ A.T, "m": (G * V).sum(1) / n}
        for key, p in (("A", A), ("B", B), ("m", m)):
            s = state.setdefault(key, dict(m=0.0, v=0.0))
            g = D[key]
            if key != "m":
                if step % T == 0 or "U" not in s or (key == "A" and step == 1): s["U"], _, s["Vt"] = np.linalg.svd(g, full_matrices=False)
                left, right = proj_type == "full" or g.shape[0] < g.shape[1], proj_type == "full" or g.shape[0] >= g.shape[1]
                U, V_ = s["U"][:, :rank] if left else np.eye(len(g)), s["Vt"][:rank].T if right else np.eye(g.shape[1])
                g = U.T @ g @ V_
            s["m"], s["v"] = b1 * s["m"] + (1 - b1) * g, b2 * s["v"] + (1 - b2) * g * g
            u = s["m"] / (np.sqrt(s["v"]) + eps) * np.sqrt(1 - b2**(step + 1)) / (1 - b1**(step + 1))
            p -= lr * (u if key == "m" else scale * U @ u @ V_.T)
    for p, q in zip((net[0].lora_A, net[0].lora_B, net[0].magnitude), (A, B, m)): np.testing.assert_allclose(p.detach().numpy(), q, atol=1e-6)


# the optimizer

def test_a_subspace_of_zeros_is_thrown_away():
    model = converted()
    optimizer = GradNormLoRPAdamW(model, 1e-2, proj_rank=2, proj_type="full", update_proj_gap=100)
    layer = next(m for m in model.modules() if isinstance(m, WeightNormLowRank))
    learn(model, optimizer, 1)
    assert not layer.lora_A.grad.any() and "basis_right" not in optimizer.state[layer.lora_A] and "basis_right" in optimizer.state[layer.lora_B]
    learn(model, optimizer, 1)
    found = optimizer.state[layer.lora_A]["basis_right"].clone()
    torch.testing.assert_close((layer.lora_A.grad @ found).norm(), torch.linalg.svdvals(layer.lora_A.grad)[:2].norm())
    learn(model, optimizer, 3)
    assert torch.equal(found, optimizer.state[layer.lora_A]["basis_right"])


def test_state_is_as_large_as_the_formula_says():
    model = converted(width=64)
    layers = [m for m in model.modules() if isinstance(m, WeightNormLowRank)]
    both, r, lengths = sum(m.in_features + m.out_features for m in layers), 4, sum(m.out_features for m in layers)
    for options, formula in ((dict(proj_rank=None), 2 * r * both), (dict(proj_rank=4), 2 * r * both + 2 * r * r * len(layers)), (dict(proj_rank=2), 4 * both + 2 * 2 * r * len(layers)), (dict(proj_rank=4, proj_type="full"), r * both + 6 * r * r * len(layers))):
        fresh = copy.deepcopy(model)
        optimizer = GradNormLoRPAdamW(fresh, 1e-3, **options)
        learn(fresh, optimizer, 3)
        assert state_bytes(optimizer) == 4 * (formula + 2 * lengths), options


def test_eight_bit_moments_take_a_byte_and_learn():
    model = converted(width=128, rank=64)
    optimizer = GradNormLoRPAdamW(model, 2e-3, proj_rank=64, bits=8, scale=1)
    plain = GradNormLoRPAdamW(other := copy.deepcopy(model), 2e-3, proj_rank=64, scale=1)
    a, b = learn(model, optimizer, 10), learn(other, plain, 10)
    for p in factors(model):
        s = optimizer.state[p]
        assert s["exp_avg"].dtype == s["exp_avg_sq"].dtype == torch.uint8 and s["exp_avg_scale"].numel() == -(-s["exp_avg"].numel() // 256)
    assert abs(a[-1] - b[-1]) < 0.25 * (b[0] - b[-1]) and b[0] - b[-1] > 0.05


def test_hooks_of_a_step_run_once():
    model = converted()
    GaLoreAdamW([dict(params=factors(converted()), rank=2)], 1e-3)  # GaLore's step is wrapped by torch when the first one is made
    optimizer, seen = GradNormLoRPAdamW(model, 1e-3), []
    optimizer.register_step_pre_hook(lambda *a: seen.append("pre")); optimizer.register_step_post_hook(lambda *a: seen.append("post"))
    learn(model, optimizer, 1)
    assert seen == ["pre", "post"]


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("at", [1, 6])
def test_an_interrupted_run_goes_on_bit_for_bit(bits, at):
    make = lambda m: GradNormLoRPAdamW(m, 1e-2, proj_rank=2, proj_type="full", update_proj_gap=4, bits=bits, min_8bit_size=64)
    whole = converted(); optimizer = make(whole)
    learn(whole, optimizer, at)
    file = io.BytesIO(); torch.save(dict(model=whole.state_dict(), optimizer=optimizer.state_dict()), file); file.seek(0)
    twin, copied = copy.deepcopy((whole, optimizer)), pickle.loads(pickle.dumps((whole, optimizer)))
    learn(whole, optimizer, 7, at)
    again = converted(seed=5); second = make(again)
    saved = torch.load(file, weights_only=True); again.load_state_dict(saved["model"]); second.load_state_dict(saved["optimizer"])
    learn(again, second, 7, at); learn(*twin, 7, at); learn(*copied, 7, at)
    for model in (again, twin[0], copied[0]):
        for p, q in zip(whole.parameters(), model.parameters()): assert torch.equal(p, q)


def test_groups_can_differ():
    model = converted()
    groups = gradnormlorp_param_groups(model, 2, weight_decay=0.1)
    assert [g.get("rank") for g in groups] == [2, None] or [g.get("rank") for g in groups] == [None, 2]
    optimizer = GradNormLoRPAdamW([{**g, **({"scale": 7.0} if "rank" in g else {})} for g in groups], 1e-3, update_proj_gap=11)
    by = {g.get("rank"): g for g in optimizer.param_groups}
    assert by[2]["scale"] == 7.0 and by[2]["update_proj_gap"] == 11 and by[2]["weight_decay"] == 0.1 and "scale" not in by[None]
    assert sum(len(g["params"]) for g in groups) == sum(p.requires_grad for p in model.parameters())


# models

@every_kind
def test_a_converted_model_saves_loads_merges(options, tmp_path):
    from safetensors.torch import load_file, save_file
    model = moved(converted(**options)).eval(); out = model(input_ids=ids()).logits
    save_file({k: v.contiguous() for k, v in model.state_dict().items() if k != "lm_head.weight"}, tmp_path / "m.safetensors")
    again = converted(seed=3, **options).eval(); again.load_state_dict(load_file(tmp_path / "m.safetensors"), strict=False)  # but the tied output layer
    assert torch.equal(again(input_ids=ids()).logits, out)
    torch.testing.assert_close(copy.deepcopy(model)(input_ids=ids()).logits, out)
    report = merge(model)
    torch.testing.assert_close(model(input_ids=ids()).logits, out, atol=1e-5, rtol=1e-5)
    assert report.bytes_after == parameter_bytes(llama(32, 1)) and not any(isinstance(m, WeightNormLowRank) for m in model.modules())
    model.save_pretrained(tmp_path / "plain")
    from transformers import AutoModelForCausalLM
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(tmp_path / "plain").eval()(input_ids=ids()).logits, out, atol=1e-5, rtol=1e-5)


def test_restart_keeps_the_function_and_frees_the_factors():
    model = converted()
    optimizer = GradNormLoRPAdamW(model, 1e-2, proj_rank=2)
    learn(model, optimizer, 4); out = model(input_ids=ids()).logits.detach()
    before = copy.deepcopy(factors(model))
    restart(model, optimizer, seed=9)
    torch.testing.assert_close(model(input_ids=ids()).logits, out, atol=1e-5, rtol=1e-5)
    assert all(p not in optimizer.state for p in factors(model)) and len(optimizer.state) == sum(m.magnitude is not None for m in model.modules() if isinstance(m, WeightNormLowRank))
    assert not any(torch.equal(p, q) for p, q in zip(factors(model), before))
    learn(model, optimizer, 3); restart(model, optimizer)
    first = next(m for m in model.modules() if isinstance(m, WeightNormLowRank))
    change = first.base.weight - next(m for m in llama(32, 1).modules() if isinstance(m, nn.Linear)).weight
    assert torch.linalg.matrix_rank(first.base.weight / first.base.weight.norm(dim=1, keepdim=True), rtol=1e-3) == 32 and change.norm() > 0


def test_conv1d_of_gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=512, n_positions=32)).eval()
    plain = model(input_ids=ids()).logits.detach()
    report = gradnormlorp(model, 4, targets=["attn", "mlp"])
    torch.testing.assert_close(model(input_ids=ids()).logits, plain, atol=1e-5, rtol=1e-5)
    assert {(r["out"], r["in"]) for r in report.layers} == {(96, 32), (32, 32), (128, 32), (32, 128)}
    moved(model); out = model(input_ids=ids()).logits
    merge(model)
    torch.testing.assert_close(model(input_ids=ids()).logits, out, atol=1e-5, rtol=1e-5)
    assert model.transformer.h[0].attn.c_attn.weight.shape == (32, 96)


def test_bert_with_a_new_head():
    model = minilm(2)[0].eval()
    x = dict(input_ids=torch.tensor([[101, 2023, 2003, 102]]), attention_mask=torch.ones(1, 4, dtype=torch.long))
    plain = model(**x).logits
    report = gradnormlorp(model, 8, targets=["query", "value", "key", "intermediate.dense", "output.dense"], trainable="classifier")
    torch.testing.assert_close(model(**x).logits, plain, atol=1e-5, rtol=1e-5)
    heads = [p for n, p in model.named_parameters() if "classifier" in n]
    assert len(report.layers) == 6 * 6 and all(p.requires_grad for p in heads) and report.trained == sum(r["trained"] for r in report.layers) + sum(p.numel() for p in heads)


def test_a_layer_at_two_places_is_one_layer_still():
    shared = nn.Linear(6, 6)
    net = nn.Sequential(shared, nn.Tanh(), shared); x = torch.randn(3, 6); plain = net(x).detach()
    assert len(gradnormlorp(net, 2).layers) == 1 and net[0] is net[2]
    torch.testing.assert_close(net(x), plain, atol=1e-6, rtol=0)
    merge(net); assert net[0] is net[2] is shared


def test_multihead_attention_reads_the_weight():
    torch.manual_seed(0)
    attention, x = nn.MultiheadAttention(16, 2, batch_first=True), torch.randn(2, 5, 16)
    plain = attention(x, x, x)[0].detach()
    gradnormlorp(attention, 2, targets="out_proj")
    torch.testing.assert_close(attention(x, x, x)[0], plain, atol=1e-6, rtol=1e-5)
    attention(x, x, x)[0].sum().backward()
    assert attention.out_proj.lora_B.grad.abs().sum() > 0


def test_report_counts_real_bytes_and_operations():
    model = llama(64, 1)
    report = gradnormlorp(model, 4, targets="down_proj")
    (row,) = report.layers
    p, q, r = row["out"], row["in"], 4
    assert row["bytes_before"] == 4 * p * q and row["bytes_after"] == 4 * (p * q + r * (p + q) + p) and row["trained"] == r * (p + q) + p == report.trained
    assert row["flops_before"] == 2 * 512 * p * q and row["flops_after"] == 2 * 512 * (p * q + r * (p + q)) + 2 * p * q * r + 2 * q * r * r + 2 * p * r * r
    assert row["error"] < 1e-6 and report.bytes_after - report.bytes_before == row["bytes_after"] - row["bytes_before"] and "trained" in report.table()


def test_conversion_keeps_dtype_mode_and_random_state():
    model = llama(32, 1).to(torch.bfloat16).eval()
    torch.manual_seed(1); a = torch.rand(1); torch.manual_seed(1)
    gradnormlorp(model, 4)
    assert torch.equal(torch.rand(1), a)
    assert all(p.dtype == torch.bfloat16 for p in model.parameters()) and not any(m.training for m in model.modules())
    a, b = (torch.cat([p.flatten() for p in factors(converted(**s))]) for s in (dict(), dict()))
    assert torch.equal(a, b)
    other = llama(32, 1); gradnormlorp(other, 4, seed=1)
    assert not torch.equal(a, torch.cat([p.flatten() for p in factors(other)]))


def test_autocast_and_compile():
    model = moved(converted())
    out = model(input_ids=ids()).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(model(input_ids=ids()).logits.float(), out, atol=0.1, rtol=0.1)
        assert next(m for m in model.modules() if isinstance(m, WeightNormLowRank)).norms().dtype == torch.float32
    layer = next(m for m in model.modules() if isinstance(m, WeightNormLowRank))
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), layer(x))


def test_condition_numbers():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 6)); gradnormlorp(net, 3)
    assert np.isnan(gradient_condition(net)["0"]["A"])
    net(torch.randn(20, 8)).square().sum().backward()
    found = gradient_condition(net)["0"]
    assert np.isnan(found["A"]), "B is zero: so is the gradient of A"
    assert found["B"] == pytest.approx(np.linalg.cond(net[0].lora_B.grad.numpy().astype(np.float64)), rel=1e-6)


# wrong input

def test_wrong_input_is_named_and_changes_nothing():
    zero = mlp([4, 3, 2])
    with torch.no_grad(): zero[0].weight[1] = 0
    infinite = mlp([4, 3, 2])
    with torch.no_grad(): infinite[2].weight[0, 0] = float("inf")
    tied, plain = llama(32, 1, tied=True), llama(32, 1)
    parametrised = mlp([4, 3, 2]); nn.utils.parametrizations.weight_norm(parametrised[0])
    bad = [(zero, {}, "'0' has 1 outputs whose weights are all zero, first output 1"), (infinite, {}, "'2' has weights that are not finite"), (tied, dict(targets=["lm_head"]), "shares its weight"), (plain, dict(targets=["conv"]), "conv"),
           (plain, dict(targets=lambda n, m: False), "takes no layer"), (plain, dict(rank=0), "rank is 0"), (plain, dict(alpha=0.0), "alpha"), (plain, dict(dropout=1.0), "dropout"), (plain, dict(trainable="score"), "score"),
           (nn.Linear(3, 3), dict(targets=lambda n, m: True), "wrap it"), (parametrised, dict(targets=["0"]), "computed at each call")]
    for model, options, message in bad:
        before = {n: (id(p), p.requires_grad, p.detach().clone()) for n, p in model.named_parameters()}
        with pytest.raises(ValueError, match=message): gradnormlorp(model, **{"rank": 2, **options})
        after = dict(model.named_parameters())
        assert all(id(after[n]) == i and after[n].requires_grad == r and torch.equal(after[n], v) for n, (i, r, v) in before.items()), message
    for options in (dict(rank=2.0), dict(rank=True), dict(normalize=1), dict(detach_norm="yes"), dict(targets=3), dict(seed=0.5)):
        with pytest.raises(TypeError): gradnormlorp(plain, **options)
    with pytest.raises(TypeError, match="model"): gradnormlorp("llama")
    gradnormlorp(zero, 2, normalize=False)
    with pytest.raises(ValueError, match="already"): gradnormlorp(zero, 2)
    for f in (merge, restart, gradient_condition, GradNormLoRPAdamW):
        with pytest.raises(ValueError, match="no GradNormLoRP layer"): f(mlp([2, 2]))
    with pytest.raises(ValueError, match="rank is 9"): WeightNormLowRank(nn.Linear(4, 8), 9)
    with pytest.raises(TypeError, match="base"): WeightNormLowRank(nn.Conv2d(2, 2, 3), 1)


def test_wrong_options_of_the_optimizer():
    model = converted()
    for options in (dict(bits=16), dict(proj_rank=0), dict(update_proj_gap=0), dict(scale=0.0), dict(proj_type="both"), dict(lr=-1.0), dict(betas=(1.0, 0.9)), dict(eps=-1.0), dict(weight_decay=-0.1), dict(block=0)):
        with pytest.raises(ValueError): GradNormLoRPAdamW(model, **options)
    with pytest.raises(TypeError): GradNormLoRPAdamW(model, proj_rank=1.5)
    with pytest.raises(ValueError, match="rank"): GradNormLoRPAdamW([dict(params=[nn.Parameter(torch.ones(3))], rank=1)])
    p = nn.Parameter(torch.ones(4, 4)); optimizer = GradNormLoRPAdamW([p], 1e-3)
    p.grad = torch.eye(4).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"): optimizer.step()


def test_several_ranks_are_no_adapter(tmp_path):
    net = mlp([8, 6, 3]); gradnormlorp(net, 4)
    with pytest.raises(ValueError, match="several kinds"): save_adapter(net, tmp_path)
