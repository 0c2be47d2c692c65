"""Pruning without retraining: 3M and 100M parameters in seconds, selections and SparseGPT beside the published loops, and what memory it takes."""
import copy
import time

import pandas as pd
import pytest
import torch
from harness import report, side_by_side

from efftrain.accounting import peak_rss
from efftrain.compress.gblm import prune
from efftrain.compress.gblm_selection import nm_mask, row_mask
from efftrain.compress.gblm_sparsegpt import sparsegpt
from efftrain.models import llama

SMALL = dict(dim=192, layers=4, vocab=4096, length=128)  # the checkpoint's sizes
LARGE = dict(dim=768, layers=12, vocab=8192, heads=12, length=128)  # 85M in the blocks, 6M in the embedding, tied
METHODS = ("magnitude", "wanda", "gblm", "sparsegpt")


def tokens(rows, vocab, length=128): return [torch.randint(0, vocab, (8, length), generator=torch.Generator().manual_seed(i)) for i in range(rows // 8)]


def rows_by_sort(s, share):
    """The published selection by rows: a full stable sort, then scatter."""
    gone = torch.zeros_like(s, dtype=torch.bool)
    return ~gone.scatter_(1, torch.sort(s, dim=-1, stable=True)[1][:, :int(s.shape[1] * share)], True)


def groups_by_loop(s, n, m):
    """The published selection of n:m groups: a loop over groups of columns."""
    gone = torch.zeros_like(s, dtype=torch.bool)
    for c in range(0, s.shape[1], m): gone.scatter_(1, c + torch.topk(s[:, c:c + m], n, dim=1, largest=False)[1], True)
    return ~gone


def sparsegpt_by_columns(w, h, share, damping=0.01, block_size=128):
    """The algorithm of Frantar & Alistarh on row-major weights, as published implementations are written: the column is a strided view, its update a new outer product."""
    w, h = w.clone(), h.clone()
    h.diagonal().add_(damping * h.diagonal().mean())
    r = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    for start in range(0, w.shape[1], block_size):
        stop = min(start + block_size, w.shape[1])
        block, local = w[:, start:stop].clone(), r[start:stop, start:stop]
        out, errors = torch.zeros_like(block), torch.zeros_like(block)
        s = block**2 / local.diagonal()[None]**2
        gone = s <= s.flatten().sort()[0][int(s.numel() * share) - 1]
        for j in range(stop - start):
            column = block[:, j]
            kept = column.clone(); kept[gone[:, j]] = 0
            out[:, j] = kept
            e = (column - kept) / local[j, j]
            block[:, j:] -= e[:, None] @ local[j, j:][None]
            errors[:, j] = e
        w[:, start:stop] = out
        w[:, stop:] -= errors @ r[start:stop, stop:]
    return w


def pruning(config, rows, method):
    """A function that prunes a fresh random model once; making the model is not timed by the caller (it copies weights back)."""
    model, data = llama(**config), tokens(rows, config["vocab"])
    weights = copy.deepcopy(model.state_dict())
    def once():
        model.load_state_dict(weights)
        prune(model, data, method, 0.5)
    return once


def peak_of(method):
    """Set-up for `peak_rss`: pruning of a model with one block and of one with four must differ by little more than hidden states (and, for GBLM, its norms)."""
    def make(layers):
        def setup():
            import torch
            from efftrain.compress.gblm import prune
            from efftrain.models import llama
            torch.set_num_threads(1)
            model, data = llama(512, layers, 512, heads=8, length=64), [torch.randint(0, 512, (4, 64))]
            prune(llama(64, 2), [torch.randint(0, 512, (2, 16))], method, 0.5)  # first use of everything
            return lambda: prune(model, data, method, 0.5)
        return setup
    return make


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.benchmark(group="Pruning, 2.6M parameters, 64 x 128 tokens")
def test_small(benchmark, method): benchmark.pedantic(pruning(SMALL, 64, method), rounds=3, warmup_rounds=1)


def test_side_by_side(tables):
    g = torch.Generator().manual_seed(0)
    s, w, x = torch.rand(2048, 2048, generator=g), torch.randn(1024, 1024, generator=g), torch.randn(4096, 1024, generator=g)
    h = x.t() @ x
    assert torch.equal(rows_by_sort(s, 0.5), row_mask(s, 0.5)) and torch.equal(groups_by_loop(s, 2, 4), nm_mask(s, 2, 4))
    ours, theirs = sparsegpt(w, h, 0.5)[0], sparsegpt_by_columns(w, h, 0.5)
    assert ((ours == 0) != (theirs == 0)).float().mean() < 1e-3, "the same algorithm"
    parts = side_by_side({"rows, full sort": lambda: rows_by_sort(s, 0.5), "rows": lambda: row_mask(s, 0.5), "2:4, loop over columns": lambda: groups_by_loop(s, 2, 4), "2:4": lambda: nm_mask(s, 2, 4),
                          "4:8, loop over columns": lambda: groups_by_loop(s, 4, 8), "4:8": lambda: nm_mask(s, 4, 8), "SparseGPT, strided columns": lambda: sparsegpt_by_columns(w, h, 0.5), "SparseGPT": lambda: sparsegpt(w, h, 0.5)}, rounds=6, warmup=1)
    small = side_by_side({f"2.6M, {m}": pruning(SMALL, 64, m) for m in METHODS}, rounds=3, warmup=1)
    large = []
    for method in METHODS:  # one at a time: four models of 400 MB are not kept together
        once = pruning(LARGE, 16, method)
        begin = time.perf_counter(); once(); large.append(dict(round=0, name=f"91M, {method}", seconds=time.perf_counter() - begin))
        del once
    times = pd.concat([parts, small, pd.DataFrame(large)])
    best, middle = (times.groupby("name", sort=False).seconds.agg(how) for how in ("min", "median"))
    peaks = {(m, n): min(peak_rss(peak_of(m)(n)) for _ in range(2)) / 2**20 for m in ("wanda", "gblm") for n in (1, 4)}
    block = 4 * (4 * 512**2 + 3 * 512 * 1368) / 2**20  # MiB of one block's weights
    frame = pd.DataFrame([dict(name=n, min_ms=1e3 * best[n], median_ms=1e3 * middle[n]) for n in best.index] + [dict(name=f"peak MiB, {m}, {n} blocks of {block:.0f} MiB", min_ms=v, median_ms=None) for (m, n), v in peaks.items()])
    ratio = lambda slow, fast: best[slow] / best[fast]
    growth = (peaks["wanda", 4] - peaks["wanda", 1]) / block
    tables.append(report("gblm", "Pruning without retraining", frame, {
        "selection by rows, times faster than a full sort, at least": (ratio("rows, full sort", "rows"), 2, ratio("rows, full sort", "rows") >= 2),
        "2:4, times faster than the loop over columns, at least": (ratio("2:4, loop over columns", "2:4"), 1.5, ratio("2:4, loop over columns", "2:4") >= 1.5),
        "4:8, times faster than the loop over columns, at least": (ratio("4:8, loop over columns", "4:8"), 1, ratio("4:8, loop over columns", "4:8") >= 1),
        "SparseGPT, times faster than with strided columns, at least": (ratio("SparseGPT, strided columns", "SparseGPT"), 1.5, ratio("SparseGPT, strided columns", "SparseGPT") >= 1.5),
        "Wanda on 91M parameters and 2,048 tokens, seconds, at most": (best["91M, wanda"], 60, best["91M, wanda"] <= 60),
        "GBLM on 91M parameters, times Wanda's, at most": (ratio("91M, gblm", "91M, wanda"), 3, ratio("91M, gblm", "91M, wanda") <= 3),
        "SparseGPT on 91M parameters, seconds, at most": (best["91M, sparsegpt"], 120, best["91M, sparsegpt"] <= 120),
        "memory that Wanda adds for three more blocks, in blocks, at most (3 if it kept something of each)": (growth, 1, growth <= 1)}))
