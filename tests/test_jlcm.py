"""JLCM: exact k-means against brute force and scikit-learn, packing against NumPy, function-preserving reordering, gradients against autograd and by hand, storage against files, and wrong input."""
import copy
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file, save_file
from sklearn.cluster import KMeans
from torch import nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from efftrain.compress.jlcm import JLCM, compress, compressible_layers, footprint, layer_statistics, model_bytes
from efftrain.compress.jlcm_codebook import CodebookConv2d, CodebookLinear, borders_pay, decompress, kmeans_1d, load_compressed, pack_bits, quantize, quantize_rtn, swap, unpack_bits, weight_matrix
from efftrain.compress.jlcm_mapping import RULES, gaps, learn_layer, mapping_gradient, move_weights
from efftrain.compress.jlcm_reorder import Chain, describe_rows, find_chains, group_rows, reorder
from efftrain.models import cnn, llama, mlp, vit


def generator(seed=0): return torch.Generator().manual_seed(seed)


def cost(x, c, l, p=1.0): return float((p * (x - c[l])**2).sum())


def brute(x, k, p):
    """Least cost over all contiguous partitions of the sorted values."""
    order = np.argsort(x); x, p = x[order], p[order]
    part = lambda a, b: float((p[a:b] * (x[a:b] - np.average(x[a:b], weights=p[a:b]))**2).sum())
    return min(sum(part(a, b) for a, b in itertools.pairwise((0, *mid, len(x)))) for mid in itertools.combinations(range(1, len(x)), min(k, len(x)) - 1))


# codebooks

@settings(max_examples=60, deadline=None)
@given(x=st.lists(st.integers(-20, 20), min_size=1, max_size=14), k=st.integers(1, 6), seed=st.integers(0, 999))
def test_kmeans_is_the_best_contiguous_partition(x, k, seed):
    x, p = np.array(x) / 3, np.random.default_rng(seed).uniform(0.1, 3, len(x))
    c, l = kmeans_1d(x, k, p)
    assert len(c) == k and (np.diff(c) >= 0).all() and l.max() < k
    assert cost(x, c, l, p) == pytest.approx(brute(x, k, p), abs=1e-9)


@pytest.mark.parametrize("k", [2, 8, 16])
def test_kmeans_is_never_above_scikit_learn(k):
    x = np.random.default_rng(k).standard_t(3, 3000)
    ours = cost(x, *kmeans_1d(x, k))
    assert ours <= KMeans(k, n_init=20, random_state=0).fit(x[:, None]).inertia_ * (1 + 1e-9)
    assert ours <= cost(x, *kmeans_1d(x, k, bins=256)) * (1 + 1e-9) < ours * 1.01


def test_kmeans_moves_and_scales_with_its_values_and_weights_count_as_repetitions():
    x = np.random.default_rng(0).normal(size=400)
    c, l = kmeans_1d(x, 5)
    c2, l2 = kmeans_1d(1e3 + 1e-3 * x, 5)
    np.testing.assert_array_equal(l, l2); np.testing.assert_allclose((c2 - 1e3) * 1e3, c, atol=1e-6)
    counts = np.random.default_rng(1).integers(1, 4, 50)
    a, b = kmeans_1d(x[:50], 4, counts.astype(float))[0], kmeans_1d(np.repeat(x[:50], counts), 4)[0]
    np.testing.assert_allclose(a, b)
    assert kmeans_1d(torch.tensor([[1.0, 2.0], [2.0, 1.0]]), 4)[1].tolist() == [[0, 1], [1, 0]]


@pytest.mark.parametrize("call, word", [(lambda: kmeans_1d([], 2), "empty"), (lambda: kmeans_1d([1.0, np.inf], 2), "not finite"), (lambda: kmeans_1d([1.0], 0), "k is 0"), (lambda: kmeans_1d([1.0], True), "k is True"),
                                        (lambda: kmeans_1d([1.0, 2.0], 1, [1.0]), "weights"), (lambda: kmeans_1d([1.0, 2.0], 1, [1.0, 0.0]), "weights"), (lambda: kmeans_1d([1.0], 1, bins=0), "bins is 0")])
def test_kmeans_refuses(call, word):
    with pytest.raises(ValueError, match=word): call()


@settings(max_examples=60, deadline=None)
@given(bits=st.integers(1, 8), n=st.integers(0, 70), seed=st.integers(0, 999))
def test_packing_is_numpys_little_endian_bit_order_and_comes_back(bits, n, seed):
    codes = np.random.default_rng(seed).integers(0, 2**bits, n)
    packed = pack_bits(torch.from_numpy(codes), bits)
    plain = np.packbits((codes[:, None] >> np.arange(bits) & 1).astype(np.uint8).reshape(-1), bitorder="little")
    assert packed.dtype == torch.uint8 and packed.tolist() == plain.tolist()
    assert unpack_bits(packed, bits, n).tolist() == codes.tolist()


def test_packing_refuses():
    with pytest.raises(ValueError, match="bits is 0"): pack_bits(torch.tensor([0]), 0)
    with pytest.raises(ValueError, match="hold 0 to 3"): pack_bits(torch.tensor([-1]), 2)
    with pytest.raises(TypeError, match="whole numbers"): pack_bits(torch.tensor([1.0]), 2)
    with pytest.raises(ValueError, match="need 2"): unpack_bits(torch.zeros(3, dtype=torch.uint8), 3, 5)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("group_param", ["codebook", "scale"])
