"""Trained rank pruning and the low-rank layers: truncation, sub-gradient and decomposition against NumPy, torch's derivative and counter, scikit-learn, saved and interrupted runs, wrong input."""
import copy
import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from sklearn.decomposition import TruncatedSVD
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from efftrain.compress.low_rank import (MODES, LowRankConv2d, LowRankLinear, break_even_rank, energy_rank, factor, factorize_layers, layer_flops, low_rank_layer, low_rank_layers, matricize, max_rank, product, rank_cost,
                                        ratio_rank, restructure, structure, unmatricize, value_rank)
from efftrain.compress.trp import TrainedRankPruner, conv_flops, decompose, nuclear_subgradient, truncatable_layers, truncate_
from efftrain.models import cnn, llama, mlp, vit
from efftrain.training import classification_loss, fit


def by_numpy(weight, mode):
    """The matrix (or matrices) of a kernel, laid out by NumPy alone."""
    w = weight.double().numpy()
    n, c, h, k = w.shape
    if mode == "channel": return [w.reshape(n, c * h * k)]
    if mode == "spatial": return [np.array([[w[j // k, i // h, i % h, j % k] for j in range(n * k)] for i in range(c * h)])]
    return [w[i].reshape(c, h * k) for i in range(n)]


shapes = st.tuples(st.integers(1, 7), st.integers(1, 6), st.integers(1, 4), st.integers(1, 4))


@settings(max_examples=40, deadline=None)
@given(shape=shapes, mode=st.sampled_from(MODES), seed=st.integers(0, 1000), share=st.floats(0.05, 1))
def test_truncation_is_numpys_truncated_svd(shape, mode, seed, share):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    matrices = by_numpy(weight, mode)
    np.testing.assert_array_equal(matricize(weight, mode).numpy().reshape(len(matrices), *matrices[0].shape), np.array(matrices, dtype=np.float32))
    assert torch.equal(unmatricize(matricize(weight, mode), shape, mode), weight)
    svds = [np.linalg.svd(m, full_matrices=False) for m in matrices]
    needed = max(next((k for k in range(1, len(s) + 1) if (s[:k]**2).sum() >= share * (s**2).sum()), len(s)) for _, s, _ in svds)
    cut = weight.clone()
    assert truncate_(cut, share, mode) == needed or share == 1
    expected = [(u[:, :needed] * s[:needed]) @ v[:needed] for u, s, v in svds]
    np.testing.assert_allclose(np.array(by_numpy(cut, mode)), expected, atol=1e-5)
    again = cut.clone()  # at a fixed rank the second truncation changes nothing
    truncate_(again, mode=mode, rank=needed)
    torch.testing.assert_close(again, cut, atol=1e-5, rtol=1e-5)


def test_truncation_at_an_energy_is_not_idempotent():
    weight = torch.diag(torch.tensor([0.89, 0.09, 0.02]).sqrt())
    assert [truncate_(weight, 0.9) for _ in range(3)] == [2, 1, 1]


def test_rank_k_agrees_with_scikit_learn():
    weight = torch.randn(20, 5, 3, 3)
    model = TruncatedSVD(4, algorithm="arpack").fit(weight.flatten(1).double().numpy())
    expected = model.inverse_transform(model.transform(weight.flatten(1).double().numpy()))
    truncate_(weight, rank=4)
    np.testing.assert_allclose(weight.flatten(1).numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_subgradient_is_the_derivative_of_the_nuclear_norm(mode):
    weight, direction = torch.randn(5, 4, 3, 2, dtype=torch.float64), torch.randn(5, 4, 3, 2, dtype=torch.float64)
    norm = lambda t: torch.linalg.matrix_norm(matricize(weight + t * direction, mode), "nuc").sum()
    assert float((nuclear_subgradient(weight, mode=mode) * direction).sum()) == pytest.approx(float((norm(1e-6) - norm(-1e-6)) / 2e-6), rel=1e-4)
    leaf = weight.clone().requires_grad_()  # and autograd's, through torch's own SVD
    torch.linalg.svdvals(matricize(leaf, mode)).sum().backward()
    torch.testing.assert_close(nuclear_subgradient(weight, mode=mode), leaf.grad, atol=1e-6, rtol=1e-6)


def test_subgradient_of_a_low_rank_matrix_has_spectral_norm_one():
    low = torch.randn(6, 2) @ torch.randn(2, 9)
    s = torch.linalg.svdvals(nuclear_subgradient(low))
    torch.testing.assert_close(s, torch.tensor([1.0, 1, 0, 0, 0, 0]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("options", [dict(), dict(padding=1), dict(stride=2, padding=1), dict(stride=(1, 2), padding=(2, 0), bias=False), dict(padding="same", dilation=2), dict(padding=1, padding_mode="circular")])
def test_decomposed_layer_is_the_truncated_layer(mode, options):
    torch.manual_seed(0)
    dense = nn.Conv2d(5, 6, (3, 2), **options)
    x = torch.randn(2, 5, 9, 10)
    rank = max(max_rank(dense.weight.shape, mode) // 2, 1)
    pair, _ = low_rank_layer(dense, rank, mode)
    truncate_(dense.weight.data, mode=mode, rank=rank)
    torch.testing.assert_close(pair(x), dense(x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(pair.merge()(x), dense(x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(pair.plain()(x), pair(x))
    assert sum(m.weight.numel() for m in pair) == rank * rank_cost(dense.weight.shape, mode) and pair.rank == rank
    pair(x).sum().backward()
    assert all(p.grad is not None for p in pair.parameters())


@pytest.mark.parametrize("mode", MODES)
def test_flops_by_formula_are_torchs(mode):
    model, x = cnn(8, residual=True), torch.randn(1, 1, 28, 28)
    for energy in (None, 0.6):
        if energy: model, _ = decompose(model, energy=energy, mode=mode, only_cheaper=False)
        with FlopCounterMode(display=False) as counter: model(x)
        assert sum(layer_flops(model, x).values()) == counter.get_total_flops()
        assert conv_flops(model, (1, 28, 28)) == counter.get_total_flops() - 2 * 32 * 10


def test_energy_one_without_penalty_is_plain_sgd_bit_for_bit():
    def trained(pruner):
        net = cnn(4, seed=1)
        x, y = torch.randn(16, 1, 12, 12, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 10
        hooks = TrainedRankPruner(net, 1.0, every=1).hooks() if pruner else {}
        fit(net, classification_loss, lambda step: (x, y), torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3), 5, device="cpu", seed=0, **hooks)
        return net.state_dict()
    a, b = trained(True), trained(False)
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_hooks_are_the_algorithm_written_out():
    """The loop of the paper by hand, with torch's SVD in place of the eigenproblem."""
    x, y = torch.randn(16, 1, 12, 12, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 10
    ours, theirs = cnn(4, norm=False, seed=1), cnn(4, norm=False, seed=1)
    pruner = TrainedRankPruner(ours, 0.8, every=3, nuclear=0.05, mode="spatial")
    fit(ours, classification_loss, lambda step: (x, y), torch.optim.SGD(ours.parameters(), lr=0.05, momentum=0.9), 8, device="cpu", **pruner.hooks())
    optimizer, names = torch.optim.SGD(theirs.parameters(), lr=0.05, momentum=0.9), list(truncatable_layers(theirs))
    for t in range(9):  # the last one truncates only when it is a multiple of the period; 8 is none
        if t == 8: break
        push = {}
        if t % 3 == 0:
            for n in names:
                w = theirs.get_submodule(n).weight
                m = w.detach().permute(1, 2, 0, 3).reshape(w.shape[1] * w.shape[2], -1)
                u, s, v = torch.linalg.svd(m, full_matrices=False)
                k = int((s.square().cumsum(0) / s.square().sum() < 0.8).sum()) + 1
                back = lambda a: a.reshape(w.shape[1], w.shape[2], w.shape[0], w.shape[3]).permute(2, 0, 1, 3)
                w.data.copy_(back((u[:, :k] * s[:k]) @ v[:k])); push[n] = back(u[:, :k] @ v[:k])
        optimizer.zero_grad(); classification_loss(theirs, (x, y)).backward()
        for n, direction in push.items(): theirs.get_submodule(n).weight.grad += 0.05 * direction
        optimizer.step()
    for (n, a), b in zip(ours.named_parameters(), theirs.parameters()): torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3, msg=n)
    assert sorted({h["step"] for h in pruner.history}) == [0, 3, 6]


def test_planted_rank_is_found():
    g = torch.Generator().manual_seed(3)
    target = torch.randn(10, 3, generator=g) @ torch.randn(3, 16, generator=g)
    x = torch.randn(400, 16, generator=g)
    y = x @ target.T + 0.3 * torch.randn(400, 10, generator=g)
    net = mlp([16, 10])
    pruner = TrainedRankPruner(net, 0.99, every=5, targets=["0"])
    fit(net, lambda m, b: F.mse_loss(m(b[0]), b[1]), lambda step: (x, y), torch.optim.SGD(net.parameters(), lr=0.5), 150, device="cpu", **pruner.hooks())
    assert pruner.finish() == {"0": 3} and torch.linalg.matrix_rank(net[0].weight.detach(), atol=1e-3) == 3


def test_an_interrupted_run_goes_on_bit_for_bit(tmp_path):
    x, y = torch.randn(16, 1, 12, 12, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 10

    def train(steps, folder, resume):
        net = cnn(4, seed=1)
        pruner = TrainedRankPruner(net, 0.8, every=2, nuclear=0.01)
        fit(net, classification_loss, lambda step: (x, y), torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9), steps, device="cpu", seed=0, save_to=folder, save_every=2, resume=resume, **pruner.hooks())
        return net.state_dict(), pruner.history
    whole, history = train(6, tmp_path / "a", False)
    calls = []

    class Stop(Exception): pass
    net = cnn(4, seed=1)
    pruner = TrainedRankPruner(net, 0.8, every=2, nuclear=0.01)
    def batches(step):
        if step == 4: raise Stop
        return x, y
    with pytest.raises(Stop): fit(net, classification_loss, batches, torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9), 6, device="cpu", seed=0, save_to=tmp_path / "b", save_every=2, **pruner.hooks())
    resumed, history_b = train(6, tmp_path / "b", True)
    assert all(torch.equal(whole[k], resumed[k]) for k in whole) and history == history_b
    with pytest.raises(ValueError, match="energy"): TrainedRankPruner(net, 0.7, every=2, nuclear=0.01).load_state_dict(pruner.state_dict())


@pytest.mark.parametrize("mode", MODES)
def test_decomposed_models_save_load_copy_compile_and_autocast(mode, tmp_path):
    from safetensors.torch import load_file, save_file
    torch.manual_seed(0)
    net, report = decompose(cnn(8, residual=True).eval(), energy=0.5, mode=mode, only_cheaper=False)
    x = torch.randn(2, 1, 28, 28)
    expected = net(x)
    fresh = restructure(cnn(8, residual=True, seed=9), structure(net)).eval()
    buffer = io.BytesIO(); torch.save(net.state_dict(), buffer); buffer.seek(0)
    fresh.load_state_dict(torch.load(buffer)); assert torch.equal(fresh(x), expected)
    save_file({k: v.contiguous() for k, v in net.state_dict().items()}, tmp_path / "m.safetensors")
    fresh.load_state_dict(load_file(tmp_path / "m.safetensors")); assert torch.equal(fresh(x), expected)
    assert torch.equal(copy.deepcopy(net)(x), expected)
    torch.testing.assert_close(torch.compile(net, backend="aot_eager")(x), expected, atol=1e-5, rtol=1e-5)
    with torch.autocast("cpu", torch.bfloat16): assert (net(x).float() - expected).abs().max() < 0.1
    net.train(); assert all(m.training for m in net.modules())
    assert (report.bytes_after < report.bytes_before).any() and (report.error < 0.75).all()


def test_report_counts_real_storage_and_errors():
    net = cnn(8, residual=True)
    small, report = decompose(net, energy=0.5, mode="spatial")
    row = report[~report.dense].iloc[0]
    layer, dense = small.get_submodule(row.layer), net.get_submodule(row.layer)
    assert isinstance(layer, LowRankConv2d) and row.bytes_after == sum(p.untyped_storage().nbytes() for p in layer.parameters())
    assert row.error == pytest.approx(float((layer.weight - dense.weight).detach().norm() / dense.weight.detach().norm()), rel=1e-4)
    assert not low_rank_layers(net) and list(report.layer) == list(truncatable_layers(net))


def test_ranks_by_value_number_and_name():
    net = cnn(8)
    names = list(truncatable_layers(net))
    singular = torch.linalg.svdvals(net.get_submodule(names[0]).weight.detach().flatten(1))
    _, report = decompose(net, value=float(singular[3]) - 1e-6, only_cheaper=False)
    assert report["rank"].iloc[0] == 4 and value_rank(singular, 1e9) == 1
    assert decompose(net, rank=3)[1]["rank"].tolist() == [3, 3]
    assert decompose(net, rank={names[1]: 2})[1].layer.tolist() == [names[1]]
    assert energy_rank(torch.zeros(4), 0.9) >= 1


def test_transformers_and_bf16_work():
    model = llama(32, 2).to(torch.bfloat16)
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and "mlp" in n]
    pruner = TrainedRankPruner(model, 0.8, every=1, targets=names)
    pruner.before_forward(0)
    small, report = decompose(model, rank=4, targets=names)
    assert isinstance(small.get_submodule(names[0]), LowRankLinear) and small.get_submodule(names[0])[0].weight.dtype == torch.bfloat16
    ids = torch.randint(0, 512, (1, 8)); small(ids, labels=ids).loss.backward()
    picture = vit()
    assert decompose(picture, rank=5, targets=lambda n, m: isinstance(m, nn.Linear) and m.out_features > 10)[0](torch.randn(1, 1, 28, 28)).logits.shape == (1, 10)


def test_gpt2_conv1d():
    from transformers.pytorch_utils import Conv1D
    layer, x = Conv1D(6, 4), torch.randn(3, 4)
    nn.init.normal_(layer.bias)
    torch.testing.assert_close(low_rank_layer(layer, 4)[0](x), layer(x), atol=1e-6, rtol=1e-5)


def test_shared_modules_are_replaced_everywhere_and_tied_weights_refused():
    shared = nn.Linear(8, 8)
    net = nn.Sequential(shared, nn.ReLU(), shared)
    factorize_layers(net, {"0": 2})
    assert net[0] is net[2] and isinstance(net[0], LowRankLinear)
    model = llama(32, 1)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match="lm_head.*tied"): decompose(model, rank=2, targets=["lm_head"], inplace=True)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize("arguments, error, text", [
    (dict(energy=0.0), ValueError, "energy is 0.0"), (dict(energy=1.5), ValueError, "energy is 1.5"), (dict(energy=float("nan")), ValueError, "energy is nan"), (dict(every=0), ValueError, "every is 0"), (dict(every=2.5), ValueError, "every is 2.5"),
    (dict(nuclear=-1.0), ValueError, "nuclear is -1.0"), (dict(nuclear=float("inf")), ValueError, "nuclear is inf"), (dict(mode="svd"), ValueError, "mode is 'svd'"), (dict(targets=["nothing"]), ValueError, "names 'nothing'"),
    (dict(targets=["1"]), TypeError, "'1' is a BatchNorm2d"), (dict(targets=[]), ValueError, "no such layer"), (dict(mode="spatial", targets=lambda n, m: isinstance(m, nn.Linear)), ValueError, "linear layer has no taps")])
def test_wrong_arguments_are_named(arguments, error, text):
    with pytest.raises(error, match=text.replace("(", r"\(")): TrainedRankPruner(cnn(4), **arguments)


def test_wrong_layers_are_named_and_nothing_changes():
    grouped = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 8, 3, groups=2))
    with pytest.raises(ValueError, match="'1'.*2 groups"): TrainedRankPruner(grouped, targets=["1"])
    with pytest.raises(ValueError, match="no convolution larger"): TrainedRankPruner(grouped)  # the grouped one is no default target
    net = cnn(4)
    net[3].weight.data[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="layer '3'.*not finite"): decompose(net, energy=0.9)
    with pytest.raises(ValueError, match="layer '3'.*not finite"): TrainedRankPruner(net)
    net = cnn(4); pruner = TrainedRankPruner(net)
    net[3].weight.data[0, 0, 0, 0] = float("inf")
    with pytest.raises(ValueError, match="layer '3', step 20"): pruner.before_forward(20)
    net = cnn(4)
    with pytest.raises(ValueError, match="energy and rank of"): decompose(net, energy=0.9, rank=2)
    with pytest.raises(ValueError, match="exactly one"): decompose(net)
    for rank in (0, 2.5, True, {"3": 99, "6": 2}):
        with pytest.raises(ValueError, match="rank"): decompose(net, rank=rank, inplace=True)
    with pytest.raises(ValueError, match="rank names"): decompose(net, rank={"3": 2}, targets=["3", "6"])
    with pytest.raises(ValueError, match="value is -1"): decompose(net, value=-1.0)
    with pytest.raises(ValueError, match="input_size"): conv_flops(net, (28, 28))
    assert not low_rank_layers(net)
    small, _ = decompose(net, rank=2)
    with pytest.raises(ValueError, match="factored already"): decompose(small, rank=1, targets=["3"])
    with pytest.raises(ValueError, match="factored already"): decompose(small, rank={"3": 1}, targets=["3"])
    with pytest.raises(ValueError, match="ratio is 1"): ratio_rank((4, 4), 1)
    with pytest.raises(ValueError, match="one mode"): structure(net)
    with pytest.raises(ValueError, match="has no parent|the layer to replace"): factorize_layers(nn.Linear(4, 4), {"": 1})
    with pytest.raises(ValueError, match="k is 99"): nuclear_subgradient(torch.randn(3, 3), 99)
    with pytest.raises(ValueError, match="rank is 0"): truncate_(torch.randn(3, 3), rank=0)
    with pytest.raises(ValueError, match="shape"): truncate_(torch.randn(3))
    assert break_even_rank((16, 16, 3, 3)) == 14.4


def test_what_is_factored_already_or_has_no_weight_of_its_own_is_refused():
    """By default, by function and by the name of a part: a pair is never taken for two dense layers."""
    small, _ = decompose(cnn(8, residual=True), energy=0.5, only_cheaper=False)
    before = {k: v.clone() for k, v in small.state_dict().items()}
    for targets in (None, lambda n, m: m.kernel_size != (1, 1) if isinstance(m, nn.Conv2d) else False, ["3.0.0"], "3.0"):
        with pytest.raises(ValueError, match="layer '3.0' is factored already"): decompose(small, energy=0.9, targets=targets, inplace=True)
        with pytest.raises(ValueError, match="layer '3.0' is factored already"): TrainedRankPruner(small, targets=targets)
    assert all(torch.equal(v, before[k]) for k, v in small.state_dict().items())
    for normed in (nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm):
        with pytest.raises(ValueError, match="layer '1' computes its weight"): TrainedRankPruner(nn.Sequential(nn.Conv2d(1, 4, 3), normed(nn.Conv2d(4, 4, 3))))


@pytest.mark.parametrize("call, error, text", [
    (lambda: truncate_(torch.ones(3, 3, dtype=torch.long)), TypeError, "torch.int64"), (lambda: truncate_([[1.0]]), TypeError, "is a list"), (lambda: nuclear_subgradient(torch.ones(3, 3, dtype=torch.long)), TypeError, "torch.int64"),
    (lambda: truncate_(torch.randn(3, 3), 2.0, rank=1), ValueError, "energy is 2.0"), (lambda: truncate_(torch.zeros(0, 3)), ValueError, "no values"), (lambda: nuclear_subgradient(torch.full((2, 2), float("nan"))), ValueError, "4 values that are not finite"),
    (lambda: TrainedRankPruner(cnn(4), energy=True), ValueError, "energy is True"), (lambda: TrainedRankPruner(cnn(4), energy="0.9"), ValueError, "energy is '0.9'"), (lambda: TrainedRankPruner(cnn(4), nuclear="1"), ValueError, "nuclear is '1'"),
    (lambda: decompose("model", rank=1), TypeError, "model is a str")])
def test_wrong_kinds_of_input_are_named(call, error, text):
    with pytest.raises(error, match=text): call()


@pytest.mark.parametrize("mode", MODES)
def test_plain_pairs_take_the_place_of_low_rank_layers(mode):
    """The decomposed network without this package: nn.Sequential pairs, the same keys, the same outputs."""
    small, _ = decompose(cnn(8, residual=True).eval(), energy=0.5, mode=mode, only_cheaper=False)
    plain = copy.deepcopy(small)
    for name, layer in low_rank_layers(plain).items(): plain.set_submodule(name, layer.plain())
    x = torch.randn(2, 1, 28, 28)
    assert not low_rank_layers(plain) and {type(m).__module__.split(".")[0] for n, m in plain.named_modules() if n in low_rank_layers(small)} == {"torch"}
    assert list(plain.state_dict()) == list(small.state_dict()) and torch.equal(plain(x), small(x))


def test_a_layer_whose_rank_saves_nothing_stays_dense():
    small, report = decompose(cnn(8), energy=0.9999)
    assert report.dense.all() and not low_rank_layers(small)
    layer = nn.Sequential(nn.Conv2d(16, 16, 3, stride=2, padding=1))  # at stride 2 the 1 x 1 layer of "decouple" works on four times the positions
    assert break_even_rank((16, 16, 3, 3), "decouple") > 5 and decompose(layer, rank=2, mode="decouple", targets=["0"])[1].dense.tolist() == [True]


def test_random_factors_keep_the_scale():
    dense = nn.Linear(200, 100)
    pair, _ = low_rank_layer(dense, 20, init="random", generator=torch.Generator().manual_seed(0))
    assert float(pair.weight.detach().std() / dense.weight.detach().std()) == pytest.approx(1, rel=0.1)
    with pytest.raises(ValueError, match="init is 'zeros'"): low_rank_layer(dense, 2, init="zeros")
    A, B, s = factor(dense.weight, 20)
    torch.testing.assert_close(A.norm(dim=1), B.norm(dim=0))  # singular values are split evenly
    torch.testing.assert_close((product(A, B) - dense.weight).norm(), s[20:].norm(), rtol=1e-4, atol=1e-5)
