"""Q-GaLore: integers in groups, layers with integer weights, the optimizer; against torch's own quantisation, NumPy, bitsandbytes and GaLore."""
import copy
import io
import math
import pickle
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from efftrain.accounting import llama_loss, memory, parameter_bytes, state_bytes
from efftrain.memory import integers, qgalore
from efftrain.memory.galore import GaLoreAdamW, GaLoreAdamW8bit, per_layer
from efftrain.memory.integer_linear import IntegerLinear, IntegerWeight, dequantized_state_dict, quantize_linear_layers
from efftrain.memory.integers import BITS, dequantize_groups, pack, quantize_groups, stochastic_round, unpack
from efftrain.memory.qgalore import QGaLoreAdamW8bit, qgalore_param_groups
from efftrain.models import llama, mlp

every_bits = pytest.mark.parametrize("bits", BITS)


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=1, n_head=2))


def noise(*shape, seed=0, dtype=torch.float32): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# integers in groups

@every_bits
@pytest.mark.parametrize("group_size", [8, 96, 256])
def test_codes_are_those_of_torch_and_of_the_definition(bits, group_size):
    w = noise(48, 64) * torch.logspace(-4, 1, 48)[:, None]
    codes, scales, zeros = quantize_groups(w, bits, group_size)
    rows, levels = w.view(-1, group_size).numpy(), 2**bits - 1
    for row, q, s, z in zip(rows, codes.view(-1, group_size).numpy(), scales.numpy(), zeros.numpy()):
        low, high = min(row.min(), 0), max(row.max(), 0)
        assert s == pytest.approx(max(high - low, 1e-5) / levels, rel=1e-6) and z == np.clip(np.round(-low / s), 0, levels)
        assert (q == np.clip(np.round(row / s) + z, 0, levels)).all()
    if bits == 8:
        peer = torch.quantize_per_channel(w.view(-1, group_size), scales.double(), zeros.long(), 0, torch.quint8)
        off = (peer.int_repr().int() - codes.view(-1, group_size).int()).abs()
        assert off.max() <= 1 and (off > 0).float().mean() < 1e-3  # torch multiplies with 1 / s: a tie can fall the other way
        torch.testing.assert_close(peer.dequantize()[off.amax(1) == 0], dequantize_groups(codes, scales, zeros).view(-1, group_size)[off.amax(1) == 0])


@every_bits
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_round_trip_costs_half_a_step_at_most(bits, dtype):
    w = noise(32, 64, dtype=torch.float64).to(dtype) * 0.02
    codes, scales, zeros = quantize_groups(w, bits, 128)
    back = dequantize_groups(codes, scales, zeros)
    assert codes.dtype == zeros.dtype == torch.uint8 and scales.dtype == torch.float32 and codes.shape == w.shape
    assert ((back - w.float()).view(-1, 128).abs() <= scales[:, None] * 0.5001 + 1e-9).all()
    again = quantize_groups(back, bits, 128)
    assert torch.equal(again[0], codes) and torch.equal(again[2], zeros)


def test_groups_of_one_sign_of_zeros_and_of_numbers_that_are_not_finite():
    for w in (torch.rand(2, 32) * 0.1 + 0.5, -torch.rand(2, 32) - 3, torch.full((2, 32), 0.7)):
        assert (dequantize_groups(*quantize_groups(w, 8, 32)) - w).abs().max() <= 0.5001 * w.abs().max() / 255
    assert not dequantize_groups(*quantize_groups(torch.zeros(4, 8), 4, 16)).any()
    for bad in (math.nan, math.inf, -math.inf):
        w = torch.ones(4, 8); w[1, 2] = bad
        back = dequantize_groups(*quantize_groups(w, 8, 8))
        assert not back[1].isfinite().all() and back[[0, 2, 3]].isfinite().all()
    assert quantize_groups(torch.zeros(0, 8), 8, 4)[0].shape == (0, 8)


def test_rounding_by_chance_is_right_on_average():
    x = torch.tensor([0.003, 0.1, 0.5, 0.77, -0.25, -3.9, 2.0, 200.31]).repeat(10_000, 1)
    r = stochastic_round(x, torch.Generator().manual_seed(0))
    f = x[0] - x[0].floor()
    assert ((r == x.floor()) | (r == x.ceil())).all() and (r[:, 6] == 2).all()
    assert ((r.mean(0) - x[0]).abs() <= 4 * (f * (1 - f) / 10_000).sqrt() + 2e-5).all()
    assert (r.var(0) <= 0.25 * 1.03).all()


