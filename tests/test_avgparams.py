"""Average parameters: schedules, masks, pruner and scaling law against independent implementations, brute force, wrong input and interrupted runs."""
import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy import optimize
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from torch import nn
from torch.nn.utils import prune as torch_prune

from efftrain.compress.avgparams import GradualMagnitudePruner, SparsitySchedule, average_parameters
from efftrain.compress.masks import Masks, largest, prunable_layers
from efftrain.compress.scaling_law import ScalingLaw
from efftrain.models import llama, mlp, vit
from efftrain.training import fit, lm_loss

HOFFMANN = dict(E=1.69, A=406.4, B=410.7, alpha=0.34, beta=0.28)


def law(n, d): return HOFFMANN["E"] + HOFFMANN["A"] / n**HOFFMANN["alpha"] + HOFFMANN["B"] / d**HOFFMANN["beta"]


def sizes(n=60, seed=0):
    rng = np.random.default_rng(seed)
    return np.stack([10**rng.uniform(7, 10, n), 10**rng.uniform(9, 11.5, n)], 1)


X = sizes(); Y = law(*X.T)
NOISY = Y * np.exp(0.01 * np.random.default_rng(7).normal(size=60))


def residual(t, y=NOISY): return np.logaddexp.reduce([t[0] - t[3] * np.log(X[:, 0]), t[1] - t[4] * np.log(X[:, 1]), np.full(len(X), t[2])]) - np.log(y)


def huber(r, delta): return np.where(np.abs(r) <= delta, r**2 / 2, delta * (np.abs(r) - delta / 2)).sum()


# the law

@pytest.mark.parametrize("delta", [1e-3, 1e-2, 1.0])
def test_a_law_without_noise_is_recovered_whatever_the_units(delta):
    for unit_n, unit_d in ((1, 1), (1e-6, 1e-9)):
        m = ScalingLaw(delta).fit(X * [unit_n, unit_d], Y)
        truth = {**HOFFMANN, "A": HOFFMANN["A"] * unit_n**HOFFMANN["alpha"], "B": HOFFMANN["B"] * unit_d**HOFFMANN["beta"]}
        for k, v in truth.items(): assert m.params_[k] == pytest.approx(v, rel=1e-2)
        np.testing.assert_allclose(m.predict(X * [unit_n, unit_d]), Y, rtol=1e-4)


@settings(max_examples=15, deadline=None)
@given(E=st.floats(0.5, 3), A=st.floats(50, 2000), B=st.floats(50, 2000), alpha=st.floats(0.15, 0.6), beta=st.floats(0.15, 0.6))
def test_other_laws_are_recovered(E, A, B, alpha, beta):
    y = E + A / X[:, 0]**alpha + B / X[:, 1]**beta
    np.testing.assert_allclose(ScalingLaw().fit(X, y).predict(X), y, rtol=1e-4)


def test_bootstrap_intervals_cover_with_one_per_cent_noise():
    """30 data sets here; the notebook makes all 100 and asks for 90%. Below 24 of 30 has a chance of less than 0.1% if the intervals hold 95%."""
    covered = []
    for trial in range(30):
        y = Y * np.exp(0.01 * np.random.default_rng(500 + trial).normal(size=60))
        low, high = ScalingLaw(polished=1).fit(X, y).bootstrap(100, seed=trial).quantile([0.025, 0.975]).to_numpy()
        covered.append([a <= v <= b for a, v, b in zip(low, HOFFMANN.values(), high)])
    assert np.sum(covered, 0).min() >= 24


@pytest.mark.parametrize("delta", [1e-3, 1e-2])
def test_two_other_solvers_end_at_the_same_optimum(delta):
    m = ScalingLaw(delta).fit(X, NOISY)
    assert huber(residual(m.theta_), delta) == pytest.approx(m.objective_, rel=1e-9)
    ends = []
    for k in range(4):
        t = m.theta_ + 0.05 * (k > 0) * np.random.default_rng(k).normal(size=5)
        for _ in range(8): t = optimize.minimize(lambda t: 1e6 * huber(residual(t), delta), t, method="L-BFGS-B", options=dict(maxfun=50_000, maxiter=5_000, ftol=1e-15, gtol=1e-10)).x
        ends.append(huber(residual(t), delta) / m.objective_ - 1)
    assert min(ends) > -1e-6 and sorted(ends)[1] < 1e-6
    other = optimize.least_squares(residual, m.theta_ * 1.001, loss="huber", f_scale=delta, x_scale="jac", xtol=1e-15, ftol=1e-15, gtol=1e-15, max_nfev=5_000)
    assert other.cost == pytest.approx(m.objective_, rel=1e-6)


