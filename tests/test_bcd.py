"""Block coordinate descent against scikit-learn, NumPy, SciPy and brute force; its estimators against scikit-learn's own checks."""
import itertools

import numpy as np
import pytest
import scipy.sparse as sp
from scipy.sparse.linalg import spsolve
from sklearn.linear_model import Lasso, LogisticRegression
from sklearn.utils.estimator_checks import parametrize_with_checks

from efftrain.optim import bcd_rules
from efftrain.optim.bcd import (L1, PARTITIONS, SELECTIONS, UPDATES, BCDLasso, BCDLogisticRegression, Box, LabelPropagation, LeastSquares, Logistic, Quadratic, Softmax,
                                block_coordinate_descent, duality_gap)
from efftrain.optim.bcd_base import Parts, check_problem
from efftrain.optim.bcd_graphs import ForestGrower, ForestSolver, is_forest, red_black, tree_partition


def data(rows=40, n=30, seed=0, density=1.0):
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(rows, n)) * np.exp(rng.normal(size=n)) * (rng.random((rows, n)) < density)
    return a, a @ (rng.normal(size=n) * (rng.random(n) < 0.3)) + 0.1 * rng.normal(size=rows)


def lattice(side=9, seed=0):
    path = sp.diags([1.0, 1.0], [-1, 1], shape=(side, side))
    labels = np.full(side**2, np.nan)
    labels[np.random.default_rng(seed).permutation(side**2)[:6]] = np.arange(6)
    return LabelPropagation(sp.csr_matrix(sp.kronsum(path, path)), labels)


A, b = data()
PROBLEMS = {"least squares": LeastSquares(A, b, l2=0.1), "sparse least squares": LeastSquares(sp.csc_matrix(data(density=0.2)[0]), b, l2=0.1), "logistic": Logistic(A, b > 0, l2=0.1),
            "softmax": Softmax(A[:, :10], np.digitize(b, [-1, 1]), l2=0.1), "quadratic": Quadratic(A.T @ A + np.eye(30), A.T @ b), "labels": lattice()}


# the problems themselves

@pytest.mark.parametrize("name", PROBLEMS)
def test_gradients_curvatures_bounds_and_maintained_state(name):
    for seed in range(3): check_problem(PROBLEMS[name], seed)


# solutions

def test_least_squares_is_numpys():
    r = block_coordinate_descent(LeastSquares(A, b), block_size=5, tol=1e-14, max_iter=5000)
    np.testing.assert_allclose(r.x, np.linalg.lstsq(A, b)[0], atol=1e-8)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("positive", [False, True])
def test_lasso_is_scikit_learns(sparse, positive):
    x, y = data(60, 80, seed=1, density=0.5)
    x = sp.csc_matrix(x) if sparse else x
    ours, theirs = BCDLasso(0.05, positive=positive, tol=1e-13).fit(x, y), Lasso(0.05, positive=positive, tol=1e-13, max_iter=100_000).fit(x, y)
    np.testing.assert_allclose(ours.coef_, theirs.coef_, atol=1e-8)
    assert abs(ours.intercept_ - theirs.intercept_) < 1e-8 and abs(ours.dual_gap_ - theirs.dual_gap_) < 1e-9


@pytest.mark.parametrize("classes", [2, 4])
def test_logistic_regression_is_scikit_learns(classes):
    x, y = data(80, 12, seed=2)
    y = np.digitize(y, np.quantile(y, np.arange(1, classes) / classes))
    ours, theirs = BCDLogisticRegression(C=0.5, tol=1e-12).fit(x, y), LogisticRegression(C=0.5, tol=1e-12, max_iter=10_000, solver="newton-cg").fit(x, y)
    np.testing.assert_allclose(ours.coef_, theirs.coef_, atol=1e-7)
    np.testing.assert_allclose(ours.predict_proba(x), theirs.predict_proba(x), atol=1e-7)


def test_bounds_are_scipys():
    from scipy.optimize import lsq_linear
    r = block_coordinate_descent(Box(LeastSquares(A, b), -0.2, 0.3), block_size=5, tol=1e-13, max_iter=5000)
    np.testing.assert_allclose(r.x, lsq_linear(A, b, (-0.2, 0.3), tol=1e-14).x, atol=1e-7)
    assert np.array_equal(r.active, (r.x <= -0.2) | (r.x >= 0.3))


