"""PELA: factoring a model, the loss of the repair and the stage against NumPy, SciPy, brute force, finite differences and Hugging Face's own files; wrong input."""
import copy
import math

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import svds
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune as torch_prune

from efftrain.compress.low_rank import LowRankConv2d, LowRankLinear, layer_weight, low_rank_layers, rank_cost, ratio_rank
from efftrain.compress.pela import PELALoss, factorable_layers, largest_drift, load_low_rank, low_rank_factorize, pela_recover
from efftrain.models import cnn, llama, mlp, vit
from efftrain.training import lm_loss

IDS = torch.randint(0, 512, (2, 12), generator=torch.Generator().manual_seed(0))


def pair(ratio=2.0, **options):
    teacher = llama(32, 2, seed=1)
    return teacher, low_rank_factorize(teacher, ratio, **options)[0]


def test_eckart_young_against_scipy_and_restarts():
    """The product is SciPy's truncated SVD, its error is the tail of the spectrum, and no least-squares fit of that rank from 200 random starts is better."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(18, 14))
    small, report = low_rank_factorize(net, rank=3)
    W, product = net[0].weight.detach().double().numpy(), small[0].weight.detach().double().numpy()
    u, s, v = svds(W, k=3)
    np.testing.assert_allclose(product, (u * s) @ v, atol=1e-5)
    tail = np.linalg.svd(W, compute_uv=False)[3:]
    assert ((W - product)**2).sum() == pytest.approx((tail**2).sum(), rel=1e-5)
    assert report.error[0] == pytest.approx(math.sqrt((tail**2).sum() / (W**2).sum()), rel=1e-5)
    rng, best = np.random.default_rng(0), math.inf
    for _ in range(200):
        B = rng.normal(size=(14, 3))
        for _ in range(8):
            A = np.linalg.lstsq(B, W, rcond=None)[0]
            B = np.linalg.lstsq(A.T, W.T, rcond=None)[0].T
        best = min(best, ((W - B @ A)**2).sum())
    assert best >= ((W - product)**2).sum() * (1 - 1e-6)


@pytest.mark.parametrize("ratio", [1.5, 2, 3])
def test_weights_are_counted_in_closed_form(ratio):
    """Rank floor(mn / (c (m + n))), r (m + n) weights a layer, everything else kept."""
    teacher, student = pair(ratio)
    layers = factorable_layers(teacher)
    expected = sum(p.numel() for p in teacher.parameters())
    for n, m in layers.items():
        a, b = m.weight.shape
        r = int(a * b // (ratio * (a + b)))
        assert student.get_submodule(n).rank == r == ratio_rank((a, b), ratio)
        expected += r * (a + b) - a * b
    assert sum(p.numel() for p in student.parameters()) == expected
    assert len(layers) == 14 and "lm_head" not in layers
    for n, m in low_rank_layers(student).items(): torch.testing.assert_close(m[0].weight.norm(dim=1), m[1].weight.norm(dim=0), rtol=1e-3, atol=1e-4)  # singular values split evenly


def test_published_sizes_of_deit_base():
    shapes = [(2304, 768), (768, 768), (3072, 768), (768, 3072)]
    for c, ranks, total in ((2, [288, 192, 307, 307], 44.08), (1.5, [384, 256, 409, 409], 58.20), (3, [192, 128, 204, 204], 29.87)):
        assert [ratio_rank(s, c) for s in shapes] == ranks
        assert (86_567_656 + 12 * sum(r * rank_cost(s) - math.prod(s) for s, r in zip(shapes, ranks))) / 1e6 == pytest.approx(total, abs=5e-3)


def test_reports_operations_of_torchs_counter():
    teacher = llama(32, 2, seed=1)
    student, report = low_rank_factorize(teacher, 2.0, inputs=IDS)
    linear = lambda m: sum(2 * IDS.numel() * w.weight.numel() for w in m.modules() if isinstance(w, nn.Linear))
    before, after = report.attrs["flops_before"], report.attrs["flops_after"]
    assert before - linear(teacher) == after - linear(student) and after < before
    row = report.iloc[0]
    assert row.bytes_before == 4 * row.weights_before and row.bytes_after == 4 * row.weights_after == sum(p.untyped_storage().nbytes() for p in student.get_submodule(row.layer).parameters())


def test_counting_operations_leaves_the_model_as_it_was():
    """Averages of normalisation layers, random numbers (dropout) and modes, of the original and of the factored copy."""
    net = nn.Sequential(nn.Linear(16, 40), nn.BatchNorm1d(40), nn.Dropout(0.5), nn.Linear(40, 20))
    before = copy.deepcopy(net.state_dict())
    torch.manual_seed(1); low_rank_factorize(net, 2.0); random = torch.get_rng_state(); torch.manual_seed(1)
    small, report = low_rank_factorize(net, 2.0, inputs=3 + torch.randn(4, 16, generator=torch.Generator().manual_seed(0)))
    for model in (net, small): assert torch.equal(model[1].running_mean, before["1.running_mean"]) and model[1].num_batches_tracked == 0 and all(m.training for m in model.modules())
    assert torch.equal(random, torch.get_rng_state()) and report.attrs["flops_after"] < report.attrs["flops_before"]


def test_loss_is_the_formula_written_out():
    teacher, student = pair(3.0)
    loss, parts = PELALoss(teacher, student, feature=0.7, logits=0.3, perturb=2.0, eps=0.01)(IDS)
    a, b = student(IDS, output_hidden_states=True), teacher(IDS, output_hidden_states=True)
    K = len(a.hidden_states) - 1
    feature = sum(((x - y)**2).mean() for x, y in zip(a.hidden_states[1:], b.hidden_states[1:])) / K
    layers = low_rank_layers(student)
    drift = sum(((m[1].weight @ m[0].weight - teacher.get_submodule(n).weight).abs().max() - 0.01)**2 for n, m in layers.items()) / len(layers)
    expected = lm_loss(student, IDS) + 0.7 * feature + 0.3 * F.mse_loss(a.logits, b.logits) + 2 * drift
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(parts["perturb"], drift.detach())


def test_nothing_to_repair_at_full_rank():
    from efftrain.compress.low_rank import factorize_layers, max_rank
    teacher = llama(32, 2, seed=1)
    student = copy.deepcopy(teacher)
    factorize_layers(student, {n: max_rank(m.weight.shape) for n, m in factorable_layers(teacher).items()})
    torch.testing.assert_close(student(IDS).logits, teacher(IDS).logits, atol=1e-5, rtol=1e-4)
    _, parts = PELALoss(teacher, student, logits=1.0, eps=0.0)(IDS)
    assert parts["feature"] < 1e-9 and parts["logits"] < 1e-10 and parts["perturb"] < 1e-11


def test_gradient_of_the_drift_against_finite_differences():
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(7, 12)).double()
    student, _ = low_rank_factorize(teacher, rank=2)
    loss = PELALoss(teacher, student, feature=0, task=0, perturb=1.0, eps=0.01, forward=lambda m, b: m(b))
    loss(torch.zeros(1, 7, dtype=torch.float64))[0].backward()
    for part in student[0]:
        if part.weight.grad is None: continue
        numeric = torch.zeros_like(part.weight)
        with torch.no_grad():
            for i in range(part.weight.numel()):
                w, ends = part.weight.view(-1), []
                for h in (1e-6, -1e-6): w[i] += h; ends.append(float(loss.drift())); w[i] -= h
                numeric.view(-1)[i] = (ends[0] - ends[1]) / 2e-6
        torch.testing.assert_close(part.weight.grad, numeric, atol=1e-7, rtol=1e-4)
    assert (student[0][1].weight.grad != 0).any(1).sum() == 1  # the largest entry alone


def test_squared_pushes_away_inside_the_ball_and_hinge_does_not():
    teacher, student = pair()
    far = float(largest_drift(student, {n: teacher.get_submodule(n).weight for n in low_rank_layers(student)}).detach().max())
    for form, zero in (("squared", False), ("hinge", True)):
        value = PELALoss(teacher, student, task=0, feature=0, eps=2 * far, perturb_form=form)(IDS)[0]
        assert (float(value) == 0) == zero


def test_terms_that_count_nothing_do_not_run_the_teacher():
    teacher, student = pair()
    def refuse(*_): raise AssertionError("the teacher ran")
    handle = teacher.register_forward_pre_hook(refuse)
    value, parts = PELALoss(teacher, student, feature=0, perturb=0)(IDS)
    assert set(parts) == {"task"} and torch.isclose(value, lm_loss(student, IDS))
    handle.remove()
    loss = PELALoss(teacher, student, perturb_every=3)
    assert ["perturb" in loss(IDS)[1] for _ in range(6)] == [True, False, False] * 2


def test_recovery_improves_the_student_and_leaves_the_teacher():
    teacher, student = pair(3.0)
    teacher.train()
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    seen = []
    teacher.register_forward_pre_hook(lambda m, _: seen.append(m.training))
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    history = pela_recover(student, teacher, lambda step: IDS, PELALoss(teacher, student, task=0), optimizer, 15)
    assert history.feature.iloc[-1] < 0.7 * history.feature.iloc[0] and len(history) == 15
    assert all(torch.equal(before[k], v) for k, v in teacher.state_dict().items()) and not any(seen) and all(p.grad is None for p in teacher.parameters())


def test_saves_and_loads_the_hugging_face_way(tmp_path):
    from safetensors.torch import load_file
    teacher, student = pair()
    student.save_pretrained(tmp_path)
    loaded = load_low_rank(type(student), tmp_path)
    assert torch.equal(loaded(IDS).logits, student.eval()(IDS).logits)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    keys = load_file(next(tmp_path.glob("*.safetensors"))).keys()
    assert "model.layers.0.mlp.up_proj.0.weight" in keys and "model.layers.0.mlp.up_proj.weight" not in keys
    teacher.save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="low_rank"): load_low_rank(type(student), tmp_path / "dense")


@pytest.mark.parametrize("tied", [True, False])
def test_a_loaded_model_keeps_its_dtype(tied, tmp_path):
    student, _ = low_rank_factorize(llama(32, 1, tied=tied).bfloat16(), 2.0)
    student.save_pretrained(tmp_path)
    loaded = load_low_rank(type(student), tmp_path)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16} and torch.equal(loaded(IDS).logits, student.eval()(IDS).logits)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    lm_loss(loaded, IDS).backward()
    assert all(p.grad is not None for p in loaded.parameters())


def test_other_models_merge_copy_compile_and_autocast():
    model = vit(32, 2)
    student, report = low_rank_factorize(model, 2.0, exclude=("embed", "norm", "classifier"))
    x = torch.randn(2, 1, 28, 28)
    student.eval()
    merged = copy.deepcopy(student)
    for n, m in low_rank_layers(student).items(): merged.set_submodule(n, m.merge())
    torch.testing.assert_close(merged(x).logits, student(x).logits, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(torch.compile(student, backend="aot_eager")(x).logits, student(x).logits, atol=1e-5, rtol=1e-4)
    with torch.autocast("cpu", torch.bfloat16): assert (student(x).logits.float() - merged(x).logits.float()).abs().max() < 0.05
    assert all(m.bias is not None and torch.equal(m.bias, model.get_submodule(n).bias) for n, m in low_rank_layers(student).items())
    low, report = low_rank_factorize(cnn(8), 2.0, mode="spatial", convolutions=True, exclude=("0",))
    assert all(isinstance(m, LowRankConv2d) for m in low_rank_layers(low).values()) and len(report) == 2
    attention = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    small, _ = low_rank_factorize(attention, 2.0)
    assert set(low_rank_layers(small)) == {"linear1", "linear2"} and small(torch.randn(2, 5, 16)).shape == (2, 5, 16)


def test_energy_leaves_layers_dense_that_it_would_enlarge():
    net = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 20))
    with torch.no_grad(): net[1].weight.copy_(torch.randn(20, 2) @ torch.randn(2, 20))
    small, report = low_rank_factorize(net, energy=0.999)
    assert list(report.layer) == ["1"] and report["rank"][0] == 2
    with pytest.raises(ValueError, match="every layer would be larger"): low_rank_factorize(nn.Sequential(nn.Linear(20, 20)), energy=0.999)


def test_tied_small_and_excluded_layers_are_left_out():
    model = llama(32, 1)
    assert "lm_head" not in factorable_layers(model, exclude=())  # tied to the embedding
    net = mlp([16, 32, 5])
    assert list(factorable_layers(net)) == ["0"] and list(factorable_layers(net, min_out=1)) == ["0", "2"]
    from transformers import GPT2Config, GPT2LMHeadModel
    gpt = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64, n_positions=16))
    small, report = low_rank_factorize(gpt, 2.0)
    assert set(report.kind) == {"Conv1D"} and isinstance(small.get_submodule(report.layer[0]), LowRankLinear) and layer_weight(gpt.get_submodule(report.layer[0])).shape == (96, 32)
    small(torch.zeros(1, 4, dtype=torch.long))


def test_one_text_excludes_as_a_list_of_one_does():
    model = llama(32, 1)
    assert list(factorable_layers(model, "mlp")) == list(factorable_layers(model, ("mlp",))) and 0 < len(factorable_layers(model, "mlp")) < len(factorable_layers(model))


def test_weights_that_are_computed_are_refused_by_name():
    normed, pruned = mlp([16, 32, 32]), mlp([16, 32, 32])
    nn.utils.parametrizations.weight_norm(normed[0]); torch_prune.l1_unstructured(pruned[0], "weight", 0.5)
    for net in (normed, pruned):
        with pytest.raises(ValueError, match="layer '0' has a weight that is computed"): low_rank_factorize(net, 2.0)
        assert list(factorable_layers(net, exclude=("0",))) == ["2"]


@pytest.mark.parametrize("arguments, text", [(dict(ratio="2"), "ratio is '2'"), (dict(ratio=True), "ratio is True"), (dict(energy="0.5"), "energy is '0.5'"), (dict(exclude=(3,)), "exclude is"), (dict(model="lm"), "model is a str")])
def test_wrong_types_are_named(arguments, text):
    with pytest.raises(TypeError, match=text): low_rank_factorize(**{"model": mlp([16, 32]), **arguments})


@pytest.mark.parametrize("arguments, text", [(dict(ratio=1.0), "ratio is 1.0"), (dict(ratio=float("nan")), "ratio is nan"), (dict(ratio=2.0, rank=3), "ratio and rank given"), (dict(rank=16), "break-even 16.0"), (dict(rank=0), "rank 0"), (dict(rank=2.0), "rank 2.0"),
                                             (dict(energy=0.0), "energy is 0.0"), (dict(ratio=1000.0, rank=1), "ratio and rank"), (dict(exclude=("model",)), "no layer to factor"), (dict(init="zeros"), "init is 'zeros'"), (dict(mode="spatial"), "no layer to factor")])
def test_wrong_arguments_are_named_and_nothing_changes(arguments, text):
    model = llama(32, 1)
    with pytest.raises(ValueError, match=text): low_rank_factorize(model, inplace=True, **arguments)
    assert not low_rank_layers(model) and not hasattr(model.config, "low_rank")


def test_wrong_models_and_losses_are_named():
    teacher, student = pair()
    with pytest.raises(ValueError, match="factored already"): low_rank_factorize(student)
    broken = llama(32, 1); broken.model.layers[0].mlp.up_proj.weight.data[0, 0] = math.nan
    with pytest.raises(ValueError, match="up_proj.*not finite"): low_rank_factorize(broken)
    for name in ("feature", "logits", "perturb", "eps"):
        with pytest.raises(ValueError, match=f"{name} is -1"): PELALoss(teacher, student, **{name: -1.0})
    with pytest.raises(ValueError, match="perturb_form is 'l2'"): PELALoss(teacher, student, perturb_form="l2")
    with pytest.raises(ValueError, match="perturb_every is 0"): PELALoss(teacher, student, perturb_every=0)
    with pytest.raises(ValueError, match="no factored layer"): PELALoss(teacher, teacher)
    with pytest.raises(ValueError, match="teacher has no layers"): PELALoss(mlp([4, 4]), student)
    with pytest.raises(ValueError, match=r"\(2, 12, 32\).*\(2, 12, 64\)"): PELALoss(llama(64, 2), student, perturb=0)(IDS)
    with pytest.raises(ValueError, match="all weights of the loss are 0"): PELALoss(teacher, student, feature=0, perturb=0, task=0)(IDS)
    with pytest.raises(TypeError, match="feature is '1'"): PELALoss(teacher, student, feature="1")
    with pytest.raises(ValueError, match="teacher is factored itself"): PELALoss(student, student)
    with pytest.raises(ValueError, match="batch is a dict and the model's output has no loss"): PELALoss(teacher, student)(dict(input_ids=IDS))
    assert PELALoss(teacher, student, feature=0, perturb=0)(dict(input_ids=IDS, labels=IDS))[1]["task"] > 0
    loss = PELALoss(teacher, student)
    with pytest.raises(ValueError, match="optimizer holds parameters of the teacher"): pela_recover(student, teacher, lambda s: IDS, loss, torch.optim.SGD([*student.parameters(), *teacher.parameters()], lr=0.1), 1)
    with pytest.raises(ValueError, match="no parameter of the student"): pela_recover(student, teacher, lambda s: IDS, loss, torch.optim.SGD(mlp([2, 2]).parameters(), lr=0.1), 1)
    with pytest.raises(ValueError, match="steps is 0"): pela_recover(student, teacher, lambda s: IDS, loss, torch.optim.SGD(student.parameters(), lr=0.1), 0)
    with pytest.raises(ValueError, match="ended after 2 of 3"): pela_recover(student, teacher, [IDS, IDS], loss, torch.optim.SGD(student.parameters(), lr=1e-4), 3)
    with pytest.raises(FloatingPointError, match="step 1"): pela_recover(student, teacher, [IDS], lambda b: (student(b).logits.sum() * math.nan, {}), torch.optim.SGD(student.parameters(), lr=1e-4), 1)
