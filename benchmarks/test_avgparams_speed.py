"""Average parameters: what masking and pruning add to a training step, and how long the scaling law takes to fit, beside SciPy one start at a time."""
import time

import numpy as np
import pandas as pd
import pytest
import torch
from harness import report, side_by_side
from scipy import optimize
from torch.nn.utils import clip_grad_norm_, prune as torch_prune

from efftrain.compress.avgparams import GradualMagnitudePruner, SparsitySchedule
from efftrain.compress.masks import prunable_layers
from efftrain.compress.scaling_law import ScalingLaw, _default_starts
from efftrain.models import llama
from efftrain.training import lm_loss

WIDTH, BATCH, LENGTH = 192, 16, 64  # 0.9 million weights in the linear layers
KINDS = ("dense", "masked", "torch.nn.utils.prune", "dense fused", "masked fused")


def stepper(kind: str):
    """One training step: dense, masked at 80% (all of `GradualMagnitudePruner` but the rounds), or with torch.nn.utils.prune.

    Most of what masks add here is PyTorch's square root, which on a CPU takes ten times longer for zeros than for other numbers: the second moments of removed weights in AdamW.
    `AdamW(fused=True)` does not have that."""
    model = llama(WIDTH, 2, length=LENGTH)
    batch = torch.randint(0, 512, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    pruner = None
    if kind.startswith("masked"): pruner = GradualMagnitudePruner(model, SparsitySchedule(0.8, 0, 0, base_steps=1000))
    if kind == "torch.nn.utils.prune":
        for layer in prunable_layers(model).values(): torch_prune.l1_unstructured(layer, "weight", amount=0.8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused="fused" in kind)
    def step():
        optimizer.zero_grad()
        lm_loss(model, batch).backward()
        if pruner: pruner.after_backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if pruner: pruner.after_step(optimizer)
    return step


def rounder():
    """One round of pruning: every call removes a little more, as the rounds of a ramp do."""
    model = llama(WIDTH, 2, length=LENGTH)
    pruner = GradualMagnitudePruner(model, SparsitySchedule(0.8, 0, 1, base_steps=10_000, rounds=100))
    optimizer, at = torch.optim.AdamW(model.parameters(), lr=1e-4), iter(range(10**6))
    for p in model.parameters(): p.grad = torch.zeros_like(p)
    optimizer.step()
    def step():
        pruner.masks.prune(0.995**(next(at) + 1)); pruner.masks.project_optimizer(optimizer)
    return step


def runs(n: int = 60):
    """Losses of Hoffmann's law with 1% noise."""
    rng = np.random.default_rng(0)
    X = np.stack([10**rng.uniform(7, 10, n), 10**rng.uniform(9, 11.5, n)], 1)
    return X, (1.69 + 406.4 / X[:, 0]**0.34 + 410.7 / X[:, 1]**0.28) * np.exp(0.01 * rng.normal(size=n))


def one_by_one(X, y, starts):
    """The published way: L-BFGS from every start, the best kept; numerical gradient, objective times 1e6 so that it moves at all."""
    u, v, z = np.log(X[:, 0]), np.log(X[:, 1]), np.log(y)
    def objective(t):
        r = np.abs(np.logaddexp.reduce([t[0] - t[3] * u, t[1] - t[4] * v, np.full(len(z), t[2])]) - z)
        return 1e6 * np.where(r <= 1e-3, r**2 / 2, 1e-3 * (r - 5e-4)).sum()
    return min(optimize.minimize(objective, s, method="L-BFGS-B").fun for s in starts) / 1e6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.benchmark(group="Training step, 0.9M weights")
def test_step(benchmark, kind): benchmark.pedantic(stepper(kind), rounds=5, warmup_rounds=1)


@pytest.mark.benchmark(group="Pruning round, 0.9M weights")
def test_round(benchmark): benchmark.pedantic(rounder(), rounds=5, warmup_rounds=1)


def test_side_by_side(tables):
    times = side_by_side({**{kind: stepper(kind) for kind in KINDS}, "one pruning round": rounder()}, rounds=24)
    X, y = runs()
    law = ScalingLaw().fit(X, y)
    fits = side_by_side({"fit, 196 starts": lambda: ScalingLaw().fit(X, y), "500 refits": lambda: law.bootstrap(500)}, rounds=5, warmup=1)
    starts = _default_starts(np.log(X[:, 0]), np.log(X[:, 1]), np.log(y))
    begin = time.perf_counter(); lowest = one_by_one(X, y, starts[::28]); loop = (time.perf_counter() - begin) * 28
    best, middle = (pd.concat([times, fits]).groupby("name").seconds.agg(how) for how in ("min", "median"))
    frame = pd.DataFrame([dict(name=n, min_ms=1e3 * best[n], median_ms=1e3 * middle[n], of_dense_step=best[n] / best["dense"] if n in set(times.name) else None) for n in best.index])
    frame.loc[len(frame)] = ["SciPy, 196 starts one by one (7 timed)", 1e3 * loop, None, None]
    by_round = times.pivot(index="round", columns="name", values="seconds")
    overhead = best["masked"] / best["dense"] - 1
    share = best["one pruning round"] / best["dense"] * 100 / 2506  # 100 rounds in the 2,506 updates of an 80% sparse run with 1,000 dense ones
    tables.append(report("avgparams", "Average parameters: masks in a training step, pruning rounds, and the scaling law's fit", frame, {
        "masking, share of a dense step added, at most": (overhead, 0.10, overhead <= 0.10),
        "masking, the same by the median of paired rounds, at most": ((by_round["masked"] / by_round["dense"]).median() - 1, 0.10, (by_round["masked"] / by_round["dense"]).median() - 1 <= 0.10),
        "masking with fused AdamW, share of a dense step added, at most": (best["masked fused"] / best["dense fused"] - 1, 0.10, best["masked fused"] / best["dense fused"] <= 1.10),
        "pruning rounds, share of training, at most": (share, 0.03, share <= 0.03),
        "point estimate, seconds, at most": (best["fit, 196 starts"], 2, best["fit, 196 starts"] <= 2),
        "500 refits, seconds, at most": (best["500 refits"], 20, best["500 refits"] <= 20),
        "fit, objective over that of SciPy's starts, at most": (law.objective_ / lowest, 1 + 1e-6, law.objective_ <= lowest * (1 + 1e-6))}))
    assert law.objective_ <= lowest * (1 + 1e-6)
