"""One contract over every entry of papers.yaml: a paper is whole or the suite says what is missing."""
import ast
import csv
import importlib
import inspect
import json
import subprocess

import pytest
import yaml

from efftrain.claims import KINDS, VERDICTS, verdict
from efftrain.datasets import project_root
from efftrain.fingerprint import fingerprint, import_closure, notebook_code
from efftrain.pipeline import check_params, figure_stages, overviews, papers

ROOT = project_root()
PAPERS, OVERVIEWS = papers(ROOT), overviews(ROOT)
TRACKED = set(subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines())
every_paper = pytest.mark.parametrize("id", PAPERS)
every_figure = pytest.mark.parametrize("id", [*PAPERS, *OVERVIEWS])


def _needed(id):
    technique = [f"nbs/{PAPERS[id]['family']}/{id}.ipynb", f"efftrain/{PAPERS[id]['family']}/{id}.py"] if id in PAPERS else []
    return [*technique, f"nbs/figures/{id}.ipynb", f"params/{id}.yaml", f"paper_figures/{id}.svg", f"paper_figures/{id}.png", f"paper_figures/{id}.json"]


@every_figure
def test_all_files_are_there_and_in_git(id):
    missing = [f for f in _needed(id) if not (ROOT / f).is_file()]
    assert not missing, f"paper {id} is not whole, missing: {', '.join(missing)}"
    untracked = [f for f in _needed(id) if f not in TRACKED]
    assert not untracked, f"paper {id}: not in git: {', '.join(untracked)}"


@every_paper
def test_every_public_name_is_documented_and_typed(id):
    module = importlib.import_module(f"efftrain.{PAPERS[id]['family']}.{id}")
    assert module.__all__, f"{module.__name__} exports nothing"
    for name in module.__all__:
        value = getattr(module, name)
        if not (inspect.isclass(value) or inspect.isfunction(value)): continue
        assert inspect.getdoc(value), f"{module.__name__}.{name} has no docstring"
        members = {name: value} if inspect.isfunction(value) else {f"{name}.{k}": v for k, v in vars(value).items() if inspect.isfunction(v) and not k.startswith("_")}
        for label, function in members.items():
            assert inspect.getdoc(function), f"{module.__name__}.{label} has no docstring"
            untyped = [p.name for p in inspect.signature(function).parameters.values()
                       if p.annotation is p.empty and p.name not in ("self", "cls") and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
            assert not untyped, f"{module.__name__}.{label}: no type hint for {', '.join(untyped)}"


@every_paper
def test_technique_notebook_exports_and_tests(id):
    source = notebook_code(ROOT / "nbs" / PAPERS[id]["family"] / f"{id}.ipynb")
    assert f"#| default_exp {PAPERS[id]['family']}.{id}" in source
    checks = sum(isinstance(n, ast.Assert) or (isinstance(n, ast.Call) and ast.unparse(n.func).startswith(("test_", "torch.testing", "np.testing"))) for n in ast.walk(ast.parse(source)))
    assert checks >= 5, f"the technique notebook of {id} has {checks} checks; each exported cell wants one that can fail"


@every_figure
def test_parameters_fit_the_notebook(id):
    check_params(ROOT / f"nbs/figures/{id}.ipynb", ROOT / f"params/{id}.yaml")
    given = yaml.safe_load((ROOT / f"params/{id}.yaml").read_text())
    assert given["out"] == "paper_figures", f"params/{id}.yaml must write to paper_figures"
    assert 'out = "build/smoke"' in notebook_code(ROOT / f"nbs/figures/{id}.ipynb"), f"the smoke run of {id} must write to build/smoke, not over the real figure"
    assert "#| default_exp" not in notebook_code(ROOT / f"nbs/figures/{id}.ipynb"), "a figure notebook exports nothing"


@every_figure
def test_claims_hold_what_a_reader_needs(id):
    result = json.loads((ROOT / f"paper_figures/{id}.json").read_text())
    assert result["id"] == id and result["caption"] and result["claims"]
    for claim in result["claims"]:
        where = f"paper_figures/{id}.json, claim {claim['id']}"
        for field in ("statement", "published", "source", "rule"): assert claim[field] not in ("", None), f"{where}: {field} is empty"
        assert claim["kind"] in KINDS and claim["verdict"] in VERDICTS, where
        if claim["kind"] != "exact": assert {"mean", "low", "high"} <= set(claim["measured"]), f"{where}: no interval"
        assert verdict(claim) == claim["verdict"], f"{where}: the stored verdict is {claim['verdict']!r}, its rule gives {verdict(claim)!r}"


@every_figure
def test_fingerprint_covers_what_the_figure_imports(id):
    stored = ROOT / f"build/code/{id}.json"
    current = fingerprint(ROOT / f"nbs/figures/{id}.ipynb", ROOT)
    if id in PAPERS: assert f"efftrain.{PAPERS[id]['family']}.{id}" in current["modules"] or PAPERS[id]["needs"].startswith("sweeps/"), f"figure {id} does not use its own module"
    closure = import_closure(notebook_code(ROOT / f"nbs/figures/{id}.ipynb"), ROOT)
    assert set(current["modules"]) == set(closure) and {"efftrain.figures", "efftrain.claims"} <= set(closure)
    if stored.exists(): assert json.loads(stored.read_text()) == current, f"build/code/{id}.json is old: figure {id} is stale, run dvc repro figure@{id}"


@every_figure
def test_the_pipeline_knows_the_paper(id):
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    assert f"paper_figures/{id}.json" in stages["gallery"]["deps"], f"add paper_figures/{id}.json to the gallery stage of dvc.yaml"
    needs = (PAPERS | OVERVIEWS)[id]["needs"]
    if needs.startswith("sweeps/"): assert needs.removeprefix("sweeps/").removesuffix(".parquet") in stages["sweep"]["foreach"], f"dvc.yaml has no stage that makes {needs}"
    lock = yaml.safe_load((ROOT / "dvc.lock").read_text())["stages"]
    stage = figure_stages(ROOT)[id]
    assert stage in lock, f"figure {id} never ran in the pipeline: dvc repro {stage}"


def test_gallery_shows_every_claim():
    rows = list(csv.DictReader((ROOT / "paper_figures/claims.csv").open()))
    stored = {(id, c["id"], c["verdict"]) for id in [*PAPERS, *OVERVIEWS] for c in json.loads((ROOT / f"paper_figures/{id}.json").read_text())["claims"]}
    assert {(r["paper"], r["claim"], r["verdict"]) for r in rows} == stored
    page = (ROOT / "paper_figures/README.md").read_text()
    for id in [*PAPERS, *OVERVIEWS]: assert f"]({id}.png)" in page and f"make figure PAPER={id}" in page
    figures = {p.stem for p in (ROOT / "paper_figures").glob("*.json")}
    assert figures == {*PAPERS, *OVERVIEWS}, f"paper_figures and papers.yaml differ: {figures ^ {*PAPERS, *OVERVIEWS}}"


def test_importing_the_package_is_light():
    import sys
    code = "import sys, efftrain, efftrain.claims, efftrain.pipeline, efftrain.datasets; print([m for m in ('torch', 'pandas', 'matplotlib', 'sklearn', 'transformers') if m in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert loaded == "[]", f"importing the light modules pulled in {loaded}"