def test_gradient_against_finite_differences_and_a_batch_against_its_members():
    from efftrain.compress.scaling_law import _objective
    data = np.log(X[:, 0]), np.log(X[:, 1]), np.log(NOISY)
    thetas = np.array([6, 6, 0.5, 0.3, 0.3]) + 0.1 * np.random.default_rng(1).normal(size=(6, 5))
    for delta in (1e-2, 1.0):
        values, gradients = _objective(thetas, *data, delta)
        for t, v, g in zip(thetas, values, gradients):
            one, slope = _objective(t, *data, delta)
            assert one == pytest.approx(v, rel=1e-12) and slope == pytest.approx(g, rel=1e-12)
            numeric = [(_objective(t + h, *data, delta)[0] - _objective(t - h, *data, delta)[0]) / 2e-6 for h in 1e-6 * np.eye(5)]
            np.testing.assert_allclose(g, numeric, rtol=1e-4, atol=1e-4 * np.abs(g).max())


def test_optimal_split_is_the_minimum_and_grows_with_the_known_exponent():
    m, grid = ScalingLaw().fit(X, Y), np.geomspace(1e6, 1e13, 20_001)
    for C in (1e18, 1e21, 1e24):
        n, d = m.optimal(C)
        assert 6 * n * d == pytest.approx(C) and n == pytest.approx(grid[law(grid, C / 6 / grid).argmin()], rel=5e-3)
    assert math.log10(m.optimal(1e22)[0] / m.optimal(1e21)[0]) == pytest.approx(0.28 / 0.62, abs=1e-3)


def test_estimator_conventions_and_determinism():
    m = ScalingLaw(delta=1e-2)
    assert clone(m).get_params() == dict(delta=1e-2, starts=None, polished=10) and m.set_params(delta=1e-3).delta == 1e-3
    with pytest.raises(NotFittedError): m.predict(X)
    assert m.fit(X, NOISY) is m and m.n_features_in_ == 2 and m.score(X, NOISY) > 0.99
    assert ScalingLaw().fit(X, NOISY).params_ == m.params_
    a, b = m.bootstrap(20, seed=3), m.bootstrap(20, seed=3)
    assert a.equals(b) and list(a) == ["E", "A", "B", "alpha", "beta"] and not a.equals(m.bootstrap(20, seed=4))
    order = np.random.default_rng(0).permutation(60)
    np.testing.assert_allclose(ScalingLaw().fit(X[order], NOISY[order]).predict(X), m.predict(X), rtol=1e-4)
    given = ScalingLaw(starts=[[6, 6, 0.5, 0.3, 0.3]]).fit(X, NOISY)
    assert given.objective_ == pytest.approx(m.objective_, rel=1e-3)


def test_group_bootstrap_draws_groups_as_a_whole():
    groups = np.arange(60) // 10
    wide, narrow = ScalingLaw().fit(np.repeat(X[:12], 5, 0), np.repeat(NOISY[:12], 5)), None
    narrow, wide = wide.bootstrap(100, groups=None), wide.bootstrap(100, groups=np.repeat(np.arange(12), 5))
    assert np.log(wide.A).std() > 1.2 * np.log(narrow.A).std(), "five copies of each run are no five runs"
    assert len(ScalingLaw().fit(X, NOISY).bootstrap(5, groups=np.where(groups < 3, 0, groups))) == 5  # groups of several sizes


def test_a_number_that_is_not_identified_is_named():
    y = law(*X.T) - HOFFMANN["E"]  # E = 0
    assert "E" in ScalingLaw().fit(X, y).at_bound_ and ScalingLaw().fit(X, Y).at_bound_ == []