@pytest.mark.parametrize("columns", [37, 40])  # bytes that hold weights of two rows, and of one
def test_decoding_is_the_table_at_the_index(bits, group_param, columns):
    layer = nn.Linear(columns, 13)
    for rows in (None, torch.arange(13) // 5, torch.arange(13) % 3):
        q = quantize(layer, bits, row_groups=rows, group_param=group_param)
        table = (q.codebook if q.scale is None else q.scale[:, None] * q.codebook).detach()
        plain = torch.stack([table[g][q.indices()[i]] for i, g in enumerate([0] * 13 if rows is None else rows.tolist())])
        assert torch.equal(q.decode(), plain) and torch.equal(q.weight, plain)
        assert q.groups_of_rows().tolist() == ([0] * 13 if rows is None else rows.tolist())
        assert (q.row_groups is None) == (rows is None or bool((rows.diff() >= 0).all()))
        twin = copy.deepcopy(q); x = torch.randn(2, 5, columns)
        assert torch.equal(twin(x), nn.functional.linear(x, plain, layer.bias))


@pytest.mark.parametrize("bits", [2, 3])
def test_gradients_of_codebook_and_scale_through_decoding(bits):
    q, g = quantize(nn.Linear(16, 6), bits, row_groups=torch.arange(6) % 2, group_param="scale"), torch.randn(6, 16, generator=generator())
    (q.decode() * g).sum().backward()
    entry, group = torch.nn.functional.one_hot(q.indices(), 2**bits).float(), torch.nn.functional.one_hot(q.groups_of_rows(), 2).float()
    by_pair = torch.einsum("rc,rck,rg->gk", g, entry, group)
    torch.testing.assert_close(q.codebook.grad[0], q.scale.detach() @ by_pair); torch.testing.assert_close(q.scale.grad, by_pair @ q.codebook[0].detach())


def test_kmeans_codebooks_are_exact_with_enough_entries_and_never_worse_than_uniform():
    layer = nn.Conv2d(3, 8, 3, stride=2, padding=1)
    layer.weight.data = torch.randint(-4, 4, layer.weight.shape, generator=generator()).float()
    q = quantize(layer, 3)
    assert torch.equal(q.decode(), layer.weight) and isinstance(q, CodebookConv2d)
    x = torch.randn(2, 3, 9, 9)
    assert torch.equal(q(x), layer(x))
    layer.weight.data.normal_()
    for bits in (1, 2, 3, 4):
        error = lambda q: float((q.decode() - layer.weight).detach().square().sum())
        assert error(quantize(layer, bits)) <= error(quantize_rtn(layer, bits)) and quantize(layer, bits).nbytes() == quantize_rtn(layer, bits).nbytes()


# reordering

def logits(model, x): return getattr(out := model(x), "logits", getattr(out, "last_hidden_state", out))


def norm_net():
    net = nn.Sequential(nn.Linear(9, 12), nn.LayerNorm(12), nn.GELU(), nn.Linear(12, 7, bias=False), nn.BatchNorm1d(7), nn.PReLU(), nn.Linear(7, 3))
    for p in net.parameters(): nn.init.normal_(p, generator=generator(1))
    net[4].running_mean.normal_(generator=generator(2)); net[4].running_var.uniform_(0.5, 2, generator=generator(3))
    return net


def attention(kv):
    """Four query heads on `kv` value heads, with biases."""
    model = LlamaForCausalLM(LlamaConfig(vocab_size=50, hidden_size=64, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=kv, attention_bias=True))
    for p in model.parameters(): nn.init.normal_(p, std=0.2, generator=generator(1))
    return model


def mobile():
    net = nn.Sequential(nn.Conv2d(2, 8, 1), nn.BatchNorm2d(8), nn.ReLU6(), nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU6(), nn.Conv2d(8, 12, 1), nn.ReLU(), nn.Conv2d(12, 6, 3, groups=3))
    for i, p in enumerate(net.parameters()): nn.init.uniform_(p, -1, 1, generator=generator(i))
    net(torch.randn(64, 2, 8, 8, generator=generator(2)))
    return net.eval()


def allowed_order(chain, units, seed=4):
    """A random order of `units`, within each head where the chain has heads."""
    size, g = units // max(chain.heads, 1), generator(seed)
    return torch.cat([start + torch.randperm(size, generator=g) for start in range(0, units, size)])


MODELS = {"mlp": (lambda: mlp([9, 12, 7, 3]), lambda: torch.randn(5, 9), 2), "norms": (norm_net, lambda: torch.randn(5, 9), 2), "conv-bn-conv": (lambda: cnn(6), lambda: torch.randn(3, 1, 16, 16), 3),
          "nested": (lambda: nn.Sequential(nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU()), nn.Sequential(nn.Conv2d(4, 5, 3), nn.Flatten(), nn.Linear(5 * 16, 2))), lambda: torch.randn(2, 1, 8, 8), 2),
          "llama": (lambda: llama(32, 2), lambda: torch.arange(9)[None], 4), "vit": (lambda: vit(32, 2), lambda: torch.randn(2, 1, 28, 28), 4), "depthwise": (mobile, lambda: torch.randn(3, 2, 8, 8), 1),
          **{f"{kv} value heads": (lambda kv=kv: attention(kv), lambda: torch.arange(9)[None], 4) for kv in (4, 2, 1)}, "opt": (lambda: OPTForCausalLM(OPTConfig(vocab_size=50, hidden_size=16, ffn_dim=24, num_hidden_layers=1, num_attention_heads=2, word_embed_proj_dim=16)), lambda: torch.arange(9)[None], 2),
          "gpt2": (lambda: GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=None, eos_token_id=None)), lambda: torch.arange(9)[None], 2),
          "bert": (lambda: BertModel(BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)), lambda: torch.arange(9)[None], 4)}


