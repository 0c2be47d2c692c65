"""Block coordinate descent: Lasso beside scikit-learn's coordinate descent at the same duality gap, and one forest block beside SciPy's sparse solver, by size."""
import warnings

import numpy as np
import pandas as pd
import scipy.sparse as sp
from harness import ratios, report, side_by_side
from scipy.sparse.linalg import spsolve
from sklearn.linear_model import Lasso

from efftrain.optim.bcd import BCDLasso
from efftrain.optim.bcd_graphs import ForestSolver


def test_lasso(tables):
    """2,000 rows, 100,000 variables, 20 nonzeros a column: a solution with some hundred nonzeros."""
    rng = np.random.default_rng(0)
    rows, n = 2000, 100_000
    a = sp.csc_matrix((rng.normal(size=20 * n), rng.integers(rows, size=20 * n), np.arange(0, 20 * n + 1, 20)), (rows, n))
    y = a @ (rng.normal(size=n) * (rng.random(n) < 1e-3)) + rng.normal(size=rows)
    alpha = 0.2 * np.abs(a.T @ (y - y.mean())).max() / rows
    ours, theirs = BCDLasso(alpha, tol=1e-6), Lasso(alpha, tol=1e-6, max_iter=100_000)
    frame = ratios(side_by_side({"BCDLasso": lambda: ours.fit(a, y), "scikit-learn Lasso": lambda: theirs.fit(a, y)}, rounds=5, warmup=1), "BCDLasso", {}, copy="BCDLasso").drop(columns=["words", "floor_ms", "of_floor"])
    np.testing.assert_allclose(ours.coef_, theirs.coef_, atol=1e-2 * np.abs(theirs.coef_).max())
    seconds = frame.set_index("name").min_ms["BCDLasso"] / 1e3
    faster = frame.set_index("name").ours_faster["scikit-learn Lasso"]
    tables.append(report("bcd_lasso", f"Lasso, {rows:,} x {n:,}, {a.nnz:,} nonzeros, {np.count_nonzero(ours.coef_)} in the solution, gap 1e-6", frame,
                         {"seconds, at most": (seconds, 10, seconds <= 10), "times faster than scikit-learn, at least": (faster, 1, faster >= 1)}, ("scikit-learn",)))


def test_forest_block(tables):
    """Elimination and solve on random trees."""
    rows = []
    for n in (20_000, 80_000, 320_000):
        rng = np.random.default_rng(n)
        parent = np.array([rng.integers(max(0, i - 50), i) for i in range(1, n)])
        w = sp.coo_matrix((-rng.random(n - 1), (np.arange(1, n), parent)), (n, n)).tocsr(); w = w + w.T
        h, right = (w + sp.diags(np.asarray(abs(w).sum(1)).ravel() + 1)).tocsr(), rng.normal(size=n)
        csc, kept = h.tocsc(), ForestSolver(h)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            frame = ratios(side_by_side({"forest: plan, eliminate, solve": lambda: ForestSolver(h).solve(right), "forest: solve again": lambda: kept.solve(right), "SciPy spsolve": lambda: spsolve(csc, right)}, rounds=5, warmup=1),
                           "forest: plan, eliminate, solve", {}, copy="SciPy spsolve").drop(columns=["words", "floor_ms", "of_floor"])
        rows.append(frame.assign(n=n))
    frame = pd.concat(rows, ignore_index=True)
    times = frame[frame.name.str.startswith("forest: plan")].set_index("n").min_ms
    growth = float(np.polyfit(np.log(times.index), np.log(times), 1)[0])
    tables.append(report("bcd_forest", "One block with the structure of a tree", frame, {"exponent of n, at most": (growth, 1.1, growth <= 1.1)}))
