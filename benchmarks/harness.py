"""Time steps of optimizers side by side, in one process, against the time that memory needs.

A benchmark file makes a dict of contenders (name -> function that takes one step), hands it to `side_by_side`, and writes the outcome with `report`.
Contenders take turns, so that a busy moment of the machine hits all of them; a contender's time is the minimum over the rounds (what it costs when nothing
disturbs), and the median over rounds stands beside it. Ratios are what counts: absolute times belong to the machine named in the report.
"""
import gc
import json
import os
import platform
import statistics
import time
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import torch
from torch import nn

RESULTS = Path(__file__).parent / "results"

# a transformer of 25 million parameters: embedding, six blocks, output layer, and the small tensors (norms, biases) that every real model has
SHAPES = [(8192, 512)] + 6 * [(512, 512), (512, 512), (512, 512), (512, 512), (2048, 512), (512, 2048), (2048,), (512,), (512,), (512,)] + [(4096, 512), (512,)]


def parameters(shapes: list[tuple] = SHAPES, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[nn.Parameter]:
    """Parameters of these shapes with random values and gradients."""
    generator = torch.Generator().manual_seed(seed)
    out = [nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]
    for p in out: p.grad = torch.randn(p.shape, generator=generator).to(dtype)
    return out


def count(shapes: list[tuple] = SHAPES) -> int:
    """How many numbers these shapes hold."""
    return sum(torch.Size(s).numel() for s in shapes)


def copy_of(n: int, dtype: torch.dtype = torch.float32):
    """A contender that copies n numbers: two words a number through memory. The floor of an optimizer that moves w words a parameter is w/2 of its time."""
    source, target = torch.randn(n).to(dtype), torch.empty(n, dtype=dtype)
    return lambda: target.copy_(source)


def side_by_side(contenders: dict, rounds: int = 20, warmup: int = 3) -> pd.DataFrame:
    """Seconds of each contender in each round: columns round, name, seconds. Contenders take turns; the order rotates with the round."""
    for _ in range(warmup):
        for step in contenders.values(): step()
    names, rows = list(contenders), []
    gc.collect(); gc.disable()
    try:
        for r in range(rounds):
            for name in names[r % len(names):] + names[:r % len(names)]:
                start = time.perf_counter()
                contenders[name]()
                rows.append(dict(round=r, name=name, seconds=time.perf_counter() - start))
    finally: gc.enable()
    return pd.DataFrame(rows)


def ratios(times: pd.DataFrame, ours: str, words: dict, copy: str = "copy") -> pd.DataFrame:
    """One row a contender: min_ms, median_ms, words a parameter, floor_ms (from the copy), of_floor, and how many times faster `ours` is (by minima and by medians).

    `words`: words that each contender must move for a parameter; contenders that are absent there get no floor.
    """
    best, middle = times.groupby("name").seconds.min(), times.groupby("name").seconds.median()
    rows = []
    for name in times.name.unique():
        floor = best[copy] * words[name] / 2 if name in words else float("nan")
        rows.append(dict(name=name, min_ms=1e3 * best[name], median_ms=1e3 * middle[name], words=words.get(name), floor_ms=1e3 * floor, of_floor=best[name] / floor,
                         ours_faster=best[name] / best[ours], ours_faster_median=middle[name] / middle[ours]))
    return pd.DataFrame(rows)


def machine() -> str:
    """One line about where this ran."""
    cpu = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), platform.processor()) if Path("/proc/cpuinfo").exists() else platform.processor()
    load = f", load {os.getloadavg()[0]:.1f} at the end" if hasattr(os, "getloadavg") else ""
    return f"{cpu}, {torch.get_num_threads()} threads of {os.cpu_count()} CPUs, {torch.backends.cpu.get_cpu_capability()}, Python {platform.python_version()}, torch {torch.__version__}{load}"


def markdown(frame: pd.DataFrame) -> str:
    """A frame as a Markdown table, numbers to three digits."""
    cell = lambda v: "" if v is None or v != v else f"{v:.3g}" if isinstance(v, float) else str(v)
    lines = ["| " + " | ".join(frame.columns) + " |", "|" + "---|" * len(frame.columns)]
    return "\n".join(lines + ["| " + " | ".join(cell(v) for v in row) + " |" for row in frame.itertuples(index=False)])


def report(name: str, title: str, frame: pd.DataFrame, reach: dict, packages: tuple = ()) -> str:
    """Write results/<name>.json and .md and return the Markdown. `reach`: statement -> (measured, bound, reached)."""
    versions = {p: version(p) for p in packages}
    goals = [dict(to_reach=k, measured=float(v), bound=float(b), reached=bool(ok)) for k, (v, b, ok) in reach.items()]
    text = "\n\n".join([f"# {title}", f"{machine()}" + "".join(f", {p} {v}" for p, v in versions.items()) + ".", markdown(frame), markdown(pd.DataFrame([{**g, "reached": "yes" if g["reached"] else "no"} for g in goals])),
                        "Times are minima over rounds in which the contenders take turns. `floor_ms`: time in which a plain copy moves as many words; a copy pays for fetching "
                        "the lines that it overwrites, an in-place update does not, so values below 1 are possible. `ours_faster`: this row's time over ours."]) + "\n"
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.md").write_text(text)
    (RESULTS / f"{name}.json").write_text(json.dumps({"machine": machine(), "versions": versions, "rows": json.loads(frame.to_json(orient="records")), "reach": goals}, indent=1) + "\n")
    return text
