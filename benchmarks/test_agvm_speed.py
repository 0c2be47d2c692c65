"""What AGVM adds to a training step: the detector with and without it, and its own passes over 25 million gradients beside SGD's step and a plain copy."""
import pandas as pd
import pytest
import torch
from harness import SHAPES, copy_of, count, parameters, ratios, report, side_by_side

from efftrain.optim.agvm import AGVM, module_groups
from efftrain.optim.agvm_detector import MODULES, detection_loss, detector, pictures

INTERVAL, BATCH = 5, 128


def detection(wrap: bool, split: bool = True):
    """A contender: INTERVAL training steps of the detector, in two micro-batches each (or whole where AGVM does not need halves)."""
    model, batch = detector(), tuple(part[:BATCH] for part in pictures(256))
    halves = list(zip(*(part.chunk(2) for part in batch)))
    base = torch.optim.SGD(module_groups(model, MODULES), lr=1e-3, momentum=0.9)
    opt = AGVM(base, interval=INTERVAL, start=0) if wrap else base

    def steps():
        for _ in range(INTERVAL):
            if split or wrap and opt.due:
                for half, part in enumerate(halves):
                    (detection_loss(model, part) / 2).backward()
                    if wrap: opt.observe(half)
            else: detection_loss(model, batch).backward()
            opt.step(); opt.zero_grad()
    return steps


def passes(kind: str):
    """A contender on 25 million parameters, without a backward pass: the step of SGD or AdamW, or what AGVM does in a step that measures beside it.

    The half's copy is made in fresh memory each time, and on a CPU its page faults cost as much as all passes; it is not kept, so that it is there only between two calls.
    """
    params = parameters()
    half = len(params) // 2
    make = torch.optim.AdamW if kind == "adamw" else torch.optim.SGD
    options = dict(lr=1e-4, fused=True) if kind == "adamw" else dict(lr=1e-4, momentum=0.9, fused=True)
    base = make([{"params": params[:half]}, {"params": params[half:]}], **options)
    if kind in ("sgd step", "adamw"): return base.step
    opt = AGVM(base, interval=1, start=0)

    def observe():
        opt.observe(0)
        for p in params[::len(params) - 1]: p.grad.flatten()[:1].add_(1.0)  # so that the second half is not empty
        opt.observe(1)
    return observe


CONTENDERS = {"detector, SGD": detection(False), "detector, AGVM(SGD)": detection(True), "detector, SGD, whole batches": detection(False, False), "detector, AGVM(SGD), halves when due": detection(True, False)}


@pytest.mark.parametrize("name", CONTENDERS)
@pytest.mark.benchmark(group="AGVM, five training steps of the detector")
def test_steps(benchmark, name):
    benchmark.pedantic(CONTENDERS[name], rounds=5, warmup_rounds=1)


def test_side_by_side(tables):
    small = side_by_side(CONTENDERS, rounds=20)
    best = small.groupby("name").seconds.min()
    overhead, own_split = best["detector, AGVM(SGD)"] / best["detector, SGD"] - 1, best["detector, AGVM(SGD), halves when due"] / best["detector, SGD, whole batches"] - 1
    large = side_by_side({"copy": copy_of(count()), "observe, both halves": passes("observe"), "torch SGD fused": passes("sgd step"), "torch AdamW fused": passes("adamw")}, rounds=12)
    frame = ratios(large, "observe, both halves", {"copy": 2, "observe, both halves": 13, "torch SGD fused": 5, "torch AdamW fused": 7})
    training = pd.DataFrame([dict(name=n, min_ms=1e3 * best[n], median_ms=1e3 * small[small.name == n].seconds.median()) for n in CONTENDERS])
    tables.append(report("agvm", f"AGVM: {INTERVAL} training steps of the detector, and its passes over {count() / 1e6:.1f} million gradients in {len(SHAPES)} tensors, float32", pd.concat([training, frame], ignore_index=True),
                         {"added to a training step in two micro-batches at interval 5, at most": (overhead, 0.05, overhead <= 0.05), "the same, with whole batches where nothing is measured, at most": (own_split, 0.10, own_split <= 0.10)}))
