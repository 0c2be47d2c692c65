"""FRUGAL's step beside AdamW's: blocks in turn, random columns, random coordinates; and the official code's way through a dense matrix of zeros."""
import torch
from harness import ratios, report, side_by_side
from torch import nn

from efftrain.memory.frugal import Frugal, _key, coordinates, subset

SHAPES = 4 * [(512, 512), (512, 512), (512, 512), (512, 512), (1376, 512), (1376, 512), (512, 1376)]


def step_of(make):
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(s, generator=generator)) for s in SHAPES]
    for p in params: p.grad = torch.randn(p.shape, generator=generator)
    optimizer = make(params)
    optimizer.step()
    return optimizer.step


def test_step(tables):
    """Between changes of the subspace: 28 matrices of a transformer 512 wide, a quarter with state."""
    frugal = lambda **options: step_of(lambda p: Frugal(p, lr=1e-3, density=0.25, update_gap=10**9, **options))
    contenders = {"Frugal, blocks": frugal(selection="blocks"), "Frugal, blocks, fused": frugal(selection="blocks", fused=True), "Frugal, columns": frugal(selection="columns"), "Frugal, rows": frugal(selection="rows"), "Frugal, randk": frugal(selection="randk"),
                  "Frugal, svd": frugal(selection="svd"), "AdamW, foreach": step_of(lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=True)), "AdamW": step_of(lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=False))}
    frame = ratios(side_by_side(contenders, rounds=10), "Frugal, blocks", {}, copy="AdamW").drop(columns=["words", "floor_ms", "of_floor"])
    best = frame.set_index("name").min_ms
    adamw = min(best["AdamW, foreach"], best["AdamW"])
    cost = {f"{name}: time of AdamW (the faster of its two paths), at most": (best[f"Frugal, {name}"] / adamw, 1.1, best[f"Frugal, {name}"] <= 1.1 * adamw) for name in ("blocks", "rows", "columns")}
    tables.append(report("frugal_step", "FRUGAL's step, 28 matrices of a transformer 512 wide, density 0.25, float32, CPU", frame, cost))


def test_bringing_back(tables):
    """Compact results into a matrix: in place, against a matrix of zeros that is filled and added, as the official code does."""
    generator = torch.Generator().manual_seed(0)
    weight, rows = torch.randn(2048, 2048, generator=generator), []
    columns, chosen = subset(2048, 512, _key(0)), coordinates(2048**2, 2**20, _key(0))
    values = torch.randn(2048, 512, generator=generator)

    def dense():
        zeros = torch.zeros_like(weight)
        zeros[:, columns] = values
        weight.add_(zeros)
    contenders = {"in place": lambda: weight.index_copy_(1, columns, values), "through zeros": dense, "coordinates, in place": lambda: weight.view(-1).index_copy_(0, chosen, values.view(-1))}
    frame = ratios(side_by_side(contenders, rounds=10), "in place", {}, copy="in place").drop(columns=["words", "floor_ms", "of_floor"])
    faster = frame.set_index("name").ours_faster["through zeros"]
    tables.append(report("frugal_back", "512 of 2,048 columns of updates into a 2,048 x 2,048 matrix, float32, CPU", frame, {"in place, times faster than through zeros, at least": (faster, 1, faster >= 1)}))
