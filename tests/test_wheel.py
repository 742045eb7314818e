"""The wheel: the library alone, with its types, in ranges that hold the versions that the tests run with."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from dali_pipeline.cli.versions import TRIED

ROOT = Path(__file__).parent.parent
PINS = [line for path in ROOT.glob("requirements*.txt") for line in path.read_text().splitlines()]
LOOP = """
import numpy as np, sys
import dali_pipeline as dp
from dali_pipeline.errors import UsageError

schema = dp.Schema(sequence=dp.Field(dtype="float16", shape=(8,)), x=dp.Field(dtype="float16", shape=(4,)))
with dp.ShardWriter("set", schema) as writer:
    for number in range(40):
        graph = dp.Graphs(x=np.ones((3, 4)), edge_index=np.array([[0, 1], [1, 2]]), edge_attr=None,
                          node_counts=np.array([3]), edge_counts=np.array([2]))
        writer.write({"id": number, "label": number % 2, "sequence": np.full((5, 8), number), "graphs": graph})
data = dp.open_dataset("set")
assert data.record("train", 0).sequence.shape == (5, 8)
for batch in dp.SequenceLoader(data, batch_size=8, engine="torch"):
    assert batch.sequences.shape == (8, 5, 8)
for batch in dp.GraphLoader(data, batch_size=8):
    assert batch.graphs.num_graphs == 8
try:
    dp.SequenceLoader(data)
except UsageError as error:
    assert "pip install 'dali-pipeline[cuda12]'" in str(error), error
else:
    sys.exit("DALI was not asked for, and is there")
for package in ("transformers", "matplotlib", "sklearn", "pyarrow"):
    try:
        __import__(package)
    except ModuleNotFoundError:
        continue
    sys.exit(f"{package} was not asked for, and is there")
print("done")
"""


def test_the_ranges_hold_what_the_tests_run_with() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ranges = [*project["dependencies"], *(line for lines in project["optional-dependencies"].values() for line in lines)]
    pins = dict(re.findall(r"^([A-Za-z0-9_-]+)(?:\[\w+\])?==(\S+)", "\n".join(PINS), re.MULTILINE))
    checked = 0
    for requirement in map(Requirement, ranges):
        if requirement.name in pins:
            assert requirement.specifier.contains(pins[requirement.name]), requirement
            checked += 1
    assert checked > 12
    assert "matplotlib" not in str(project["dependencies"])


def test_versions_names_what_the_tests_run_with() -> None:
    pins = dict(re.findall(r"^([A-Za-z0-9_-]+)==(\S+)", "\n".join(PINS), re.MULTILINE))
    for name, version in TRIED.items():
        packages = ("nvidia-dali-cuda120", "nvidia-dali-cuda130") if name == "nvidia-dali" else (name,)
        assert {pins[package] for package in packages if package in pins} == {version}, name


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_wheel_with_one_extra_runs_the_loop(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    source = tmp_path / "source"  # a copy, as building leaves files beside what is built
    shutil.copytree(ROOT / "dali_pipeline", source / "dali_pipeline", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", str(tmp_path), str(source)], check=True)
    (wheel,) = tmp_path.glob("dali_pipeline-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "dali_pipeline/py.typed" in names
    assert {name.partition("/")[0] for name in names if ".dist-info" not in name} == {"dali_pipeline"}
    assert "dali_pipeline/ingest/readers/pt.py" in names
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    torch = next(line.split()[0] for line in PINS if line.startswith("torch=="))  # that which lies in the machine's index
    install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", torch, f"{wheel}[graphs]"]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    subprocess.run(install, check=True, env=clean)
    work = tmp_path / "work"
    work.mkdir()
    done = subprocess.run([str(python), "-c", LOOP], cwd=work, env=clean, capture_output=True, text=True)
    assert done.stdout == "done\n", done.stderr
    command = tmp_path / "venv" / "bin" / "dali-pipeline"
    looked = subprocess.run([str(command), "verify", "set"], cwd=work, env=clean, capture_output=True, text=True)
    assert looked.returncode == 0, looked.stderr
    drawn = subprocess.run(
        [str(command), "inspect", "set", "--plot", "a.png"], cwd=work, env=clean, capture_output=True, text=True
    )
    assert (drawn.returncode, drawn.stderr.count("\n")) == (2, 1)
    assert "drawing a picture needs matplotlib, which is not installed: pip install 'dali-pipeline[plots]'" in drawn.stderr