def test_labels_on_a_graph_are_the_linear_systems():
    p = lattice()
    r = block_coordinate_descent(p, partition="forest", selection="gs", tol=1e-13, max_iter=5000)
    np.testing.assert_allclose(r.x, spsolve(sp.csc_matrix(p.graph()), p.b), atol=1e-8)


# every combination

COMBINATIONS = [(p, s, u) for p in PARTITIONS for s in SELECTIONS for u in UPDATES if not s.startswith("gs-") and u != "tmp"
                and not (p == "forest" and s in ("cyclic", "permutation", "lipschitz", "gsq")) and (u == "message") == (p in ("red-black", "trees", "forest"))]


@pytest.mark.parametrize("partition", PARTITIONS)
def test_every_rule_decreases_the_value_every_time_and_heads_for_the_minimum(partition):
    p = lattice(6)
    least = 0.5 * p.b @ -spsolve(sp.csc_matrix(p.graph()), p.b) + p.constant
    for _, selection, update in (c for c in COMBINATIONS if c[0] == partition):
        r = block_coordinate_descent(p, partition=partition, selection=selection, update=update, block_size=4, max_iter=400, random_state=0)
        value = r.history.value.to_numpy()
        assert (np.diff(value) <= 1e-12 * abs(value[0])).all(), (partition, selection, update)
        assert value[-1] - least < 0.2 * (value[0] - least) and value[-1] > least - 1e-9, (partition, selection, update)


@pytest.mark.parametrize("name", ["least squares", "logistic", "softmax"])
@pytest.mark.parametrize("update", ["gradient", "line-search", "matrix", "newton", "exact", "tmp"])
def test_every_update_handles_l1_and_never_rises(name, update):
    p = L1(PROBLEMS[name], 0.3)
    values = [block_coordinate_descent(p, selection=s, update=update, block_size=6, max_iter=300, random_state=1).history.value.to_numpy() for s in ("random", "cyclic", "gs-s", "gs-r", "gs-q")]
    best = block_coordinate_descent(p, update="tmp", block_size=p.n, max_iter=300, tol=1e-12).value
    for v in values: assert (np.diff(v) <= 1e-11 * abs(v[0])).all() and best - 1e-9 < v[-1] < best + 0.2 * (v[0] - best)


# greedy rules against brute force

@pytest.mark.parametrize("rule", ["gs", "gsl", "gsd", "gsdhb", "gsq"])
@pytest.mark.parametrize("partition", ["order", "variable"])
def test_greedy_rules_choose_what_brute_force_chooses(rule, partition):
    rng, n, k = np.random.default_rng(3), 10, 3
    a = rng.normal(size=(20, n)) * np.exp(rng.normal(size=n))
    p = LeastSquares(a, rng.normal(size=20))
    selector = bcd_rules.Selector(Parts.of(p), partition, rule, k, np.random.default_rng(0))
    blocks = selector.blocks if partition == "order" else [np.array(c) for c in itertools.combinations(range(n), k)]
    h, good = a.T @ a, 0
    for trial in range(12):
        state = p.start(rng.normal(size=n))
        g = p.gradient(state)
        score = {"gs": lambda i: (g[i] ** 2).sum(), "gsl": lambda i: (g[i] ** 2).sum() / np.linalg.eigvalsh(h[np.ix_(i, i)])[-1] if partition == "order" else (g[i] ** 2 / h.diagonal()[i]).sum(),
                 "gsd": lambda i: (g[i] ** 2 / h.diagonal()[i]).sum() / (len(i) if partition == "order" else 1), "gsdhb": lambda i: (g[i] ** 2 / selector.row_sums[i]).sum(), "gsq": lambda i: g[i] @ np.linalg.solve(h[np.ix_(i, i)], g[i])}[rule]
        best, chosen = max(blocks, key=score), selector.next(state)[0]
        if rule == "gsq" and partition == "variable":  # the best of all subsets is hard; the approximation must be near, and at least as good as the diagonal rule
            assert score(chosen) >= 0.5 * score(best) and score(chosen) >= score(np.sort(np.argsort(-(g**2 / h.diagonal()))[:k])) - 1e-12
            good += score(chosen) >= 0.95 * score(best)
        else: assert np.array_equal(chosen, best), (chosen, best)
    assert rule != "gsq" or partition == "order" or good >= 6


