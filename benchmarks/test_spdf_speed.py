"""SPDF: what a fixed mask adds to a training step, beside the dense loop and torch.nn.utils.prune, and what a 90% sparse product costs in CSR."""
import pandas as pd
import pytest
import torch
from harness import report, side_by_side
from torch import nn
from torch.nn.utils import clip_grad_norm_, prune as torch_prune

from efftrain.compress.spdf import sparsify
from efftrain.models import llama
from efftrain.training import lm_loss

WIDTH, BATCH, LENGTH = 192, 16, 64  # 0.9 million weights in the linear layers
KINDS = ("dense", "attached", "torch.nn.utils.prune")


def stepper(kind: str):
    """One training step with fused AdamW (PyTorch's foreach one takes ten times longer for the square root of zeros): dense, with `attach` and gradients masked before clipping, or with torch's pruning."""
    model = llama(WIDTH, 2, length=LENGTH)
    batch = torch.randint(0, 512, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    static = sparsify(model, 0.75) if kind == "attached" else None
    if kind == "torch.nn.utils.prune":
        twin = sparsify(llama(WIDTH, 2, length=LENGTH), 0.75)
        for name in twin.masks.layers: torch_prune.custom_from_mask(model.get_submodule(name), "weight", twin.masks[name])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    if static: static.attach(optimizer)
    def step():
        optimizer.zero_grad()
        lm_loss(model, batch).backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return step


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.benchmark(group="Sparse pretraining step, 0.9M weights")
def test_step(benchmark, kind): benchmark.pedantic(stepper(kind), rounds=5, warmup_rounds=1)


def test_side_by_side(tables):
    steps = side_by_side({kind: stepper(kind) for kind in KINDS}, rounds=24)
    layer, x = nn.Linear(2048, 2048, bias=False), torch.randn(2048, 64)
    sparsify(layer, 0.9, targets=[""])
    dense, csr = layer.weight.detach(), layer.weight.detach().to_sparse_csr()
    torch.testing.assert_close(csr @ x, dense @ x, atol=1e-3, rtol=1e-3)
    products = side_by_side({"2048 x 2048, dense": lambda: dense @ x, "2048 x 2048, 90% sparse in CSR": lambda: csr @ x}, rounds=20)
    both = pd.concat([steps, products])
    best, middle = both.groupby("name").seconds.min(), both.groupby("name").seconds.median()
    against = {n: "dense" if n in KINDS else "2048 x 2048, dense" for n in best.index}
    frame = pd.DataFrame([dict(name=n, min_ms=1e3 * best[n], median_ms=1e3 * middle[n], of_dense=best[n] / best[against[n]]) for n in best.index])
    by_round = steps.pivot(index="round", columns="name", values="seconds")
    share = (by_round["attached"] / by_round["dense"]).median() - 1
    peer = best["attached"] / best["torch.nn.utils.prune"]
    tables.append(report("spdf", "SPDF: fixed masks in a training step, and a sparse product", frame, {
        "masking, share of a dense step added (minima), at most": (best["attached"] / best["dense"] - 1, 0.10, best["attached"] / best["dense"] <= 1.10),
        "masking, the same by the median of paired rounds, at most": (share, 0.10, share <= 0.10),
        "masking over torch.nn.utils.prune, time of a step, at most": (peer, 1.0, peer <= 1.0)}))