@pytest.mark.parametrize("make, text", [
    (lambda: ScalingLaw().fit(X[:5], Y[:5]), "at least 6"),
    (lambda: ScalingLaw().fit(np.stack([np.full(60, 1e8), X[:, 1]], 1), Y), "alpha is not identified"),
    (lambda: ScalingLaw().fit(np.stack([X[:, 0], np.full(60, 1e8)], 1), Y), "beta is not identified"),
    (lambda: ScalingLaw().fit(X, np.where(np.arange(60) == 3, np.inf, Y)), "row 3"),
    (lambda: ScalingLaw().fit(X, -Y), "positive and finite"),
    (lambda: ScalingLaw().fit(X * [0, 1], Y), "N = 0"),
    (lambda: ScalingLaw().fit(X * [1, np.nan], Y), "D = nan"),
    (lambda: ScalingLaw().fit(X[:, :1], Y), "shape"), (lambda: ScalingLaw().fit(X, Y[:-1]), "y has shape"),
    (lambda: ScalingLaw(delta=0).fit(X, Y), "delta is 0"), (lambda: ScalingLaw(starts=[[1, 2]]).fit(X, Y), "starts"),
    (lambda: ScalingLaw().fit(X, Y).optimal(-1), "compute is -1"), (lambda: ScalingLaw().fit(X, Y).bootstrap(0), "n is 0"),
    (lambda: ScalingLaw().fit(X, Y).bootstrap(3, groups=[1, 2]), "groups"), (lambda: ScalingLaw().fit(X, Y).bootstrap(3, groups=[1] * 60), "single label"),
])
def test_wrong_input_of_the_law(make, text):
    with pytest.raises(ValueError, match=text): make()


# schedules

@settings(max_examples=60, deadline=None)
@given(st.floats(0, 0.95), st.floats(0, 1), st.floats(0, 1), st.sampled_from(["geometric", "cubic", "linear"]))
def test_compute_is_that_of_the_dense_model(sparsity, one, two, ramp):
    a, b = sorted((one, two))
    fine = SparsitySchedule(sparsity, a, b, base_steps=10_000, ramp=ramp, rounds=max(int((b - a) * 9_000), 1))
    assert fine.compute == pytest.approx(10_000, rel=2e-3)


@pytest.mark.parametrize("a, b", [(0.3, 0.3), (0, 0), (1, 1), (0, 1), (0.25, 0.75)])
def test_density_step_by_step(a, b):
    s = SparsitySchedule(0.8, a, b, base_steps=400, rounds=50)
    stairs = [s.density(t) for t in range(s.total_steps)]
    assert np.allclose(stairs, s.densities(), rtol=1e-12) and all(x >= y for x, y in zip(stairs, stairs[1:]))
    assert s.average_density == pytest.approx(np.mean(stairs)) and s.compute == pytest.approx(400, rel=2e-2)
    assert s.density(s.total_steps) == pytest.approx(0.2) and s.density(0) == (1.0 if a else pytest.approx(0.2 if b == 0 else 0.2**(1 / 50)))
    assert all(d == 1 for d in stairs[:s.start_step]) and all(d == pytest.approx(0.2) for d in stairs[s.end_step:])


def test_rounds_of_a_geometric_ramp_take_equal_shares():
    s = SparsitySchedule(0.8, base_steps=1000, rounds=10)
    levels = [s.density(t) for t in s.round_steps]
    np.testing.assert_allclose(np.diff(np.log([1, *levels])), math.log(0.2) / 10)
    assert SparsitySchedule(0, base_steps=100, rounds=10).total_steps == 100


@pytest.mark.parametrize("sparsity, steps, end, average", [(0.2, 11_200, None, None), (0.4, 13_050, 8_875, 0.7651), (0.6, 16_375, None, None), (0.8, 25_050, 12_600, 0.3984)])
def test_published_schedules_of_one_billion_parameters(sparsity, steps, end, average):
    s = SparsitySchedule(sparsity, base_steps=10_000)
    assert s.total_steps == pytest.approx(steps, rel=1e-3) and s.start_step == 2_500
    if end: assert s.end_step == pytest.approx(end, rel=5e-3) and s.average_density == pytest.approx(average, abs=1e-3)


@pytest.mark.parametrize("arguments, text", [
    (dict(start=0.5, end=0.4), "end is 0.4"), (dict(start=-0.1), "start is -0.1"), (dict(end=1.1), "end is 1.1"), (dict(final_sparsity=1.0), "final_sparsity is 1.0"),
    (dict(final_sparsity=-0.1), "final_sparsity"), (dict(rounds=1000), "rounds is 1000"), (dict(rounds=0), "rounds is 0"), (dict(base_steps=0), "base_steps is 0"),
    (dict(base_steps=1.5), "base_steps is 1.5"), (dict(ramp="sine"), "ramp is 'sine'"), (dict(start=float("nan")), "start is nan")])