def test_row_sums_of_gsdhb_dominate_the_hessian():
    p = PROBLEMS["least squares"]
    assert np.linalg.eigvalsh(np.diag(p.row_sums) - p.bound(np.arange(p.n))).min() > -1e-9


def test_single_variables_are_gauss_southwell():
    p = LeastSquares(A, b)
    r = block_coordinate_descent(p, selection="gs", update="exact", block_size=1, max_iter=200, tol=0)
    x = np.zeros(30)
    for _ in range(200):
        g = A.T @ (A @ x - b); i = np.argmax(np.abs(g))
        x[i] -= g[i] / (A[:, i] @ A[:, i])
    np.testing.assert_allclose(r.x, x, rtol=1e-9, atol=1e-12)


# message passing

@pytest.mark.parametrize("seed", range(4))
def test_forest_solver_is_a_sparse_solve(seed):
    rng, n = np.random.default_rng(seed), 300
    parent = np.array([rng.integers(max(0, i - 20), i) for i in range(1, n)])
    keep = rng.random(n - 1) < 0.9
    w = sp.coo_matrix((-rng.random(keep.sum()), (np.arange(1, n)[keep], parent[keep])), (n, n)).tocsr(); w = w + w.T
    h, right = w + sp.diags(np.asarray(abs(w).sum(1)).ravel() + 0.1), rng.normal(size=n)
    shuffle = rng.permutation(n); h, right = sp.csr_matrix(h)[shuffle][:, shuffle], right[shuffle]
    solver = ForestSolver(h)
    np.testing.assert_allclose(solver.solve(right), spsolve(sp.csc_matrix(h), right), rtol=1e-10)
    np.testing.assert_allclose(solver.solve(2 * right), 2 * solver.solve(right), rtol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_partitions_of_graphs_cover_once_and_have_no_cycles(seed):
    rng, n = np.random.default_rng(seed), 60
    g = sp.random(n, n, 0.06, random_state=rng); g = g + g.T
    for blocks, allowed in ((red_black(g), lambda sub: sub.nnz == 0), (tree_partition(g), is_forest)):
        assert np.array_equal(np.sort(np.concatenate(blocks)), np.arange(n))
        for block in blocks:
            sub = sp.csr_matrix(g)[block][:, block]; sub.setdiag(0); sub.eliminate_zeros()
            assert allowed(sub)
    order = rng.permutation(n)
    grown = ForestGrower(g).grow(order)
    assert is_forest(sp.csr_matrix(g)[grown][:, grown]) and order[0] in grown
    for i in set(range(n)) - set(grown): assert not is_forest(sp.csr_matrix(g)[np.r_[grown, i]][:, np.r_[grown, i]]), "the forest could have grown"


def test_what_is_no_forest_is_refused():
    with pytest.raises(ValueError, match="no forest"): ForestSolver(np.array([[2.0, 1, 1], [1, 2, 1], [1, 1, 2]]))
    with pytest.raises(ValueError, match="not positive definite"): ForestSolver(np.array([[1.0, 2], [2, 1]]))


# active sets

def test_support_is_found_and_then_convergence_is_superlinear():
    x, y = data(100, 60, seed=5)
    p = L1(LeastSquares(x, y), 20.0)
    best = block_coordinate_descent(p, block_size=60, tol=1e-14).value
    r = block_coordinate_descent(p, block_size=40, tol=1e-13, max_iter=200)
    gap = (r.history.value - best).to_numpy() / (r.history.value.iloc[0] - best)
    assert r.converged and r.identified < r.iterations and np.array_equal(~r.active, r.x != 0) and 0 < (~r.active).sum() < 40
    above = gap[gap > 1e-13]
    assert above[-1] / above[-2] < 0.1


def test_duality_gap_bounds_the_error():
    x, y = data(50, 40, seed=6)
    p = L1(LeastSquares(x, y), 5.0)
    best = block_coordinate_descent(p, block_size=40, tol=1e-14).value
    for k in (1, 5, 20):
        r = block_coordinate_descent(p, block_size=4, max_iter=k, tol=0)
        assert duality_gap(p, r.state) >= r.value - best - 1e-10


# estimators

@parametrize_with_checks([BCDLasso(), BCDLogisticRegression()])
def test_scikit_learns_checks(estimator, check): check(estimator)


# the same seed, the same run

def test_seeds_decide_everything():
    runs = [block_coordinate_descent(PROBLEMS["logistic"], selection="random", block_size=3, max_iter=50, random_state=s).x for s in (4, 4, 5)]
    assert np.array_equal(runs[0], runs[1]) and not np.array_equal(runs[0], runs[2])


# wrong input

@pytest.mark.parametrize("options, text", [
    (dict(block_size=0), "block_size is 0"), (dict(block_size=31), r"block_size is 31; it must be a whole number in \[1, 30\]"), (dict(selection="best"), "selection is 'best'"), (dict(partition="some"), "partition is 'some'"),
    (dict(update="jump"), "update is 'jump'"), (dict(selection="gs-q"), None), (dict(update="message", partition="order"), "sparse Hessian|no forest"), (dict(max_iter=-1), "max_iter is -1"), (dict(tol=-1.0), "tol is -1.0"),
    (dict(partition=[[0, 1], [1, 2]]), "exactly once"), (dict(partition="forest", selection="cyclic"), "selection is 'cyclic'"), (dict(record=-1), "record is -1")])
def test_wrong_options_are_named(options, text):
    if text is None:
        block_coordinate_descent(PROBLEMS["least squares"], max_iter=2, **options)  # a rule for L1 reads a smooth problem as one without L1
        return
    with pytest.raises(ValueError, match=text): block_coordinate_descent(PROBLEMS["least squares"], **options)


def test_wrong_problems_are_named():
    with pytest.raises(TypeError, match="problem is a ndarray"): block_coordinate_descent(A)
    with pytest.raises(ValueError, match="lam is -1"): L1(PROBLEMS["least squares"], -1.0)
    with pytest.raises(ValueError, match="lower must not exceed upper"): Box(PROBLEMS["least squares"], 1.0, 0.0)
    with pytest.raises(ValueError, match="A holds NaN"): LeastSquares(np.full((3, 2), np.nan), np.zeros(3))
    with pytest.raises(ValueError, match=r"b has shape \(4,\); it must be \(3,\)"): LeastSquares(np.ones((3, 2)), np.zeros(4))
    with pytest.raises(ValueError, match="labels must be -1 and 1"): Logistic(np.ones((3, 2)), [0, 1, 2])
    with pytest.raises(ValueError, match="selection is 'gs', a rule for smooth problems"): block_coordinate_descent(L1(PROBLEMS["least squares"], 1.0), selection="gs")
    with pytest.raises(ValueError, match="not symmetric"): Quadratic(np.array([[1.0, 2], [0, 1]]), np.zeros(2))
    with pytest.raises(ValueError, match="not connected to any label"): LabelPropagation(np.zeros((3, 3)), [1.0, np.nan, 0.0])


@pytest.mark.parametrize("make, error, text", [
    (lambda: LeastSquares(A + 1j, b), TypeError, "A holds complex"), (lambda: LeastSquares(sp.csr_matrix(A + 1j), b), TypeError, "A holds complex"), (lambda: LeastSquares(A, b + 1j), TypeError, "b holds complex"), (lambda: LeastSquares(A, b, l2=1j), TypeError, "l2 holds complex"),
    (lambda: LabelPropagation(np.ones((3, 3)) + 1j, [1, np.nan, 0]), TypeError, "w holds complex"), (lambda: LabelPropagation(np.array([[0, 1, 0], [2, 0, 1], [0, 1, 0]]), [1, np.nan, 0]), ValueError, "w is not symmetric: w - w.T reaches 1"), (lambda: L1("x", 0.1), TypeError, "problem is a str"),
    (lambda: block_coordinate_descent(LeastSquares(A[:, :3], b), partition=[[0.5], [1, 2]]), TypeError, r"block \[0.5\]"), (lambda: block_coordinate_descent(LeastSquares(A[:, :3], b), partition=[[True, False], [2]]), TypeError, "whole numbers")])
def test_nothing_is_silently_made_real_whole_or_symmetric(make, error, text):
    with pytest.raises(error, match=text): make()
