"""diffGrad's three paths beside two other implementations, PyTorch's fused AdamW and a plain copy, on 25 million parameters: in one tensor, and in the 63 of a small transformer."""
import warnings

import pytest
import pytorch_optimizer
import torch
import torch_optimizer
from harness import SHAPES, copy_of, count, parameters, ratios, report, side_by_side

from efftrain.optim.diffgrad import DiffGrad

OPTIONS = dict(lr=1e-4, eps=1e-8, weight_decay=0.0)
CONTENDERS = {  # name: (make, words a parameter that must move)
    "DiffGrad fused": (lambda p: DiffGrad(p, fused=True, **OPTIONS), 9),
    "DiffGrad foreach": (lambda p: DiffGrad(p, foreach=True, **OPTIONS), 9),
    "DiffGrad single": (lambda p: DiffGrad(p, foreach=False, **OPTIONS), 9),
    "pytorch-optimizer": (lambda p: pytorch_optimizer.DiffGrad(p, **OPTIONS), 9),
    "torch-optimizer": (lambda p: torch_optimizer.DiffGrad(p, **OPTIONS), 9),
    "torch AdamW fused": (lambda p: torch.optim.AdamW(p, lr=1e-4, weight_decay=0.0, fused=True), 7)}
PEERS = ["pytorch-optimizer", "torch-optimizer"]
LAYOUTS = {"transformer": ("diffgrad", SHAPES, f"{len(SHAPES)} tensors"), "one tensor": ("diffgrad_one_tensor", [(25 * 2**20,)], "one tensor")}


@pytest.fixture(scope="module", params=LAYOUTS)
def layout(request): return LAYOUTS[request.param]


@pytest.fixture(scope="module")
def steps(layout):
    shapes = layout[1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {"copy": copy_of(count(shapes)), **{name: make(parameters(shapes)).step for name, (make, _) in CONTENDERS.items()}}


@pytest.mark.parametrize("name", ["copy", *CONTENDERS])
@pytest.mark.benchmark(group="diffGrad, 25M parameters")
def test_step(benchmark, steps, name):
    benchmark.pedantic(steps[name], rounds=8, warmup_rounds=2)


def test_side_by_side(steps, layout, tables):
    name, shapes, text = layout
    frame = ratios(side_by_side(steps), "DiffGrad fused", {"copy": 2, **{name: words for name, (_, words) in CONTENDERS.items()}})
    value = frame.set_index("name")
    floor, slowest = value.of_floor["DiffGrad fused"], value.ours_faster[PEERS].min()
    tables.append(report(name, f"diffGrad's step on {count(shapes) / 1e6:.1f} million parameters in {text}, float32", frame,
                         {"DiffGrad fused, times of the memory floor, at most": (floor, 1.2, floor <= 1.2), "faster than each other diffGrad, at least": (slowest, 1.5, slowest >= 1.5)}, tuple(PEERS)))
