"""What the builders of data/ share: fetching packages by name, writing tables so that equal content gives equal bytes, and the record of sources.

Users of efftrain never need this: `dvc pull` brings data/ as these notebooks made it.
"""
import hashlib, json, re, subprocess, sys
from pathlib import Path

ROOT = next(p for p in Path(__file__).resolve().parents if (p / "settings.ini").exists())
DATA = ROOT / "data"


def sh(*args, cwd=None, binary=False):
    "Run a command, return its standard output; a failure shows what the command said."
    done = subprocess.run([str(a) for a in args], cwd=cwd, capture_output=True)
    if done.returncode: raise RuntimeError(f"{args[0]} failed: {done.stderr.decode(errors='replace')[-2000:]}")
    return done.stdout if binary else done.stdout.decode()


def apt(package, folder):
    "Download a Debian package, unpack it under `folder`, return (folder, version). Run `apt-get update` once before."
    folder = Path(folder) / package
    folder.mkdir(parents=True)
    sh("apt-get", "download", package, cwd=folder)
    deb, = folder.glob("*.deb")
    sh("dpkg-deb", "-x", deb, folder)
    return folder, sh("dpkg-deb", "-f", deb, "Version").strip()


def npm(package, folder):
    "Download an npm package (`name` or `name@version`), unpack it under `folder`, return (folder, version)."
    folder = Path(folder) / package.replace("/", "_")
    folder.mkdir(parents=True)
    sh("npm", "pack", package, cwd=folder)
    tgz, = folder.glob("*.tgz")
    sh("tar", "xzf", tgz, cwd=folder)
    folder = folder / "package"
    return folder, json.loads((folder / "package.json").read_text())["version"]


def pip(package, folder):
    "Download a wheel from the Python index, unpack it under `folder`, return (folder, version)."
    folder = Path(folder) / package
    folder.mkdir(parents=True)
    sh(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", folder, package)
    wheel, = folder.glob("*.whl")
    sh(sys.executable, "-m", "zipfile", "-e", wheel, folder)
    return folder, wheel.name.split("-")[1]


def write(name, columns):
    """Write `columns` (dict or DataFrame) to data/`name`.parquet: zstd 22, one page a column, text lengths apart from the text.

    No metadata but the schema, so that the bytes depend on the content (and on pyarrow) alone."""
    import pyarrow as pa, pyarrow.parquet as pq
    table = pa.table({k: pa.array(columns[k]) for k in columns}).replace_schema_metadata(None)
    if any(pa.types.is_large_string(f.type) for f in table.schema):
        table = table.cast(pa.schema([(f.name, pa.string() if pa.types.is_large_string(f.type) else f.type) for f in table.schema]))
    encoding = {f.name: "DELTA_LENGTH_BYTE_ARRAY" if pa.types.is_string(f.type) or pa.types.is_binary(f.type) else
                "DELTA_BINARY_PACKED" if pa.types.is_integer(f.type) and f.type.bit_width >= 32 else "PLAIN" for f in table.schema if not pa.types.is_nested(f.type)}
    few = [f.name for f in table.schema if pa.types.is_string(f.type) and len(table[f.name].unique()) <= min(256, len(table) // 8)]
    path = DATA / f"{name}.parquet"
    path.parent.mkdir(exist_ok=True)
    pq.write_table(table, path, compression="zstd", compression_level=22, data_page_size=1 << 30, row_group_size=1 << 30, write_batch_size=1 << 24,
                   use_dictionary=few or False, column_encoding={k: v for k, v in encoding.items() if k not in few},
                   max_rows_per_page=1 << 30, write_statistics=False, store_schema=False)
    return path


def record(name, **facts):
    "Enter the set `name` into data/manifest.json (with size and SHA-256 of its files) and write the README files from it."
    path = DATA / "manifest.json"
    manifest = json.loads(path.read_text()) if path.exists() else {"sets": {}, "files": {}}
    files = facts.pop("files")
    manifest["sets"][name] = {**facts, "files": files}
    for f in files:
        b = (DATA / f).read_bytes()
        manifest["files"][f] = {"bytes": len(b), "sha256": hashlib.sha256(b).hexdigest()}
    used = {f for s in manifest["sets"].values() for f in s["files"]}
    manifest = {"sets": dict(sorted(manifest["sets"].items())), "files": {k: v for k, v in sorted(manifest["files"].items()) if k in used}}
    path.write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
    text = readme(manifest)
    for folder in (DATA, ROOT / "nbs" / "_data"): (folder / "README.md").write_text(text)


def readme(manifest):
    "The README of data/ as Markdown: where each set comes from, under what licence, how large it is."
    lines = ["# The bundled data", "",
             "Made by the notebooks in `nbs/_data` from packages; `dvc pull` brings it. Written by `store.record`, not by hand: `data/README.md` and `nbs/_data/README.md` are the same text.", "",
             "| set | package (version) | licence | rows | KB | builder |", "|---|---|---|---|---|---|"]
    size = lambda s: sum(manifest["files"][f]["bytes"] for f in s["files"])
    for name, s in manifest["sets"].items():
        lines.append(f"| {name} | {s['registry']} `{s['package']}` ({s['version']}) | {s['licence']} | {s['rows']:,} | {size(s) / 1e3:,.0f} | `{s['notebook']}` |")
    lines += ["", f"Together {sum(f['bytes'] for f in manifest['files'].values()) / 1e6:.1f} MB.", ""]
    for name, s in manifest["sets"].items():
        lines += [f"## {name}", f"{s['origin']}.", f"Columns or arrays: {s['columns']}. Made: {s['made']}.", ""]
    lines += ["## Files", "", "| file | bytes | SHA-256 |", "|---|---|---|"]
    lines += [f"| {k} | {v['bytes']:,} | `{v['sha256']}` |" for k, v in manifest["files"].items()]
    notices = ROOT / "nbs" / "_data" / "notices.md"
    return "\n".join(lines) + "\n" + ("\n" + notices.read_text() if notices.exists() else "")
