"""EfficientLLM: what observing adds to a training step, how long an event takes, the least-squares refit beside numpy.linalg.lstsq, and the latency of the model that is left against its parameters."""
import copy

import numpy as np
import pandas as pd
import pytest
import torch
from harness import report, side_by_side

from efftrain.compress.efficientllm import StructuredPruner, least_squares_update
from efftrain.compress.efficientllm_model import rebuild
from efftrain.models import llama
from efftrain.training import lm_loss

WIDTH, BATCH, LENGTH = 192, 16, 64  # 0.9 million weights in the linear layers
KINDS = ("plain", "fisher", "fisher and inputs")


def stepper(kind: str):
    """One training step of AdamW: alone, with the Fisher average, and with the second moments of the inputs of O and down as well."""
    model = llama(WIDTH, 2, length=LENGTH)
    batch = torch.randint(0, 512, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    pruner = None if kind == "plain" else StructuredPruner(model, optimizer, compensate=kind != "fisher")
    def step():
        optimizer.zero_grad(); lm_loss(model, batch).backward()
        if pruner: pruner.observe()
        optimizer.step()
    step.model, step.optimizer, step.pruner = model, optimizer, pruner
    return step


def event():
    """An event that removes 1% of the parameters, from the same model every time but for what earlier ones took."""
    step = stepper("fisher and inputs"); step()
    def call(): step.pruner.prune_to(int(0.995 * step.pruner.n_params))
    return call


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.benchmark(group="Pruning-aware step, 0.9M weights")
def test_step(benchmark, kind): benchmark.pedantic(stepper(kind), rounds=5, warmup_rounds=1)


@pytest.mark.benchmark(group="Pruning event, 0.9M weights")
def test_event(benchmark): benchmark.pedantic(event(), rounds=5, warmup_rounds=1)


def test_side_by_side(tables):
    steps = side_by_side({**{k: stepper(k) for k in KINDS}, "event, 0.5% of the parameters": event()}, rounds=24)
    n, drop = 512, torch.arange(0, 512, 16)
    x, W = torch.randn(2048, n) @ torch.randn(n, n) / n**0.5, torch.randn(192, n)
    H, keep = x.T @ x / len(x), np.setdiff1d(np.arange(n), drop.numpy())
    a, b = x.numpy()[:, keep], (x @ W.T).numpy()
    torch.testing.assert_close(least_squares_update(W, H, drop, 0.0), torch.from_numpy(np.linalg.lstsq(a, b, rcond=None)[0].T), atol=2e-2, rtol=2e-2)
    refits = side_by_side({"refit of 192 x 512 from H": lambda: least_squares_update(W, H, drop), "numpy.linalg.lstsq on 2,048 inputs": lambda: np.linalg.lstsq(a, b, rcond=None)}, rounds=8, warmup=1)
    source = llama(256, 4, length=LENGTH).eval()
    cut = copy.deepcopy(source).train(); pruner = StructuredPruner(cut); lm_loss(cut, torch.randint(0, 512, (4, LENGTH))).backward(); pruner.observe()
    start = pruner.n_params; pruner.prune_to(int(0.4 * start)); pruner.finish(); small = rebuild(cut).eval()
    inputs = {rows: torch.randint(0, 512, (rows, LENGTH)) for rows in (1, 32)}
    def forward(model, rows):
        def call():
            with torch.no_grad(): model(inputs[rows])
        return call
    latency = side_by_side({f"{name}, batch {rows}": forward(m, rows) for rows in inputs for name, m in (("source", source), ("pruned", small))}, rounds=12)
    both = pd.concat([steps, refits, latency])
    best, middle = both.groupby("name").seconds.min(), both.groupby("name").seconds.median()
    frame = pd.DataFrame([dict(name=k, min_ms=1e3 * best[k], median_ms=1e3 * middle[k]) for k in best.index])
    by_round = steps.pivot(index="round", columns="name", values="seconds")
    fisher, inputs_too = ((by_round[k] / by_round["plain"]).median() - 1 for k in ("fisher", "fisher and inputs"))
    ratio, parameters = best["pruned, batch 32"] / best["source, batch 32"], pruner.n_params / start
    tables.append(report("efficientllm", "EfficientLLM: observing, pruning events, the refit, and the model that is left", frame, {
        "Fisher average, share of a step added (median of paired rounds), at most": (fisher, 0.10, fisher <= 0.10),
        "with second moments of inputs, share of a step added, at most": (inputs_too, 0.25, inputs_too <= 0.25),
        "refit over numpy.linalg.lstsq, time, at most": (best["refit of 192 x 512 from H"] / best["numpy.linalg.lstsq on 2,048 inputs"], 1.0, best["refit of 192 x 512 from H"] <= best["numpy.linalg.lstsq on 2,048 inputs"]),
        f"latency at batch 32 over the source's, at {parameters:.0%} of its parameters, at most": (ratio, 0.75, ratio <= 0.75)}))