@pytest.mark.parametrize("kind", MODELS)
def test_reordering_preserves_the_function(kind):
    make, data, expected = MODELS[kind]
    model, x = make().eval(), data()
    chains = find_chains(model)
    assert len(chains) == expected
    moved = reorder(copy.deepcopy(model), [(c, allowed_order(c, len(weight_matrix(model.get_submodule(c.rows[0]))))) for c in chains])
    with torch.no_grad(): a, b = logits(model, x), logits(moved, x)
    torch.testing.assert_close(a, b, rtol=0, atol=1e-6 * max(1.0, float(a.abs().max())))
    assert any(not torch.equal(p, q) for p, q in zip(model.parameters(), moved.parameters()))


def test_unsafe_neighbours_form_no_chain():
    for between in (nn.Softmax(-1), nn.GLU(), nn.PReLU(8), nn.Unflatten(1, (2, 4))): assert find_chains(nn.Sequential(nn.Linear(4, 8), between, nn.Linear(8, 2))) == []
    class Residual(nn.Sequential):
        def forward(self, x): return x + super().forward(x)
    assert find_chains(nn.Sequential(nn.Linear(8, 8), Residual(nn.Linear(8, 8)), nn.Linear(8, 2))) == []
    assert find_chains(nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3, groups=2))) == []


class Attention(nn.Module):
    """Attention by name, with what `extra` adds; a query projection of more rows than needed stands for a gate."""
    head_dim = 4
    def __init__(self, queries=16, **extra):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = nn.Linear(16, queries), nn.Linear(16, 8), nn.Linear(16, 8), nn.Linear(16, 16)
        for name, module in extra.items(): self.add_module(name, module)


