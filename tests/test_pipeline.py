"""The pipeline itself, on a small project of its own: what re-runs, what does not, and what a failing or killed figure leaves behind."""
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from efftrain.datasets import project_root

ROOT = project_root()
BIN = Path(sys.executable).parent
ENV = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}

SETUP = """
import matplotlib; matplotlib.use("Agg")
import matplotlib.pyplot as plt
from efftrain.claims import Claim
from efftrain.figures import save, style
from efftrain.optim.demo import value
"""
BODY = """
style()
fig, ax = plt.subplots(); ax.plot([0, steps], [0, value()])
claim = Claim("big", "the value is big", 1, "nowhere", dict(mean=value(), low=value(), high=value(), n=1), rule="low > 1")
save("demo", fig, [claim], caption=f"{steps} steps", out=out)
"""


def notebook(*cells, parameters="steps = 1\nout = 'build/smoke'"):
    code = lambda i, text, tags=(): {"cell_type": "code", "id": f"c{i}", "execution_count": None, "outputs": [], "metadata": {"tags": list(tags)} if tags else {}, "source": text}
    return json.dumps({"nbformat": 4, "nbformat_minor": 5, "metadata": {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}},
                       "cells": [code(0, SETUP), code(1, parameters, ["parameters"])] + [code(i + 2, c) for i, c in enumerate(cells)]})


