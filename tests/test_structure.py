"""The structure of the code: which folder may import from which, and that importing does no work."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parent.parent
# a folder, or a module beside them, imports from those above it in this list, and from itself
FOLDERS = [
    "errors",
    "types",
    "runtime",
    "storage",
    "format",
    "sampling",
    "writing",
    "dataset",
    "reading",
    "loaders",
    "ingest",
    "tools",
    "cli",
    "__main__",
]
MOST_MODULES, LEAST_MODULES, MOST_DEPTH = 14, 2, 14
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
    "target",
    "objective",
    "build",
    "pieces",
    "step",
    "scoring",
    "checkpoint",
    "prepare",
    "threads",
    "statistics",
    "resolve",
    "trainer",
    "watch",
    "ceiling",
    "checkup",
    "baselines",
    "report",
    "pairs",
    "transfer",
    "scores",
    "pictures",
    "run",
]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT).with_suffix("")).replace("/", ".").removesuffix(".__init__")


MODULES = {name_of(path): path for path in (ROOT / "dali_pipeline").rglob("*.py") if path.name != "__init__.py"}


def is_for_types(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imports(path: Path, *, at_load: bool = False) -> set[str]:
    """Names of what a file imports. at_load: without what waits for a function, or is there for types alone."""
    tree = ast.parse(path.read_text())
    bodies = [node for node in tree.body if not is_for_types(node)] if at_load else [tree]
    nodes = [node for body in bodies for node in (ast.walk(body) if not at_load or not is_function(body) else ())]
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def is_function(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef)


def folder_of(name: str) -> str:
    return name.split(".")[1]


def test_folders_import_from_those_above_them() -> None:
    assert {folder_of(name) for name in MODULES} == set(FOLDERS)
    for name, path in MODULES.items():
        allowed = FOLDERS[: FOLDERS.index(folder_of(name)) + 1]
        theirs = imports(path) & MODULES.keys()
        assert {folder_of(one) for one in theirs} <= set(allowed), f"{name} imports {sorted(theirs)}"


def test_the_library_knows_nothing_of_the_application() -> None:
    for name, path in MODULES.items():
        assert not {one.split(".")[0] for one in imports(path)} & {"train", "predict", "training", "models"}, name


def test_imports_are_a_tree_of_little_depth() -> None:
    """Over what is imported as modules load; `graphlib` refuses a circle."""
    needs = {name: imports(path, at_load=True) & MODULES.keys() - {name} for name, path in MODULES.items()}
    depth: dict[str, int] = {}
    for name in TopologicalSorter(needs).static_order():
        depth[name] = 1 + max((depth[one] for one in needs[name]), default=0)
    assert max(depth.values()) <= MOST_DEPTH, sorted(depth.items(), key=lambda item: -item[1])[:5]


def test_folders_are_of_a_size() -> None:
    folders = Counter(path.parent for path in MODULES.values() if path.parent != ROOT / "dali_pipeline")
    assert len(folders) > 10
    for folder, modules in folders.items():
        assert LEAST_MODULES <= modules <= MOST_MODULES, f"{folder.name} has {modules} modules"
        assert ast.get_docstring(ast.parse((folder / "__init__.py").read_text())), f"{folder.name} does not say what it is for"


def test_the_order_of_an_epoch_needs_numpy_alone() -> None:
    reached, left = set[str](), [name for name in MODULES if folder_of(name) == "sampling"]
    while left:
        name = left.pop()
        reached.add(name)
        left += (imports(MODULES[name], at_load=True) & MODULES.keys()) - reached
    foreign = {one.split(".")[0] for name in reached for one in imports(MODULES[name], at_load=True)}
    # xxhash: a pure function too, of the name of a split
    assert foreign - set(sys.stdlib_module_names) == {"dali_pipeline", "numpy", "xxhash"}


def test_the_runs_modules_import_one_way() -> None:
    modules = {path.stem: path for path in (ROOT / "training").glob("*.py") if path.name != "__init__.py"}
    assert sorted(modules) == sorted(TRAINING), "every module has its place in the order"
    for name, path in modules.items():
        theirs = {one.split(".")[1] for one in imports(path) if one.startswith("training.")}
        assert theirs <= set(TRAINING[: TRAINING.index(name)]), f"{name} imports {theirs}"


def test_models_know_nothing_of_the_loaders() -> None:
    for path in (ROOT / "models").glob("*.py"):
        assert {name.split(".")[0] for name in imports(path)} <= {"__future__", "models", "torch", "torch_geometric", "typing"}


def test_nothing_forks() -> None:
    """A forked child has none of its parent's threads, and Python 3.12 warns of it. Tests fork on purpose, to see it told so.

    `subprocess` does not fork in that sense, unless it is to run Python in the child (`preexec_fn`).
    """
    files = [
        ROOT / "train.py",
        *(path for name in ("dali_pipeline", "training", "models") for path in (ROOT / name).rglob("*.py")),
    ]
    forks = re.compile(r"\bos\.fork\(|\bforkpty\(|preexec_fn|ProcessPoolExecutor|get_context|\bPool\(|multiprocessing\.Process")
    assert [str(path.relative_to(ROOT)) for path in files if forks.search(path.read_text())] == []
    assert forks.search((ROOT / "tests" / "helpers" / "ranks.py").read_text())  # which does


def test_help_of_training_waits_for_no_torch() -> None:
    """`train.py --help` and a mistyped flag are answered at once."""
    code = "import sys, train, predict; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "False"


def test_importing_the_package_is_cheap() -> None:
    code = "import sys, dali_pipeline; print(sorted({'torch', 'nvidia', 'torch_geometric', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"