@every_bits
def test_groups_rounded_by_chance_are_right_on_average(bits):
    """Numbers that lie on the grid's own range; those beyond its ends, by half a step at most, are clamped to it."""
    w, n = noise(8, 32), 10_000
    generator = torch.Generator().manual_seed(1)
    _, scales, zeros = quantize_groups(w, bits, 64)
    total = quantize_groups(w.repeat(n, 1), bits, 64, stochastic=True, generator=generator)
    mean = dequantize_groups(*total).view(n, -1, 64).double().mean(0)
    rows, s = w.view(-1, 64).double(), scales[:, None].double()
    grid = rows / s + zeros[:, None]
    inside, f = (grid >= 0) & (grid <= 2**bits - 1), grid - grid.floor()
    assert inside.float().mean() > 0.9
    assert ((mean - rows).abs() / s <= 4.5 * (f * (1 - f) / n).sqrt() + 2e-4)[inside].all()
    assert ((mean - rows).abs() / s)[~inside].max() <= 0.5 + 1e-3 if (~inside).any() else True


def test_a_generator_decides_and_torchs_own_is_left_alone():
    w, before = noise(8, 32), torch.get_rng_state()
    draw = lambda seed: quantize_groups(w, 4, 32, stochastic=True, generator=torch.Generator().manual_seed(seed))[0]
    assert torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1)) and torch.equal(torch.get_rng_state(), before)


def test_parts_on_a_processor_do_not_show(monkeypatch):
    w = noise(64, 64)
    whole = quantize_groups(w, 8, 64)
    monkeypatch.setattr(integers, "_CHUNK", 64 * 3)
    for a, b in zip(whole, quantize_groups(w, 8, 64)): assert torch.equal(a, b)


@every_bits
def test_packing_by_hand_and_back(bits):
    codes = torch.randint(2**bits, (6, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    packed, per = pack(codes, bits), 8 // bits
    flat = codes.flatten().tolist()
    assert packed.tolist() == [sum(flat[i + k] << (bits * k) for k in range(per)) for i in range(0, 48, per)]
    assert packed.untyped_storage().nbytes() == 48 * bits // 8 and torch.equal(unpack(packed, bits, (6, 8)), codes)


@pytest.mark.parametrize("call, match", [
    (lambda: quantize_groups(noise(4, 8), 3), "bits is 3"), (lambda: quantize_groups(noise(4, 8), True), "bits is True"), (lambda: quantize_groups(noise(4, 8), 8, 5), "group_size is 5.*32 numbers"),
    (lambda: quantize_groups(noise(4, 8), 8, 0), "group_size is 0"), (lambda: quantize_groups(torch.ones(4, 8, dtype=torch.int64), 8, 8), "torch.int64"), (lambda: stochastic_round(torch.ones(3, dtype=torch.int32)), "torch.int32"),
    (lambda: pack(torch.zeros(3, dtype=torch.uint8), 4), "whole groups and bytes"), (lambda: pack(torch.zeros(4), 4), "torch.float32"), (lambda: unpack(torch.zeros(4, dtype=torch.uint8), 4, (9,)), "4 bytes"),
    (lambda: dequantize_groups(torch.zeros(8, dtype=torch.uint8), torch.ones(3), torch.ones(3)), "8 codes")])
def test_integers_reject_wrong_input(call, match):
    with pytest.raises(ValueError, match=match): call()


# layers

def pair(bits=8, bias=True, group_size=64, dtype=torch.float32):
    """An integer layer and an ordinary one with the same numbers."""
    torch.manual_seed(0)
    linear = nn.Linear(32, 24, bias=bias, dtype=dtype)
    layer = IntegerLinear.of(linear, bits, group_size)
    plain = nn.Linear(32, 24, bias=bias, dtype=dtype)
    plain.load_state_dict({"weight": layer.weight.dequantize(), **({"bias": linear.bias.detach()} if bias else {})})
    return layer, plain


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(32,), (5, 32), (2, 3, 32)])
def test_outputs_and_gradients_are_those_of_an_ordinary_layer(bits, bias, shape):
    results = []
    for m in pair(bits, bias):
        x = noise(*shape, seed=3).requires_grad_()
        y = m(x); y.square().sum().backward()
        results.append([y, x.grad, m.weight.grad, *([m.bias.grad] if bias else [])])
    for a, b in zip(*results): torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert type(results[0][2]) is torch.Tensor


def test_frozen_weights_get_no_gradient_and_second_derivatives_are_refused():
    layer, _ = pair()
    layer.weight.requires_grad_(False)
    x = noise(3, 32).requires_grad_()
    layer(x).sum().backward()
    assert layer.weight.grad is None and x.grad is not None
    first, = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError): first.sum().backward()


