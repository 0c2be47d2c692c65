"""PELA: a factored linear layer beside the dense one, factoring a model, and the parts of a repair step."""
import numpy as np
import pandas as pd
import pytest
import torch
from harness import report, side_by_side
from torch import nn

from efftrain.compress.low_rank import LowRankLinear, ratio_rank
from efftrain.compress.pela import PELALoss, factorable_layers, low_rank_factorize
from efftrain.models import llama

WIDTHS, BATCHES = (256, 768, 2048), (1, 64)


def layer(width: int, batch: int, factored: bool):
    """A forward pass of a square layer, dense or at compression 2."""
    m = LowRankLinear(width, width, ratio_rank((width, width), 2)) if factored else nn.Linear(width, width)
    x = torch.randn(batch, width)
    def go():
        with torch.no_grad():
            for _ in range(10): m(x)
    return go


def repair(**weights):
    """Forward and backward pass of one repair step."""
    teacher = llama(192, 4, 4096, length=128)
    student, _ = low_rank_factorize(teacher, 2.0)
    loss, ids = PELALoss(teacher, student, **weights), torch.randint(0, 4096, (8, 64))
    def go():
        student.zero_grad(); loss(ids)[0].backward()
    return go


def by_numpy(model: nn.Module):
    """The official way: NumPy's full SVD of each weight."""
    weights = [m.weight.detach().numpy() for m in factorable_layers(model).values()]
    def go():
        for w in weights:
            u, s, v = np.linalg.svd(w.T, full_matrices=True)
            r = ratio_rank(w.shape, 2)
            root = np.sqrt(np.diag(s[:r])); (u[:, :r] @ root, root @ v[:r])
    return go


@pytest.mark.parametrize("factored", [False, True])
@pytest.mark.benchmark(group="Linear layer 768 x 768, batch 64, ten passes")
def test_layer(benchmark, factored): benchmark.pedantic(layer(768, 64, factored), rounds=10, warmup_rounds=2)


def test_side_by_side(tables):
    contenders = {f"{kind}, width {w}, batch {b}": layer(w, b, kind == "factored") for w in WIDTHS for b in BATCHES for kind in ("dense", "factored")}
    passes = side_by_side(contenders, rounds=12, warmup=2)
    steps = side_by_side({"repair step, task": repair(feature=0, perturb=0), "repair step, task + features": repair(perturb=0), "repair step, task + features + drift": repair()}, rounds=8, warmup=1)
    model = llama(192, 4, 4096, length=128)
    factoring = side_by_side({"factor a model of 2.6M, ours": lambda: low_rank_factorize(model, 2.0), "factor a model of 2.6M, NumPy's full SVD": by_numpy(model)}, rounds=4, warmup=1)
    best = pd.concat([passes, steps, factoring]).groupby("name").seconds.agg(["min", "median"])
    frame = pd.DataFrame([dict(name=n, min_ms=1e3 * r["min"], median_ms=1e3 * r["median"], operations_ratio=2.0 if n.startswith("factored") else None, time_ratio=best["min"][n.replace("factored", "dense")] / r["min"] if n.startswith("factored") else None)
                          for n, r in best.iterrows()])
    wide, drift = best["min"]["dense, width 2048, batch 64"] / best["min"]["factored, width 2048, batch 64"], 1 - best["min"]["repair step, task + features"] / best["min"]["repair step, task + features + drift"]
    factor = best["min"]["factor a model of 2.6M, NumPy's full SVD"] / best["min"]["factor a model of 2.6M, ours"]
    tables.append(report("pela", "PELA: factored layers, the repair step and factoring", frame, {
        "width 2048, batch 64, c = 2: times faster than dense, at least": (wide, 1.3, wide >= 1.3), "drift term, share of a repair step, at most": (drift, 0.3, drift <= 0.3),
        "factoring: times faster than the official way, at least": (factor, 1.0, factor >= 1.0)}))
