"""`sweep` where a notebook cannot go: workers that die, Ctrl-C and kill -9 of the main process, a Dask cluster, code that changes between two sweeps."""
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st

from efftrain.sweep import grid_product, sweep, tune

ENV = {**os.environ, "OMP_NUM_THREADS": "1"}
GRID = {"method": ["b", "a"], "lr": [0.3, 0.1, 0.2]}


def quick(method, lr, seed):
    """Later runs finish first."""
    time.sleep(0.06 - 0.03 * (method == "a") - 0.02 * (seed == 0))
    return pd.DataFrame({"step": [1, 2], "loss": np.float32([lr, lr / 3 + seed]), "rank": [None, 4], "note": ["", method * seed]})


def dies(lr, seed):
    if lr == 2 and seed == 0: os._exit(9)  # as when the system runs out of memory
    if lr == 2 and seed == 1: os.kill(os.getpid(), signal.SIGSEGV)
    if lr == 3: sys.exit("gives up")
    time.sleep(0.02)
    return {"loss": lr * 10 + seed}


def test_order_and_types_are_the_same_everywhere(tmp_path):
    """Here, in two processes, with a store that is new, partly full and full: one table."""
    here = sweep(quick, GRID, [1, 0], workers=1, progress=False)
    assert here[["method", "lr", "seed"]].drop_duplicates().values.tolist() == [[m, lr, s] for m in "ba" for lr in (0.3, 0.1, 0.2) for s in (1, 0)]
    assert list(here.columns) == ["method", "lr", "seed", "step", "loss", "rank", "note"] and here.attrs["failures"] == []
    there = sweep(quick, GRID, [1, 0], workers=2, progress=False)
    part = sweep(quick, {"method": "a", "lr": [0.2]}, [0], workers=1, store=tmp_path, progress=False)
    new, full = [sweep(quick, GRID, [1, 0], workers=2, store=tmp_path, progress=False) for _ in range(2)]
    for other in (there, new, full): pd.testing.assert_frame_equal(here, other, check_exact=True)
    pd.testing.assert_frame_equal(part, here[(here.method == "a") & (here.lr == 0.2) & (here.seed == 0)].reset_index(drop=True), check_dtype=False)
    assert len(list(tmp_path.iterdir())) == 12


def test_a_worker_that_dies_is_named_and_loses_nobody(tmp_path):
    """Two settings kill their process, one leaves by sys.exit: three failures with their settings, all other runs in the table and the store."""
    with pytest.warns(UserWarning, match="4 of 10 runs failed"):
        df = sweep(dies, {"lr": [0, 1, 2, 3, 4]}, [0, 1], workers=2, store=tmp_path, progress=False)
    assert df["loss"].tolist() == [0, 1, 10, 11, 40, 41] and len(list(tmp_path.iterdir())) == 6
    failures = df.attrs["failures"]
    assert [(f["setting"], f["seed"]) for f in failures] == [({"lr": 2}, 0), ({"lr": 2}, 1), ({"lr": 3}, 0), ({"lr": 3}, 1)]
    assert all("worker process died" in f["error"] for f in failures[:2]) and "SystemExit: gives up" in failures[2]["error"]
    json.dumps(failures)  # plain values: they can be written down
    df.to_parquet(tmp_path / "all.parquet")


def test_a_run_gets_one_thread_and_a_function_of_this_call():
    """In a worker and here, with globals and closures; the number of threads of this process is as it was."""
    import torch
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for workers in (1, 2):
            for offset in (10, 20):
                def run(x, seed):
                    import torch
                    return {"threads": torch.get_num_threads(), "value": x + offset + len(GRID)}
                df = sweep(run, {"x": [1, 2]}, [0], workers=workers, progress=False)
                assert df["threads"].tolist() == [1, 1] and df["value"].tolist() == [offset + 3, offset + 4]
        assert torch.get_num_threads() == 2
    finally: torch.set_num_threads(before)


