"""GBNN against autograd, SciPy, NumPy and scikit-learn's networks; its estimators against scikit-learn's own checks."""
import copy
import pickle
import warnings

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from scipy.optimize import minimize, minimize_scalar
from sklearn.datasets import load_breast_cancer, load_diabetes, load_wine
from sklearn.dummy import DummyClassifier
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV
from sklearn.neural_network import MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks
from torch import nn
from torch.nn import functional as F

from efftrain.optim.gbnn import GBNNClassifier, GBNNRegressor, deep_features, replace_head
from efftrain.optim.gbnn_blocks import ACTIVATIONS, Block, Huber, Logistic, Softmax, SquaredError, fit_block, objective, step_length

FAST = dict(tol=1e-5, random_state=0)
MODULES = {"identity": nn.Identity(), "logistic": nn.Sigmoid(), "tanh": nn.Tanh(), "relu": nn.ReLU()}


def scaled(load):
    x, y = load(return_X_y=True)
    return StandardScaler().fit_transform(x), y


WINE, CANCER, DIABETES = scaled(load_wine), scaled(load_breast_cancer), scaled(load_diabetes)


@parametrize_with_checks([GBNNClassifier(6, 2, tol=1e-4), GBNNRegressor(6, 2, tol=1e-4), GBNNRegressor(10, 2, solver="adam", max_iter=20, batch_size=10, early_stopping=True), GBNNRegressor(3, 2, loss="huber", step="exact", subsample=1.0)])
def test_scikit_learns_checks(estimator, check): check(estimator)


# losses, residuals and steps

def case(kind, seed=0, n=50):
    rng = np.random.default_rng(seed)
    y = {SquaredError: lambda: rng.normal(size=(n, 3)), Huber: lambda: rng.standard_t(2, size=(n, 3)), Logistic: lambda: (rng.random((n, 1)) < 0.3) * 1.0, Softmax: lambda: np.eye(4)[rng.integers(4, size=n)]}[kind]()
    loss = kind()
    loss.start(y)
    return loss, y, 1.3 * rng.normal(size=y.shape), rng.normal(size=y.shape)


def torch_value(loss, y, f):
    y = torch.tensor(y)
    if isinstance(loss, Logistic): return F.binary_cross_entropy_with_logits(f, y, reduction="sum")
    if isinstance(loss, Softmax): return F.cross_entropy(f, y, reduction="sum")
    if isinstance(loss, Huber): return sum(F.huber_loss(f[:, k], y[:, k], reduction="sum", delta=float(d)) for k, d in enumerate(loss.delta))
    return 0.5 * ((f - y) ** 2).sum()


LOSSES = [SquaredError, Huber, Logistic, Softmax]


@pytest.mark.parametrize("kind", LOSSES)
def test_residuals_and_curvature_are_autograds(kind):
    for seed in range(3):
        loss, y, f, h = case(kind, seed)
        t = torch.tensor(f, requires_grad=True)
        (g,) = torch.autograd.grad(torch_value(loss, y, t), t)
        np.testing.assert_allclose(loss.residuals(y, f), -g.numpy(), atol=1e-12)
        along = lambda rho: torch_value(loss, y, torch.tensor(f) + rho * torch.tensor(h))
        bend = torch.autograd.functional.hessian(along, torch.zeros((), dtype=torch.float64)).item()
        assert loss.curvature(y, f, h) == pytest.approx(bend, rel=1e-9)
        assert loss.value(y, f) * len(y) == pytest.approx(along(0.0).item(), rel=1e-12)
        slope = -float((loss.residuals(y, f) * h).sum())
        assert step_length(loss, y, f, h, "newton") == pytest.approx(-slope / bend, rel=1e-9)


def test_the_diagonal_step_is_the_official_formula():
    loss, y, f, h = case(Softmax)
    p = np.exp(f) / np.exp(f).sum(1, keepdims=True)
    assert step_length(loss, y, f, h, "diagonal") == pytest.approx(-np.sum(h * (y - p)) / np.sum(h * h * p * (p - 1)), rel=1e-12)
    loss, y, f, h = case(Logistic)  # the official code has labels of -1 and 1, F as half the log-odds, and residuals twice as large: the change of the log-odds is the same
    s, half = 2 * y - 1, f / 2
    r = 2 * s / (1 + np.exp(2 * s * half))
    official = np.sum(r * 2 * h) / np.sum(r * (2 * h) ** 2 * (2 * s - r))
    assert 2 * official * 2 == pytest.approx(step_length(loss, y, f, h, "diagonal"), rel=1e-9)


