"""Fira: a step beside GaLore's and beside pytorch-optimizer's Fira."""
import pytorch_optimizer
import torch
from harness import ratios, report, side_by_side
from torch import nn

from efftrain.memory.fira import Fira
from efftrain.memory.galore import GaLoreAdamW

RANK = 128
SHAPES = 4 * [(512, 512), (512, 512), (512, 512), (512, 512), (1376, 512), (1376, 512), (512, 1376)]


def stepper(kind, keys):
    """A step between refreshes of the subspace: 28 matrices of a small transformer, its embedding and a norm."""
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(s, generator=generator)) for s in [*SHAPES, (8192, 512), (512,)]]
    for p in params: p.grad = torch.randn(p.shape, generator=generator)
    optimizer = kind([dict(params=params[:-2], rank=RANK, update_proj_gap=10**9, scale=0.25, **keys), dict(params=params[-2:])], lr=1e-5)
    optimizer.step()
    return optimizer.step, params


def test_step(tables):
    made = {"Fira": stepper(Fira, dict(form="code")), "GaLoreAdamW": stepper(GaLoreAdamW, {}), "pytorch-optimizer": stepper(pytorch_optimizer.Fira, dict(projection_type="std"))}
    for ours, theirs in zip(made["Fira"][1], made["pytorch-optimizer"][1]): torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    frame = ratios(side_by_side({name: step for name, (step, _) in made.items()}, rounds=12), "Fira", {}, copy="GaLoreAdamW").drop(columns=["words", "floor_ms", "of_floor"])
    faster = frame.set_index("name").ours_faster
    dearer = 1 / faster["GaLoreAdamW"]
    tables.append(report("fira_step", f"Fira's step, {len(SHAPES)} matrices of a transformer 512 wide and an embedding, rank {RANK}, float32", frame,
                         {"times GaLore's step, at most": (dearer, 1.25, dearer <= 1.25), "times faster than pytorch-optimizer, at least": (faster["pytorch-optimizer"], 1, faster["pytorch-optimizer"] >= 1)}, ("pytorch_optimizer",)))


def test_small_matrices(tables):
    """A model 64 wide, where calls cost more than arithmetic: what 14 matrices take."""
    def small(kind, keys):
        generator = torch.Generator().manual_seed(0)
        params = [nn.Parameter(torch.randn(s, generator=generator)) for s in 2 * [(64, 64), (64, 64), (64, 64), (64, 64), (176, 64), (176, 64), (64, 176)]]
        for p in params: p.grad = torch.randn(p.shape, generator=generator)
        optimizer = kind([dict(params=params, rank=16, update_proj_gap=10**9, scale=0.25, **keys)], lr=1e-5); optimizer.step()
        return optimizer.step
    contenders = {"Fira": small(Fira, {}), "GaLoreAdamW": small(GaLoreAdamW, {}), "pytorch-optimizer": small(pytorch_optimizer.Fira, dict(projection_type="std"))}
    frame = ratios(side_by_side(contenders, rounds=200), "Fira", {}, copy="GaLoreAdamW").drop(columns=["words", "floor_ms", "of_floor"])
    dearer = 1 / frame.set_index("name").ours_faster["GaLoreAdamW"]
    tables.append(report("fira_small", "Fira's step, 14 matrices of a model 64 wide, rank 16, float32", frame, {"times GaLore's step, at most": (dearer, 2.5, dearer <= 2.5)}, ("pytorch_optimizer",)))
