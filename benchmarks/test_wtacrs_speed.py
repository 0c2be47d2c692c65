"""WTA-CRS beside nn.Linear: forward and backward pass of one layer, and the sampling alone."""
import pytest
import torch
from harness import ratios, report, side_by_side
from torch import nn

from efftrain.memory.wtacrs import GradientNormCache, kept_rows, row_probabilities, sample_rows, to_wtacrs

SAMPLES, TOKENS, WIDTH, OUT, BUDGET = 32, 128, 512, 2048, 0.3


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(SAMPLES, TOKENS, WIDTH, generator=generator) * torch.rand(SAMPLES, TOKENS, 1, generator=generator)
    return x.requires_grad_(), torch.randn(SAMPLES, TOKENS, OUT, generator=generator) * torch.rand(SAMPLES, TOKENS, 1, generator=generator)**3


def test_layer_and_sampling(data, tables):
    x, z = data
    cache = GradientNormCache(SAMPLES)

    def layer(budget):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(WIDTH, OUT))
        if budget: to_wtacrs(net, budget)
        return net
    dense, sampled, cached = layer(None), layer(BUDGET), layer(BUDGET)

    def step(net, known=False):
        net.zero_grad(); x.grad = None
        if not known: net(x).backward(z); return
        with cache.batch(range(SAMPLES)): net(x).backward(z)

    def sampling():
        """What WTA-CRS does besides: probabilities from both norms, the draw, copies of the kept rows of H and of the gradient, new norms."""
        with torch.no_grad():
            rows, flat = x.reshape(-1, WIDTH), z.reshape(-1, OUT)
            where, scale = sample_rows(row_probabilities(rows, torch.linalg.vector_norm(flat, dim=-1)), kept_rows(len(rows), BUDGET))
            return rows.index_select(0, where) * scale.float()[:, None], flat.index_select(0, where)
    contenders = {"WTA-CRS 0.3": lambda: step(sampled), "WTA-CRS 0.3, cache": lambda: step(cached, True), "nn.Linear": lambda: step(dense), "sampling alone": sampling}
    frame = ratios(side_by_side(contenders, rounds=10, warmup=2), "WTA-CRS 0.3, cache", {}, copy="nn.Linear").drop(columns=["words", "floor_ms", "of_floor"])
    best = frame.set_index("name").min_ms
    of_dense = best["WTA-CRS 0.3, cache"] / best["nn.Linear"]
    overhead = best["sampling alone"] / best["nn.Linear"]
    ideal = (2 + BUDGET) / 3  # two exact products of three, and a share of the third
    torch.testing.assert_close(sampled(x), dense(x))
    tables.append(report("wtacrs_layer", f"Forward and backward pass of a linear layer {WIDTH} to {OUT}, {SAMPLES} x {TOKENS} rows, float32", frame, {
        f"time of nn.Linear that remains (products alone: {ideal:.2f}), at most": (of_dense, ideal + 0.10, of_dense <= ideal + 0.10), "sampling alone over nn.Linear, at most": (overhead, 0.10, overhead <= 0.10)}))