@pytest.mark.parametrize("kind", LOSSES)
def test_exact_steps_are_the_minimum(kind):
    for seed in range(5):
        loss, y, f, h = case(kind, seed)
        best = minimize_scalar(lambda rho: loss.value(y, f + rho * h), (-1, 1), tol=1e-12).x
        assert step_length(loss, y, f, h, "exact") == pytest.approx(best, abs=1e-5)
        assert step_length(loss, y, f, -h / 4, "exact") == pytest.approx(-4 * best, abs=1e-4)


def test_steps_that_have_no_minimum_end_at_ten():
    y, f = np.array([[0.0], [1.0]]), np.zeros((2, 1))
    for step in ("newton", "exact"): assert abs(step_length(Logistic(), y, f + 30 * (1 - 2 * y), y - 0.5, step) * 0.5) == pytest.approx(10)
    assert step_length(Logistic(), y, f, y - 0.5, "exact") == 20 and step_length(Logistic(), y, f, 0 * y, "exact") == 0


@pytest.mark.parametrize("kind", LOSSES)
def test_first_constants_minimise_the_loss(kind):
    loss, y, f, _ = case(kind)
    found = minimize(lambda c: loss.value(y, f * 0 + c), np.zeros(y.shape[1]), tol=1e-12).x
    value = lambda c: loss.value(y, f * 0 + c)
    assert value(loss.start(y)) <= value(found) + 1e-12


def test_without_anything_learned_the_priors_remain():
    x, y = WINE
    model = GBNNClassifier(2, **FAST).fit(x, y).truncate(0)
    np.testing.assert_allclose(model.predict_proba(x), DummyClassifier(strategy="prior").fit(x, y).predict_proba(x), rtol=1e-12)
    x, y = DIABETES
    np.testing.assert_allclose(GBNNRegressor(2, **FAST).fit(x, y).truncate(0).predict(x), y.mean(), rtol=1e-12)


# blocks

@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("sparse", [False, True])
def test_block_gradients_are_autograds(activation, sparse):
    rng = np.random.default_rng(0)
    x, r, vector = rng.normal(size=(30, 5)), rng.normal(size=(30, 2)), rng.normal(size=5 * 3 + 3 + 3 * 2 + 2)
    value, grad = objective(vector, sp.csr_matrix(x) if sparse else x, r, 3, activation, 0.2)
    t = torch.tensor(vector, requires_grad=True)
    W, b, V, c = (p.reshape(s) for p, s in zip(t.split([15, 3, 6, 2]), ((5, 3), (3,), (3, 2), (2,))))
    total = (((MODULES[activation](torch.tensor(x) @ W + b) @ V + c - torch.tensor(r)) ** 2).sum() + 0.2 * ((W**2).sum() + (V**2).sum())) / 60
    total.backward()
    np.testing.assert_allclose([value, *grad], [total.item(), *t.grad.numpy()], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_block_goes_the_way_of_scikit_learns_network(activation):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(100, 3))
    y = np.sin(2 * x[:, :1]) * x[:, 1:2] / 0.7
    for seed in range(5):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = MLPRegressor(hidden_layer_sizes=(6,), activation=activation, alpha=0.1, solver="lbfgs", max_iter=15, tol=1e-11, random_state=seed).fit(x, y.ravel())
        block, _ = fit_block(x, y, 6, np.random.RandomState(seed), activation, alpha=0.1, max_iter=15, tol=1e7 * np.finfo(float).eps)
        np.testing.assert_allclose(block.W, theirs.coefs_[0], atol=1e-6)
        np.testing.assert_allclose(block.output(x, activation).ravel(), theirs.predict(x), atol=1e-6)


def test_adam_fits_what_l_bfgs_fits():
    rng = np.random.default_rng(2)
    x = rng.normal(size=(100, 3))
    y = np.tanh(x[:, :1]) + 0.5 * x[:, 1:2]
    y /= y.std()
    block, epochs = fit_block(x, y, 4, np.random.RandomState(0), solver="adam", max_iter=800, tol=1e-7, lr=0.02, batch=25)
    assert epochs <= 800 and np.mean((block.output(x, "logistic") - y) ** 2) < 0.02


# the whole: an independent boosting loop, the torch network, prefixes

