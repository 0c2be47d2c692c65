"""Sparse pretraining, dense fine-tuning: masks through optimizers, against PyTorch's pruning and a NumPy loop, the way out, operation counts, resumed runs, wrong input."""
import copy

import numpy as np
import pytest
import torch
import transformers as T
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.nn.utils import prune as torch_prune
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from efftrain.compress.masks import prunable_layers
from efftrain.compress.spdf import sparsify, training_flops
from efftrain.models import cnn, llama, mlp, vit
from efftrain.optim.lion import Lion
from efftrain.training import cosine_schedule, fit, lm_loss


def model(seed=0): return llama(16, 1, heads=2, seed=seed)


def batch(step): return torch.randint(0, 512, (4, 16), generator=torch.Generator().manual_seed(step))


def train(net, optimizer, steps, static=None, first=0, clip=1.0):
    for t in range(first, first + steps):
        optimizer.zero_grad(); lm_loss(net, batch(t)).backward()
        if static is not None: static.mask_gradients()
        nn.utils.clip_grad_norm_(net.parameters(), clip)
        optimizer.step()


def same(a, b): return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values()))


# the draw

@settings(max_examples=40, deadline=None)
@given(st.floats(0, 0.99), st.integers(1, 40), st.integers(1, 40), st.integers(0, 10))
def test_exactly_the_share_is_missing_and_the_rest_keeps_its_bits(sparsity, rows, columns, seed):
    net = nn.Sequential(nn.Linear(columns, rows)); before = net[0].weight.detach().clone()
    static = sparsify(net, sparsity, seed=seed)
    here = static.masks["0"]
    assert int((~here).sum()) == round((1 - (1 - sparsity)) * rows * columns)
    assert torch.equal(net[0].weight[here], before[here]) and (net[0].weight[~here] == 0).all()


def test_masks_are_random_uniform_and_depend_on_the_seed_alone():
    counts = sum(sparsify(nn.Sequential(nn.Linear(20, 30)), 0.75, seed=s).masks["0"].float() for s in range(400))
    assert abs(counts.mean() / 400 - 0.25) < 1e-6 and counts.var() == pytest.approx(400 * 0.25 * 0.75, rel=0.25), "each weight is kept in a quarter of the draws, binomially"
    state = torch.get_rng_state()
    a, b = sparsify(model(0), 0.5, seed=4), sparsify(model(7), 0.5, seed=4)
    assert all(torch.equal(a.masks[n], b.masks[n]) for n in a.masks.layers)
    torch.set_rng_state(state); sparsify(model(), 0.5); assert torch.equal(state, torch.get_rng_state())


def test_what_stays_dense():
    for net in (model(), llama(16, 1, heads=2, tied=False), vit(16, 1), GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=11, n_positions=8))):
        before = {n: p.clone() for n, p in net.named_parameters()}
        static = sparsify(net, 0.75)
        inside = {f"{n}.weight" for n in static.masks.layers}
        assert inside == {f"{n}.weight" for n in prunable_layers(net)}
        for n, p in net.named_parameters(): assert (n in inside) != torch.equal(p, before[n]), n


@pytest.mark.parametrize("rescale", [False, True])
def test_rescaling_keeps_the_variance_of_outputs(rescale):
    net = nn.Sequential(nn.Linear(600, 600, bias=False)); x = torch.randn(300, 600); before = net(x).detach().var()
    sparsify(net, 0.75, rescale=rescale)
    assert float(net(x).detach().var() / before) == pytest.approx(1 if rescale else 0.25, rel=0.1)


# through optimizers

