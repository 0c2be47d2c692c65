"""JLCM: one-dimensional k-means beside scikit-learn, decoding and decoded products beside dense ones, and the learning of one layer."""
import numpy as np
import pandas as pd
import pytest
import torch
from harness import report, side_by_side
from sklearn.cluster import KMeans
from torch import nn
from torch.nn import functional as F

from efftrain.compress.jlcm_codebook import kmeans_1d, quantize
from efftrain.compress.jlcm_mapping import RULES, learn_layer

SIZE, VALUES, ENTRIES = 1024, 1_000_000, 8
BITS = (2, 3, 4, 8)


def values(n: int = VALUES): return np.random.default_rng(0).standard_t(4, n)


def cost(x, centers, labels): return float(((x - centers[labels])**2).sum())


def products(batch: int) -> dict:
    """Dense product, decoded products, and decoding alone (writing the weight), for a layer of SIZE x SIZE."""
    torch.manual_seed(0)
    dense, x = nn.Linear(SIZE, SIZE), torch.randn(batch, SIZE)
    layers = {b: quantize(dense, b, row_groups=torch.arange(SIZE) * 4 // SIZE) for b in BITS}
    out = {f"dense, batch {batch}": lambda: F.linear(x, dense.weight, dense.bias)}
    for b, layer in layers.items():
        out[f"{b} bits, batch {batch}"] = lambda layer=layer: layer(x)
        if batch == 1: out[f"{b} bits, decode"] = layer.decode
    return out


def learners() -> dict:
    """20 steps of learning a layer of 256 x 256, 3 bits, by each rule; and the k-means start alone."""
    generator = torch.Generator().manual_seed(0)
    w, x = torch.randn(256, 256, generator=generator), torch.randn(512, 256, generator=generator)
    gram = x.T @ x
    return {"k-means start, 65,536 weights": lambda: learn_layer(w, gram, bits=3, steps=0), **{f"20 steps, {r}": lambda r=r: learn_layer(w, gram, bits=3, rule=r, steps=20) for r in RULES}}


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.benchmark(group="Decoding, 1M weights")
def test_decode(benchmark, bits):
    with torch.no_grad(): benchmark.pedantic(quantize(nn.Linear(SIZE, SIZE), bits).decode, rounds=10, warmup_rounds=2)


@pytest.mark.benchmark(group="k-means, 1M values")
def test_kmeans(benchmark):
    x = values()
    benchmark.pedantic(lambda: kmeans_1d(x, ENTRIES, bins=1024), rounds=3, warmup_rounds=1)


def test_side_by_side(tables):
    x = values()
    found = {}
    def ours(): found["ours"] = kmeans_1d(x, ENTRIES, bins=1024)
    def peer(): found["peer"] = KMeans(ENTRIES, n_init=1, random_state=0).fit(x[:, None])
    def exact(): found["exact"] = kmeans_1d(x, ENTRIES)
    with torch.no_grad():
        times = [side_by_side({**products(1), **products(64)}, rounds=20), side_by_side({"k-means, 1M values": ours, "scikit-learn, one start": peer, "k-means, 1M values, exact": exact}, rounds=2, warmup=0), side_by_side(learners(), rounds=5, warmup=1)]
    best, middle = (pd.concat(times).groupby("name").seconds.agg(how) for how in ("min", "median"))
    against = lambda n: best[f"dense, {n.split(', ')[1]}"] if "batch" in n else best["dense, batch 1"] if "decode" in n else best["k-means, 1M values"] if n.startswith(("k-means, 1M", "scikit")) else best["20 steps, proximal"]
    frame = pd.DataFrame([dict(name=n, min_ms=1e3 * best[n], median_ms=1e3 * middle[n], ratio=best[n] / against(n), weights_a_second=SIZE**2 / best[n] if "decode" in n else None) for n in best.index])
    excess_peer, excess = found["peer"].inertia_ / cost(x, *found["exact"]), cost(x, *found["ours"]) / cost(x, *found["exact"])
    tables.append(report("jlcm", "JLCM: k-means in one dimension, decoding, learning", frame, {
        "k-means of 1M values, seconds, at most": (best["k-means, 1M values"], 2, best["k-means, 1M values"] <= 2),
        "k-means against scikit-learn with one start, time, at most": (best["k-means, 1M values"] / best["scikit-learn, one start"], 1, best["k-means, 1M values"] <= best["scikit-learn, one start"]),
        "k-means with bins, cost over the exact optimum, at most": (excess, 1.0001, excess <= 1.0001),
        "scikit-learn, cost over the exact optimum, at least": (excess_peer, 1 - 1e-9, excess_peer >= 1 - 1e-9),
        "2 bits, batch 64, decoded over dense, at most": (best["2 bits, batch 64"] / best["dense, batch 64"], 3, best["2 bits, batch 64"] <= 3 * best["dense, batch 64"])}, ("scikit-learn",)))
    assert excess <= 1.0001 and excess_peer >= 1 - 1e-9