def command(project, *words, check=True):
    done = subprocess.run([sys.executable, "-m", *words], cwd=project, env={**ENV, "PYTHONPATH": str(project)}, capture_output=True, text=True)
    if check and done.returncode: raise AssertionError(f"{words} failed:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return done


def repro(project, *words, check=True):
    done = command(project, "dvc", "repro", *words, check=check)
    return [line.split("'")[1] for line in done.stdout.splitlines() if line.startswith("Running stage")], done


def figure_bytes(project):
    return {p.name: p.read_bytes() for p in sorted((project / "paper_figures").glob("demo.*"))}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A project with one paper, `demo`, whose stages are those of the real dvc.yaml; its figure has been made once."""
    root = tmp_path_factory.mktemp("project")
    for name in ("settings.ini", ".dvcignore"): shutil.copy(ROOT / name, root)
    shutil.copytree(ROOT / "efftrain", root / "efftrain", ignore=shutil.ignore_patterns("__pycache__"))
    for folder in ("nbs/figures", "nbs/checkpoints", "params", "data", "paper_figures"): (root / folder).mkdir(parents=True)
    (root / "nbs/checkpoints/keep.txt").touch(); (root / "data/x.txt").write_text("1")
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())
    for group in ("checkpoint", "sweep"): stages["stages"].pop(group)
    stages["stages"]["gallery"]["deps"] = [d for d in stages["stages"]["gallery"]["deps"] if not d.startswith("paper_figures")] + ["paper_figures/demo.json"]
    (root / "dvc.yaml").write_text(yaml.safe_dump(stages))
    entry = dict(title="Demo", authors="Nobody", year=2024, arxiv="2401.00001", family="optim", code="none", needs="data")
    (root / "papers.yaml").write_text(yaml.safe_dump({"papers": {"demo": entry}, "overviews": {}}))
    (root / "efftrain/optim").mkdir(exist_ok=True)
    (root / "efftrain/optim/__init__.py").touch()
    (root / "efftrain/optim/demo.py").write_text('"""Prose."""\ndef value():\n    return 2.0\n')
    (root / "params/demo.yaml").write_text("steps: 10\nout: paper_figures\n")
    (root / "nbs/figures/demo.ipynb").write_text(notebook(BODY))
    command(root, "dvc", "init", "--no-scm", "--quiet")
    ran, _ = repro(root)
    assert ran == ["code", "figure@demo", "gallery"]
    return root


def test_nothing_to_do_after_a_run(project):
    assert repro(project, "--dry")[0] == []
    assert json.loads((project / "paper_figures/demo.json").read_text())["claims"][0]["verdict"] == "reproduced"
    assert "| the value is big |" in (project / "paper_figures/README.md").read_text()


def test_prose_reruns_nothing_and_code_reruns_the_figure(project):
    module = project / "efftrain/optim/demo.py"
    module.write_text('"""Better prose."""\ndef value():\n    # and a reason\n    return 2.0\n')
    assert "figure@demo" not in repro(project)[0]
    other = project / "efftrain/optim/other.py"; other.write_text("x = 1\n")
    assert "figure@demo" not in repro(project)[0], "a module that the figure does not use"
    module.write_text('def value():\n    return 3.0\n')
    assert "figure@demo" in repro(project)[0]
    assert json.loads((project / "paper_figures/demo.json").read_text())["measured"]["big"]["mean"] == 3.0


def test_a_raising_figure_fails_keeps_its_log_and_the_old_figure(project):
    book = project / "nbs/figures/demo.ipynb"
    before, good = figure_bytes(project), book.read_text()
    book.write_text(notebook("raise RuntimeError('diverged at step 7')", BODY))
    try:
        ran, done = repro(project, check=False)
        assert done.returncode and "figure@demo" in ran
        assert "diverged at step 7" in (project / "build/figures/demo.ipynb").read_text(), "the executed notebook shows where"
        assert figure_bytes(project) == before and set(before) == {"demo.json", "demo.png", "demo.svg"}
    finally: book.write_text(good)


@pytest.mark.parametrize("text, said", [("step: 10\nout: paper_figures\n", "unknown ['step'], missing ['steps']"), ("steps: [1]\nout: paper_figures\n", "parameters are flat")])
def test_a_wrong_parameter_stops_before_anything_runs(project, text, said):
    params = project / "params/demo.yaml"
    before, good = figure_bytes(project), params.read_text()
    params.write_text(text)
    try:
        _, done = repro(project, check=False)
        assert done.returncode and said in done.stderr + done.stdout and figure_bytes(project) == before
    finally: params.write_text(good)


def test_an_unknown_paper_is_named(project):
    before = figure_bytes(project)
    done = command(project, "efftrain.pipeline", "figures", "dmo", check=False)
    assert done.returncode == 2 and "unknown paper 'dmo'; did you mean demo?" in done.stderr and figure_bytes(project) == before


def test_one_figure_again_and_the_table(project):
    done = command(project, "efftrain.pipeline", "figures", "--force", "demo")
    assert "demo    regenerated  big: reproduced" in done.stdout
    done = command(project, "efftrain.pipeline", "figures")
    assert "up to date" in done.stdout and "make figure PAPER=" in done.stdout


KILLED = """
import os, signal, sys
import matplotlib; matplotlib.use("Agg")
import matplotlib.pyplot as plt
import efftrain.figures as figures
from efftrain.claims import Claim
target, at = sys.argv[1], int(sys.argv[2])
calls = 0
def dying(original):
    def call(*args):
        global calls
        calls += 1
        if calls == at: os.kill(os.getpid(), signal.SIGKILL)
        return original(*args)
    return call
figures._write, os.replace = dying(figures._write), dying(os.replace)
fig, ax = plt.subplots(); ax.plot([0, 1], [0, 2])
figures.save("demo", fig, [Claim("c", "s", 1, "t", dict(low=2.0), rule="low > 1", kind="exact")], caption="new", out=target)
"""


@pytest.mark.parametrize("at", [1, 3, 4, 5, 6])
def test_a_kill_while_saving_leaves_whole_files(tmp_path, at):
    old = {"demo.json": b'{"old": 1}', "demo.png": b"old png", "demo.svg": b"<svg>old</svg>"}
    for name, content in old.items(): (tmp_path / name).write_bytes(content)
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), str(at)], cwd=ROOT, env=ENV, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    now = {p.name: p.read_bytes() for p in tmp_path.glob("demo.*")}
    assert set(now) == set(old)
    for name, content in now.items():
        whole = content == old[name] or (name == "demo.json" and json.loads(content)["caption"] == "new") or (name == "demo.png" and content.endswith(b"IEND\xaeB`\x82")) or (name == "demo.svg" and content.rstrip().endswith(b"</svg>"))
        assert whole, f"{name} is torn"
    if at <= 4: assert now == old, "killed before the first rename: nothing has changed"
