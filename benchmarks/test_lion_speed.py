"""Lion's three paths beside three other implementations, PyTorch's fused AdamW and a plain copy, on 25 million parameters: in one tensor, and in the 63 of a small transformer.

The number of passes over memory decides in one large tensor. In tensors that fit the processor's cache the other implementations' passes are cheap, and the floor itself limits how much faster anything can be.
"""
import warnings

import lion_pytorch
import lion_pytorch.foreach
import optimi
import pytest
import pytorch_optimizer
import torch
from harness import SHAPES, copy_of, count, parameters, ratios, report, side_by_side

from efftrain.optim.lion import Lion

OPTIONS = dict(lr=1e-4, betas=(0.9, 0.99), weight_decay=0.1)
CONTENDERS = {  # name: (make, words a parameter that must move)
    "Lion fused": (lambda p: Lion(p, fused=True, **OPTIONS), 5),
    "Lion foreach": (lambda p: Lion(p, foreach=True, **OPTIONS), 5),
    "Lion single": (lambda p: Lion(p, foreach=False, **OPTIONS), 5),
    "lion-pytorch": (lambda p: lion_pytorch.Lion(p, **OPTIONS), 5),
    "lion-pytorch foreach": (lambda p: lion_pytorch.foreach.Lion(p, **OPTIONS), 5),
    "pytorch-optimizer": (lambda p: pytorch_optimizer.Lion(p, **OPTIONS), 5),
    "torch-optimi": (lambda p: optimi.Lion(p, **OPTIONS), 5),
    "torch AdamW fused": (lambda p: torch.optim.AdamW(p, lr=1e-4, weight_decay=0.1, fused=True), 7)}
PEERS = [name for name in CONTENDERS if not name.startswith("Lion ") and "AdamW" not in name]


LAYOUTS = {"transformer": ("lion", SHAPES, f"{len(SHAPES)} tensors"), "one tensor": ("lion_one_tensor", [(25 * 2**20,)], "one tensor")}


@pytest.fixture(scope="module", params=LAYOUTS)
def layout(request): return LAYOUTS[request.param]


@pytest.fixture(scope="module")
def steps(layout):
    shapes = layout[1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {"copy": copy_of(count(shapes)), **{name: make(parameters(shapes)).step for name, (make, _) in CONTENDERS.items()}}


@pytest.mark.parametrize("name", ["copy", *CONTENDERS])
@pytest.mark.benchmark(group="Lion, 25M parameters")
def test_step(benchmark, steps, name):
    benchmark.pedantic(steps[name], rounds=8, warmup_rounds=2)


def test_side_by_side(steps, layout, tables):
    name, shapes, text = layout
    frame = ratios(side_by_side(steps), "Lion fused", {"copy": 2, **{name: words for name, (_, words) in CONTENDERS.items()}})
    value = frame.set_index("name")
    floor, slowest = value.of_floor["Lion fused"], value.ours_faster[PEERS].min()
    tables.append(report(name, f"Lion's step on {count(shapes) / 1e6:.1f} million parameters in {text}, float32", frame,
                         {"Lion fused, times of the memory floor, at most": (floor, 1.2, floor <= 1.2), "faster than each other Lion, at least": (slowest, 2.5, slowest >= 2.5)},
                         ("lion-pytorch", "pytorch-optimizer", "torch-optimi")))