OPTIMIZERS = {"sgd": lambda p: torch.optim.SGD(p, 0.1, 0.9, weight_decay=1e-2), "adamw": lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.1), "fused": lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.1, fused=True),
              "lion": lambda p: Lion(p, 1e-3, weight_decay=0.1), "adafactor": lambda p: torch.optim.Adafactor(p, 1e-2, weight_decay=0.1), "rmsprop": lambda p: torch.optim.RMSprop(p, 1e-3, momentum=0.9)}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_missing_weights_and_their_states_stay_exactly_zero(name):
    net = model(); static = sparsify(net, 0.75); optimizer = OPTIMIZERS[name](net.parameters())
    static.attach(optimizer)
    train(net, optimizer, 50)  # no call by hand
    for n, w in zip(static.masks.layers, static.masks.weights):
        gone = ~static.masks[n]
        assert (w[gone] == 0).all() and (w[~gone] != 0).all()
        for s in optimizer.state[w].values():
            if torch.is_tensor(s) and s.shape == w.shape: assert (s[gone] == 0).all()


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("make", [lambda p: torch.optim.SGD(p, 0.1, 0.9), lambda p: torch.optim.AdamW(p, 1e-2), lambda p: Lion(p, 1e-3)])
def test_gradients_that_a_closure_makes_are_masked(make, by_name):
    net = mlp([8, 8]); static = sparsify(net, 0.5); optimizer = make(net.parameters()); static.attach(optimizer); x = torch.randn(4, 8)
    def closure(): optimizer.zero_grad(); loss = net(x).square().sum(); loss.backward(); return loss
    for _ in range(3): assert torch.is_tensor(optimizer.step(closure=closure) if by_name else optimizer.step(closure))
    w, gone = static.masks.weights[0], ~static.masks["0"]
    assert (w[gone] == 0).all() and all((s[gone] == 0).all() and (s[~gone] != 0).any() for s in optimizer.state[w].values() if torch.is_tensor(s) and s.shape == w.shape)
    static.densify(); optimizer.step(closure)
    assert (w[gone] != 0).any(), "nothing is masked any more"


def test_an_optimizer_that_mixes_weights_is_projected():
    """Orthogonalised momentum gives every weight an update, also those whose gradient is masked."""
    class Orthogonal(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure=None):
            for g in self.param_groups:
                for p in g["params"]:
                    if p.grad is not None and p.ndim == 2: u, _, v = torch.linalg.svd(p.grad, full_matrices=False); p.add_(u @ v, alpha=-0.01)
    net = model(); static = sparsify(net, 0.5); optimizer = Orthogonal(net.parameters(), 0.1); static.attach(optimizer)
    train(net, optimizer, 3)
    assert (static.report().error == 0).all()
    train(net, Orthogonal(net.parameters(), 0.1), 1)
    assert (static.report().error > 0).all(), "without attach it does move them: the report sees it"


def test_trajectory_equals_that_of_torch_pruning():
    ours, theirs = model(1), model(1)
    static = sparsify(ours, 0.6, seed=5); optimizer = torch.optim.SGD(ours.parameters(), 0.3, 0.9); static.attach(optimizer)
    for n in static.masks.layers: torch_prune.custom_from_mask(theirs.get_submodule(n), "weight", static.masks[n])
    train(ours, optimizer, 25, static); train(theirs, torch.optim.SGD(theirs.parameters(), 0.3, 0.9), 25)
    for n, w in zip(static.masks.layers, static.masks.weights):
        torch.testing.assert_close(w.data, theirs.get_submodule(n).weight_orig.data * static.masks[n], atol=1e-6, rtol=0)


def test_adamw_equals_a_numpy_loop_over_the_present_weights():
    net = nn.Sequential(nn.Linear(5, 3, bias=False)).double(); static = sparsify(net, 0.6, seed=2)
    keep, w = static.masks["0"].numpy(), net[0].weight.detach().numpy().copy()
    optimizer = torch.optim.AdamW(net.parameters(), 1e-2, weight_decay=0.1); static.attach(optimizer)
    rng, m, v = np.random.default_rng(0), np.zeros((3, 5)), np.zeros((3, 5))
    for t in range(1, 30):
        x, y = rng.normal(size=(8, 5)), rng.normal(size=(8, 3))
        optimizer.zero_grad(); ((net(torch.from_numpy(x)) - torch.from_numpy(y))**2).sum().backward(); optimizer.step()
        g = 2 * (x @ w.T - y).T @ x
        for i, j in zip(*np.nonzero(keep)):
            w[i, j] *= 1 - 1e-3
            m[i, j], v[i, j] = 0.9 * m[i, j] + 0.1 * g[i, j], 0.999 * v[i, j] + 0.001 * g[i, j]**2
            w[i, j] -= 1e-2 * m[i, j] / (1 - 0.9**t) / (np.sqrt(v[i, j] / (1 - 0.999**t)) + 1e-8)
    np.testing.assert_allclose(net[0].weight.detach().numpy(), w, atol=1e-9)