def small(seed=0, **options):
    model = llama(32, 1, seed=seed)
    return model, quantize_linear_layers(model, **{"group_size": 32, **options})


IDS = torch.randint(512, (2, 12), generator=torch.Generator().manual_seed(0))
def logits(model): return model(input_ids=IDS).logits
def step_of(model, optimizer): model(input_ids=IDS, labels=IDS).loss.backward(); optimizer.step(); optimizer.zero_grad()


@pytest.mark.parametrize("bits", [8, 4])
def test_report_and_bytes_are_those_of_the_storages(bits):
    before = parameter_bytes(llama(32, 1))
    model, report = small(bits=bits)
    assert len(report) == 7 and report.layer.str.contains("q_proj|k_proj|v_proj|o_proj|gate|up|down").all()
    n = report.bytes_before.sum() // 4
    assert (report.bytes_before == [4 * m.weight.numel() for m in model.modules() if isinstance(m, IntegerLinear)]).all()
    assert report.bytes_after.sum() == n * bits // 8 + n // 32 * 5 and parameter_bytes(model) == before - 4 * n + report.bytes_after.sum()
    assert report.error.between(*{8: (1e-4, 0.01), 4: (0.02, 0.15)}[bits]).all()


def test_state_is_plain_tensors_and_loads_back(tmp_path):
    from safetensors.torch import load_file, save_file
    model, _ = small()
    state = model.state_dict()
    assert all(type(t) is torch.Tensor for t in state.values())
    save_file({k: t.contiguous() for k, t in state.items() if k != "lm_head.weight"}, tmp_path / "m.safetensors")
    again, _ = small(seed=5)
    again.load_state_dict(load_file(tmp_path / "m.safetensors"), strict=False)
    assert torch.equal(logits(again), logits(model))
    buffer = io.BytesIO(); torch.save(state, buffer); buffer.seek(0)
    other, _ = small(seed=6)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(logits(other), logits(model))


def test_wrong_checkpoints_are_named():
    model, _ = small()
    state, name = model.state_dict(), "model.layers.0.mlp.up_proj.weight"
    with pytest.raises(RuntimeError, match=f"(?s)Missing.*{name}_scales"): model.load_state_dict({k: v for k, v in state.items() if k != f"{name}_scales"})
    with pytest.raises(RuntimeError, match=f"(?s)Unexpected.*{name}_other"): model.load_state_dict({**state, f"{name}_other": torch.ones(1)})
    with pytest.raises(RuntimeError, match=f"mismatch for {name}"): model.load_state_dict({**state, name: state[name][:2]})
    with pytest.raises(RuntimeError, match=f"mismatch for {name}"): model.load_state_dict({**state, name: torch.ones(3, 3)})
    layer, _ = pair()
    with pytest.raises(RuntimeError, match="mismatch for bias"): layer.load_state_dict({**layer.state_dict(), "bias": torch.ones(2)})


def test_hugging_face_saves_it_and_loads_the_floats(tmp_path):
    model, _ = small()
    model.save_pretrained(tmp_path / "integers"); model.save_pretrained(tmp_path / "floats", state_dict=dequantized_state_dict(model))
    floats = type(model).from_pretrained(tmp_path / "floats")
    torch.testing.assert_close(logits(floats), logits(model), atol=1e-5, rtol=1e-5)
    from safetensors.torch import load_file
    again, _ = small(seed=4); again.load_state_dict(load_file(tmp_path / "integers/model.safetensors"), strict=False)
    assert torch.equal(logits(again), logits(model))
    fresh, _ = small(seed=7); fresh.load_state_dict(floats.state_dict())  # floats are quantised as they load
    torch.testing.assert_close(logits(fresh), logits(model), atol=1e-4, rtol=1e-4)


def test_copies_pickles_dtypes_and_modes():
    model, _ = small()
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(again), logits(model))
        w = again.model.layers[0].mlp.up_proj.weight
        assert isinstance(w, IntegerWeight) and isinstance(w, nn.Parameter) and w.requires_grad and w.codes.data_ptr() != model.model.layers[0].mlp.up_proj.weight.codes.data_ptr()
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert half.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16 and half.model.layers[0].mlp.up_proj.weight.codes.dtype == torch.uint8
    half(input_ids=IDS, labels=IDS).loss.backward()
    assert half.model.layers[0].mlp.up_proj.weight.grad.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16): loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad.dtype == torch.float32
    assert torch.equal(logits(model.eval()), logits(model.train())) and "bits=8" in repr(model)


