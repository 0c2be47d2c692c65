"""AdaGrad-Norm's step beside torch's AdaGrad and a plain copy, and what testing the batch adds to a training step, beside gradients of single examples by vmap and by Opacus.

`adadagrad`: 25 million parameters; four words a parameter must move, of AdaGrad five. `adadagrad_test`: ten training steps of a CNN and an MLP on batches of 256, plain, tested at every step, tested once.
"""
import copy
import warnings

import pytest
import torch
from harness import SHAPES, copy_of, count, parameters, ratios, report, side_by_side
from torch import nn

from efftrain.models import cnn, mlp
from efftrain.optim.adadagrad import AdaGradNorm, BatchSizeController
from efftrain.optim.adadagrad_gradients import GradientRecorder, gradient_moments, per_sample_gradients
from efftrain.training import classification_loss

CONTENDERS = {  # name: (make, words a parameter that must move)
    "AdaGradNorm fused": (lambda p: AdaGradNorm(p, lr=1e-3, fused=True), 4),
    "AdaGradNorm foreach": (lambda p: AdaGradNorm(p, lr=1e-3, foreach=True), 4),
    "AdaGradNorm single": (lambda p: AdaGradNorm(p, lr=1e-3, foreach=False), 4),
    "torch Adagrad fused": (lambda p: torch.optim.Adagrad(p, lr=1e-3, fused=True), 5),
    "torch Adagrad foreach": (lambda p: torch.optim.Adagrad(p, lr=1e-3, foreach=True), 5),
    "torch Adagrad single": (lambda p: torch.optim.Adagrad(p, lr=1e-3, foreach=False), 5)}


@pytest.fixture(scope="module")
def steps():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {"copy": copy_of(count(SHAPES)), **{name: make(parameters(SHAPES)).step for name, (make, _) in CONTENDERS.items()}}


@pytest.mark.parametrize("name", ["copy", *CONTENDERS])
@pytest.mark.benchmark(group="AdaGrad-Norm, 25M parameters")
def test_step(benchmark, steps, name): benchmark.pedantic(steps[name], rounds=8, warmup_rounds=2)


def test_side_by_side(steps, tables):
    frame = ratios(side_by_side(steps), "AdaGradNorm fused", {"copy": 2, **{name: words for name, (_, words) in CONTENDERS.items()}})
    value = frame.set_index("name")
    floor, slowest = value.of_floor["AdaGradNorm fused"], value.ours_faster[["torch Adagrad foreach", "torch Adagrad single"]].min()  # torch's fused one passes over memory once; a norm of everything needs two passes
    tables.append(report("adadagrad", f"AdaGrad-Norm's step on {count(SHAPES) / 1e6:.1f} million parameters in {len(SHAPES)} tensors, float32", frame,
                         {"AdaGradNorm fused, times of the memory floor, at most": (floor, 1.2, floor <= 1.2), "faster than torch's AdaGrad foreach and single, at least": (slowest, 1.0, slowest >= 1.0)}))


MODELS = {"CNN": lambda: (cnn(16, norm=False), torch.randn(256, 1, 28, 28)), "MLP": lambda: (mlp([784, 512, 512, 10]), torch.randn(256, 784))}


def contenders(name):
    """Ten training steps each: plain, with a test at every step or at one of ten (all rows, and at most 32), and per-sample gradients at every step by vmap and Opacus."""
    from opacus.grad_sample import GradSampleModule
    torch.manual_seed(0)
    model, x = MODELS[name]()
    y = torch.randint(10, (len(x),))

    def ten(tested, limit=None, kind="recorder"):
        own = copy.deepcopy(model)
        if kind == "opacus": own = GradSampleModule(own, loss_reduction="mean")
        optimizer, controller = torch.optim.Adagrad(own.parameters(), lr=1e-3, foreach=True), BatchSizeController(initial=256, maximum=8192)
        recorder = GradientRecorder(own, limit=limit, along=False) if kind == "recorder" and tested else None

        def run():
            for k in range(10):
                due = tested and k % tested == 0
                if recorder: recorder.active = due
                classification_loss(own, (x, y)).backward()
                if due: controller.required(recorder.moments() if recorder else gradient_moments(per_sample_gradients(own, classification_loss, (x, y)) if kind == "vmap" else [p.grad_sample for p in own.parameters()]))
                optimizer.step(); optimizer.zero_grad()
                if kind == "opacus":
                    for p in own.parameters(): p.grad_sample = None
        return run
    return {"plain": ten(0), "test every step": ten(1), "test every step, 32 rows": ten(1, 32), "test every 10": ten(10), "test every 10, 32 rows": ten(10, 32), "vmap every step": ten(1, kind="vmap"), "Opacus every step": ten(1, kind="opacus")}


@pytest.mark.parametrize("name", MODELS)
def test_overhead_of_the_test(name, tables):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        times = side_by_side(contenders(name), rounds=15)
    frame = ratios(times, "test every step", {}, copy="plain")[["name", "min_ms", "median_ms", "ours_faster"]]
    best = times.groupby("name").seconds.min()
    frame["overhead"] = [best[n] / best["plain"] - 1 for n in frame.name]
    over = frame.set_index("name").overhead
    tables.append(report(f"adadagrad_test_{name.lower()}", f"Testing the batch: ten training steps of the {name}, batch 256", frame,
                         {"overhead of a test at every step, at most": (over["test every step"], 0.3, over["test every step"] <= 0.3), "overhead of a test at every tenth step, at most": (over["test every 10"], 0.03, over["test every 10"] <= 0.03),
                          "overhead of a test at every step from 32 rows, at most": (over["test every step, 32 rows"], 0.3, over["test every step, 32 rows"] <= 0.3),
                          "overhead of a test at every tenth step from 32 rows, at most": (over["test every 10, 32 rows"], 0.03, over["test every 10, 32 rows"] <= 0.03)}, ("opacus",)))