@pytest.mark.parametrize("step", ["newton", "diagonal", "exact"])
@pytest.mark.parametrize("classes", [2, 3])
def test_the_model_is_a_plain_boosting_loop(step, classes):
    """The loop of the paper with its own losses and step lengths, given the blocks' shapes of h: the same outputs."""
    x, y = CANCER if classes == 2 else WINE
    model = GBNNClassifier(8, 3, learning_rate=0.4, subsample=0.7, step=step, **FAST).fit(x, y)
    labels = torch.tensor(y)
    f = torch.tensor(np.tile(np.log(np.bincount(y) / len(y)), (len(y), 1)))
    if classes == 2: f = (f[:, 1] - f[:, 0])[:, None]
    for t in range(8):
        part = slice(3 * t, 3 * t + 3)
        w, b, v, c = model.coefs_[0][:, part], model.intercepts_[0][part], model.coefs_[1][part], model.block_intercepts_[t]
        h = torch.tensor((1 / (1 + np.exp(-(x @ w + b)))) @ v + c) / model.steps_[t]  # h_t on the scale of the residuals
        value = lambda rho, f=f, h=h: F.binary_cross_entropy_with_logits((f + rho * h)[:, 0], labels.double(), reduction="sum") if classes == 2 else F.cross_entropy(f + rho * h, labels, reduction="sum")
        zero = torch.zeros((), dtype=torch.float64)
        rho = (-torch.autograd.functional.jacobian(value, zero) / torch.autograd.functional.hessian(value, zero)).item()
        if step == "exact":
            limit = 10 / h.abs().max().item()
            rho = minimize_scalar(lambda a: value(a).item(), bounds=(0, limit), method="bounded", options=dict(xatol=1e-9)).x
        if step == "diagonal" and classes == 3:
            p = f.softmax(1)
            rho = (((F.one_hot(labels, 3) - p) * h).sum() / (p * (1 - p) * h**2).sum()).item()
        assert model.steps_[t] == pytest.approx(0.4 * rho, rel=1e-4), t
        f = f + 0.4 * rho * h
        assert model.train_losses_[t + 1] * len(y) == pytest.approx(value(0.0 * zero, f=f).item(), rel=1e-4)
    np.testing.assert_allclose(model.decision_function(x).reshape(f.shape), f, atol=1e-3 * f.abs().max().item())


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_network_is_the_sum_and_a_prefix_is_its_stage(activation):
    x, y = WINE
    model = GBNNClassifier(10, 3, learning_rate=0.5, activation=activation, **FAST).fit(x, y)
    stages = list(model.staged_predict_proba(x))
    assert len(stages) == model.n_blocks_ == 10 and model.coefs_[0].shape == (13, 30)
    np.testing.assert_allclose(stages[-1], model.predict_proba(x), atol=1e-6)
    for t in (1, 4, 10):
        cut, net = model.truncate(t), model.to_torch(t, dtype=torch.float64)
        assert [type(m) for m in net] == [nn.Linear, type(MODULES[activation]), nn.Linear] and net[0].out_features == 3 * t
        np.testing.assert_allclose(cut.predict_proba(x), stages[t - 1], atol=1e-9)
        np.testing.assert_allclose(net(torch.tensor(x)).softmax(1).detach(), stages[t - 1], atol=1e-9)
        assert (cut.predict(x) == list(model.staged_predict(x))[t - 1]).all()
    np.testing.assert_allclose(model.to_torch()(torch.tensor(x, dtype=torch.float32)).softmax(1).detach(), stages[-1], atol=1e-4)
    assert model.n_blocks_ == 10 and cut.truncate(3).n_blocks_ == 3  # a copy of a copy


def test_regression_networks_and_stages_for_several_targets():
    x, y = DIABETES
    both = np.c_[y, -2 * y + 10 * x[:, 0]]
    model = GBNNRegressor(8, 2, learning_rate=0.3, **FAST).fit(x, both)
    assert model.predict(x).shape == both.shape and model.intercepts_[1].shape == (2,)
    stages = list(model.staged_predict(x))
    np.testing.assert_allclose(model.to_torch(dtype=torch.float64)(torch.tensor(x)).detach(), stages[-1], rtol=1e-9, atol=1e-6)
    np.testing.assert_allclose(model.truncate(3).predict(x), stages[2], rtol=1e-9, atol=1e-6)
    assert GBNNRegressor(2, **FAST).fit(x, y).predict(x).shape == y.shape


def test_exact_steps_never_raise_the_training_loss():
    for kind, (x, y), options in ((GBNNClassifier, WINE, {}), (GBNNClassifier, CANCER, {}), (GBNNRegressor, DIABETES, {}), (GBNNRegressor, DIABETES, dict(loss="huber"))):
        for rate in (1.0, 0.3): assert (np.diff(kind(20, 1, step="exact", learning_rate=rate, subsample=0.5, **FAST, **options).fit(x, y).train_losses_) <= 1e-12).all()


