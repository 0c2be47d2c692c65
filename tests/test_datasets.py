"""The bundled data: what is there, from anywhere, and what is said when it is not."""
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

import efftrain.datasets as datasets
from efftrain.datasets import data_dir, data_file, load, names, project_root, text_classification, text_classification_tasks

SETS = json.loads((data_dir() / "manifest.json").read_text())["sets"]
FILES = json.loads((data_dir() / "manifest.json").read_text())["files"]


def rows(value):
    """Number of rows of whatever a loader gives."""
    return len(value[0]) if isinstance(value, tuple) else len(value)


@pytest.mark.parametrize("name", names())
def test_every_set_loads_from_another_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(project_root() / "nbs" / "figures")
    value = load(name)
    assert rows(value) > 100
    if name == "english": assert (value == 0).sum() + (datasets.english("valid") == 0).sum() == SETS[name]["rows"]      # documents
    elif name == "fashion_mnist": assert rows(value) + 10_000 == SETS[name]["rows"]
    elif name in ("m1", "m3", "tourism"): assert value.unique_id.nunique() == SETS[name]["rows"]
    elif name in SETS: assert rows(value) == SETS[name]["rows"]


def test_without_a_repository_the_variable_or_the_install_finds_the_data(tmp_path):
    """A process of its own, outside of the repository: what an editable install gives, and what EFFTRAIN_DATA gives."""
    call = [sys.executable, "-c", "import efftrain.datasets as d; print(d.data_dir()); print(len(d.m1('yearly').unique_id.unique()))"]
    clean = {k: v for k, v in os.environ.items() if k != "EFFTRAIN_DATA"} | {"PYTHONPATH": str(project_root())}
    for env in (clean, clean | {"EFFTRAIN_DATA": os.path.relpath(data_dir(), tmp_path)}):
        done = subprocess.run(call, cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
        assert done.stdout.split() == [str(data_dir()), "181"]


def test_importing_is_cheap(tmp_path):
    """Heavy libraries come with the function that needs them."""
    code = "import sys, efftrain.datasets; print([m for m in ('torch', 'pandas', 'pyarrow', 'sklearn', 'tokenizers', 'PIL', 'matplotlib') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], cwd=project_root(), capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_every_bundled_set_can_be_loaded():
    assert set(names()) - set(SETS) == {"digits", "breast_cancer", "diabetes", "iris", "wine"} and set(SETS) <= set(names())      # the rest is scikit-learn's
    assert {p.name for p in data_dir().iterdir()} == set(FILES) | {"README.md", "manifest.json"}
    assert {f for s in SETS.values() for f in s["files"]} == set(FILES)
    assert sum(f["bytes"] for f in FILES.values()) < 70e6


def test_every_bundled_set_has_its_origin_and_licence():
    page = (data_dir() / "README.md").read_text()
    assert page == (project_root() / "nbs/_data/README.md").read_text()
    for name, facts in SETS.items():
        assert facts["licence"] and facts["origin"] and f"| {name} |" in page and facts["licence"] in page and facts["version"] in page
        assert (project_root() / "nbs/_data" / facts["notebook"]).is_file()
        assert f"{facts['rows']:,}" in page and facts["made"] in page and all(f"| {f} | {FILES[f]['bytes']:,} | `{FILES[f]['sha256']}` |" in page for f in facts["files"])
    notices = page[page.index("## Notices"):]
    assert "Princeton University" in notices and "GNU General Public License" in notices and all(f"**{n}" in notices or f", {n}" in notices for n in SETS)


def test_the_builders_name_only_public_places():
    """Code, text and outputs of nbs/_data: each has a title, a licence and a rebuild note; no paths or hosts of one machine."""
    import re
    public = {"www.debian.org", "www.apache.org", "openmoji.org", "creativecommons.org", "www.gnu.org", "jaspar.elixir.no"}
    for path in (project_root() / "nbs/_data").iterdir():
        if not path.is_file(): continue
        text = path.read_text()
        assert set(re.findall(r"https?://([^/\s\"'>)]+)", text)) <= public, path.name
        assert not re.search(r"(?<![\w.])/(?:work|root|home|tmp|Users|mnt)/", text), path.name
        if path.suffix == ".ipynb":
            head = "".join(json.loads(text)["cells"][0]["source"])
            assert head.startswith("# ") and re.search("licen", head, re.I) and "To rebuild" in head, path.name


def test_shapes_and_ranges():
    for split, n in (("train", 60_000), ("test", 10_000)):
        x, y = datasets.fashion_mnist(split)
        assert x.shape == (n, 28, 28) and x.dtype == np.uint8 and y.dtype == np.int64 and np.bincount(y).tolist() == [n // 10] * 10
    for size in (32, 64):
        x, about = datasets.emoji("google", size)
        assert x.shape == (len(about), size, size, 3) and x.dtype == np.uint8 and list(about) == ["name", "keywords", "group", "subgroup", "unicode"]
    edges = datasets.debian_depends()
    assert edges.min() >= 0 and edges.max() < len(datasets.debian()) and edges.shape[1] == 2
    assert all(c.shape[1] == 4 and (c >= 0).all() for c in datasets.jaspar().counts)
    series = datasets.m3("quarterly")
    assert set(series.part) == {"train", "test"} and (series.groupby("unique_id").ds.max() + 1 == series.groupby("unique_id").size()).all()


def test_english_is_text_and_its_parts_do_not_meet():
    for vocab in (512, 4096):
        tokenizer, tokens = datasets.english_tokenizer(vocab), datasets.english("valid", vocab)
        assert tokens.dtype == np.uint16 and tokens.max() < vocab and " the " in tokenizer.decode(tokens[:5000].tolist())
    train, valid = ({d.tobytes() for d in np.split(tokens, np.flatnonzero(tokens == 0) + 1)} - {b""} for tokens in (datasets.english("train", 4096), datasets.english("valid", 4096)))
    documents = datasets.english_documents("valid")
    assert len(valid) == len(documents) == documents.text.nunique() > 1000 and not train & valid      # no document on both sides
    anew = datasets.english_tokenizer(512).encode_batch(list(documents.text[:200]))
    assert np.array_equal(np.concatenate([e.ids + [0] for e in anew]), datasets.english("valid", 512)[:sum(len(e.ids) + 1 for e in anew)])
    parts = datasets.english_tokens_by_domain("valid", 512)
    assert set(parts) == {"debian", "gcide", "manpages", "wordnet"} and sum(map(len, parts.values())) == len(datasets.english("valid", 512))


@pytest.mark.parametrize("task", text_classification_tasks())
def test_tasks_are_balanced_disjoint_and_repeatable(task):
    train, valid = text_classification(task, 600, 300)
    assert train.label.mean() == valid.label.mean() == 0.5 and len(train) == 600 and len(valid) == 300
    assert not set(train.text) & set(valid.text)
    again = text_classification(task, 600, 300)
    assert again[0].equals(train) and again[1].equals(valid) and not text_classification(task, 600, 300, seed=1)[0].equals(train)
    assert text_classification(task, 200, 300)[1].equals(valid)                             # validation does not move with the size of training
    assert list(train) == ["text", "label"] and set(train.label) == {0, 1} and train.text.is_unique and valid.text.is_unique and train.text.str.len().min() >= 20


# what is said when something is wrong

@pytest.mark.parametrize("call, said", [(lambda: load("fashion-mnist"), "did you mean 'fashion_mnist'"), (lambda: datasets.emoji("apple"), "'apple'"), (lambda: datasets.fashion_mnist("valid"), "'valid'"), (lambda: datasets.english("test"), "'test'"),
                                        (lambda: datasets.manpages("xx"), "'xx'"), (lambda: datasets.m3("weekly"), "'weekly'"), (lambda: datasets.tabular("titanic"), "'titanic'"), (lambda: text_classification("mrpc"), "'mrpc'"),
                                        (lambda: text_classification("utils-net", 10**6), "n_train=1000000"), (lambda: datasets.jaspar("birds"), "'birds'")])
def test_unknown_names_list_what_is_allowed(call, said):
    with pytest.raises(ValueError, match=said): call()


def test_unknown_set_lists_all_of_them():
    with pytest.raises(ValueError) as said: load("nothing like it")
    assert all(name in str(said.value) for name in names())
    with pytest.raises(ValueError, match="choose one of"): load(["debian"])
    with pytest.raises(ValueError, match="choose one of .*'utils-devel'.*'da-nb'"): text_classification("mrpc")
    for wrong in ({"n_train": 7}, {"n_valid": 0}, {"n_train": 10.0}, {"seed": -1}, {"seed": "a"}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}="): text_classification(**wrong)


@pytest.fixture
def small_copy(tmp_path, monkeypatch):
    """A data folder with one file of its own, which EFFTRAIN_DATA names."""
    folder = tmp_path / "data"; folder.mkdir()
    for name in ("manifest.json", "emoji.parquet"): shutil.copy(data_dir() / name, folder)
    monkeypatch.setenv("EFFTRAIN_DATA", str(folder))
    return folder


def test_the_folder_can_be_elsewhere(small_copy):
    assert data_file("emoji.parquet") == small_copy / "emoji.parquet"
    with pytest.raises(FileNotFoundError, match=r"m1.parquet is missing: run `dvc pull"): datasets.m1()


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b[:500] + bytes([b[500] ^ 1]) + b[501:], lambda b: b""])
def test_a_damaged_file_is_named_with_the_repair(small_copy, damage):
    path = small_copy / "emoji.parquet"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"emoji.parquet is damaged .*: run `dvc pull --force data.dvc`"): data_file("emoji.parquet")