def test_compiled_in_one_graph_and_after_an_update():
    torch.manual_seed(0)
    net = nn.Sequential(IntegerLinear.of(nn.Linear(32, 32), group_size=64), nn.ReLU(), IntegerLinear.of(nn.Linear(32, 8), bits=4, group_size=64))
    compiled, x, grads = torch.compile(net, fullgraph=True, backend="aot_eager"), noise(5, 32), []
    for f in (compiled, net):
        net.zero_grad(); f(x).square().sum().backward(); grads.append([p.grad.clone() for p in net.parameters()])
    for a, b in zip(*grads): torch.testing.assert_close(a, b)
    torch.optim.SGD(net.parameters(), 0.1).step()
    torch.testing.assert_close(compiled(x), net(x))


def test_no_float_copy_waits_for_the_backward_pass_and_checkpointing_changes_nothing():
    model, _ = small()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t): model(input_ids=IDS, labels=IDS).loss.backward()
    sizes = {tuple(m.weight.shape) for m in model.modules() if isinstance(m, IntegerLinear)}
    assert any(isinstance(t, IntegerWeight) for t in saved) and not any(type(t) is torch.Tensor and tuple(t.shape) in sizes | {s[::-1] for s in sizes} and t.is_floating_point() for t in saved)
    plain = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.train(); model.gradient_checkpointing_enable()
    model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    for a, p in zip(plain, model.parameters()): torch.testing.assert_close(a, p.grad)


@pytest.mark.parametrize("make", [lambda p: torch.optim.SGD(p, 0.05, momentum=0.9), lambda p: torch.optim.AdamW(p, 1e-2), lambda p: torch.optim.AdamW(p, 1e-2, foreach=True)])
def test_any_optimizer_can_write_into_integers(make):
    """Close to the same steps with floats: a run differs by rounding alone."""
    layer, plain = pair()
    start = plain.weight.detach().clone()
    for m in (layer, plain):
        torch.manual_seed(0)
        o = make(m.parameters())
        for i in range(10): o.zero_grad(); (m(noise(8, 32, seed=i)) - 1).square().mean().backward(); o.step()
    moved, off = (plain.weight - start).norm(), (layer.weight.dequantize() - plain.weight).norm()
    assert off < 0.25 * moved and type(layer.weight) is IntegerWeight


def test_steps_below_the_grid_need_chance():
    moved = {}
    for stochastic in (True, False):
        w = nn.Parameter(IntegerWeight.of(noise(64, 64) * 0.02, 8, 256, stochastic))
        start, o = w.detach().dequantize(), torch.optim.SGD([w], lr=1.0)
        torch.manual_seed(0)
        for _ in range(100): w.grad = torch.full(w.shape, 1e-5); o.step()
        moved[stochastic] = (w.detach().dequantize() - start).mean().item()
    assert moved[True] == pytest.approx(-1e-3, rel=0.1) and abs(moved[False]) < 1e-4


@pytest.mark.parametrize("model, options, match", [
    (lambda: llama(32, 1), dict(bits=2), "bits is 2; allowed are 8, 4"), (lambda: llama(32, 1), dict(group_size=100), "group_size is 100.*q_proj.*32, 32"), (lambda: llama(32, 1), dict(targets=["conv"]), "takes no layer.*q_proj"),
    (lambda: llama(32, 1), dict(targets="mlp"), r"targets is 'mlp'.*\['mlp'\]"), (lambda: llama(32, 1), dict(targets=["embed"]), "'model.embed_tokens', a Embedding"), (lambda: llama(32, 1), dict(targets=["lm_head"], group_size=32), "'lm_head' is shared"),
    (gpt2, dict(group_size=32), "Conv1D"), (lambda: small()[0], dict(group_size=32), "integer weights already")])
def test_refusals_name_the_layer_and_change_nothing(model, options, match):
    model = model()
    kinds = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=match): quantize_linear_layers(model, **options)
    assert kinds == [type(m) for m in model.modules()]


def test_weights_that_are_not_finite_are_refused_and_a_flag_must_be_one():
    model = llama(32, 1)
    with torch.no_grad(): model.model.layers[0].mlp.down_proj.weight[0, 0] = math.nan
    with pytest.raises(ValueError, match="down_proj' holds numbers that are not finite"): quantize_linear_layers(model, group_size=32)
    with pytest.raises(TypeError, match="stochastic_rounding is 1"): quantize_linear_layers(llama(32, 1), group_size=32, stochastic_rounding=1)
    with pytest.raises(ValueError, match=r"must be \(64, 64\)"): IntegerWeight.of(noise(64, 64)).requantize_(noise(64, 32))


# the optimizer

