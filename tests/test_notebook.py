"""The notebook of examples/: stripped as committed, and run from the first cell to the last in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"
# the kernel is a process of this interpreter, whatever kernels the machine has registered
EXECUTE = """
import sys
import nbformat
from nbclient import NotebookClient

notebook = nbformat.read(sys.argv[1], as_version=4)
NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": sys.argv[2]}}).execute()
nbformat.write(notebook, sys.argv[3])
"""


def cells_of(path: Path) -> list[dict[str, Any]]:
    cells = [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert len(cells) > 5
    return cells


def test_outputs_are_stripped() -> None:
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells_of(NOTEBOOK))


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_notebook_trains_a_detector_and_draws_its_curves(tmp_path: Path) -> None:
    done = tmp_path / "done.ipynb"
    paths = os.pathsep.join(path for path in (str(ROOT), os.environ.get("PYTHONPATH")) if path)
    environment = {**os.environ, "PYTHONPATH": paths, "TMPDIR": str(tmp_path), "IPYTHONDIR": str(tmp_path / "ipython")}
    arguments = [sys.executable, "-c", EXECUTE, str(NOTEBOOK), str(tmp_path), str(done)]
    ran = subprocess.run(arguments, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    outputs = [output for cell in cells_of(done) for output in cell["outputs"]]
    printed = "".join(text for output in outputs for text in output.get("text", []))
    assert "sound: 1,800 records" in printed
    assert printed.count("1,240 of 1,240 records, each once") == 8
    assert any("image/png" in output.get("data", {}) for output in outputs)