def test_values_move_within_their_heads_alone():
    chain, = find_chains(Attention())
    assert chain == Chain(("v_proj",), ("o_proj",), heads=2)
    assert find_chains(Attention(queries=32)) == [] and find_chains(Attention(v_norm=nn.LayerNorm(8))) == [] and find_chains(Attention(q_norm=nn.LayerNorm(4))) == [chain]
    model = Attention(); before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="between its 2 heads"): reorder(model, [(chain, torch.arange(8).flip(0))])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    w = torch.randn(24, 10, generator=generator()) * torch.logspace(-1, 1, 24)[torch.randperm(24, generator=generator(1)), None]
    order, labels = group_rows(w, 3, blocks=4)
    assert torch.equal(labels, group_rows(w, 3)[1]) and torch.equal(order // 6, torch.arange(24) // 6) and (labels[order].view(4, 6).diff(dim=1) >= 0).all()
    for blocks in (0, 5, True):
        with pytest.raises(ValueError, match="blocks is"): group_rows(w, 3, blocks)


@pytest.mark.parametrize("groups", [2, 4, 16, 17])  # four heads of 32 rows: 4, 12, 60 and 64 bytes of borders against 16, 32, 64 and 80 of group numbers
def test_groups_in_heads_are_stored_the_shorter_way(groups):
    rows = torch.stack([torch.randint(0, groups, (32,), generator=generator(h)).sort().values for h in range(4)]).view(-1)  # 4 heads of 32 rows
    dense = nn.Linear(6, 128); pay = borders_pay(128, groups, 4)
    assert pay == (4 * (groups - 1) < 128 * int(np.ceil(np.log2(groups))) / 8)
    q = CodebookLinear(torch.randint(0, 4, (128, 6), generator=generator()), torch.randn(groups, 4), row_groups=rows, blocks=4)
    assert q.groups_of_rows().tolist() == rows.tolist() and (q.borders is not None) == pay and (not pay or q.borders.shape == (4, groups - 1) and q.borders.dtype == torch.uint8)
    again = load_compressed(nn.Sequential(dense), {f"0.{k}": v for k, v in q.state_dict().items()} | {"0.bias": dense.bias.detach()})
    assert torch.equal(again[0].decode(), q.decode()) and again[0].nbytes() == q.nbytes() + 128 * 4
    one = CodebookLinear(torch.zeros(8, 2, dtype=torch.long), torch.randn(2, 4), row_groups=torch.arange(8) // 4, blocks=2)
    assert one.borders.tolist() == [4], "groups that ascend over all rows need one border"
    with pytest.raises(ValueError, match="blocks is 3"): CodebookLinear(torch.zeros(8, 2, dtype=torch.long), torch.randn(2, 4), row_groups=torch.arange(8) % 2, blocks=3)


def test_a_refused_plan_changes_nothing():
    model = mlp([4, 6, 3]); before = copy.deepcopy(model.state_dict()); chain = find_chains(model)[0]
    tied = mlp([6, 6, 6, 6]); tied[2].weight = tied[0].weight
    for m, plan in ((model, [(chain, torch.zeros(6, dtype=torch.long))]), (model, [(chain, torch.randperm(5))]), (model, [(Chain(("x",), ("2",)), torch.arange(6))]), (tied, [(find_chains(tied)[0], torch.randperm(6))])):
        with pytest.raises(ValueError): reorder(m, plan)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_rows_are_grouped_by_size_and_kinds_are_found():
    spread = torch.tensor([1.0, 10.0])[torch.arange(20) % 2]
    w = torch.randn(20, 50, generator=generator()) * spread[:, None]
    order, labels = group_rows(w, 2)
    assert sorted(order.tolist()) == list(range(20)) and (labels[order].diff() >= 0).all() and labels.tolist() == [0, 1] * 10
    torch.testing.assert_close(describe_rows(2 * w), describe_rows(w) + np.log(2))
    with pytest.raises(ValueError, match="groups is 21"): group_rows(w, 21)
    joint, _ = group_rows([w, torch.randn(20, 50, generator=generator(1))], 2)
    assert sorted(joint.tolist()) == list(range(20))


# gradients and learning

def test_pull_rises_with_distance_for_the_ordinary_rule_and_falls_for_the_proximal():
    book = torch.randn(2, 9, generator=generator()).sort(1).values
    d = (book[:, None] - book[:, :, None])
    torch.testing.assert_close(move_weights(book, "straight_through"), d)
    for phi in ("inverse", "exp"):
        pull = move_weights(book, "proximal", phi)
        assert torch.equal(pull.sign(), d.sign()) and (pull.abs() <= 1 + 1e-6).all()
        assert (pull[:, 0, 1:].diff(dim=1) < 0).all(), "from the lowest entry, ever less"
    assert torch.equal(gaps(book.flip(1))[0], gaps(book)[0]), "the order of the entries does not matter"


def test_mapping_gradients_are_the_formulas_on_two_by_three():
    g, codes, book, rows = torch.tensor([[2.0, -1.0, 0.5], [1.0, 3.0, -2.0]]), torch.tensor([[0, 1, 2], [2, 0, 1]]), torch.tensor([[-1.0, 0.5, 1.0], [0.0, 2.0, 5.0]]), torch.tensor([0, 1])
    z = torch.randn(2, 3, 3, generator=generator())
    for rule in RULES[:3]:
        got = mapping_gradient(g, codes, book, rows, rule=rule, logits=z)
        for i, j, k in itertools.product(range(2), range(3), range(3)):
            c = book[rows[i]].tolist(); d = c[k] - c[codes[i, j]]
            p = np.exp(z[i, j].double().numpy()); p /= p.sum()
            expected = {"straight_through": d, "proximal": (0.0 if d == 0 else np.sign(d) * min(b - a for a, b in itertools.pairwise(c)) / abs(d)), "softmax": p[k] * (c[k] - p @ c)}[rule]
            assert float(got[i, j, k]) == pytest.approx(float(g[i, j]) * expected, rel=1e-5, abs=1e-6)


def test_softmax_rule_is_the_gradient_of_the_softmax_mixture():
    book, z = torch.randn(1, 4, generator=generator()), torch.randn(3, 5, 4, generator=generator(1)).requires_grad_()
    g = torch.randn(3, 5, generator=generator(2))
    ((z.softmax(-1) * book[0]).sum(-1) * g).sum().backward()
    torch.testing.assert_close(mapping_gradient(g, torch.zeros(3, 5, dtype=torch.long), book, torch.zeros(3, dtype=torch.long), rule="softmax", logits=z.detach()), z.grad)


def test_with_two_entries_all_rules_agree_in_sign():
    g, codes, book, rows = torch.randn(4, 6, generator=generator()), torch.randint(0, 2, (4, 6), generator=generator(1)), torch.tensor([[-0.4, 1.3]]), torch.zeros(4, dtype=torch.long)
    moves = [(m := mapping_gradient(g, codes, book, rows, rule=r, logits=torch.zeros(4, 6, 2)))[..., 1] - m[..., 0] for r in RULES[:3]]
    assert all(torch.equal(m.sign(), g.sign()) for m in moves)


def test_codebook_gradient_is_autograds_through_the_index():
    w, x = torch.randn(5, 8, generator=generator()), torch.randn(30, 8, generator=generator(1))
    for group_param in ("codebook", "scale"):
        rows = torch.tensor([0, 1, 0, 1, 1])
        r = learn_layer(w, x.T @ x, bits=2, row_groups=rows, group_param=group_param, steps=0)
        book, scale = r.codebook.clone().requires_grad_(), None if r.scale is None else r.scale.clone().requires_grad_()
        table = book if scale is None else scale[:, None] * book
        loss = (x @ (w - table[rows[:, None], r.codes]).T).square().sum() / (x @ w.T).square().sum()
        assert float(loss.detach()) == pytest.approx(r.start, rel=1e-4)
        loss.backward()
        tiny = learn_layer(w, x.T @ x, bits=2, row_groups=rows, group_param=group_param, steps=1, lr_map=0, lr_code=1e-3)
        assert torch.equal((r.codebook - tiny.codebook).sign(), book.grad.sign()), "Adam's first step has the gradient's sign"
        if scale is not None: assert torch.equal((r.scale - tiny.scale).sign(), scale.grad.sign())


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("bits, group_param", [(2, "codebook"), (3, "scale"), (5, "codebook")])
def test_learning_lowers_the_error_that_the_outputs_have(rule, bits, group_param):
    w, x = torch.randn(16, 24, generator=generator()), torch.randn(80, 24, generator=generator(1)) @ torch.diag(torch.logspace(0, -2, 24)) @ torch.randn(24, 24, generator=generator(2))
    rows = torch.arange(16) // 8
    r = learn_layer(w, x.T @ x, bits=bits, row_groups=rows, group_param=group_param, rule=rule, steps=60, lr_map=0.1)
    decoded = (r.codebook if r.scale is None else r.scale[:, None] * r.codebook)[rows if r.scale is None or True else 0][:, None, :].expand(16, 24, -1).gather(2, r.codes[..., None])[..., 0]
    plain = float((x @ (w - decoded).T).square().sum() / (x @ w.T).square().sum())
    assert plain == pytest.approx(r.error, rel=1e-3, abs=1e-6) and r.error < 0.95 * r.start and len(r.trace) == 61
    again = learn_layer(w, x.T @ x, bits=bits, row_groups=rows, group_param=group_param, rule=rule, steps=60, lr_map=0.1)
    assert torch.equal(again.codes, r.codes) and torch.equal(again.codebook, r.codebook), "no randomness"


def test_an_entry_for_every_distinct_weight_is_exact_and_stays_so():
    w, x = torch.randint(-4, 4, (6, 9), generator=generator()).float(), torch.randn(40, 9, generator=generator(1))
    for rule in RULES: assert learn_layer(w, x.T @ x, bits=3, rule=rule, steps=25).error < 1e-9


def test_outputs_of_another_model_are_the_target():
    """With distorted inputs the dense weight is not the best one; learning on the dense outputs goes below what the dense weight itself would give."""
    g = generator(3)
    w, x = torch.randn(12, 20, generator=g), torch.randn(200, 20, generator=g)
    distorted = x @ (torch.eye(20) + 0.4 * torch.randn(20, 20, generator=g))
    y = x @ w.T
    of_dense = float((y - distorted @ w.T).square().sum() / y.square().sum())
    r = learn_layer(w, distorted.T @ distorted, cross=y.T @ distorted, energy=float(y.square().sum()), bits=4, steps=200)
    assert r.error < 0.9 * of_dense


# whole models

def trained(kind):
    if kind == "cnn":
        model = cnn(8); model(torch.randn(64, 1, 16, 16, generator=generator()))
        return model.eval(), torch.randn(32, 1, 16, 16, generator=generator(1))
    return llama(32, 2).eval(), torch.randint(0, 512, (8, 16), generator=generator(1))


@pytest.mark.parametrize("kind", ["cnn", "llama"])
@pytest.mark.parametrize("group_param", ["codebook", "scale"])
def test_compressed_models_save_load_copy_train_and_keep_their_bytes(kind, group_param, tmp_path):
    model, x = trained(kind); dense = copy.deepcopy(model)
    report = compress(model, [x[:16 if kind == "cnn" else 4], x[16 if kind == "cnn" else 4:]], bits=3, groups=2, group_param=group_param, steps=15)
    assert (report.layers.error <= report.layers.error_kmeans).all() and report.bytes_after == model_bytes(model) < report.bytes_before == model_bytes(dense) and report.flops_before == report.flops_after > 0
    file = tmp_path / "model.safetensors"
    if kind == "llama":
        model.save_pretrained(tmp_path)
        fresh = LlamaForCausalLM(model.config)
    else:
        save_file(model.state_dict(), file); fresh = cnn(8, seed=3)
    header = int.from_bytes(file.read_bytes()[:8], "little") + 8
    assert abs((file.stat().st_size - header) / model_bytes(model) - 1) < 0.01
    load_compressed(fresh.eval(), load_file(file))
    torch.save(model.state_dict(), tmp_path / "m.pt"); other = load_compressed(copy.deepcopy(dense), torch.load(tmp_path / "m.pt"))
    with torch.no_grad():
        expected = logits(model, x)
        for m in (fresh, other, copy.deepcopy(model)): assert torch.equal(logits(m, x), expected)
        with torch.autocast("cpu", torch.bfloat16): assert torch.isfinite(logits(model, x)).all()
    model.train()
    logits(model, x).square().mean().backward()
    books = [p for n, p in model.named_parameters() if n.endswith("codebook")]
    assert len(books) == len(report.layers) and all(torch.isfinite(p.grad).all() and p.grad.abs().sum() > 0 for p in books)


def test_nothing_but_sorting_happens_when_entries_suffice():
    """8 bits for 8-bit weights: the compressed model is the dense one, sorted."""
    model, x = trained("cnn")
    for m in compressible_layers(model).values(): m.weight.data = torch.randint(-20, 20, m.weight.shape, generator=generator(5)).float() / 50
    before = model(x).detach()
    report = compress(model, x, bits=8, groups=3, steps=5)
    assert set(report.layers.order) == {"sorted", "stored"} and report.layers.error.max() < 1e-6
    torch.testing.assert_close(model(x).detach(), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("group_param", ["codebook", "scale"])
def test_convolutions_in_groups_learn_on_their_own_inputs(group_param, tmp_path):
    model, x = mobile(), torch.randn(40, 2, 8, 8, generator=generator(1)); dense = copy.deepcopy(model)
    with torch.no_grad(): gram, cross, energy = layer_statistics(model, model, ["8"], [x[:15], x[15:]])
    assert gram.shape == (3, 36, 36)
    with torch.no_grad(): inputs, outputs = model[:8](x), model(x)
    patches = nn.functional.unfold(inputs, 3).transpose(1, 2).reshape(-1, 12 * 9)
    for part in range(3): torch.testing.assert_close(gram[part], patches[:, 36 * part:36 * part + 36].T @ patches[:, 36 * part:36 * part + 36], rtol=1e-4, atol=1e-4)
    assert energy["8"] == pytest.approx(float((outputs - dense[8].bias.detach()[:, None, None]).square().sum()), rel=1e-4)
    r = learn_layer(weight_matrix(model[8]), gram, cross=cross["8"], energy=energy["8"], bits=2, row_groups=torch.arange(6) % 2, group_param=group_param, steps=80, lr_map=0.03, lr_code=0.01)
    table = r.codebook if r.scale is None else r.scale[:, None] * r.codebook
    small = copy.deepcopy(dense); small[8].weight.data = table[(torch.arange(6) % 2)[:, None], r.codes].view(6, 4, 3, 3)
    with torch.no_grad(): real = float((small(x) - outputs).square().sum()) / energy["8"]
    assert real == pytest.approx(r.error, rel=1e-3) and r.error < 0.9 * r.start
    report = compress(model, x, bits=2, groups=2, group_param=group_param, steps=20)
    assert list(report.layers.name) == ["0", "3", "6", "8"] and list(report.layers.order) == ["sorted", "sorted", "stored", "stored"] and report.flops_after == report.flops_before
    save_file(model.state_dict(), tmp_path / "m.safetensors")
    assert torch.equal(load_compressed(mobile(), load_file(tmp_path / "m.safetensors"))(x), model(x))
    with pytest.raises(ValueError, match="number of these"): learn_layer(weight_matrix(dense[8]), gram[:2][:, :35, :35])


def test_values_are_sorted_in_their_heads_and_the_function_stays():
    """8 bits for 8-bit weights: nothing but reordering happens, in every layer."""
    model, x = attention(2).eval(), torch.randint(0, 50, (4, 12), generator=generator())
    for m in compressible_layers(model).values(): m.weight.data = torch.randint(-20, 20, m.weight.shape, generator=generator(5)).float() / 100
    with torch.no_grad(): before = model(x).logits
    report = compress(model, x, bits=8, groups=3, steps=2)
    by_name = report.layers.set_index("name")
    assert by_name.loc["model.layers.1.self_attn.v_proj", "order"] == "in heads" and model.model.layers[1].self_attn.v_proj.borders.shape == (2, 2)
    with torch.no_grad(): torch.testing.assert_close(model(x).logits, before, rtol=1e-4, atol=1e-4)
    model, twin = attention(2).eval(), attention(2).eval()
    sizes = [compress(m, x, bits=3, groups=4, steps=0, reorder=how).bytes_after for m, how in ((model, "auto"), (twin, "store"))]
    assert sizes[0] < sizes[1]


def test_fit_leaves_the_model_alone_and_transform_takes_only_that_model():
    model, x = trained("cnn"); before = copy.deepcopy(model.state_dict()); model.train()
    method = JLCM(bits=2, groups=2, steps=3)
    with pytest.raises(RuntimeError, match="fit"): method.transform(model)
    method.fit(model, x)
    assert model.training and all(m.training for m in model.modules()) and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with pytest.raises(ValueError, match="other weights"): method.transform(cnn(8, seed=9))
    moved = reorder(copy.deepcopy(model), [(find_chains(model)[0], torch.arange(len(model[0].weight)).flip(0))])
    with pytest.raises(ValueError, match="layer '0' has other weights"): method.transform(moved)  # the same values in another order
    a, b = method.transform(copy.deepcopy(model)).eval(), method.transform(model).eval()
    assert torch.equal(a(x), b(x)) and all(not m.training for m in b.modules())
    with pytest.raises(ValueError, match="compressed already"): method.transform(model)


@pytest.mark.parametrize("kind", ["cnn", "llama", "gpt2", "mobile"])
def test_decompressed_models_are_plain_and_compute_the_same(kind):
    model, x = (mobile(), torch.randn(20, 2, 8, 8, generator=generator(1))) if kind == "mobile" else (MODELS[kind][0]().eval(), torch.randint(0, 50, (4, 9), generator=generator(1))) if kind == "gpt2" else trained(kind)
    compress(model, x, bits=3, groups=2, steps=2)
    for p in (p for n, p in model.named_parameters() if n.endswith("codebook")): p.requires_grad_(False); break
    plain = decompress(copy.deepcopy(model))
    with torch.no_grad(): assert torch.equal(logits(plain, x), logits(model, x))
    assert not any(type(m).__module__.startswith("efftrain") for n, m in plain.named_modules()) and all(m.training == plain.training for m in plain.modules())
    first = next(m for m in plain.modules() if isinstance(m, (nn.Linear, nn.Conv2d)))
    assert not first.weight.requires_grad
    with pytest.raises(ValueError, match="no codebook layer"): decompress(plain)


def test_frozen_layers_stay_frozen():
    model, x = trained("cnn")
    for p in model.parameters(): p.requires_grad_(False)
    compress(model, x, bits=2, groups=2, group_param="scale", steps=2)
    assert not any(p.requires_grad for p in model.parameters())


def test_layers_that_share_an_input_are_calibrated_together_with_the_same_result():
    model, x = trained("llama")
    name = "model.layers.0.self_attn.v_proj"
    one, all_three = JLCM(bits=2, groups=1, steps=5), JLCM(bits=2, groups=1, steps=5)
    one.fit(model, x, [name]); all_three.fit(model, x, lambda n, m: "layers.0.self_attn" in n)
    assert torch.equal(one.layers_[name].indices(), all_three.layers_[name].indices())


def test_footprint_from_shapes_is_the_size_of_the_compressed_model():
    model = mlp([16, 64, 32, 8])
    for group_param in ("codebook", "scale"):
        expected = footprint(model, 3, 1, group_param, value_bytes=4)["bytes"]
        small = copy.deepcopy(model); compress(small, torch.randn(40, 16), bits=3, groups=1, steps=1)
        assert expected == model_bytes(small)
    grouped = copy.deepcopy(model); compress(grouped, torch.randn(40, 16), ["0", "2"], bits=2, groups=4, steps=1)
    assert footprint(model, 2, 4, targets=["0", "2"], value_bytes=4)["bytes"] == model_bytes(grouped)


def test_half_precision_and_compile():
    model, x = trained("cnn"); model = model.bfloat16()
    compress(model, x.bfloat16(), bits=2, groups=2, steps=5)
    assert model[0].codebook.dtype == torch.bfloat16 and model(x.bfloat16()).dtype == torch.bfloat16
    layer = quantize(nn.Linear(24, 12), 3, row_groups=torch.arange(12) // 4)
    compiled = torch.compile(layer, backend="eager", fullgraph=True); y = torch.randn(3, 24)
    torch.testing.assert_close(compiled(y), layer(y))


class Twice(nn.Module):
    def __init__(self): super().__init__(); self.layer = nn.Linear(4, 4)
    def forward(self, x): return self.layer(self.layer(x))


class Half(nn.Module):
    """Its two layers look like an MLP block, but the halves of the hidden units are treated differently."""
    def __init__(self): super().__init__(); self.fc1, self.fc2 = nn.Linear(6, 8), nn.Linear(8, 6)
    def forward(self, x): h = self.fc1(x); return self.fc2(torch.cat([h[..., :4], -h[..., 4:]], -1))


def broken(value):
    model = mlp([6, 8, 3]); model[0].weight.data[0, 0] = value
    return model


def tied():
    model = mlp([6, 6, 6]); model[2].weight = model[0].weight
    return model


X = torch.randn(10, 6, generator=generator())


@pytest.mark.parametrize("model, batches, options, error, word", [
    (lambda: mlp([6, 8, 3]), X, dict(bits=0), ValueError, "bits is 0"), (lambda: mlp([6, 8, 3]), X, dict(bits=9), ValueError, "bits is 9"), (lambda: mlp([6, 8, 3]), X, dict(groups=4), ValueError, "groups is 4 for layer '2'"),
    (lambda: mlp([6, 8, 3]), X, dict(groups={"1": 2}), ValueError, "groups names '1'"), (lambda: mlp([6, 8, 3]), X, dict(groups=0), ValueError, "groups is 0"), (lambda: mlp([6, 8, 3]), [], dict(groups=1), ValueError, "batches is empty"),
    (lambda: mlp([6, 8, 3]), [(X, X)], dict(groups=1), TypeError, "batch is a tensor"), (lambda: mlp([6, 8, 3]), 0 * X, dict(groups=1), ValueError, "layer '0' are all zero"), (lambda: mlp([6, 8, 3]), X * float("nan"), dict(groups=1), ValueError, "not finite"),
    (lambda: mlp([6, 8, 3]), X, dict(groups=2, reorder="free"), ValueError, "layer '2' has rows whose order"), (lambda: broken(float("nan")), X, dict(groups=1), ValueError, "layer '0' has 1 weights that are not finite"),
    (Twice, torch.randn(3, 4), dict(groups=1), ValueError, "called 2 times"), (tied, X, dict(groups=1), ValueError, "shares its weight"), (Half, X, dict(groups=2), ValueError, "changes the outputs"),
    (lambda: nn.Sequential(nn.Embedding(4, 4)), torch.zeros(1, dtype=torch.long), {}, ValueError, "no layer to compress"), (lambda: mlp([6, 8, 3]), X, dict(mapping="nearest"), ValueError, "mapping is 'nearest'"),
    (lambda: mlp([6, 8, 3]), X, dict(phi="linear"), ValueError, "phi is 'linear'"), (lambda: mlp([6, 8, 3]), X, dict(group_param="table"), ValueError, "group_param is"), (lambda: mlp([6, 8, 3]), X, dict(steps=-1), ValueError, "steps is -1"),
    (lambda: mlp([6, 8, 3]), X, dict(lr_map=float("nan")), ValueError, "lr_map is nan"), (lambda: mlp([6, 8, 3]), X, dict(targets=["9"], groups=1), ValueError, "targets names '9'"), (lambda: nn.Sequential(nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect")), torch.randn(1, 2, 5, 5), dict(targets=["0"]), ValueError, "layer '0' is a convolution with padding_mode='reflect'"),
    (lambda: nn.Linear(6, 3), X, dict(groups=1, targets=[""]), ValueError, "put it into an nn.Sequential"), (lambda: nn.Conv2d(2, 4, 3), torch.randn(4, 2, 5, 5), dict(groups=1), ValueError, "put it into an nn.Sequential")])
def test_wrong_input_is_named_and_the_model_stays(model, batches, options, error, word):
    model = model(); before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=word): compress(model, batches, **options)
    assert model.state_dict().keys() == before.keys() and all(torch.equal(v, before[k]) or torch.isnan(v).any() for k, v in model.state_dict().items())


def zero():
    model = mlp([6, 8, 3]); nn.init.zeros_(model[0].weight)
    return model


@pytest.mark.parametrize("model, batches, options, error, word", [
    (lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 8)), nn.ReLU(), nn.Linear(8, 3)), X, {}, ValueError, "layer '0' computes its weight"), (lambda: nn.Sequential(nn.utils.spectral_norm(nn.Linear(6, 8)), nn.Linear(8, 3)), X, {}, ValueError, "layer '0' computes its weight"),
    (zero, X, {}, ValueError, "layer '0' has weights that are all zero"), (lambda: mlp([6, 8, 3]), None, {}, TypeError, "batches is a NoneType"), (lambda: mlp([6, 8, 3]), X, dict(lr_map="1"), ValueError, "lr_map is '1'"), (lambda: mlp([6, 8, 3]), X, dict(lr_code=True), ValueError, "lr_code is True")])
def test_more_wrong_input_is_named(model, batches, options, error, word):
    with pytest.raises(error, match=word): compress(model(), batches, groups=1, **options)
    with pytest.raises(TypeError, match="model is a str"): compress("model", X)


def test_computed_weights_are_not_permuted():
    """Their rows are those of other parameters, so no chain is found, and a plan that names one is refused."""
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 8)), nn.ReLU(), nn.Linear(8, 3))
    assert find_chains(model) == [] and find_chains(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.utils.spectral_norm(nn.Linear(8, 3)))) == []
    with pytest.raises(ValueError, match="layer '0' computes its weight"): reorder(model, [(Chain(("0",), ("2",)), torch.randperm(8))])