def problem(shapes=((32, 64), (64, 32), (32, 32), (7,)), dtype=torch.float64):
    return [nn.Parameter(noise(*s, seed=i, dtype=dtype)) for i, s in enumerate(shapes)], [noise(*s, seed=50 + i, dtype=dtype) for i, s in enumerate(shapes)]


def walk(make, steps=90, gap=40, dtype=torch.float64, **own):
    params, goals = problem(dtype=dtype)
    o = make([dict(params=params[:3], rank=16, update_proj_gap=gap, scale=0.5, **own), dict(params=params[3:])])
    for _ in range(steps):
        for p, t in zip(params, goals): p.grad = (p - t).detach() * t.abs()
        o.step()
    return params, o


@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "left", "right", "full"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_with_floats_and_no_laziness_it_is_galore(proj_type, weight_decay):
    ours, _ = walk(lambda g: QGaLoreAdamW8bit(g, lr=0.02, weight_decay=weight_decay, bits=32, eps=1e-30), proj_bits=32, cos_threshold=None, proj_type=proj_type)
    theirs, _ = walk(lambda g: GaLoreAdamW(g, lr=0.02, weight_decay=weight_decay, eps=1e-30), proj_type=proj_type)
    for a, b in zip(ours, theirs): torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


def test_with_a_float_projection_it_is_eight_bit_galore():
    ours, _ = walk(lambda g: QGaLoreAdamW8bit(g, lr=0.02, min_8bit_size=0), proj_bits=32, cos_threshold=None)
    theirs, _ = walk(lambda g: GaLoreAdamW8bit(g, lr=0.02, weight_decay=0.0, min_8bit_size=0))
    for a, b in zip(ours, theirs): torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_against_numpy_with_integers_everywhere(shape):
    """Weights to the nearest of 8 bits, projection of 4 bits, float moments, the signed rule for the interval: every part by hand."""
    m, n = shape
    rank, T, lr, alpha, group = 8, 4, 0.02, 0.25, 64

    def rounded(x, bits):
        rows = x.reshape(-1, group)
        low, high = np.minimum(rows.min(1, keepdims=True), 0), np.maximum(rows.max(1, keepdims=True), 0)
        s = np.maximum(high - low, 1e-5) / (2**bits - 1)
        z = np.clip(np.round(-low / s), 0, 2**bits - 1)
        return ((np.clip(np.round(rows / s) + z, 0, 2**bits - 1) - z) * s).reshape(x.shape)

    weight = nn.Parameter(IntegerWeight.of(noise(m, n) * 0.1, 8, group, stochastic=False))
    o = QGaLoreAdamW8bit([dict(params=[weight], rank=rank, update_proj_gap=T, scale=alpha, proj_group_size=group, queue_size=2, signed_cosine=True)], lr=lr, bits=32)
    w, first, second, P, last, gap, queue, refreshes = rounded(noise(m, n).numpy().astype(np.float64) * 0.1, 8), 0.0, 0.0, None, None, T, [], 0
    torch.testing.assert_close(weight.detach().dequantize().double(), torch.from_numpy(w), atol=1e-6, rtol=0)
    base = noise(m, n, seed=7).numpy() * np.linspace(3, 0.1, n)
    for t in range(40):
        g = (base + 0.3 * noise(m, n, seed=100 + t).numpy()).astype(np.float32)
        weight.grad = torch.from_numpy(g); o.step()
        if t % gap == 0:
            u, _, vt = torch.linalg.svd(torch.from_numpy(g), full_matrices=False)
            exact = vt[:rank].numpy() if m >= n else u[:, :rank].numpy()
            refreshes += 1
            vector = exact[0] if m >= n else exact[:, 0]
            if last is not None:
                queue = [*queue, float(vector @ last)][-2:]
                if len(queue) == 2 and sum(queue) / 2 >= 0.4: gap *= 2
            last, P = vector, rounded(exact.astype(np.float64), 4)
        low = g @ P.T if m >= n else P.T @ g
        first, second = 0.9 * first + 0.1 * low, 0.999 * second + 0.001 * low**2
        step = first / (1 - 0.9**(t + 1)) / (np.sqrt(second / (1 - 0.999**(t + 1))) + 1e-8)
        w = rounded(w - lr * alpha * (step @ P if m >= n else P @ step), 8)
        got = weight.detach().dequantize().double().numpy()
        assert np.abs(got - w).max() < 3e-3 and (np.abs(got - w) > 1e-5).mean() < 2e-2, t  # a number may round to the other neighbour
        w = got  # ... and is then not to be followed
    assert o.svd_counts["0.0"] == refreshes < 10 and o.update_proj_gaps["0.0"] == gap