def test_linear_boosting_is_least_squares():
    x, y = DIABETES
    model = GBNNRegressor(80, 1, learning_rate=0.5, subsample=1.0, activation="identity", alpha=0.0, tol=1e-13, random_state=0).fit(x, y)
    ones = np.c_[np.ones(len(x)), x]
    np.testing.assert_allclose(model.predict(x), ones @ np.linalg.lstsq(ones, y)[0], atol=1e-3 * y.std())


def test_one_large_block_is_a_plain_network():
    x, y = DIABETES
    model = GBNNRegressor(1, 20, subsample=1.0, alpha=1e-4, random_state=0).fit(x, y)
    assert model.steps_[0] == pytest.approx(1, abs=2e-2)
    errors = []
    for seed in range(3):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            net = MLPRegressor(hidden_layer_sizes=(20,), activation="logistic", solver="lbfgs", max_iter=200, random_state=seed).fit(x, (y - y.mean()) / y.std())
        errors.append(np.mean((net.predict(x) * y.std() + y.mean() - y) ** 2))
    assert np.mean((model.predict(x) - y) ** 2) < 1.3 * np.mean(errors)


def test_the_scale_of_the_target_does_not_matter():
    x, y = DIABETES
    a, b = (GBNNRegressor(5, 2, **FAST).fit(x, y * s).predict(x) for s in (1.0, 2.0**20))  # a power of two: no rounding, which long runs of L-BFGS amplify
    np.testing.assert_allclose(a * 2.0**20, b, rtol=1e-12)


def test_huber_withstands_outliers():
    x, y = DIABETES
    rng = np.random.default_rng(0)
    spoiled = y + 5000 * (rng.random(len(y)) < 0.05)
    error = {loss: np.median(np.abs(GBNNRegressor(15, 1, learning_rate=0.3, loss=loss, **FAST).fit(x, spoiled).predict(x) - y)) for loss in ("squared_error", "huber")}
    assert error["huber"] < 0.5 * error["squared_error"]


# use

def test_it_learns():
    for model, (x, y), least in ((GBNNClassifier(30, 1, learning_rate=0.5, **FAST), CANCER, 0.95), (GBNNClassifier(30, 1, learning_rate=0.5, **FAST), WINE, 0.95), (GBNNRegressor(30, 1, learning_rate=0.1, **FAST), DIABETES, 0.4)):
        train = np.arange(len(y)) % 3 > 0
        assert model.fit(x[train], y[train]).score(x[~train], y[~train]) > least


def test_text_labels_sparse_input_and_a_search():
    x, y = WINE
    names = np.array(["barolo", "grignolino", "barbera"])[y]
    search = GridSearchCV(make_pipeline(StandardScaler(), GBNNClassifier(8, **FAST)), {"gbnnclassifier__block_size": [1, 3]}, cv=3).fit(x, names)
    assert search.score(x, names) > 0.95 and set(search.predict(x)) == set(names)
    dense, sparse = (GBNNClassifier(5, 2, max_iter=8, **FAST).fit(m, names) for m in (x, sp.csr_matrix(x)))  # few iterations, before rounding is amplified
    np.testing.assert_allclose(dense.predict_proba(x), sparse.predict_proba(sp.csr_matrix(x)), atol=1e-6)
    assert sparse.score(x, np.where(y == 0, "unseen", names)) == pytest.approx(np.mean((sparse.predict(x) == names) & (y != 0)))  # a label never seen is simply never right


def test_early_stopping_keeps_the_best_prefix():
    x, y = DIABETES
    model = GBNNRegressor(100, 5, early_stopping=True, validation_fraction=0.3, n_iter_no_change=4, **FAST).fit(x, y)
    best = int(np.argmin(model.validation_losses_))
    assert model.n_blocks_ == best < 96 and len(model.validation_losses_) == best + 5 and model.coefs_[0].shape[1] == 5 * best


def test_nothing_to_fit():
    x, _ = DIABETES
    model = GBNNRegressor(5, **FAST).fit(x, np.full(len(x), 3.0))
    assert model.n_blocks_ == 0 and (model.predict(x) == 3).all() and list(model.staged_predict(x)) == []
    assert (model.to_torch()(torch.zeros(2, x.shape[1])) == 3).all()


def test_seeds_copies_and_pickles():
    x, y = WINE
    a, b, c = (GBNNClassifier(4, 2, tol=1e-5, random_state=s).fit(x, y).predict_proba(x) for s in (0, 0, 1))
    assert np.array_equal(a, b) and not np.array_equal(a, c)
    model = GBNNClassifier(4, 2, **FAST).fit(x, y)
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)): assert np.array_equal(other.predict_proba(x), a)


