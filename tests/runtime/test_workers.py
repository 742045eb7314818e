"""Worker processes start fresh, whoever starts them: a script, a notebook, `python -`, a daemonic process, after threads."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import dali_pipeline as dp
from dali_pipeline.ingest.workers import in_order
from dali_pipeline.runtime.workerprocess import SharedBytes
from tests.helpers.records import make_records, write
from tests.helpers.scripts import ROOT
from tests.helpers.work import fails_at_three, imports_torch, square

THREADS = "import torch\ntorch.set_num_threads(4)\nassert torch.rand(2000, 2000).matmul(torch.rand(2000, 2000)).sum() > 0\n"
CONVERT = (
    "from pathlib import Path\nfrom dali_pipeline.ingest import convert, sources\nsources.CHUNK_BYTES = 1\n"
    "data = convert.convert(Path('src'), Path('dst'), convert.ConvertConfig(num_workers=2))\n"
    "assert data.num_records('train', 'sequences')\n"
)
LOAD = (
    "import dali_pipeline as dp\n"
    "batches = list(dp.GraphLoader(dp.open_dataset('set'), num_workers=2))\n"
    "assert sum(int(batch.valid.sum()) for batch in batches) == dp.open_dataset('set').num_records('train', 'graphs')\n"
)
LOOK = "import os\nopen(f'ran-{os.getpid()}', 'w').close()\n"  # a file for every process that runs the caller's main module
DAEMONIC = (
    "def load():\n" + "".join(f"    {line}\n" for line in LOAD.splitlines()) + "    open('loaded', 'w').close()\n"
    "if __name__ == '__main__':\n"
    "    import multiprocessing\n"
    "    process = multiprocessing.get_context('fork').Process(target=load, daemon=True)\n"
    "    process.start()\n    process.join(60)\n    assert os.path.exists('loaded')\n"
)
# what a notebook is to us: cells run one by one in a main module without a file
NOTEBOOK = (
    "import code, sys\nshell = code.InteractiveInterpreter(vars(sys.modules['__main__']))\n"
    "for cell in sys.stdin.read().split('# cell\\n'):\n    if shell.runsource(cell, '<cell>', 'exec'):\n        sys.exit(3)\n"
    "sys.exit(1 if hasattr(sys, 'last_value') else 0)\n"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Traces to convert, and a data set of graphs."""
    root = tmp_path_factory.mktemp("num_workers")
    rng = np.random.default_rng(0)
    (root / "src").mkdir()
    for number in range(3):
        traces = [
            {
                "question_id": f"q{number}-{row}",
                "label": row % 2,
                "hidden_states": [rng.normal(size=(5, 4)).astype(np.float16) for _ in range(3)],
                "attentions": [np.full((2, 5, 5), 0.2, np.float32) for _ in range(2)],
            }
            for row in range(8)
        ]
        (root / "src" / f"traces_{number}.pkl").write_bytes(pickle.dumps(traces))
    write(root / "set", make_records(60))
    return root


@pytest.mark.parametrize(
    ("way", "work"),
    [
        ("script without a main guard", CONVERT),
        pytest.param("script without a main guard", LOAD, marks=pytest.mark.slow),
        ("python -", CONVERT),
        ("notebook", CONVERT),
        pytest.param("daemonic process", LOAD, marks=pytest.mark.slow),
    ],
)
def test_workers_of_whoever_has_used_torch_end(folder: Path, tmp_path: Path, way: str, work: str) -> None:
    for name in ("src", "set"):
        (tmp_path / name).symlink_to(folder / name)
    program = LOOK + THREADS + (DAEMONIC if way == "daemonic process" else work)
    command, given = [sys.executable, "-"], program
    if way in ("script without a main guard", "daemonic process"):
        (tmp_path / "script.py").write_text(program)
        command, given = [sys.executable, "script.py"], ""
    elif way == "notebook":
        command, given = [sys.executable, "-c", NOTEBOOK], program.replace("import dali", "# cell\nimport dali")
    done = subprocess.run(
        command,
        input=given,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("ran-*"))) == 1


def test_results_come_in_order_and_errors_in_their_turn() -> None:
    torch.rand(10)  # which this process has, and its workers have not
    assert list(in_order(square, range(20), 3, lambda _: None)) == [(number, number * number) for number in range(20)]
    assert not any(found for _, found in in_order(imports_torch, range(4), 2, lambda _: None))
    found = []
    with pytest.raises(dp.DataError, match=r"^three is no number$"):
        for number, _ in in_order(fails_at_three, range(8), 2, lambda _: None):
            found.append(number)
    assert found == [0, 1, 2]


def test_shared_memory_pickled_for_another_machine_begins_anew() -> None:
    shared = SharedBytes(10)
    shared.memory[3] = 7
    other = pickle.loads(pickle.dumps(shared))
    assert bytes(other.memory) == bytes(10)
    assert shared.memory[3] == 7