def test_eight_bit_moments_walk_as_bitsandbytes():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import bitsandbytes
    ours, theirs = (nn.Parameter(noise(64, 128)) for _ in range(2))
    o, peer = QGaLoreAdamW8bit([ours], lr=1e-2), bitsandbytes.optim.AdamW8bit([theirs], lr=1e-2, weight_decay=0.0)
    for t in range(30):
        ours.grad, theirs.grad = noise(64, 128, seed=t), noise(64, 128, seed=t)
        o.step(); peer.step()
        if t == 0: torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
    off, moved = (ours - theirs).abs(), (theirs - noise(64, 128)).abs().mean()
    assert off.mean() < 0.01 * moved and off.quantile(0.99) < 0.1 * moved  # its kernel does not always take the nearest code
    assert o.state[ours]["exp_avg"].dtype == torch.uint8 and state_bytes(o) == 2 * 64 * 128 * (1 + 4 / 256)


def refreshes(direction, steps=400, T=10, **own):
    """The steps at which the subspace is found, when the first singular vectors are those of direction(step)."""
    p = nn.Parameter(torch.zeros(16, 32))
    o, at = QGaLoreAdamW8bit([dict(params=[("w", p)], rank=2, update_proj_gap=T, proj_group_size=32, **own)]), []
    for t in range(steps):
        p.grad = torch.outer(direction(t), noise(32, seed=9)) + 0.01 * noise(16, 32, seed=t)
        before = o.svd_counts["w"]; o.step()
        if o.svd_counts["w"] > before: at.append(t)
    assert o.svd_counts == {"w": len(at)}
    return at, o.update_proj_gaps["w"]


def test_a_settled_subspace_is_found_ever_less_often():
    fixed, turning = lambda t: noise(16, seed=3) * (-1)**t, lambda t: noise(16, seed=1000 + t)
    assert refreshes(fixed) == ([0, 10, 20, 30, 40, 50, 60, 80, 160, 320], 320)
    assert refreshes(fixed, queue_size=2, gamma_proj=3, steps=300) == ([0, 10, 20, 30, 90, 270], 10 * 3**4)
    assert refreshes(fixed, cos_threshold=None) == (list(range(0, 400, 10)), 10)
    assert refreshes(turning) == (list(range(0, 400, 10)), 10)


def test_the_sign_of_a_singular_vector_decides_only_if_told(monkeypatch):
    """The official rule: with signs that flip at every refresh the mean cosine is -1 and the interval stays."""
    exact, calls = qgalore.subspace, []
    def flipping(*args, **options): calls.append(0); return exact(*args, **options) * (-1)**len(calls) * torch.sign(exact(*args, **options)[0, 0])
    monkeypatch.setattr(qgalore, "subspace", flipping)
    fixed = lambda t: noise(16, seed=3)
    assert refreshes(fixed, signed_cosine=True)[1] == 10 and refreshes(fixed)[1] == 320


def trained(steps, o=None, model=None, seed=0, **options):
    if model is None: model, _ = small()
    if o is None: o = QGaLoreAdamW8bit(qgalore_param_groups(model, 8, projection=dict(update_proj_gap=2, proj_group_size=64)), lr=1e-2, min_8bit_size=64, seed=seed, **options)
    for _ in range(steps): step_of(model, o)
    return model, o


def test_an_interrupted_run_goes_on_bit_for_bit_and_replicas_round_alike():
    straight, _ = trained(14)
    model, o = trained(6)
    buffer = io.BytesIO(); torch.save(dict(model=model.state_dict(), optimizer=o.state_dict()), buffer); buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    again, _ = small(seed=9); again.load_state_dict(saved["model"])
    o = QGaLoreAdamW8bit(qgalore_param_groups(again, 8, projection=dict(update_proj_gap=2, proj_group_size=64)), lr=1e-2, min_8bit_size=64)
    o.load_state_dict(saved["optimizer"])
    torch.manual_seed(1234)  # torch's own generator has no part in it
    trained(8, o, again)
    for a, b in zip(straight.state_dict().values(), again.state_dict().values()): assert torch.equal(a, b)
    other, _ = trained(14, seed=1)
    assert not torch.equal(other.model.layers[0].mlp.up_proj.weight.codes, straight.model.layers[0].mlp.up_proj.weight.codes)