def test_wrong_schedules(arguments, text):
    with pytest.raises(ValueError, match=text): SparsitySchedule(**{**dict(final_sparsity=0.8, base_steps=100), **arguments})


def test_average_parameters():
    assert average_parameters([(100, 3), (25, 1)]) == pytest.approx(81.25) == average_parameters([100, 100, 100, 25])
    assert average_parameters([(4, 1), (9, 1)], 0) == pytest.approx(6) and average_parameters([(2, 1), (6, 1)], -1) == pytest.approx(3)
    assert average_parameters([(1e12, 2), (1e11, 1)], 40) < 1e12  # no overflow
    for wrong in ([], [(1, 2, 3)], [0, 1], [(5, 0)], [np.nan]):
        with pytest.raises(ValueError, match="history"): average_parameters(wrong)


# masks

def network(seed=0): return mlp([12, 20, 16, 4], seed=seed)


@pytest.mark.parametrize("scope", ["uniform", "global"])
@pytest.mark.parametrize("density", [1.0, 0.73, 0.5, 0.1, 0.0])
def test_masks_equal_those_of_torch(scope, density):
    ours, theirs = network(), network()
    masks = Masks(ours)
    removed = masks.prune(density, scope)
    if scope == "global": torch_prune.global_unstructured([(m, "weight") for m in prunable_layers(theirs).values()], torch_prune.L1Unstructured, amount=1 - density)
    else:
        for m in prunable_layers(theirs).values(): torch_prune.l1_unstructured(m, "weight", amount=1 - density)
    for name, layer in prunable_layers(theirs).items():
        assert torch.equal(masks[name], layer.weight_mask.bool() if hasattr(layer, "weight_mask") else torch.ones_like(layer.weight).bool())
        assert torch.equal(ours.get_submodule(name).weight, layer.weight)
    assert removed == masks.n_total - masks.n_active


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from([0.0, 1.0, 2.0, 3.5, -1.0]), min_size=1, max_size=30), st.data())
def test_largest_keeps_exactly_the_largest(values, data):
    scores, keep = torch.tensor(values), data.draw(st.integers(0, len(values)))
    mask = largest(scores, keep)
    assert mask.sum() == keep
    if 0 < keep < len(values): assert scores[mask].min() >= scores[~mask].max()


def test_targets():
    model = llama(16, 1, heads=2)
    assert len(prunable_layers(model)) == 7 and model.lm_head.weight is model.model.embed_tokens.weight
    assert len(prunable_layers(llama(16, 1, heads=2, tied=False))) == 7
    assert not any("classifier" in n or "patch" in n for n in prunable_layers(vit(16, 1)))
    assert list(Masks(model, lambda n, m: "mlp" in n).layers) == [n for n in prunable_layers(model) if "mlp" in n]
    shared = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)}); shared["b"].weight = shared["a"].weight
    assert list(prunable_layers(shared)) == ["a"]
    from transformers import GPT2Config, GPT2LMHeadModel
    gpt2 = prunable_layers(GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=11, n_positions=8)))
    assert [n.rsplit(".", 1)[-1] for n in gpt2] == ["c_attn", "c_proj", "c_fc", "c_proj"]


@pytest.mark.parametrize("make, text", [
    (lambda: Masks(nn.LayerNorm(3)), "no layer to prune"), (lambda: Masks(network(), ["9"]), "targets names '9'"), (lambda: Masks(network(), ["1"]), "without a weight"),
    (lambda: Masks(network()).prune(1.5), "density is 1.5"), (lambda: Masks(network()).prune(0.5, "row"), "scope is 'row'"),
    (lambda: Masks(network()).prune(0.5, scores={}), "scores"), (lambda: GradualMagnitudePruner(nn.LayerNorm(3), SparsitySchedule(0.5, base_steps=200)), "no layer to prune"),
    (lambda: GradualMagnitudePruner(network(), SparsitySchedule(0.5, base_steps=200), scope="row"), "scope is 'row'")])
def test_wrong_masks(make, text):
    with pytest.raises(ValueError, match=text): make()


def test_weights_that_are_no_numbers_are_refused():
    model = network(); model[0].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"): Masks(model).prune(0.5)


