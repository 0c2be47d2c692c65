"""Trained rank pruning: what truncations add to training, one truncation beside torch's SVD, and the time of a decomposed network beside its operations."""
import copy

import pandas as pd
import pytest
import torch
from harness import report, side_by_side
from torch import nn
from torch.nn import functional as F

from efftrain.compress.low_rank import matricize, unmatricize
from efftrain.compress.trp import TrainedRankPruner, conv_flops, decompose, truncatable_layers
from efftrain.models import cnn

WIDTH, BATCH, EVERY = 32, 128, 10


def stepper(every: int | None):
    """`EVERY` training steps of a residual network, with one truncation of every layer in them or none."""
    net, x, y = cnn(WIDTH, residual=True), torch.randn(BATCH, 1, 28, 28), torch.arange(BATCH) % 10
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    pruner = TrainedRankPruner(net, 0.95, every=every, nuclear=1e-3) if every else None
    def step():
        for t in range(EVERY):
            if pruner: pruner.before_forward(t)
            optimizer.zero_grad(); F.cross_entropy(net(x), y).backward()
            if pruner: pruner.after_backward(t)
            optimizer.step()
    return step


def by_svd(net: nn.Module, mode: str):
    """The same truncation with torch.linalg.svd, layer by layer (matrix by matrix in "decouple"), as the official code does."""
    weights = [m.weight.detach().clone() for m in truncatable_layers(net).values()]
    def step():
        for w in weights:
            M = matricize(w, mode)
            for part in (M if M.ndim == 3 else [M]):
                u, s, v = torch.linalg.svd(part, full_matrices=False)
                k = int((s.square().cumsum(0) < 0.95 * s.square().sum()).sum()) + 1
                part.copy_((u[:, :k] * s[:k]) @ v[:k])
            w.copy_(unmatricize(M, w.shape, mode))
    return step


def by_pruner(net: nn.Module, mode: str):
    pruner = TrainedRankPruner(copy.deepcopy(net), 0.95, every=1, mode=mode)
    return lambda: pruner.before_forward(0)


@pytest.mark.parametrize("every", [None, EVERY])
@pytest.mark.benchmark(group="Ten training steps of a residual network, width 32")
def test_steps(benchmark, every): benchmark.pedantic(stepper(every), rounds=3, warmup_rounds=1)


def test_side_by_side(tables):
    net = cnn(WIDTH, residual=True)
    training = side_by_side({"10 steps": stepper(None), "10 steps, one truncation": stepper(EVERY)}, rounds=6, warmup=1)
    cuts = side_by_side({f"truncation, {mode}, {who}": make(net, mode) for mode in ("channel", "spatial", "decouple") for who, make in (("ours", by_pruner), ("torch SVD", by_svd))}, rounds=6, warmup=1)
    wide, forward = cnn(64, residual=True).eval(), {}
    speed = {}
    for mode in ("channel", "spatial", "decouple"):
        rank = {n: max(m.out_channels // {"channel": 4, "spatial": 3, "decouple": 32}[mode], 1) for n, m in truncatable_layers(wide).items()} if mode != "decouple" else {n: 2 for n in truncatable_layers(wide)}
        small = decompose(wide, rank=rank, mode=mode, only_cheaper=False)[0].eval()
        speed[mode] = conv_flops(wide, (1, 28, 28)) / conv_flops(small, (1, 28, 28))
        for rows in (1, 128): forward[f"{mode}, batch {rows}"] = (small, torch.randn(rows, 1, 28, 28))
    for rows in (1, 128): forward[f"dense, batch {rows}"] = (wide, torch.randn(rows, 1, 28, 28))
    def runner(m, x):
        def go():
            with torch.no_grad(): m(x)
        return go
    passes = side_by_side({k: runner(*v) for k, v in forward.items()}, rounds=12, warmup=2)
    best = pd.concat([training, cuts, passes]).groupby("name").seconds.agg(["min", "median"])
    frame = pd.DataFrame([dict(name=n, min_ms=1e3 * r["min"], median_ms=1e3 * r["median"], operations_ratio=speed.get(n.split(",")[0]) if "batch" in n else None,
                               time_ratio=best["min"][f"dense, batch {n.split()[-1]}"] / r["min"] if "batch" in n and not n.startswith("dense") else None) for n, r in best.iterrows()])
    share = best["min"]["10 steps, one truncation"] / best["min"]["10 steps"] - 1
    reach = {"truncation every 10 steps, share of training time added, at most": (share, 0.15, share <= 0.15)}
    for mode in ("channel", "spatial", "decouple"):
        ratio = best["min"][f"truncation, {mode}, torch SVD"] / best["min"][f"truncation, {mode}, ours"]
        reach[f"truncation, {mode}: times faster than torch's SVD layer by layer, at least"] = (ratio, 1.0, ratio >= 1)
    tables.append(report("trp", "Trained rank pruning: truncations in training, and decomposed networks", frame, reach))