def test_multihead_attention_of_torch_is_left_alone():
    model, x = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1).eval(), torch.randn(4, 5, 8, generator=generator())
    report = compress(model, x, bits=3, groups=1, steps=5)
    assert list(report.layers.name) == ["layers.0.linear1", "layers.0.linear2"] and torch.isfinite(model(x)).all()


@pytest.mark.parametrize("rows", [[0, 5, 0, 0], [0, 1], [0, -1, 0, 1]])
def test_groups_of_rows_are_checked(rows):
    with pytest.raises(ValueError, match="row_groups has shape"): quantize(nn.Linear(4, 4), 2, row_groups=torch.tensor(rows))


def test_compressed_layers_and_foreign_states_are_refused():
    model = mlp([6, 8, 3]); swap(model, "0", quantize(model[0], 2))
    with pytest.raises(ValueError, match="layer '0' is compressed already"): compress(model, X, groups=1)
    with pytest.raises(TypeError, match="compressed already"): quantize(model[0], 2)
    for state, fresh in ((model.state_dict(), mlp([6, 9, 3])), (mlp([6, 8, 3]).state_dict(), mlp([6, 8, 3])), ({k: v for k, v in model.state_dict().items() if k != "2.bias"}, mlp([6, 8, 3])),
                         ({k: v for k, v in model.state_dict().items() if k != "0.codebook"}, mlp([6, 8, 3])), (model.state_dict() | {"0.codes": model[0].codes[:-1]}, mlp([6, 8, 3])), (model.state_dict() | {"0.borders": torch.zeros(3)}, mlp([6, 8, 3]))):
        before = copy.deepcopy(fresh.state_dict())
        with pytest.raises(ValueError): load_compressed(fresh, state)
        assert fresh.state_dict().keys() == before.keys() and all(torch.equal(v, before[k]) for k, v in fresh.state_dict().items())
    with pytest.raises(ValueError, match="codebook has shape"): CodebookLinear(torch.zeros(2, 2, dtype=torch.long), torch.zeros(1, 3))
    with pytest.raises(ValueError, match="row_groups"): CodebookLinear(torch.zeros(2, 2, dtype=torch.long), torch.zeros(1, 4), row_groups=torch.tensor([0, 1]))