def test_a_sweep_in_a_sweep():
    def outer(a, seed): return {"sum": int(sweep(lambda b, seed: {"v": a * b}, {"b": [1, 2]}, [0], workers=1, progress=False)["v"].sum())}
    for workers in (1, 2): assert sweep(outer, {"a": [1, 2]}, [0], workers=workers, progress=False)["sum"].tolist() == [3, 6]


def test_wrong_arguments_run_nothing(tmp_path):
    calls = []
    def run(lr, seed): calls.append(lr); return {"loss": lr}
    for words, kwargs in [("grid is empty", dict(grid={})), ("lr has no values", dict(grid={"lr": []})), ("grid is empty", dict(grid=[])), ("twice", dict(grid=[{"lr": 1}, {"lr": 1.0}])), ("takes no argument 'rate'", dict(grid={"rate": [1]})),
                          ("needs the argument 'lr'", dict(grid=[{}])), ("seeds is empty", dict(seeds=[])), ("one occurs twice", dict(seeds=[1, 1])), ("seeds holds 0.5", dict(seeds=[0.5])), ("seeds holds -1", dict(seeds=[-1])),
                          ("grid holds 'seed'", dict(grid={"lr": [1], "seed": [0]})), ("workers is 0", dict(workers=0)), ("give a name", dict(grid={"lr": [object()]}))]:
        with pytest.raises(ValueError, match=words): sweep(run, **{**dict(grid={"lr": [1]}, seeds=[0], workers=1, store=tmp_path / "store", progress=False), **kwargs})
    with pytest.raises(TypeError, match="run is 'train'"): sweep("train", {"lr": [1]}, [0], progress=False)
    lock = __import__("threading").Lock()
    with pytest.raises(TypeError, match="cannot be sent to another process"): sweep(lambda lr, seed: {"loss": lock}, {"lr": [1, 2]}, [0], workers=2, progress=False)
    assert calls == [] and not (tmp_path / "store").exists()


def test_rows_that_cannot_be_stored_are_a_failure(tmp_path):
    def run(lr, seed): return [{"loss": 1.0}, {"loss": "diverged" if lr == 2 else 2.0}]
    with pytest.warns(UserWarning, match="cannot be stored"): df = sweep(run, {"lr": [1, 2]}, [0], workers=1, store=tmp_path, progress=False)
    assert df["lr"].tolist() == [1, 1] and len(list(tmp_path.iterdir())) == 1


def test_a_damaged_file_is_made_again(tmp_path):
    run = lambda lr, seed: {"loss": lr}
    df = sweep(run, {"lr": [1, 2]}, [0], workers=1, store=tmp_path, progress=False)
    file = next(tmp_path.iterdir())
    os.truncate(file, 50)
    with pytest.warns(UserWarning, match="cannot be read"): assert sweep(run, {"lr": [1, 2]}, [0], workers=1, store=tmp_path, progress=False).equals(df)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sweep(run, {"lr": [1, 2]}, [0], workers=1, store=tmp_path, progress=False)


# ---------------------------------------------------------------- the main process is interrupted or killed

