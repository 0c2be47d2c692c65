"""SLTrain: a layer's forward and backward pass against a dense layer and against the matrix added up under autograd; sampled products against a dense product and a gather; memory of a training step."""
import pandas as pd
import pytest
import torch
from harness import report, side_by_side
from torch import nn

from efftrain.accounting import peak_rss
from efftrain.memory.sltrain import SLLinear, random_support

SIDE, RANK = 1024, 256


class Plain(nn.Module):
    """The same layer in the obvious way: W is added up with 64-bit indices, and autograd keeps it."""
    def __init__(self, layer: SLLinear) -> None:
        super().__init__()
        self.A, self.B, self.values = (nn.Parameter(t.detach().clone()) for t in (layer.A, layer.B, layer.values))
        self.scale = layer.scale
        self.register_buffer("indices", layer.indices.long())

    def forward(self, x):
        W = self.scale * self.B @ self.A
        return x @ W.reshape(-1).scatter_add(0, self.indices, self.values).view_as(W).T


def contenders(rows: int, density: float) -> dict:
    """name -> one forward and backward pass with gradients of weights and input."""
    torch.manual_seed(0)
    layer = SLLinear(SIDE, SIDE, RANK, density, bias=False)
    with torch.no_grad(): layer.B.normal_()
    x = torch.randn(rows, SIDE, requires_grad=True)
    upstream = torch.randn(rows, SIDE)
    def run(module):
        def step():
            module(x).backward(upstream); x.grad = None; module.zero_grad()
        return step
    def kernel(name):
        other = SLLinear(SIDE, SIDE, RANK, density, bias=False, kernel=name); other.load_state_dict(layer.state_dict()); return other
    return {"dense nn.Linear": run(nn.Linear(SIDE, SIDE, bias=False)), "SLLinear": run(layer), "SLLinear, kernel dense": run(kernel("dense")), "W kept by autograd": run(Plain(layer))}


@pytest.mark.parametrize("kind", ["dense nn.Linear", "SLLinear", "SLLinear, kernel dense"])
@pytest.mark.benchmark(group="Forward and backward, 1024 x 1024, 1024 rows")
def test_layer(benchmark, kind): benchmark.pedantic(contenders(1024, 0.03)[kind], rounds=5, warmup_rounds=1)


def test_side_by_side(tables):
    rows, reach = [], {}
    for n in (256, 1024, 4096):
        for density in (0.01, 0.03):
            times = side_by_side(contenders(n, density), rounds=6, warmup=2)
            best = times.groupby("name").seconds.min()
            rows += [dict(rows=n, density=density, name=name, min_ms=1e3 * best[name], median_ms=1e3 * times[times.name == name].seconds.median(), of_dense=best[name] / best["dense nn.Linear"]) for name in best.index]
            if density == 0.03: reach[f"{n} rows, density 0.03, of a dense layer's time, at most"] = (rows[-4 + list(best.index).index("SLLinear")]["of_dense"], 1.3, best["SLLinear"] <= 1.3 * best["dense nn.Linear"])
    tables.append(report("sltrain_layer", f"SLTrain: forward and backward pass of a {SIDE} x {SIDE} layer, rank {RANK}, float32", pd.DataFrame(rows), reach))


def test_sampled_products(tables):
    """Gradient of the values: wanted entries alone, or all of them and a gather."""
    rows, reach = [], {}
    x, dy = torch.randn(1024, SIDE), torch.randn(1024, SIDE)
    for density in (0.003, 0.01, 0.03, 0.1):
        indices = random_support(SIDE, SIDE, density)
        starts = torch.searchsorted(indices, torch.arange(SIDE + 1) * SIDE, out_int32=True)
        places = torch.sparse_csr_tensor(starts, indices % SIDE, torch.zeros(len(indices)), (SIDE, SIDE))
        sampled, gathered = lambda: torch.sparse.sampled_addmm(places, dy.T.contiguous(), x).values(), lambda: (dy.T @ x).reshape(-1).index_select(0, indices)
        torch.testing.assert_close(sampled(), gathered(), atol=1e-3, rtol=1e-3)
        best = side_by_side({"sampled": sampled, "dense and gather": gathered}, rounds=8).groupby("name").seconds.min()
        rows.append(dict(density=density, sampled_ms=1e3 * best["sampled"], dense_and_gather_ms=1e3 * best["dense and gather"], times_faster=best["dense and gather"] / best["sampled"]))
        if density <= 0.01: reach[f"density {density}, times faster than a dense product and a gather, more than"] = (rows[-1]["times_faster"], 1, rows[-1]["times_faster"] > 1)
    tables.append(report("sltrain_sampled", f"Gradient of the values of a {SIDE} x {SIDE} support, 1024 rows, float32", pd.DataFrame(rows), reach))


def test_memory(tables):
    """Resident memory that a layer and three training steps with AdamW add to a fresh process."""
    wide, rows = 4096, 256
    def step(kind):
        def setup():
            import torch
            from efftrain.memory.sltrain import SLLinear
            def run():
                module = torch.nn.Linear(wide, wide, bias=False) if kind == "dense nn.Linear" else SLLinear(wide, wide, wide // 4, 0.03, bias=False, kernel=kind)
                optimizer = torch.optim.AdamW(module.parameters())
                for _ in range(3): optimizer.zero_grad(); module(torch.ones(rows, wide)).square().mean().backward(); optimizer.step()
            return run
        return min(peak_rss(setup) for _ in range(2))
    peaks = {kind: step(kind) for kind in ("dense nn.Linear", "factored", "dense")}
    frame = pd.DataFrame([dict(name=kind if "nn" in kind else f"SLLinear, kernel {kind}", peak_MB=peak / 1e6, of_dense_layer=peak / peaks["dense nn.Linear"]) for kind, peak in peaks.items()])
    assert peaks["factored"] < peaks["dense nn.Linear"]
    tables.append(report("sltrain_memory", f"Peak memory of training a {wide} x {wide} layer, rank {wide // 4}, density 0.03, {rows} rows, float32, AdamW", frame, {f"kernel {kind}, of the dense layer's peak, less than": (peaks[kind] / peaks["dense nn.Linear"], 1, peaks[kind] < peaks["dense nn.Linear"]) for kind in ("factored", "dense")}))