def test_a_missing_folder_names_the_command(tmp_path, monkeypatch):
    monkeypatch.setenv("EFFTRAIN_DATA", str(tmp_path / "none"))
    with pytest.raises(FileNotFoundError, match="EFFTRAIN_DATA"): load("debian")


def test_the_repair_command_repairs(tmp_path):
    """In a bare project with the real data.dvc and store: a damaged file comes back bit for bit."""
    root = project_root()
    for name in ("data.dvc", "settings.ini", ".dvcignore"): shutil.copy(root / name, tmp_path)
    (tmp_path / "dvc.yaml").write_text("{}\n")
    run = lambda *words: subprocess.run([sys.executable, "-m", "dvc", *words], cwd=tmp_path, capture_output=True, text=True, check=True, env={**os.environ, "DVC_NO_ANALYTICS": "1"})
    run("init", "--no-scm", "-q"); run("remote", "add", "-d", "store", str(root / ".dvc/store"), "-q")
    run("pull", "-q")
    for name, facts in FILES.items(): assert (tmp_path / "data" / name).stat().st_size == facts["bytes"]
    good, path = (data_dir() / "m1.parquet").read_bytes(), tmp_path / "data" / "m1.parquet"
    path.chmod(0o644); path.unlink(); path.write_bytes(good[:100])
    run("pull", "--force", "data.dvc", "-q")
    assert path.read_bytes() == good