MAIN = """
import os, sys, time
from pathlib import Path
from efftrain.sweep import sweep

folder = Path(sys.argv[1])
def run(i, seed):
    with open(folder / "calls", "a") as f: f.write(f"{i} {os.getpid()}\\n")
    time.sleep(0.1)
    return {"square": i * i}

if __name__ == "__main__":
    try: print(sweep(run, {"i": list(range(30))}, [0], workers=2, store=folder / "store", progress=False)["square"].sum())
    except KeyboardInterrupt as stop: print("interrupted:", stop, "finished:", len(stop.finished)); sys.exit(3)
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_sweep_goes_on(tmp_path, how):
    """Ctrl-C, as a terminal sends it (to the workers too), or kill -9: finished runs are kept, nothing half-written, workers end, and the next call makes only what is missing."""
    (tmp_path / "main.py").write_text(MAIN)
    process = subprocess.Popen([sys.executable, tmp_path / "main.py", tmp_path], env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    calls, store, start = tmp_path / "calls", tmp_path / "store", time.time()
    while not (store.exists() and len(list(store.glob("*.parquet"))) >= 4) and process.poll() is None and time.time() - start < 60: time.sleep(0.01)
    os.killpg(process.pid, how) if how == signal.SIGINT else process.kill()
    out, err = process.communicate(timeout=60)
    finished = len(list(store.glob("*.parquet")))
    assert 4 <= finished < 30
    if how == signal.SIGINT:
        assert process.returncode == 3 and f"{finished} of 30 runs are finished" in out and f"finished: {finished}" in out, out + err
        assert "Traceback" not in err, "workers say nothing of it"
    for file in store.glob("*.parquet"): assert len(pd.read_parquet(file)) == 1
    workers = {int(line.split()[1]) for line in calls.read_text().splitlines()}
    deadline = time.time() + 30
    while any(Path(f"/proc/{w}").exists() and "Z" not in Path(f"/proc/{w}/stat").read_text().rpartition(")")[2].split()[0] for w in workers) and time.time() < deadline: time.sleep(0.05)
    assert time.time() < deadline, "the workers outlive the sweep"

    calls.unlink()
    done = subprocess.run([sys.executable, tmp_path / "main.py", tmp_path], env=ENV, capture_output=True, text=True)
    assert done.stdout.strip() == str(sum(i * i for i in range(30))), done.stderr
    assert len(calls.read_text().splitlines()) == 30 - finished


def test_workers_see_edited_code(tmp_path, monkeypatch):
    """Workers are kept between sweeps; when a module changes they are not, or a notebook would go on measuring the old code."""
    module = tmp_path / "experiment_under_change.py"
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    seen = []
    for version in (1, 2):
        module.write_text(f"def run(x, seed):\n    import os\n    return {{'value': x * {version}, 'process': os.getpid()}}\n")
        os.utime(module, (version * 1000, version * 1000))
        sys.modules.pop("experiment_under_change", None)
        import experiment_under_change
        for _ in range(2): seen.append(sweep(experiment_under_change.run, {"x": [1, 2, 3, 4]}, [0], workers=2, progress=False))
    assert [df["value"].tolist() for df in seen] == [[1, 2, 3, 4]] * 2 + [[2, 4, 6, 8]] * 2
    assert set(seen[0]["process"]) & set(seen[1]["process"]) and not set(seen[1]["process"]) & set(seen[2]["process"])


# ---------------------------------------------------------------- Dask

@pytest.fixture(scope="module")
def cluster():
    import logging
    from dask import config
    from dask.distributed import LocalCluster
    logging.getLogger("distributed").setLevel(logging.CRITICAL)
    with config.set({"distributed.scheduler.allowed-failures": 0}), LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster: yield cluster


def seeded(method, lr, seed):
    """Uses the random generators of its process, which two runs at a time would share."""
    import numpy as np, os, torch
    torch.manual_seed(seed); np.random.seed(seed)
    total = sum(torch.rand(100).sum().item() * lr + np.random.rand() for _ in range(100))
    return {"total": total, "threads": torch.get_num_threads(), "process": os.getpid() > 0}


def test_cluster_gives_what_this_machine_gives(cluster, tmp_path):
    here = sweep(seeded, GRID, range(3), workers=1, progress=False)
    far = sweep(seeded, GRID, range(3), cluster=cluster.scheduler_address, store=tmp_path, progress=False)
    pd.testing.assert_frame_equal(here, far, check_exact=True)
    assert len(list(tmp_path.iterdir())) == 18 and (far["threads"] == 1).all()
    from dask.distributed import Client
    with Client(cluster) as client:
        pd.testing.assert_frame_equal(here, sweep(seeded, GRID, range(3), cluster=client, progress=False), check_exact=True)
        assert client.status == "running", "a client that was given stays open"


def test_cluster_reports_failures_and_refuses_data(cluster):
    def run(lr, seed):
        if lr == 2: raise ValueError("boom")
        if lr == 3: os._exit(1)
        return {"loss": lr}
    with pytest.warns(UserWarning, match="2 of 4 runs failed"): df = sweep(run, {"lr": [1, 2, 3, 4]}, [0], cluster=cluster.scheduler_address, progress=False)
    assert df["lr"].tolist() == [1, 4]
    assert [f["error"].split(":")[0] for f in df.attrs["failures"]] == ["ValueError", "KilledWorker"] and "in run" in df.attrs["failures"][0]["traceback"]
    big = np.zeros(20 * 2**20, dtype=np.uint8)
    with pytest.raises(ValueError, match="20 MB with it .* load the data inside run"): sweep(lambda lr, seed: {"n": len(big)}, {"lr": [1]}, [0], cluster=cluster.scheduler_address, progress=False)


def test_threads_of_a_cluster_do_not_share_random_numbers():
    """A worker with four threads: its runs draw from the same generators, so they are made one at a time."""
    from dask.distributed import Client, LocalCluster
    here = sweep(seeded, GRID, range(2), workers=1, progress=False)
    with LocalCluster(n_workers=1, threads_per_worker=4, processes=False, dashboard_address=":0") as cluster, Client(cluster) as client:
        pd.testing.assert_frame_equal(here, sweep(seeded, GRID, range(2), cluster=client, progress=False), check_exact=True)


def test_no_cluster_there():
    with pytest.raises((ConnectionError, TypeError), match="cluster 'nowhere'"): sweep(seeded, GRID, [0], cluster="nowhere", progress=False)


# ---------------------------------------------------------------- properties

plain = st.one_of(st.integers(-5, 5), st.floats(allow_nan=False, allow_infinity=False), st.text(max_size=3), st.none(), st.tuples(st.integers(0, 3), st.integers(0, 3)))


@given(st.dictionaries(st.sampled_from(["a", "b", "c"]), st.lists(plain, min_size=1, max_size=4, unique=True), min_size=1))
@settings(max_examples=80, deadline=None)
def test_grid_product(grid):
    out = grid_product(grid)
    assert len(out) == np.prod([len(v) for v in grid.values()]) and all(list(s) == list(grid) for s in out)
    assert [s[next(iter(grid))] for s in out] == sorted((s[next(iter(grid))] for s in out), key=list(grid.values())[0].index), "the first name changes slowest"
    assert grid_product(out) == out


@given(st.lists(st.floats(-10, 10), min_size=12, max_size=12), st.sampled_from(["min", "max"]), st.permutations(range(12)))
@settings(max_examples=60, deadline=None)
def test_tune_finds_the_best_mean(values, mode, order):
    df = pd.DataFrame({"method": ["x"] * 6 + ["y"] * 6, "lr": [1, 1, 2, 2, 3, 3] * 2, "seed": [0, 1] * 6, "loss": values})
    best = tune(df.iloc[list(order)], "loss", "method", "lr", mode=mode).set_index("method")
    means = df.groupby(["method", "lr"])["loss"].mean().unstack()
    for method in "xy":
        assert np.isclose(best.loc[method, "loss"], means.loc[method].agg(mode)) and np.isclose(means.loc[method, best.loc[method, "lr"]], best.loc[method, "loss"])
        assert best.loc[method, "edge"] == ("" if best.loc[method, "lr"] == 2 else "lr") and best.loc[method, "seeds"] == 2


def test_tune_over_several_columns():
    df = pd.DataFrame([{"method": m, "batch": b, "lr": lr, "betas": betas, "seed": s, "loss": abs(lr - b) + (betas == (0.9, 0.99)) + (m == "b") + s} for m in "ab" for b in (1, 2) for lr in (1, 2, 3) for betas in ((0.9, 0.99), (0.9, 0.95)) for s in (0, 1)])
    best = tune(df, "loss", by=["method", "batch"], over=["lr", "betas"])
    assert best[["method", "batch", "lr", "betas"]].values.tolist() == [["a", 1, 1, (0.9, 0.95)], ["a", 2, 2, (0.9, 0.95)], ["b", 1, 1, (0.9, 0.95)], ["b", 2, 2, (0.9, 0.95)]]
    assert best["edge"].tolist() == ["lr", "", "lr", ""]
    again = grid_product(best[["method", "batch", "lr", "betas"]].to_dict("records"))
    assert again[0] == {"method": "a", "batch": 1, "lr": 1, "betas": (0.9, 0.95)} and type(again[0]["lr"]) is int