def test_it_learns_and_integers_stay_integers():
    model = small()[0]
    first = model(input_ids=IDS, labels=IDS).loss.item()
    model, o = trained(30, QGaLoreAdamW8bit(qgalore_param_groups(model, 8, projection=dict(update_proj_gap=5, proj_group_size=64)), lr=1e-2, min_8bit_size=64), model)
    assert model(input_ids=IDS, labels=IDS).loss.item() < first - 1
    assert all(isinstance(m.weight, IntegerWeight) and m.weight.grad is None for m in model.modules() if isinstance(m, IntegerLinear))
    assert set(o.svd_counts) == {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, IntegerLinear)} and all(c == 6 for c in o.svd_counts.values())
    floats = llama(32, 1); floats.load_state_dict(dequantized_state_dict(model))
    torch.testing.assert_close(logits(floats), logits(model), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("proj_bits", [8, 4, 2, 32])
def test_state_has_the_bytes_of_the_formula(proj_bits):
    p = nn.Parameter(noise(64, 96))
    o = QGaLoreAdamW8bit([dict(params=[p], rank=16, proj_bits=proj_bits)], min_8bit_size=0)
    p.grad = noise(64, 96, seed=1); o.step()
    basis = 64 * 16 * (4 if proj_bits == 32 else proj_bits / 8) + (0 if proj_bits == 32 else 64 * 16 // 256 * 5)
    assert state_bytes(o) == 2 * 16 * 96 * (1 + 4 / 256) + basis + 4 * 64


def test_memory_on_fake_tensors_is_that_of_real_ones():
    def make(model): return list(per_layer(model, lambda named: QGaLoreAdamW8bit([dict(params=named, rank=16, proj_group_size=64)] if "attn" in named[0][0] or "mlp" in named[0][0] else named, lr=0.01)).optimizers.values())
    def build(): model = llama(64, 1); quantize_linear_layers(model, group_size=64); return model
    fake, real = (memory(build, make, llama_loss(2, 32), fake=f) for f in (True, False))
    assert (fake.weights, fake.optimizer, fake.gradients, fake.parameters) == (real.weights, real.optimizer, real.gradients, real.parameters)
    assert fake.peak == pytest.approx(real.peak, rel=0.3)  # scratch memory: parts are smaller on a real processor, and the codes of moments are not computed on fake tensors


def test_updates_inside_the_backward_pass_are_the_same():
    def make(named): return QGaLoreAdamW8bit([dict(params=named, rank=8, proj_group_size=32)] if "attn" in named[0][0] or "mlp" in named[0][0] else named, lr=0.01)
    (inside, _), (outside, _) = small(), small()
    o = per_layer(inside, make)
    own = [make([(n, p)]) for n, p in outside.named_parameters()]
    for _ in range(3):
        inside(input_ids=IDS, labels=IDS).loss.backward()
        assert all(p.grad is None for p in inside.parameters())
        outside(input_ids=IDS, labels=IDS).loss.backward()
        for q in own: q.step(); q.zero_grad()
    for a, b in zip(inside.state_dict().values(), outside.state_dict().values()): assert torch.equal(a, b)
    again = per_layer(small(seed=3)[0], make); again.load_state_dict(o.state_dict())


def test_parts_of_a_large_tensor_do_not_show(monkeypatch):
    def walked():
        p = nn.Parameter(noise(40, 300)); o = QGaLoreAdamW8bit([p], lr=0.1, weight_decay=0.1, min_8bit_size=0)
        for t in range(5): p.grad = noise(40, 300, seed=t); o.step()
        return p, o.state[p]
    (a, s), _ = walked(), monkeypatch.setattr(qgalore, "_PART", 1000)
    b, t = walked()
    assert torch.equal(a, b) and all(torch.equal(s[k], t[k]) for k in s if torch.is_tensor(s[k]))


def test_bfloat16_scaler_closure_maximize_and_strides():
    p = nn.Parameter(noise(32, 64).bfloat16()); o = QGaLoreAdamW8bit([dict(params=[p], rank=8)], lr=0.1)
    loss = o.step(lambda: (o.zero_grad(), (p * 1.0).float().square().sum())[1].backward() or p.float().square().sum().item())
    assert loss > p.float().square().sum().item() and p.dtype == torch.bfloat16
    up, down = (nn.Parameter(noise(32, 64)) for _ in range(2))
    for q, sign in ((up, -1), (down, 1)):
        o = QGaLoreAdamW8bit([dict(params=[q], rank=8)], maximize=sign < 0)
        for t in range(3): q.grad = sign * noise(32, 64, seed=t); o.step()
    torch.testing.assert_close(up, down)
    a, b = nn.Parameter(noise(40, 30).t()), nn.Parameter(noise(40, 30).t().contiguous())  # not contiguous, and contiguous
    for q in (a, b):
        o = QGaLoreAdamW8bit([q], lr=0.1, weight_decay=0.1)
        for t in range(3): q.grad = noise(30, 40, seed=t); o.step()
    torch.testing.assert_close(a, b)
    model, _ = small()
    o, scaler = QGaLoreAdamW8bit(qgalore_param_groups(model, 8, projection=dict(proj_group_size=64)), lr=1e-2), torch.amp.GradScaler("cpu")
    scaler.scale(model(input_ids=IDS, labels=IDS).loss).backward(); scaler.unscale_(o); torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0); scaler.step(o); scaler.update()
    assert all(t.isfinite().all() for t in dequantized_state_dict(model).values())


def test_gradients_that_are_not_finite_are_named_and_nothing_moves():
    model, o = trained(0)
    model(input_ids=IDS, labels=IDS).loss.backward()
    model.model.layers[0].mlp.up_proj.weight.grad[0, 0] = math.nan
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="not finite.*up_proj"): o.step()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items() if "mlp.up_proj" in k or "attn" in k)