def test_sparsity_zero_is_plain_training_bit_for_bit():
    a, b = model(), model()
    static = sparsify(a, 0.0); one = torch.optim.AdamW(a.parameters(), 1e-2); static.attach(one)
    train(a, one, 5, static); train(b, torch.optim.AdamW(b.parameters(), 1e-2), 5)
    assert same(a, b)


# the way out

def test_densify_keeps_outputs_and_wakes_everything():
    net = model(); static = sparsify(net, 0.75); old = torch.optim.AdamW(net.parameters(), 1e-2); static.attach(old); train(net, old, 5)
    gone, x = {n: ~static.masks[n] for n in static.masks.layers}, batch(99); before = net(x).logits
    static.densify()
    assert torch.equal(net(x).logits, before) and not static.sparse
    train(net, torch.optim.AdamW(net.parameters(), 1e-3), 3)
    assert all((w[gone[n]] != 0).float().mean() > 0.95 for n, w in zip(static.masks.layers, static.masks.weights))
    train(net, old, 1)  # the old optimizer masks no longer
    assert (static.report().sparsity == 0).all()
    with pytest.raises(ValueError, match="lifted already"): static.densify()
    with pytest.raises(ValueError, match="lifted already"): static.attach(old)


def test_a_stopped_run_goes_on_with_the_same_bits(tmp_path):
    def run(folder, steps_first=None, resume=False, seed=3):
        net = model(); static = sparsify(net, 0.75, seed=seed); optimizer = torch.optim.AdamW(net.parameters(), 1e-2, fused=True)
        hooks = static.hooks()
        if steps_first:
            inner = hooks["after_backward"]
            def stop(m, step):
                if step > steps_first: raise InterruptedError
                inner()
            hooks["after_backward"] = stop
        try: fit(net, lm_loss, batch, optimizer, 20, scheduler=cosine_schedule(optimizer, 20), clip=1.0, device="cpu", save_to=folder, save_every=5, resume=resume, **hooks)
        except InterruptedError: pass
        return net, static
    whole, _ = run(tmp_path / "a")
    run(tmp_path / "b", 12)
    with pytest.raises(ValueError, match="seed = 3.*seed = 4"): run(tmp_path / "b", resume=True, seed=4)
    again, static = run(tmp_path / "b", resume=True)
    assert same(whole, again) and static.masks.density == pytest.approx(0.25, abs=1e-3)


def test_state_travels_through_files_and_copies(tmp_path):
    net = model(); static = sparsify(net, 0.5, seed=1)
    state = static.state_dict()
    assert sum(t.numel() for t in state["masks"].values()) == static.masks.n_total / 8
    torch.save({"model": net.state_dict(), "masks": state}, tmp_path / "run.pt")
    loaded = torch.load(tmp_path / "run.pt")
    other = model(5); again = sparsify(other, 0.5, seed=1); other.load_state_dict(loaded["model"]); again.load_state_dict(loaded["masks"])
    assert same(net, other) and all(torch.equal(static.masks[n], again.masks[n]) for n in static.masks.layers)
    twin, copied = copy.deepcopy((net, static))
    optimizer = torch.optim.SGD(twin.parameters(), 0.1); copied.attach(optimizer); train(twin, optimizer, 2)
    assert (copied.report().error == 0).all() and not same(net, twin) and copied.masks.weights[0] is next(prunable_layers(twin).values().__iter__()).weight
    static.densify(); third = sparsify(model(), 0.5, seed=1); third.load_state_dict(static.state_dict())
    assert not third.sparse, "a lifted state lifts"


