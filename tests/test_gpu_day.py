"""The script of the first GPU day: what fails costs its own part, what is measured is kept, and a dry run does all of it."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_day, gpu_loaders, gpu_parts, gpu_plot, gpu_training, gpu_work, harness, plot
from benchmarks.gpu_work import Deadline, Report, Setup
from dali_pipeline.loaders.sidestream import to_device
from tests.pretended_gpu import pretended_gpu
from tests.pretended_gpu.dali import dali_on_the_cpu

ROOT = Path(gpu_day.__file__).parent.parent


def parts(*names: str) -> list[gpu_day.Part]:
    return [gpu_day.Part(name, 1, f"tests.helpers.dayparts:{name}") for name in names]


def ran(folder: Path, *names: str, seconds: float = 60) -> gpu_day.Findings:
    findings = gpu_day.Findings(folder / "day.json", folder, {"device": "cpu"})
    gpu_day.run_parts(parts(*names), Setup(device="cpu", folder=folder, quick=True), findings, seconds)
    return findings


def test_a_part_that_fails_or_crashes_costs_itself_alone(tmp_path: Path) -> None:
    findings = ran(tmp_path, "works", "fails", "crashes", "absent", "half")
    found = json.loads((tmp_path / "day.json").read_text())["parts"]
    assert found == findings.parts
    assert {name: part["outcome"] for name, part in found.items()} == {
        "works": "worked",
        "fails": "failed",
        "crashes": "failed",
        "absent": "failed",
        "half": "failed",
    }
    assert found["fails"]["why"] == "ValueError: first line"
    assert found["crashes"]["why"] == f"its process ended with {-signal.SIGSEGV}"
    assert found["fails"]["facts"] == found["crashes"]["facts"] == {"before": "told"}
    assert "has no attribute 'absent'" in found["absent"]["why"]
    assert found["half"]["why"] == "1 measurements failed, the first one (number 1: itself) with RuntimeError: odd"
    assert [row["scenario"] for row in found["half"]["rows"]] == ["number 0", "number 2"]
    assert findings.failed
    lines = findings.table().splitlines()
    assert [line.split()[0] for line in lines] == ["part", "works", "fails", "crashes", "absent", "half"]


def test_rows_are_those_of_every_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["benchmarks/gpu_day.py", "--dry-run"])
    assert not ran(tmp_path, "works").failed
    (path,) = tmp_path.glob("gpu_works_*.csv")
    with path.open(newline="") as file:
        ceiling, together = csv.DictReader(file)
    assert (ceiling["median"], ceiling["reference"], ceiling["repeats"]) == ("2", "", "3")
    assert (together["reference"], together["ratio"], together["cache"]) == ("ceiling", "0.500", "warm")
    assert ceiling["command"] == "python -m benchmarks.gpu_day --dry-run"


@pytest.mark.slow
def test_a_part_that_hangs_is_killed_with_all_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_day, "GRACE_SECONDS", 1.0)
    begun = time.monotonic()
    found = ran(tmp_path, "hangs", "works", seconds=8).parts
    assert time.monotonic() - begun < 8
    assert found["hangs"]["why"].startswith("not over within")
    assert found["works"]["outcome"] == "worked"
    child = Path(f"/proc/{found['hangs']['facts']['child']}/stat")
    assert not child.exists() or child.read_text().split()[2] == "Z"


@pytest.mark.slow
def test_no_part_goes_on_behind_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_day, "GRACE_SECONDS", 0.0)
    found = ran(tmp_path, "works", seconds=-1).parts
    assert found["works"]["why"] == "no time was left"


def test_the_json_is_whole_after_each_message(tmp_path: Path) -> None:
    path = tmp_path / "day.json"
    findings = gpu_day.Findings(path, tmp_path, {"device": "cpu"})

    def on_disk() -> Any:
        return json.loads(path.read_text())["parts"]

    findings.begin("one", 5)
    assert on_disk()["one"]["outcome"] == "begun"
    findings.take("one", {"facts": {"fact": 1}})
    assert on_disk()["one"]["facts"] == {"fact": 1}
    findings.take("one", {"left_out": {"count": 3, "total": 4}})
    findings.end("one", 1.0, "")
    findings.begin("two", 5)
    assert (on_disk()["one"]["outcome"], on_disk()["two"]["outcome"]) == ("worked", "begun")
    assert findings.line("one") == "one: worked after 1.0 s, 3 of 4 combinations left out"
    assert not list(tmp_path.glob("*.tmp"))


def test_the_deadline_ends_a_grid_and_tells_what_it_left_out(tmp_path: Path) -> None:
    now: list[float] = [0.0]
    told: list[Any] = []
    done: list[int] = []
    deadline = Deadline(10, lambda: now[0])

    def measure(number: int) -> None:
        done.append(number)
        now[0] += 4

    setup = Setup(device="cpu", folder=tmp_path, quick=True)
    gpu_work.run_grid(list(range(7)), measure, lambda number: ("number", str(number)), setup, deadline, Report(told.append))
    assert done == [0, 1, 2]
    assert told == [{"left_out": {"count": 4, "total": 7}}]
    assert (deadline.passed, deadline.left_seconds) == (True, 0)


@pytest.mark.slow
def test_tests_that_fail_are_named_and_those_that_hang_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_parts, "ROOT", tmp_path)
    setup = Setup(device="cpu", folder=tmp_path, quick=False)
    (tmp_path / "tests").mkdir()
    text = "import time\nimport pytest\n@pytest.mark.gpu\ndef test_it() -> None:\n    "
    for name, line in (("good", "pass"), ("bad", "raise ValueError"), ("slow", "time.sleep(60)")):
        (tmp_path / "tests" / f"test_{name}.py").write_text(text + line)
    (tmp_path / "tests" / "test_other.py").write_text("import nothing_such")  # not asked for: no test of it needs a GPU
    told: list[Any] = []
    with pytest.raises(RuntimeError, match=r"pytest: stopped after \d+ s, in tests/test_slow.py::test_it"):
        gpu_parts.tests(setup, Deadline(8), Report(told.append))
    (tmp_path / "tests" / "test_slow.py").unlink()
    with pytest.raises(RuntimeError, match="1 failed, 1 passed"):
        gpu_parts.tests(setup, Deadline(60), Report(told.append))
    for message in told:
        (failing,) = message["facts"]["failing"]
        assert "tests/test_bad.py::test_it" in failing


def test_a_lost_device_ends_the_grid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_work, "is_usable", lambda _: False)
    told: list[Any] = []

    def measure(_: int) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nadvice")

    setup = Setup(device="cuda", folder=tmp_path, quick=True)
    with pytest.raises(gpu_work.DeviceLostError):
        gpu_work.run_grid([1, 2], measure, lambda _: ("a", "b"), setup, Deadline(9), Report(told.append))
    assert told[0]["failed"]["why"] == "RuntimeError: CUDA error: an illegal memory access was encountered"
    assert told[1] == {"left_out": {"count": 1, "total": 2}}


def test_the_most_telling_combinations_come_first() -> None:
    grid = gpu_loaders.loading_grid(quick=False)
    assert len(set(grid)) == len(grid)
    first = grid[:10]
    assert len({(one.name, one.engine) for one in first}) == 10
    assert {one.batch_size for one in first} == {32}
    assert {one.batch_size for one in grid} == {32, 256}
    settings = gpu_training.training_grid(quick=False)
    assert len(set(settings)) == 24
    assert [one.compiled for one in settings] == [False] * 12 + [True] * 12


class Batches:
    """A loader of epochs of so many batches of eight records."""

    device = torch.device("cpu")

    def __init__(self, count: int) -> None:
        self._count = count

    def __iter__(self) -> Iterator[list[int]]:
        time.sleep(0.05)  # an epoch's start
        for _ in range(self._count):
            time.sleep(0.002)
            yield [0] * 8


def test_rates_leave_out_the_start_of_an_epoch() -> None:
    rates = gpu_loaders.rates_of(Batches(6), 0.06, Deadline(30))
    assert len(rates) == gpu_loaders.SAMPLES
    assert 500 < max(rates) <= 8 / 0.002
    with pytest.raises(RuntimeError, match="no batch came"):
        gpu_loaders.rates_of(Batches(1), 0.06, Deadline(0.3))


def test_waits_are_counted_by_the_line_that_causes_them() -> None:
    with gpu_training.counted_waits("cpu") as places:
        warnings.warn("called a synchronizing CUDA operation (Triggered internally …)", stacklevel=1)
        warnings.warn(
            "Synchronization debug mode is a prototype feature and does not yet detect all synchronizing", stacklevel=1
        )
        warnings.warn("something else", stacklevel=1)
    assert places.total() == 1
    assert next(iter(places)).startswith("test_gpu_day.py:")

    class Waiting:
        is_cuda = False

        def to(self, *_: object) -> None:
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)

    with gpu_training.counted_waits("cpu") as places:
        to_device(Waiting(), torch.device("cpu"))  # type: ignore[arg-type]
    assert next(iter(places)).startswith("dali_pipeline/loaders/sidestream.py:")


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="a real one is here")
def test_the_parts_run_on_a_pretended_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not run by default: half a minute."""
    for name in ("reset_peak_memory_stats", "set_sync_debug_mode", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 5e8)
    setup = Setup(device="cuda", folder=tmp_path, quick=True)
    with pretended_gpu() as log, dali_on_the_cpu():
        for part in (gpu_parts.limits, gpu_loaders.loaders, gpu_training.training, gpu_training.waits):
            told: list[Any] = []
            part(setup, Deadline(100), Report(told.append))
            assert not [message for message in told if message.keys() & {"failed", "left_out"}]
            assert [message for message in told if "row" in message]
    assert log.nbytes["pinned copy"]


