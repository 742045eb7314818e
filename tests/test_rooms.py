"""The layout of the house: imports run one way, modules stay small, and importing does no work."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# in reading order: a module imports only modules above it
ROOMS = [
    "encoding",
    "layout",
    "errors",
    "numpyversion",
    "dali",
    "checks",
    "schema",
    "outside",
    "whole",
    "record",
    "digest",
    "world",
    "container",
    "machine",
    "trace",
    "timing",
    "progress",
    "stores",
    "openfile",
    "cache",
    "cachedfile",
    "files",
    "reads",
    "memory",
    "header",
    "shard",
    "shardfile",
    "manifest",
    "split",
    "moments",
    "pending",
    "filler",
    "journal",
    "writer",
    "order",
    "lane",
    "draws",
    "plan",
    "budget",
    "selection",
    "dataset",
    "upload",
    "mix",
    "state",
    "workerprocess",
    "records",
    "gather",
    "layers",
    "rows",
    "source",
    "graphrows",
    "held",
    "graphsource",
    "damage",
    "readahead",
    "stretch",
    "graphstretch",
    "sidestream",
    "decoding",
    "ahead",
    "processes",
    "delivery",
    "loader",
    "sequences",
    "collate",
    "graphs",
    "ingest.attention",
    "ingest.prompts",
    "ingest.inert",
    "ingest.foreign",
    "ingest.storedzip",
    "ingest.tensors",
    "ingest.pt",
    "ingest.traces",
    "ingest.npz",
    "ingest.columns",
    "ingest.own",
    "ingest.remote",
    "ingest.sources",
    "ingest.names",
    "ingest.workers",
    "ingest.onray",
    "ingest.scales",
    "ingest.dealing",
    "ingest.config",
    "ingest.inference",
    "ingest.job",
    "ingest.convert",
    "ingest.anatomy",
    "ingest.tracer",
    "ingest.extract",
    "ingest.demo",
    "shardcheck",
    "verify",
    "buffer",
    "shuffle",
    "describe",
    "shufflereport",
    "picture",
    "arguments",
    "stages",
    "knobs",
    "threads",
    "doctor",
    "checkup",
    "predict",
    "inspection",
    "versions",
    "cli",
    "__main__",
]
TRAINING = [
    "config",
    "commandline",
    "provenance",
    "folder",
    "extras",
    "results",
    "processes",
    "interrupt",
    "randomness",
    "memory",
    "metrics",
    "intervals",
    "build",
    "pieces",
    "step",
    "scoring",
    "checkpoint",
    "prepare",
    "threads",
    "statistics",
    "trainer",
    "watch",
    "ceiling",
    "layers",
    "report",
    "scores",
    "pictures",
    "run",
]


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize(("package", "order"), [("dali_pipeline", ROOMS), ("training", TRAINING)])
def test_imports_run_one_way(package: str, order: list[str]) -> None:
    modules = {
        str(path.relative_to(ROOT / package).with_suffix("")).replace("/", "."): path
        for path in (ROOT / package).rglob("*.py")
        if path.name != "__init__.py"
    }
    assert sorted(modules) == sorted(order), "every module has its place in the order"
    for name, path in modules.items():
        allowed = {f"{package}.{above}" for above in order[: order.index(name)]}
        theirs = {one for one in imports(path) if one.startswith(f"{package}.") and one.removeprefix(f"{package}.") in modules}
        assert theirs <= allowed, f"{name} imports {theirs - allowed}"


def test_models_know_nothing_of_the_loaders() -> None:
    for path in (ROOT / "models").glob("*.py"):
        assert {name.split(".")[0] for name in imports(path)} <= {"__future__", "models", "torch", "torch_geometric", "typing"}


def test_importing_the_package_is_cheap() -> None:
    code = "import sys, dali_pipeline; print(sorted({'torch', 'nvidia', 'torch_geometric', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"