def test_works_compiled_in_autocast_and_on_other_models():
    net = model(); static = sparsify(net, 0.5); optimizer = torch.optim.AdamW(net.parameters(), 1e-3); static.attach(optimizer)
    with torch.autocast("cpu", torch.bfloat16): lm_loss(net, batch(0)).backward()
    optimizer.step()
    assert (static.report().error == 0).all()
    plain = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)); static = sparsify(plain, 0.5); compiled = torch.compile(plain, backend="aot_eager")
    optimizer = torch.optim.SGD(plain.parameters(), 0.1, 0.9); static.attach(optimizer)
    for _ in range(2): optimizer.zero_grad(); compiled(torch.randn(4, 6)).sum().backward(); optimizer.step()
    assert (static.report().error == 0).all()
    sparsify(cnn(4), 0.5)  # its linear head
    half = model().bfloat16(); static = sparsify(half, 0.5)
    assert static.report().dense_bytes.sum() == 2 * static.masks.n_total


def test_report_counts_real_bytes():
    static = sparsify(mlp([64, 32]), 0.75); r = static.report().iloc[0]
    assert (r.weights, r.present, r.dense_bytes, r.sparse_bytes) == (2048, 512, 8192, 512 * 4 + 256)


# operations

CONFIGS = [LlamaConfig(hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=k, vocab_size=50, head_dim=h, attn_implementation="eager") for k, h in ((4, 8), (2, 8), (1, 12))]
CONFIGS.append(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50, n_positions=64, attn_implementation="eager"))


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("backward", [False, True])
def test_operations_equal_the_counter(config, backward):
    net = (GPT2LMHeadModel if isinstance(config, GPT2Config) else LlamaForCausalLM)(config)
    with FlopCounterMode(display=False, depth=10) as counter:
        loss = lm_loss(net, torch.randint(0, 50, (3, 20)))
        if backward: loss.backward()
    angles = sum(sum(v.values()) for k, v in counter.get_flop_counts().items() if k.endswith("rotary_emb"))
    assert training_flops(config, 0, 60, 20, backward)["total"] == counter.get_total_flops() - angles
    static = sparsify(net, 0.75)
    assert training_flops(config, 0.75, 1, 20, False)["linear"] == 2 * static.masks.n_active


def test_published_ratios():
    ratio = lambda c, s, length=2048: training_flops(c, 0, 1, length)["total"] / training_flops(c, s, 1, length)["total"]
    xl, small = GPT2Config(n_embd=2048, n_layer=24, n_head=16), GPT2Config(n_embd=768, n_layer=12, n_head=12)
    assert ratio(xl, 0.75) == pytest.approx(2.5, rel=0.01), "abstract"
    by_hand = lambda layers, d, s, length: (24 * layers * d**2 + 4 * layers * length * d + 2 * 50257 * d) / (24 * layers * d**2 * (1 - s) + 4 * layers * length * d + 2 * 50257 * d)
    for c, (layers, d), s, length in ((xl, (24, 2048), 0.5, 2048), (small, (12, 768), 0.5, 2048), (small, (12, 768), 0.75, 2048), (small, (12, 768), 0.75, 1024)):
        assert ratio(c, s, length) == pytest.approx(by_hand(layers, d, s, length), rel=1e-9)


KV = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=50)
KIN = [T.MistralConfig(**KV), T.Gemma3TextConfig(**KV, head_dim=8), T.OlmoConfig(**KV), T.Phi3Config(**KV, pad_token_id=0), T.CohereConfig(**KV), T.Starcoder2Config(**KV), T.GPTNeoXConfig(**{k: v for k, v in KV.items() if k != "num_key_value_heads"}),
       T.OPTConfig(hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=50, word_embed_proj_dim=32), T.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=50)]


