"""Monarch: multiplication against a dense layer and against the same map written in three other ways, forward and with gradients; projection of a layer."""
import math

import pandas as pd
import pytest
import torch
from harness import report, side_by_side
from torch import nn

from efftrain.compress.monarch import MonarchLinear, monarch_project

SIZES, ROWS = (512, 1024, 2048, 4096), 256


def blocks(n: int) -> int:
    """The divisor of n nearest to its root."""
    return min((d for d in range(1, n + 1) if n % d == 0), key=lambda d: abs(d - math.sqrt(n)))


def three_index(L, R):
    """The square case as one einsum over three indices, as the definition is written."""
    def multiply(x): return torch.einsum("bkp,kqp,qsk->bsq", x.reshape(len(x), R.shape[0], R.shape[2]), R, L).reshape(len(x), -1)
    return multiply


def batch_first(L, R):
    """Two batched products with the batch before the features, as usual: a transposition before and after each of them."""
    (l, s, r), (k, q, p) = L.shape, R.shape
    def multiply(x):
        between = torch.bmm(x.reshape(-1, k, p).transpose(0, 1), R.transpose(1, 2)).transpose(0, 1).reshape(-1, r, l)
        return torch.bmm(between.permute(2, 0, 1), L.transpose(1, 2)).permute(1, 2, 0).reshape(len(x), -1)
    return multiply


def contenders(n: int, train: bool) -> dict:
    """name -> one pass over a batch, forward alone or with gradients of weights and input."""
    torch.manual_seed(0)
    b = blocks(n)
    dense, monarch, four = nn.Linear(n, n, bias=False), MonarchLinear(n, n, b, bias=False), MonarchLinear(n, n, 4, bias=False)
    x = torch.randn(ROWS, n, requires_grad=train)
    def run(f):
        def step():
            if train: f(x).sum().backward(); x.grad = None; [m.zero_grad() for m in (dense, monarch, four)]
            else:
                with torch.no_grad(): f(x)
        return step
    out = {f"dense, n = {n}": run(dense), f"Monarch, {b} blocks, n = {n}": run(monarch), f"Monarch, 4 blocks, n = {n}": run(four)}
    if not train:
        out |= {f"batch first, n = {n}": run(batch_first(monarch.L, monarch.R)), f"grouped convolutions, n = {n}": run(monarch.to_torch())}
        if b * b == n: out[f"einsum over three indices, n = {n}"] = run(three_index(monarch.L, monarch.R))
    return out


@pytest.mark.parametrize("kind", ["dense", "Monarch"])
@pytest.mark.benchmark(group="Forward, n = 2048, 256 rows")
def test_forward(benchmark, kind): benchmark.pedantic(next(f for name, f in contenders(2048, False).items() if name.startswith(kind)), rounds=5, warmup_rounds=1)


def test_side_by_side(tables):
    rows, ratio = [], {}
    for train in (False, True):
        for n in SIZES:
            times = side_by_side(contenders(n, train), rounds=15 if n < 4096 else 7, warmup=1)
            best, middle = (getattr(times.groupby("name").seconds, how)() for how in ("min", "median"))
            dense, b = f"dense, n = {n}", blocks(n)
            ratio[n, train] = best[dense] / best[f"Monarch, {b} blocks, n = {n}"]
            rows += [dict(name=name + (", with gradients" if train else ""), min_ms=1e3 * best[name], median_ms=1e3 * middle[name], faster_than_dense=best[dense] / best[name],
                          of_the_operations_saved=best[dense] / best[name] / (b / 2) if "blocks" in name and f"{b} blocks" in name else None) for name in best.index]
            if not train: ratio[n, "batch first"] = best[f"batch first, n = {n}"] / best[f"Monarch, {b} blocks, n = {n}"]
    W = torch.randn(1024, 1024)
    projection = side_by_side({"project 1024 x 1024, 4 blocks": lambda: monarch_project(W, 4), "project 1024 x 1024, 32 blocks": lambda: monarch_project(W, 32), "dense SVD of it (low rank)": lambda: torch.linalg.svd(W, full_matrices=False)}, rounds=3, warmup=1)
    best = projection.groupby("name").seconds.min()
    rows += [dict(name=name, min_ms=1e3 * best[name], median_ms=1e3 * projection[projection.name == name].seconds.median(), faster_than_dense=None, of_the_operations_saved=None) for name in best.index]
    growth = math.log(ratio[4096, False] / ratio[1024, False]) / math.log(4)
    tables.append(report("monarch", f"Monarch: multiplication of {ROWS} rows, dense and with about sqrt(n) blocks in each factor", pd.DataFrame(rows), {
        **{f"forward, n = {n}, times faster than dense, more than": (ratio[n, False], 1, ratio[n, False] > 1) for n in (2048, 4096)},
        **{f"with gradients, n = {n}, times faster than dense, more than": (ratio[n, True], 1, ratio[n, True] > 1) for n in (2048, 4096)},
        "exponent with which the speed-up grows from n = 1024 to 4096 (operations: 0.5), at least": (growth, 0.4, growth >= 0.4),
        "n = 2048, times faster than batch first, at least": (ratio[2048, "batch first"], 0.95, ratio[2048, "batch first"] >= 0.95),
        "projection of 1024 x 1024, of a dense SVD's time, at most": (best["project 1024 x 1024, 4 blocks"] / best["dense SVD of it (low rank)"], 1, best["project 1024 x 1024, 4 blocks"] <= best["dense SVD of it (low rank)"])}))
    assert ratio[4096, False] > 1
