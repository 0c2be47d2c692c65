"""Sophia's step beside pytorch-optimizer's SophiaH, PyTorch's fused AdamW and a plain copy on 25 million parameters, and what the refresh adds to the training of a small language model.

The peer is handed its curvature as a zero estimate once and steps without refreshes, so that both sides do the same work: a clipped step with `h` read only.
"""
import warnings

import pandas as pd
import pytest
import pytorch_optimizer
import torch
from harness import SHAPES, copy_of, count, parameters, ratios, report, side_by_side

from efftrain.datasets import TokenBatches, english
from efftrain.models import llama
from efftrain.optim.sophia import SophiaG, refresh_hook
from efftrain.training import lm_loss

OPTIONS = dict(lr=1e-4, betas=(0.965, 0.99), weight_decay=0.1)


def ours(params, **flags):
    opt = SophiaG(params, rho=0.04, update_period=10**9, **OPTIONS, **flags)
    opt.update_hessian(1000)
    return opt.step


def peer(params, **flags):
    opt = pytorch_optimizer.SophiaH(params, p=0.04, update_period=10**9, **OPTIONS, **flags)
    opt.step(hessian=[p.grad.square() for p in params])
    return opt.step


CONTENDERS = {  # name: (make, words a parameter that must move)
    "Sophia fused": (lambda p: ours(p, fused=True), 6),
    "Sophia foreach": (lambda p: ours(p, foreach=True), 6),
    "Sophia single": (lambda p: ours(p, foreach=False), 6),
    "pytorch-optimizer": (lambda p: peer(p, foreach=False), 6),
    "pytorch-optimizer foreach": (lambda p: peer(p, foreach=True), 6),
    "torch AdamW fused": (lambda p: torch.optim.AdamW(p, lr=1e-4, weight_decay=0.1, fused=True).step, 7)}
PEERS = [name for name in CONTENDERS if name.startswith("pytorch-optimizer")]
LAYOUTS = {"transformer": ("sophia", SHAPES, f"{len(SHAPES)} tensors"), "one tensor": ("sophia_one_tensor", [(25 * 2**20,)], "one tensor")}


@pytest.fixture(scope="module", params=LAYOUTS)
def layout(request): return LAYOUTS[request.param]


@pytest.fixture(scope="module")
def steps(layout):
    shapes = layout[1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {"copy": copy_of(count(shapes)), **{name: make(parameters(shapes)) for name, (make, _) in CONTENDERS.items()}}


@pytest.mark.parametrize("name", ["copy", *CONTENDERS])
@pytest.mark.benchmark(group="Sophia, 25M parameters")
def test_step(benchmark, steps, name):
    benchmark.pedantic(steps[name], rounds=8, warmup_rounds=2)


def test_side_by_side(steps, layout, tables):
    name, shapes, text = layout
    frame = ratios(side_by_side(steps), "Sophia fused", {"copy": 2, **{name: words for name, (_, words) in CONTENDERS.items()}})
    value = frame.set_index("name")
    floor, slowest = value.of_floor["Sophia fused"], value.ours_faster[PEERS].min()
    tables.append(report(name, f"Sophia's step on {count(shapes) / 1e6:.1f} million parameters in {text}, float32", frame,
                         {"Sophia fused, times of the memory floor, at most": (floor, 1.2, floor <= 1.2), "faster than pytorch-optimizer's SophiaH, at least": (slowest, 1.5, slowest >= 1.5)}, ("pytorch-optimizer",)))


def test_refresh_is_a_small_part_of_training(tables):
    """Ten training steps of a small Llama with and without the refresh on half a batch."""
    tokens = english("train")

    def loop(refreshed):
        model, batches = llama(64, 2), TokenBatches(tokens, 16, 64)
        opt = SophiaG(model.parameters(), foreach=True, update_period=10 if refreshed else 10**9)
        hook = refresh_hook(opt, TokenBatches(tokens, 8, 64, 1), lambda m, b: m(b).logits[:, :-1])
        if not refreshed: hook(model, opt, 0)
        def ten():
            for i in range(10):
                opt.zero_grad(); lm_loss(model, batches(i)).backward(); opt.step(); hook(model, opt, i)
        return ten
    times = side_by_side({"with refresh": loop(True), "without": loop(False)}, rounds=10, warmup=2)
    best = times.groupby("name").seconds.min()
    share = best["with refresh"] / best["without"] - 1
    frame = pd.DataFrame([dict(name=n, min_ms=1e3 * t, median_ms=1e3 * times[times.name == n].seconds.median()) for n, t in best.items()])
    tables.append(report("sophia_refresh", "Ten training steps of a 0.13M-parameter Llama, 16 x 64 tokens, with a refresh of Sophia-G on 8 rows and without", frame,
                         {"share of time that the refresh adds, at most": (share, 0.1, share <= 0.1)}))
