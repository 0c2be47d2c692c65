"""AdaBelief's three paths beside three other implementations, PyTorch's fused AdamW and a plain copy, on 25 million parameters: in one tensor, and in the 63 of a small transformer."""
import contextlib
import io
import warnings

import adabelief_pytorch
import pytest
import pytorch_optimizer
import torch
import torch_optimizer
from harness import SHAPES, copy_of, count, parameters, ratios, report, side_by_side

from efftrain.optim.adabelief import AdaBelief

OPTIONS = dict(lr=1e-4, eps=1e-8, weight_decay=0.1, rectify=False, weight_decouple=True)


def official(params):
    with contextlib.redirect_stdout(io.StringIO()): return adabelief_pytorch.AdaBelief(params, print_change_log=False, **OPTIONS)


CONTENDERS = {  # name: (make, words a parameter that must move)
    "AdaBelief fused": (lambda p: AdaBelief(p, fused=True, **OPTIONS), 7),
    "AdaBelief foreach": (lambda p: AdaBelief(p, foreach=True, **OPTIONS), 7),
    "AdaBelief single": (lambda p: AdaBelief(p, foreach=False, **OPTIONS), 7),
    "adabelief-pytorch": (official, 7),
    "pytorch-optimizer": (lambda p: pytorch_optimizer.AdaBelief(p, **OPTIONS), 7),
    "torch-optimizer": (lambda p: torch_optimizer.AdaBelief(p, **OPTIONS), 7),
    "torch AdamW fused": (lambda p: torch.optim.AdamW(p, lr=1e-4, weight_decay=0.1, fused=True), 7)}
PEERS = ["adabelief-pytorch", "pytorch-optimizer", "torch-optimizer"]
LAYOUTS = {"transformer": ("adabelief", SHAPES, f"{len(SHAPES)} tensors"), "one tensor": ("adabelief_one_tensor", [(25 * 2**20,)], "one tensor")}


@pytest.fixture(scope="module", params=LAYOUTS)
def layout(request): return LAYOUTS[request.param]


@pytest.fixture(scope="module")
def steps(layout):
    shapes = layout[1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {"copy": copy_of(count(shapes)), **{name: make(parameters(shapes)).step for name, (make, _) in CONTENDERS.items()}}


@pytest.mark.parametrize("name", ["copy", *CONTENDERS])
@pytest.mark.benchmark(group="AdaBelief, 25M parameters")
def test_step(benchmark, steps, name):
    benchmark.pedantic(steps[name], rounds=8, warmup_rounds=2)


def test_side_by_side(steps, layout, tables):
    name, shapes, text = layout
    frame = ratios(side_by_side(steps), "AdaBelief fused", {"copy": 2, **{name: words for name, (_, words) in CONTENDERS.items()}})
    value = frame.set_index("name")
    floor, slowest = value.of_floor["AdaBelief fused"], value.ours_faster[PEERS].min()
    tables.append(report(name, f"AdaBelief's step on {count(shapes) / 1e6:.1f} million parameters in {text}, float32", frame,
                         {"AdaBelief fused, times of the memory floor, at most": (floor, 1.2, floor <= 1.2), "faster than each other AdaBelief, at least": (slowest, 1.5, slowest >= 1.5)}, tuple(PEERS)))
