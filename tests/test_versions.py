"""What is installed: NumPy 1, DALI that is not there or does not fit, and GPUs that torch does not see, each in one sentence."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dali_pipeline import UsageError
from dali_pipeline.numpyversion import check_numpy
from training.randomness import seed_of

ROOT = Path(__file__).parents[1]
REFUSAL = "NumPy 1.26.4 is installed in {folder}; expected NumPy 2 or newer: pip install 'numpy>=2'"


@pytest.fixture
def old_numpy(tmp_path: Path) -> dict[str, str]:
    """The environment of a process whose NumPy says that it is 1.26.4, and whose pyarrow refuses it, as version 26 does."""
    (tmp_path / "sitecustomize.py").write_text("import numpy\nnumpy.__version__ = '1.26.4'\n")
    (tmp_path / "pyarrow.py").write_text("raise ImportError('numpy.core.multiarray failed to import')\n")
    return {**os.environ, "PYTHONPATH": str(tmp_path)}


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["-m", "dali_pipeline", "versions"], "dali_pipeline"),
        (["-m", "dali_pipeline", "inspect", "data/none"], "dali_pipeline"),
        (["-m", "dali_pipeline.numpyversion"], "dali_pipeline"),
        (["train.py", "--data", "data/none"], "train.py"),
    ],
)
def test_numpy_1_is_refused_in_one_sentence(old_numpy: dict[str, str], arguments: list[str], name: str) -> None:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=old_numpy, cwd=ROOT)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"{name}: {REFUSAL.format(folder=Path(np.__file__).parent)}\n"


def test_numpy_1_is_refused_before_any_test(old_numpy: dict[str, str]) -> None:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/test_rooms.py"]
    done = subprocess.run(command, capture_output=True, text=True, env=old_numpy, cwd=ROOT)
    assert done.returncode == 2
    assert REFUSAL.format(folder=Path(np.__file__).parent) in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert "passed" not in done.stdout


@pytest.mark.parametrize(("version", "refused"), [("1.26.4", True), ("2.0.0rc1", False), ("2.4.6", False), ("10.0.0", False)])
def test_numpy_2_or_newer_is_expected(monkeypatch: pytest.MonkeyPatch, version: str, refused: bool) -> None:
    monkeypatch.setattr(np, "__version__", version)
    if refused:
        with pytest.raises(UsageError, match=r"^NumPy 1\.26\.4 is installed in .*; expected NumPy 2 or newer: pip install"):
            check_numpy()
    else:
        check_numpy()


@pytest.mark.parametrize("target", ["train", "test", "check", "results", "bench", "plots"])
def test_make_looks_at_numpy_in_a_ready_environment_first(target: str) -> None:
    command = ["make", "--dry-run", "QUICK=1", target]
    steps = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    own = [step for step in steps if step.startswith(".venv/bin/") and "pip install" not in step]
    assert own[0] == ".venv/bin/python -m dali_pipeline.numpyversion"
    assert len(own) > 1


def test_an_image_with_numpy_1_gets_a_newer_one() -> None:
    names = [line.split()[0] for line in (ROOT / "requirements-base.txt").read_text().splitlines() if line[0] != "#"]
    assert "numpy>=2" in names


class Uint64OfNumpy1(int):
    """What an array of uint64 holds in NumPy 1: not to be shifted by a Python integer."""

    def __rshift__(self, other: object) -> int:
        raise TypeError("ufunc 'right_shift' not supported for the input types")


def test_seeds_are_the_same_with_any_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Literal, as a seed that changes makes another run of the same command."""
    expected = [seed_of(0), seed_of(0, 1), seed_of(7, 1000, 3)]
    assert expected == [7896617691693857887, 2918264622725855778, 8349868311749256094]
    plain = np.random.SeedSequence

    class Sequence:
        def __init__(self, words: tuple[int, ...]) -> None:
            self.words = words

        def generate_state(self, count: int, dtype: type) -> list[Uint64OfNumpy1]:
            return [Uint64OfNumpy1(word) for word in plain(self.words).generate_state(count, dtype)]

    monkeypatch.setattr(np.random, "SeedSequence", Sequence)
    assert [seed_of(0), seed_of(0, 1), seed_of(7, 1000, 3)] == expected