def test_masks_that_would_not_last_are_refused():
    tied, normed, pruned = network(), network(), network()
    tied[2].weight = tied[0].weight = nn.Parameter(torch.randn(12, 12))
    with pytest.raises(ValueError, match="'0' and '2', which share one weight"): Masks(tied, ["0", "2"])
    nn.utils.parametrizations.weight_norm(normed[0]); nn.utils.prune.l1_unstructured(pruned[0], "weight", 0.5)
    for net in (normed, pruned):
        with pytest.raises(ValueError, match="layer '0' has a weight that is computed"): Masks(net)
        assert list(Masks(net, ["2"]).layers) == ["2"]
    sharded = network(); sharded[0].weight = nn.Parameter(sharded[0].weight.detach().as_subclass(type("DTensor", (torch.Tensor,), {})))
    with pytest.raises(ValueError, match="layer '0' is sharded"): Masks(sharded)
    for density in (True, "0.5", None):
        with pytest.raises(TypeError, match=f"density is {density!r}"): Masks(network()).prune(density)


def test_masks_travel_in_one_bit_a_weight_and_refuse_others():
    masks = Masks(network()); masks.prune(0.3)
    state = masks.state_dict()
    assert all(s.dtype == torch.uint8 and s.numel() == math.ceil(w.numel() / 8) for s, w in zip(state.values(), masks.weights))
    other = Masks(network(1)); other.load_state_dict(state)
    assert all(torch.equal(masks[n], other[n]) for n in masks.layers) and other.n_active == masks.n_active
    with pytest.raises(ValueError, match="state holds"): Masks(mlp([5, 5])).load_state_dict(state)
    other.clear(); assert other.density == 1


def test_masks_follow_the_dtype_of_the_weights():
    model = network(); masks = Masks(model); masks.prune(0.5)
    model.to(torch.bfloat16); before = masks.n_active
    with torch.no_grad(): [w.fill_(1) for w in masks.weights]
    masks.project()
    assert sum(int((w != 0).sum()) for w in masks.weights) == before and masks.weights[0].dtype == torch.bfloat16


def test_random_masks_depend_on_their_seed_alone():
    a, b, c = (Masks(network(s)) for s in (0, 1, 2))
    state = torch.get_rng_state()
    a.prune_randomly(0.4, seed=5); b.prune_randomly(0.4, seed=5); c.prune_randomly(0.4, seed=6)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a[n], b[n]) for n in a.layers) and any(not torch.equal(a[n], c[n]) for n in a.layers) and a.density == pytest.approx(0.4, abs=0.01)


# the pruner

def tokens(step): return torch.randint(0, 512, (4, 16), generator=torch.Generator().manual_seed(step))


OPTIMIZERS = {"adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1), "fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
              "momentum": lambda p: torch.optim.SGD(p, lr=1e-1, momentum=0.9, nesterov=True), "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9, centered=True)}


@pytest.mark.parametrize("scope", ["uniform", "global"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_pruned_weights_are_exactly_zero_after_every_update(name, scope):
    model = llama(16, 1, heads=2)
    s = SparsitySchedule(0.8, base_steps=12, rounds=5)
    pruner, opt = GradualMagnitudePruner(model, s, scope=scope), OPTIMIZERS[name](model.parameters())
    gone = {n: torch.zeros_like(w).bool() for n, w in zip(pruner.masks.layers, pruner.masks.weights)}
    for t in range(1, s.total_steps + 1):
        opt.zero_grad(); lm_loss(model, tokens(t)).backward(); pruner.after_backward(); opt.step(); pruner.after_step(opt)
        for n, w in zip(pruner.masks.layers, pruner.masks.weights):
            now = ~pruner.masks[n]
            assert (now | ~gone[n]).all() and (w[now] == 0).all(), "masks only shrink and hold"
            assert all((v[now] == 0).all() for v in opt.state[w].values() if isinstance(v, torch.Tensor) and v.shape == w.shape)
            gone[n] = now
        assert pruner.masks.density == pytest.approx(s.density(t), abs=5e-3)
    assert pruner.n_average == pytest.approx(s.average_density * pruner.masks.n_total, rel=1e-2) and sum(h[1] for h in pruner.history) == s.total_steps
    assert (model.lm_head.weight != 0).all()


def train(sparsity=None, steps=None, base=16, **options):
    model = llama(16, 1, heads=2, seed=3)
    pruner = sparsity is not None and GradualMagnitudePruner(model, SparsitySchedule(sparsity, base_steps=base, rounds=5))
    opt = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    fit(model, lm_loss, tokens, opt, steps or pruner.schedule.total_steps, clip=1.0, device="cpu", **{**(pruner.hooks() if pruner else {}), **options})
    return model, pruner


def test_sparsity_zero_is_dense_training_bit_for_bit():
    (sparse, pruner), (dense, _) = train(0.0), train(steps=16)
    assert pruner.history == [[pruner.masks.n_total, 16]]
    assert all(torch.equal(a, b) for a, b in zip(sparse.parameters(), dense.parameters()))


def test_an_interrupted_run_resumes_on_the_same_bits_and_refuses_another_schedule(tmp_path):
    whole, reference = train(0.8)
    class Stop(Exception): pass
    def stop(model, step):
        if step == 14: raise Stop
    model = llama(16, 1, heads=2, seed=3)
    pruner = GradualMagnitudePruner(model, reference.schedule)
    opt = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    def after_backward(*at): stop(*at); pruner.after_backward()
    with pytest.raises(Stop): fit(model, lm_loss, tokens, opt, reference.schedule.total_steps, clip=1.0, device="cpu", save_to=tmp_path, save_every=6, **{**pruner.hooks(), "after_backward": after_backward})
    assert 0 < pruner.masks.density < 1
    resumed, again = train(0.8, save_to=tmp_path, save_every=6, resume=True)
    assert again.history == reference.history and again.updates == reference.updates
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), whole.parameters()))