def _worker(rank, world, store):
    """Float weights in shards, integer weights in replicas: as in one process, and replicas stay bit for bit alike."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    make = lambda m: QGaLoreAdamW8bit(qgalore_param_groups(m, 8, projection=dict(proj_group_size=64, update_proj_gap=2)), lr=1e-2, weight_decay=0.1, bits=32)
    plain, sharded = llama(32, 1), fully_shard(llama(32, 1), mesh=init_device_mesh("cpu", (world,)))
    one, other = make(plain), make(sharded)
    for _ in range(3): step_of(plain, one); step_of(sharded, other)
    for a, b in zip(plain.parameters(), sharded.parameters()): torch.testing.assert_close(a, b.full_tensor(), atol=1e-4, rtol=1e-3)
    alone, _ = small(); replica = DistributedDataParallel(small()[0])
    one, other = make(alone), make(replica.module)
    for _ in range(3):
        step_of(alone, one)
        replica(input_ids=IDS[rank:rank + 1], labels=IDS[rank:rank + 1]).loss.backward(); other.step(); other.zero_grad()
    for name, t in replica.module.state_dict().items():
        copies = [torch.empty_like(t) for _ in range(world)]
        dist.all_gather(copies, t.contiguous())
        assert torch.equal(*copies), name
    for a, b in zip(dequantized_state_dict(alone).values(), dequantized_state_dict(replica.module).values()): torch.testing.assert_close(a, b, atol=5e-3, rtol=0.05)
    dist.destroy_process_group()


def test_shards_and_replicas_on_two_processes(tmp_path):
    torch.multiprocessing.spawn(_worker, (2, str(tmp_path / "store")), nprocs=2)


@pytest.mark.parametrize("bad, match", [
    (dict(proj_bits=3), "proj_bits is 3"), (dict(proj_bits=True), "proj_bits is True"), (dict(proj_group_size=5), "group_size is 5.*4 x 2"), (dict(cos_threshold=1.5), "cos_threshold"), (dict(cos_threshold="a"), "cos_threshold"), (dict(gamma_proj=0.9), "gamma_proj"),
    (dict(queue_size=0), "queue_size is 0"), (dict(signed_cosine=None), "signed_cosine is None"), (dict(bits=16), "bits is 16"), (dict(block=0), "block is 0"), (dict(min_8bit_size=-1), "min_8bit_size is -1"), (dict(seed=1.0), "seed is 1.0"),
    (dict(rank=5), "rank is 5"), (dict(rank=0), "rank is 0"), (dict(lr=0.0), "lr"), (dict(betas=(0.9, 1.0)), r"betas\[1\]"), (dict(update_proj_gap=0), "update_proj_gap is 0"), (dict(maximize="no"), "maximize")])
def test_wrong_options_are_named(bad, match):
    with pytest.raises((ValueError, TypeError), match=match): QGaLoreAdamW8bit([{"params": [nn.Parameter(torch.ones(4, 6))], "rank": 2, "proj_group_size": 8, **bad}])


def test_a_group_without_rank_has_no_projection_and_targets_must_fit():
    with pytest.raises(ValueError, match="without rank.*proj_bits"): QGaLoreAdamW8bit([dict(params=[nn.Parameter(torch.ones(4))], proj_bits=4)])
    with pytest.raises(ValueError, match="targets="): qgalore_param_groups(mlp([4, 2]), 2, targets=["attn"])
    o = QGaLoreAdamW8bit([nn.Parameter(torch.ones(4))])
    with pytest.raises(ValueError): o.add_param_group(dict(params=[nn.Parameter(torch.ones(4))], rank=2))
    assert len(o.param_groups) == 1 and o.svd_counts == {}
