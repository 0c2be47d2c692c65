"""A step of tpSGD beside a step of backpropagation on the same network: an MLP of depth 6, deeper ones, and a small convolutional network; time and memory in one run.

tpSGD does two of backpropagation's three matrix products a layer and builds no graph. The peer is PyTorch's autograd with its own SGD, foreach and fused.
"""
import json

import pandas as pd
import pytest
import torch
from harness import RESULTS, machine, markdown, side_by_side
from torch import nn
from torch.nn import functional as F

from efftrain.accounting import peak_rss
from efftrain.optim.tpsgd import TPSGD, drtp, peak_bytes
from efftrain.optim.tpsgd_feedback import Feedback

BATCH = 256


def mlp(depth, width=256):
    torch.manual_seed(0)
    sizes = [784] + depth * [width]
    return nn.Sequential(*[m for a, b in zip(sizes, sizes[1:]) for m in (nn.Linear(a, b), nn.Tanh())], nn.Linear(width, 10)), torch.randn(BATCH, 784)


def cnn():
    torch.manual_seed(0)
    channels = (1, 16, 32, 64)
    return nn.Sequential(*[m for a, b in zip(channels, channels[1:]) for m in (nn.Conv2d(a, b, 3, 2, 1), nn.Tanh())], nn.Flatten(), nn.Linear(1024, 10)), torch.randn(BATCH, 1, 28, 28)


NETWORKS = {"MLP, depth 2": lambda: mlp(2), "MLP, depth 6": lambda: mlp(6), "MLP, depth 12": lambda: mlp(12), "CNN": cnn}
Y = torch.randint(10, (BATCH,), generator=torch.Generator().manual_seed(0))


def autograd(net, x, **options):
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, **options)

    def step():
        F.cross_entropy(net(x), Y).backward()
        optimizer.step(); optimizer.zero_grad()
    return step


def local(make, net, x):
    trainer = make(net, lr=1e-3)
    return lambda: trainer.fit_batch(x, Y)


METHODS = {"tpSGD": lambda n, x: local(TPSGD, n, x), "tpSGD, torch SGD": lambda n, x: local(lambda n, lr: TPSGD(n, lr=lr, optimizer=torch.optim.SGD), n, x), "DRTP": lambda n, x: local(drtp, n, x),
           "backpropagation, foreach": lambda n, x: autograd(n, x, foreach=True), "backpropagation, fused": lambda n, x: autograd(n, x, fused=True),
           "feedback alignment": lambda n, x: local(lambda n, lr: Feedback(n, lr=lr, rule="fa"), n, x), "direct feedback": lambda n, x: local(lambda n, lr: Feedback(n, lr=lr, rule="dfa"), n, x)}
PEERS = ("backpropagation, foreach", "backpropagation, fused")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.benchmark(group="tpSGD, MLP of depth 6")
def test_step(benchmark, method):
    benchmark.pedantic(METHODS[method](*mlp(6)), rounds=10, warmup_rounds=3)


def test_side_by_side(tables):
    rows = []
    for network, make in NETWORKS.items():
        steps, peaks = {}, {}
        for method, contender in METHODS.items():
            net, x = make()
            steps[method] = contender(net, x); steps[method]()
            peaks[method] = peak_bytes(steps[method], [x, Y, *net.parameters()])
        times = side_by_side(steps, rounds=20)
        best, middle = times.groupby("name").seconds.min(), times.groupby("name").seconds.median()
        peer = min(best[p] for p in PEERS)
        rows += [dict(network=network, method=m, min_ms=1e3 * best[m], median_ms=1e3 * middle[m], of_backpropagation=best[m] / peer, peak_mb=peaks[m] / 2**20) for m in METHODS]
    frame = pd.DataFrame(rows)
    six = frame[frame.network == "MLP, depth 6"].set_index("method")
    peak = frame[frame.method == "tpSGD"].set_index("network").peak_mb
    reach = [dict(to_reach="step of tpSGD over backpropagation's faster one, MLP of depth 6, at most", measured=float(six.of_backpropagation["tpSGD"]), bound=0.8), dict(to_reach="peak memory of tpSGD over backpropagation's, MLP of depth 6, below", measured=float(six.peak_mb["tpSGD"] / six.peak_mb[list(PEERS)].min()), bound=1.0),
             dict(to_reach="peak memory of tpSGD, depth 12 over depth 6, at most", measured=float(peak["MLP, depth 12"] / peak["MLP, depth 6"]), bound=1.01)]
    for r in reach: r["reached"] = r["measured"] <= r["bound"]
    text = "\n\n".join([f"# A step of tpSGD beside backpropagation, batch {BATCH}, float32", machine() + ".", markdown(frame), markdown(pd.DataFrame([{**r, "reached": "yes" if r["reached"] else "no"} for r in reach])),
                        "Times are minima over rounds in which the contenders take turns. `of_backpropagation`: over the faster of the two backpropagation rows. `peak_mb`: most bytes alive at once in a step beyond weights and batch."]) + "\n"
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "tpsgd.md").write_text(text)
    (RESULTS / "tpsgd.json").write_text(json.dumps({"machine": machine(), "rows": json.loads(frame.to_json(orient="records")), "reach": reach}, indent=1) + "\n")
    tables.append(text)