def test_state_of_another_schedule_scope_or_model_changes_nothing():
    _, done = train(0.8)
    for other in (GradualMagnitudePruner(llama(16, 1, heads=2), SparsitySchedule(0.6, base_steps=16, rounds=5)), GradualMagnitudePruner(llama(16, 1, heads=2), done.schedule, scope="global"),
                  GradualMagnitudePruner(llama(24, 1, heads=3), done.schedule)):
        with pytest.raises(ValueError, match="state"): other.load_state_dict(done.state_dict())
        assert other.masks.density == 1 and other.updates == 0
    twin = GradualMagnitudePruner(llama(16, 1, heads=2), done.schedule); twin.load_state_dict(copy.deepcopy(done.state_dict()))
    assert twin.n_active == done.n_active and twin.n_average == done.n_average


def test_pruning_at_the_very_start_and_once():
    model = llama(16, 1, heads=2)
    pruner = GradualMagnitudePruner(model, SparsitySchedule(0.5, 0, 0, base_steps=10))
    assert pruner.masks.density == pytest.approx(0.5) and pruner.schedule.total_steps == 20
    once = SparsitySchedule(0.5, 0.4, 0.4, base_steps=10)
    assert once.round_steps == [4] and once.total_steps == 16 and once.compute == pytest.approx(10)


def test_gradients_of_removed_weights_do_not_count_when_clipping():
    model = llama(16, 1, heads=2); pruner = GradualMagnitudePruner(model, SparsitySchedule(0.8, 0, 0, base_steps=10))
    lm_loss(model, tokens(0)).backward()
    before = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    pruner.after_backward()
    assert torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]) < before


@pytest.mark.parametrize("make, error, text", [
    (lambda X, y: ScalingLaw(delta="x").fit(X, y), TypeError, "delta is 'x'"), (lambda X, y: ScalingLaw(delta=True).fit(X, y), TypeError, "delta is True"), (lambda X, y: ScalingLaw(polished=-1).fit(X, y), ValueError, "polished is -1"),
    (lambda X, y: ScalingLaw(polished="a").fit(X, y), ValueError, "polished is 'a'"), (lambda X, y: ScalingLaw().fit(X + 0j, y), TypeError, "complex"), (lambda X, y: ScalingLaw().fit(X, y).optimal("a"), TypeError, "compute is 'a'"),
    (lambda X, y: ScalingLaw().fit(X, y).optimal(True), TypeError, "compute is True")])
def test_scaling_law_names_wrong_types(make, error, text):
    X = np.exp(np.random.default_rng(0).uniform(10, 16, (8, 2)))
    with pytest.raises(error, match=text): make(X, 1.7 + 400 / X[:, 0]**0.34 + 410 / X[:, 1]**0.28)