@pytest.mark.parametrize("config", KIN, ids=lambda c: c.model_type)
def test_linear_operations_are_those_of_the_layers_there_are(config):
    with torch.device("meta"): net = T.AutoModelForCausalLM.from_config(config)
    assert training_flops(config, 0, 1, 8, False)["linear"] == 2 * sum(w.weight.numel() for n, w in net.named_modules() if isinstance(w, nn.Linear) and "head" not in n and n != "embed_out")


def test_configurations_of_another_layout_are_refused():
    for config in (T.MixtralConfig(**KV), T.BertConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=2), T.T5Config()):
        with pytest.raises(ValueError, match=f"model_type {config.model_type!r}"): training_flops(config, 0, 1, 8)


def test_sparse_computed_and_non_finite_weights_are_refused_by_name():
    twice, normed, pruned, broken = (mlp([16, 16, 16]) for _ in range(4))
    sparsify(twice, 0.5, seed=1); nn.utils.parametrizations.weight_norm(normed[0]); torch_prune.l1_unstructured(pruned[0], "weight", 0.5); broken[2].weight.data[0, 0] = float("nan")
    for net, text in ((twice, "layer '0' is sparse already"), (normed, "layer '0' has a weight that is computed"), (pruned, "layer '0' has a weight that is computed"), (broken, "layer '2' has 1 weights that are not finite")):
        before = copy.deepcopy(net.state_dict())
        with pytest.raises(ValueError, match=text): sparsify(net, 0.5, seed=2)
        assert all(torch.equal(v, net.state_dict()[k]) or v.isnan().any() for k, v in before.items())
    again = sparsify(twice, 0.5, seed=1)  # the same draw: a run that goes on
    assert again.masks.density == 0.5 and all((w != 0).float().mean() == 0.5 for w in again.masks.weights)
    with torch.no_grad(): twice[2].weight.zero_()
    sparsify(nn.Sequential(nn.Linear(4, 4), twice[2]), 0.5)  # a layer that starts at zero is not sparse
    assert sparsify(nn.Sequential(nn.Linear(3, 0)), 0.5).report().sparsity[0] == 1


@pytest.mark.parametrize("make, text", [
    (lambda: sparsify(model(), 1.0), "sparsity is 1.0"), (lambda: sparsify(model(), -0.1), "sparsity is -0.1"), (lambda: sparsify(model(), float("nan")), "sparsity is nan"), (lambda: sparsify(model(), "0.5"), "sparsity is '0.5'"),
    (lambda: sparsify(model(), 0.5, seed=-1), "seed is -1"), (lambda: sparsify(nn.LayerNorm(3), 0.5), "no layer"), (lambda: sparsify(model(), 0.5, targets=["head"]), "targets names 'head'"),
    (lambda: sparsify(model(), 0.5).attach(torch.optim.SGD(model().parameters(), 0.1)), "does not hold the weight"),
    (lambda: training_flops(CONFIGS[0], 1.0, 1, 1), "sparsity is 1.0"), (lambda: training_flops(CONFIGS[0], 0, 0, 1), "tokens is 0"), (lambda: training_flops(CONFIGS[0], 0, 1, 1.5), "seq_len is 1.5"), (lambda: training_flops(object(), 0, 1, 1), "config is a object")])
def test_wrong_input(make, text):
    with pytest.raises(ValueError, match=text): make()


def test_a_refused_call_changes_nothing():
    net, before = model(), model()
    for call in (lambda: sparsify(net, 2.0), lambda: sparsify(net, 0.5, targets=["nowhere"])):
        with pytest.raises(ValueError): call()
    assert same(net, before)
    with pytest.raises(TypeError, match="optimizer is a str"): sparsify(net, 0).attach("adam")
    static = sparsify(net, 0.5); optimizer = torch.optim.SGD(net.parameters(), 0.1); static.attach(optimizer)
    with pytest.raises(ValueError, match="attached already"): static.attach(optimizer)
    wide = sparsify(llama(32, 1), 0.5)
    with pytest.raises(ValueError, match="state holds masks"): static.load_state_dict(wide.state_dict())
    assert static.masks.density == 0.5
