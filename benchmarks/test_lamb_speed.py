"""LAMB's and LARS's paths beside other implementations, PyTorch's fused AdamW and a plain copy, on 25 million parameters: in one tensor, and in the 63 of a small transformer.

Two floors. The words that must move, seven for LAMB (read θ, g, m, v; write θ, m, v) and five for LARS, as if the second pass over θ and the update came from the cache for nothing. And the row "two passes without arithmetic": plain in-place
additions that touch the same arrays in the same order, one layer after the other, since no weight may move before the norm of its whole layer is known.
"""
import warnings

import pytest
import pytorch_optimizer
import torch
import torch_optimizer
from harness import SHAPES, copy_of, count, parameters, ratios, report, side_by_side

from efftrain.optim.lamb import Lamb
from efftrain.optim.lars import Lars

FAMILIES = {
    "LAMB": ({
        "LAMB fused": (lambda p: Lamb(p, lr=1e-4, weight_decay=0.1, fused=True), 7),
        "LAMB foreach": (lambda p: Lamb(p, lr=1e-4, weight_decay=0.1, foreach=True), 7),
        "LAMB single": (lambda p: Lamb(p, lr=1e-4, weight_decay=0.1, foreach=False), 7),
        "pytorch-optimizer": (lambda p: pytorch_optimizer.Lamb(p, lr=1e-4, weight_decay=0.1, weight_decouple=False), 7),
        "torch-optimizer": (lambda p: torch_optimizer.Lamb(p, lr=1e-4, weight_decay=0.1), 7),
        "torch AdamW fused": (lambda p: torch.optim.AdamW(p, lr=1e-4, weight_decay=0.1, fused=True), 7)}, "LAMB fused", 1.2),
    "LARS": ({
        "LARS fused": (lambda p: Lars(p, lr=1e-4, weight_decay=0.1, fused=True), 5),
        "LARS fused, local rates": (lambda p: Lars(p, lr=1e-1, weight_decay=0.1, form="local_rate", fused=True), 5),
        "LARS foreach": (lambda p: Lars(p, lr=1e-4, weight_decay=0.1, foreach=True), 5),
        "pytorch-optimizer": (lambda p: pytorch_optimizer.LARS(p, lr=1e-1, weight_decay=0.1), 5),
        "torch-optimizer": (lambda p: torch_optimizer.LARS(p, lr=1e-1, momentum=0.9, weight_decay=0.1), 5)}, "LARS fused, local rates", 1.2)}


def two_passes(family: str, shapes: list[tuple]):
    """A contender that reads and writes what a step must, and calculates next to nothing: a first pass over all but the weights' writes, a second that moves the weights."""
    params, grads, first, second = ([p.detach() for p in parameters(shapes)] for _ in range(4))
    scratch = torch.zeros(max(p.numel() for p in params))
    updates = [scratch[:p.numel()].view_as(p) for p in params] if family == "LAMB" else first
    def step():
        for p, g, m, v, u in zip(params, grads, first, second, updates):
            m.addcmul_(g, p, value=1e-9)
            if family == "LAMB": v.mul_(1.0)
            p.add_(u, alpha=1e-9)
    return step


PASSES = "two passes without arithmetic"
LAYOUTS = {"transformer": ("", SHAPES, f"{len(SHAPES)} tensors"), "one tensor": ("_one_tensor", [(5120, 5120)], "one tensor")}


@pytest.fixture(scope="module", params=[(f, l) for f in FAMILIES for l in LAYOUTS], ids=lambda pair: "-".join(pair))
def contest(request):
    family, layout = request.param
    contenders, ours, bound = FAMILIES[family]
    suffix, shapes, text = LAYOUTS[layout]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        steps = {"copy": copy_of(count(shapes)), PASSES: two_passes(family, shapes), **{name: make(parameters(shapes)).step for name, (make, _) in contenders.items()}}
    return family, ours, bound, family.lower() + suffix, shapes, text, steps, {"copy": 2, PASSES: 7 if family == "LAMB" else 5, **{name: words for name, (_, words) in contenders.items()}}


def test_side_by_side(contest, tables):
    family, ours, bound, name, shapes, text, steps, words = contest
    frame = ratios(side_by_side(steps), ours, words)
    value = frame.set_index("name")
    floor, slowest = value.of_floor[ours], value.ours_faster[[n for n in steps if n.endswith("-optimizer")]].min()
    passes = value.min_ms[ours] / value.min_ms[PASSES]
    tables.append(report(name, f"{family}'s step on {count(shapes) / 1e6:.1f} million parameters in {text}, float32", frame,
                         {f"{ours}, times of the memory floor, at most": (floor, bound, floor <= bound), f"{ours}, times of two passes without arithmetic, at most": (passes, 1.2, passes <= 1.2), f"faster than each other {family}, at least": (slowest, 1.0, slowest >= 1.0)}, ("pytorch-optimizer", "torch-optimizer")))
