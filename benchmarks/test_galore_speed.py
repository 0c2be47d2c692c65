"""GaLore: finding the subspace exactly and approximately, and a step beside the official package."""
import warnings

import pytest
import torch
from harness import ratios, report, side_by_side
from torch import nn

from efftrain.memory.galore import GaLoreAdamW
from efftrain.memory.projection import subspace

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import galore_torch

SIDE, RANK = 2048, 128


@pytest.fixture(scope="module")
def gradient():
    """A gradient with the spectrum of real ones: fast decay, then a long tail."""
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(SIDE, SIDE, generator=generator)).Q for _ in range(2))
    return (u * (1 / torch.arange(1, SIDE + 1))) @ v.T


def test_subspace(gradient, tables):
    previous = subspace(gradient, RANK, "left")
    contenders = {"exact SVD": lambda: subspace(gradient, RANK, "left"), "randomized": lambda: subspace(gradient, RANK, "left", method="randomized"),
                  "subspace iteration": lambda: subspace(gradient, RANK, "left", method="iterate", previous=previous)}
    frame = ratios(side_by_side(contenders, rounds=3, warmup=1), "randomized", {}, copy="exact SVD").drop(columns=["words", "floor_ms", "of_floor"])
    faster = frame.set_index("name").ours_faster["exact SVD"]
    best = (previous.T @ gradient).norm()
    for name in ("randomized", "subspace iteration"): assert (contenders[name]().T @ gradient).norm() > 0.99 * best, name
    tables.append(report("galore_subspace", f"Subspace of a {SIDE} x {SIDE} gradient, rank {RANK}, float32", frame, {"randomized, times faster than exact, at least": (faster, 3, faster >= 3)}))


def test_step(tables):
    """Between refreshes of the subspace: 24 matrices of a small transformer and its embedding."""
    shapes = 4 * [(512, 512), (512, 512), (512, 512), (512, 512), (1376, 512), (1376, 512), (512, 1376)]
    generator = torch.Generator().manual_seed(0)

    def make(kind, **options):
        params = [nn.Parameter(torch.randn(s, generator=generator)) for s in shapes + [(8192, 512), (512,)]]
        for p in params: p.grad = torch.randn(p.shape, generator=generator)
        optimizer = kind([dict(params=params[:-2], rank=RANK, update_proj_gap=10**9, scale=0.25, proj_type="std"), dict(params=params[-2:])], lr=1e-2, **options)
        optimizer.step()
        return optimizer.step
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        contenders = {"GaLoreAdamW": make(GaLoreAdamW), "galore-torch": make(galore_torch.GaLoreAdamW, no_deprecation_warning=True)}
    frame = ratios(side_by_side(contenders, rounds=10), "GaLoreAdamW", {}, copy="galore-torch").drop(columns=["words", "floor_ms", "of_floor"])
    faster = frame.set_index("name").ours_faster["galore-torch"]
    tables.append(report("galore_step", "GaLore's step, 24 matrices of a transformer 512 wide and an embedding, rank 128, float32", frame, {"times faster than galore-torch, at least": (faster, 1, faster >= 1)}, ("galore-torch",)))