def command(*options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_day", *options],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment},
        capture_output=True,
        text=True,
        timeout=230,
        check=False,
    )


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ([], "there is no GPU that torch can use; --dry-run runs everything on the CPU"),
        (["--dry-run", "--parts", "loaders,others"], "'others'; expected some of versions,tests,"),
        (["--dry-run", "--out", "benchmarks/results"], "a dry run measures nothing that benchmarks/results is for"),
    ],
)
def test_what_cannot_run_is_one_sentence(options: list[str], sentence: str) -> None:
    done = command(*options)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert sentence in done.stderr


@pytest.mark.slow
def test_a_dry_run_does_all_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not run by default: the better part of a minute."""
    before = set(harness.RESULTS.rglob("*"))
    done = command("--dry-run", OUT=str(tmp_path / "out"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(harness.RESULTS.rglob("*")) == before
    found = json.loads((tmp_path / "out" / "gpu_day.json").read_text())
    assert list(found["parts"]) == [part.name for part in gpu_day.PARTS]
    assert {part["outcome"] for part in found["parts"].values()} == {"worked"}
    assert not any(part["left_out"] for part in found["parts"].values())
    assert "tests collected" in found["parts"]["tests"]["facts"]["summary"]
    assert len(found["parts"]["loaders"]["rows"]) == 2 * len(gpu_loaders.loading_grid(quick=True))
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "out")
    panels = list(gpu_plot.gpu_panels())
    assert len(panels) == 2
    plot.draw(panels, tmp_path / "gpu.png", 2, 5.5)
    assert (tmp_path / "gpu.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_is_drawn_where_no_gpu_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    assert list(gpu_plot.gpu_panels()) == []
