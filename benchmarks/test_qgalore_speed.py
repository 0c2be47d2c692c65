"""Q-GaLore: integers in groups beside copying, torch's own quantisation and bitsandbytes; a step beside 8-bit GaLore."""
import warnings

import torch
from harness import ratios, report, side_by_side
from torch import nn

from efftrain.memory.galore import GaLoreAdamW8bit
from efftrain.memory.integer_linear import IntegerWeight
from efftrain.memory.integers import dequantize_groups, pack, quantize_groups, unpack
from efftrain.memory.qgalore import QGaLoreAdamW8bit

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import bitsandbytes.functional as bnb

N, GROUP, RANK = 2048, 256, 128


def test_requantise(tables):
    """Four million numbers. A copy moves eight bytes a number, quantising five."""
    x, generator = torch.randn(N, N, generator=torch.Generator().manual_seed(0)), torch.Generator().manual_seed(1)
    target = torch.empty_like(x)
    codes, scales, zeros = quantize_groups(x, 8, GROUP)
    four = quantize_groups(x, 4, GROUP)[0]
    packed = pack(four, 4)
    rows, s, z = x.view(-1, GROUP), scales.double(), zeros.long()
    contenders = {"to the nearest": lambda: quantize_groups(x, 8, GROUP), "copy": lambda: target.copy_(x), "by chance": lambda: quantize_groups(x, 8, GROUP, stochastic=True, generator=generator),
                  "torch.quantize_per_channel, scales given": lambda: torch.quantize_per_channel(rows, s, z, 0, torch.quint8), "bitsandbytes, block-wise 8 bits": lambda: bnb.quantize_blockwise(x, blocksize=GROUP),
                  "by chance with torch.rand": lambda: (rows / scales[:, None]).add_(torch.rand_like(rows)).floor_().add_(zeros[:, None]).clamp_(0, 255).to(torch.uint8),
                  "dequantise": lambda: dequantize_groups(codes, scales, zeros), "pack 4 bits": lambda: pack(four, 4), "unpack 4 bits": lambda: unpack(packed, 4, x.shape)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        frame = ratios(side_by_side(contenders, rounds=10), "by chance", {"to the nearest": 1.25, "by chance": 1.25, "dequantise": 1.25, "pack 4 bits": 0.375, "unpack 4 bits": 0.375})
    faster = frame.set_index("name").ours_faster
    tables.append(report("qgalore_integers", f"Integers of {N} x {N} numbers in groups of {GROUP}, float32", frame, {
        "rounding by chance, times as fast as with torch.rand and given scales, at least": (faster["by chance with torch.rand"], 1, faster["by chance with torch.rand"] >= 1),
        "to the nearest, times as fast as bitsandbytes' block-wise codes, at least": (faster["bitsandbytes, block-wise 8 bits"] / faster["to the nearest"], 1, faster["bitsandbytes, block-wise 8 bits"] >= faster["to the nearest"]),
        "by chance, part of copy bandwidth, at least": (1 / frame.set_index("name").of_floor["by chance"], 0.5, 1 / frame.set_index("name").of_floor["by chance"] >= 0.5)}, ("bitsandbytes",)))


def test_step(tables):
    """Between refreshes of the subspace: 28 matrices of a small transformer and its embedding."""
    shapes = 4 * [(512, 512), (512, 512), (512, 512), (512, 512), (1376, 512), (1376, 512), (512, 1376)]
    generator = torch.Generator().manual_seed(0)

    def make(kind, integers, **own):
        params = [nn.Parameter(torch.randn(s, generator=generator)) for s in shapes + [(8192, 512), (512,)]]
        if integers: params = [nn.Parameter(IntegerWeight.of(p.detach())) for p in params[:-2]] + params[-2:]
        for p in params: p.grad = torch.randn(p.shape, generator=generator)
        optimizer = kind([dict(params=params[:-2], rank=RANK, update_proj_gap=10**9, scale=0.25, **own), dict(params=params[-2:])], lr=1e-2)
        optimizer.step()
        return optimizer.step
    contenders = {"Q-GaLore, integer weights": make(QGaLoreAdamW8bit, True), "Q-GaLore, float weights": make(QGaLoreAdamW8bit, False), "GaLoreAdamW8bit": make(GaLoreAdamW8bit, False)}
    frame = ratios(side_by_side(contenders, rounds=10), "Q-GaLore, integer weights", {}, copy="GaLoreAdamW8bit").drop(columns=["words", "floor_ms", "of_floor"])
    ratio = frame.set_index("name").ours_faster["GaLoreAdamW8bit"]
    tables.append(report("qgalore_step", "Q-GaLore's step, 28 matrices of a transformer 512 wide and an embedding, rank 128", frame, {"as fast as 8-bit GaLore, though weights are quantised, at least": (ratio, 0.5, ratio >= 0.5)}))