# deep features

class Deep(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten())
        self.out = nn.Linear(144, 3)

    def forward(self, x): return self.out(self.body(x))


def test_a_head_on_a_deep_network():
    torch.manual_seed(0)
    net, x = Deep(), torch.randn(90, 1, 8, 8)
    features = deep_features(net, x, batch_size=40)
    assert features.shape == (90, 144) and net.training and net.body.training
    net.eval()
    np.testing.assert_allclose(features, net.body(x).detach().double(), atol=1e-6)
    y = np.arange(90) % 3
    model = GBNNClassifier(5, 2, **FAST).fit(features, y)
    whole = replace_head(net, model.to_torch())
    np.testing.assert_allclose(whole(x).softmax(1).detach(), model.predict_proba(features), atol=1e-4)
    assert isinstance(net.out, nn.Linear) and isinstance(whole.out, nn.Sequential)
    F.cross_entropy(whole(x), torch.tensor(y)).backward()
    assert all(p.grad is not None for p in whole.parameters())
    assert replace_head(net.to(torch.bfloat16), model.to_torch()).out[0].weight.dtype == torch.bfloat16
    assert isinstance(replace_head(Deep(), nn.Linear(144, 7), "out").out, nn.Linear)


def test_wrong_networks_are_refused_by_name():
    net = Deep()
    for call, text in ((lambda: deep_features("net", torch.zeros(1)), "model is str"), (lambda: deep_features(nn.ReLU(), torch.zeros(1)), "no nn.Linear"), (lambda: deep_features(net, torch.zeros(1, 1, 8, 8), "head"), "layer is 'head'.*'out'"),
                       (lambda: deep_features(net, torch.zeros(1, 1, 8, 8), batch_size=0), "batch_size is 0"), (lambda: replace_head(net, nn.Linear(3, 3)), "head takes 3 features.*takes 144")):
        with pytest.raises((ValueError, TypeError), match=text): call()
    net.spare = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="does not call it"): deep_features(net, torch.zeros(1, 1, 8, 8), "spare")


# wrong input

@pytest.mark.parametrize("options, text", [
    (dict(n_blocks=0), "n_blocks is 0"), (dict(n_blocks=2.0), "n_blocks is 2.0"), (dict(n_blocks=True), "n_blocks is True"), (dict(block_size=0), "block_size is 0"), (dict(learning_rate=0), "learning_rate is 0"),
    (dict(learning_rate=float("inf")), "learning_rate is inf"), (dict(subsample=0), "subsample is 0"), (dict(subsample=1.1), "subsample is 1.1.*at most 1"), (dict(loss="poisson"), "loss is 'poisson'.*allowed"),
    (dict(step="wolfe"), "step is 'wolfe'.*'newton', 'diagonal', 'exact'"), (dict(activation="gelu"), "activation is 'gelu'"), (dict(solver="sgd"), "solver is 'sgd'.*'lbfgs', 'adam'"), (dict(alpha=-1e-9), "alpha is -1e-09"),
    (dict(max_iter=0), "max_iter is 0"), (dict(tol=float("nan")), "tol is nan"), (dict(learning_rate_init="fast"), "learning_rate_init is 'fast'"), (dict(batch_size=0), "batch_size is 0"), (dict(early_stopping=None), "early_stopping is None"),
    (dict(validation_fraction=1.0), "validation_fraction is 1.0"), (dict(n_iter_no_change=0), "n_iter_no_change is 0")])
@pytest.mark.parametrize("kind", [GBNNClassifier, GBNNRegressor])
def test_wrong_settings_are_refused_by_name(kind, options, text):
    with pytest.raises((ValueError, TypeError), match=text): kind(**options).fit(*WINE)


def test_wrong_data_and_prefixes_are_refused():
    x, y = WINE
    with pytest.raises(ValueError, match="one class"): GBNNClassifier(2).fit(x, np.ones(len(y)))
    with pytest.raises(ValueError, match="NaN"): GBNNClassifier(2).fit(np.where(x == x[0, 0], np.nan, x), y)
    with pytest.raises(ValueError, match="Unknown label type"): GBNNClassifier(2).fit(x, x[:, 0])
    with pytest.raises(NotFittedError): GBNNClassifier(2).truncate(1)
    model = GBNNClassifier(3, **FAST).fit(x, y)
    with pytest.raises(ValueError, match="features"): model.predict(x[:, 1:])
    for call in (model.truncate, model.to_torch):
        for wrong in (4, -1, 1.0, True):
            with pytest.raises((ValueError, TypeError), match="n_blocks is"): call(wrong)
