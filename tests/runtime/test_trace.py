"""A trace tells what StepTimer tells, thread by thread, opens whenever the run ends, and is bounded."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest

import dali_pipeline as dp
from dali_pipeline.runtime import trace
from dali_pipeline.runtime.trace import span
from tests.helpers.traces import Event, read, within


def loaders(data: dp.Dataset, num_workers: int) -> dict[str, Any]:
    return {
        "dali": dp.SequenceLoader(data, batch_size=8, num_workers=num_workers, window="gather"),
        "torch": dp.SequenceLoader(data, batch_size=8, num_workers=num_workers, engine="torch", window="gather"),
        "graphs": dp.GraphLoader(data, batch_size=8, num_workers=num_workers, window="gather"),
    }


@pytest.mark.parametrize("engine", ["torch", "dali"])
def test_the_window_is_told_by_its_pieces(data: dp.Dataset, tmp_path: Path, engine: Any) -> None:
    loader = dp.SequenceLoader(data, batch_size=8, engine=engine, window="resident")
    with dp.Trace(tmp_path / "trace.json"):
        steps = len(list(loader))
    names = Counter(one["name"] for one in read(tmp_path / "trace.json"))
    assert names["select"] == names["decode"] == steps > 1
    assert names["read piece"] >= 1
    assert set(names) - {"dali"} == {"select", "decode", "order", "read piece"}


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("way", ["dali", "torch", "graphs"])
def test_an_epoch_is_told_as_the_timer_has_it(data: dp.Dataset, tmp_path: Path, way: str, num_workers: int) -> None:
    loader, timer = loaders(data, num_workers)[way], dp.StepTimer()
    with dp.Trace(tmp_path / "trace.json"):
        for _ in timer(loader):
            with span("forward"):
                pass
    spans = read(tmp_path / "trace.json")
    found: dict[str, list[Event]] = defaultdict(list)
    for one in spans:
        found[one["name"]].append(one)
    expected = {"load", "step", "forward", "gather"}
    expected |= {"collate", "decode"} if way == "graphs" else {"decode"}
    assert found.keys() - {"read ahead"} == expected | ({"dali"} if way == "dali" else set())  # no copy on a CPU
    assert len(found["step"]) == len(found["forward"]) == len(loader)
    assert len(found["load"]) == len(loader) + 1  # the last one finds the epoch at its end
    for name, seconds in (("load", timer.wait_seconds), ("step", timer.compute_seconds)):
        assert sum(one["dur"] for one in found[name]) / 1e6 == pytest.approx(seconds, abs=1e-8 * len(spans))
    assert all(any(within(one, step) for step in found["step"]) for one in found["forward"])
    for one in (*found["decode"], *found["collate"], *found["dali"]):
        assert any(within(one, load) for load in found["load"])
    main = {one["tid"] for one in found["load"]}
    gathering = {(one["pid"] == os.getpid(), one["tid"] in main) for one in found["gather"]}
    assert gathering == {(way != "graphs" or not num_workers, not num_workers)}  # processes, threads, or the caller's own


def test_a_break_and_an_error_end_spans_too(tmp_path: Path) -> None:
    timer = dp.StepTimer()
    with dp.Trace(tmp_path / "trace.json"), pytest.raises(KeyError):
        for _ in timer([b"one", b"two"]):
            break
        for _ in timer([b"one", b"two"]):
            with span("forward"):
                raise KeyError
    names = [one["name"] for one in read(tmp_path / "trace.json")]
    assert sorted(names) == ["forward", "load", "load", "step", "step"]


def test_threads_have_their_names(tmp_path: Path) -> None:
    def work() -> None:
        for _ in range(500):
            with span("work"):
                pass

    threads = [threading.Thread(target=work, name=f"worker-{number}") for number in range(4)]
    with dp.Trace(tmp_path / "trace.json"):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(read(tmp_path / "trace.json")) == 2000
    told = {one["args"]["name"] for one in json.loads((tmp_path / "trace.json").read_text()) if one["ph"] == "M"}
    assert {thread.name for thread in threads} <= told


def test_threads_of_a_name_share_a_line_unless_they_live_together(tmp_path: Path) -> None:
    def work() -> None:
        with span("work"):
            barrier.wait()

    with dp.Trace(tmp_path / "trace.json"):
        for together in (1, 2, 2):
            barrier = threading.Barrier(together)
            threads = [threading.Thread(target=work, name="worker") for _ in range(together)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        with span("main"):
            pass
    lines = [one["tid"] for one in read(tmp_path / "trace.json")]
    assert len(lines) == 6
    assert len(set(lines[:5])) == 2
    assert lines[5] == os.getpid()
    assert lines[5] not in lines[:5]


def test_memory_and_file_are_bounded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with dp.Trace(tmp_path / "trace.json", most=1500) as one:
        for _ in range(3000):
            with span("work"):
                pass
            assert len(one._buffered) <= trace.FLUSH_EVENTS + 2  # two names
    assert len(read(tmp_path / "trace.json")) == 1500
    assert "holds the first 1500 of 3000 events" in caplog.text


def test_nothing_is_left_behind_and_nothing_written_when_off(tmp_path: Path) -> None:
    with span("before"):
        pass
    with dp.Trace(tmp_path / "trace.json"):
        late = span("late")
        late.__enter__()
        with pytest.raises(dp.UsageError, match="one at a time"), dp.Trace(tmp_path / "other.json"):
            pass
    late.__exit__(None, None, None)
    with span("after"):
        pass
    assert read(tmp_path / "trace.json") == []
    assert not (tmp_path / "other.json").exists()
    assert span("off") is span("off")  # not even an object
    with pytest.raises(dp.UsageError, match="No such file or directory"), dp.Trace(tmp_path / "none" / "trace.json"):
        pass
    with dp.Trace(tmp_path / "trace.json"):
        pass


def test_a_full_disk_ends_the_trace_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pwrite = os.pwrite
    with dp.Trace(tmp_path / "trace.json"):
        for _ in range(trace.FLUSH_EVENTS):
            with span("work"):
                pass
        kept = len(read(tmp_path / "trace.json"))
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", lambda fd, text, at: pwrite(fd, text[: max(3, len(text) // 2)], at))
            for _ in range(trace.FLUSH_EVENTS):
                with span("more"):
                    pass
    assert len(read(tmp_path / "trace.json")) == kept > 0
    assert "ends early (the disk is full); the run goes on" in caplog.text


KILLED = """
import sys, dali_pipeline as dp
with dp.Trace(sys.argv[1]):
    for number in range(5000):
        with dp.span("work"):
            pass
    print("there", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_run_leaves_a_file_that_opens(tmp_path: Path, how: signal.Signals) -> None:
    command = [sys.executable, "-c", "import signal; signal.signal(2, signal.default_int_handler)\n" + KILLED]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([*command, str(tmp_path / "trace.json")], **pipes) as process:  # type: ignore[call-overload]
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(how)
        process.wait()
    assert len(read(tmp_path / "trace.json")) >= 5000 - trace.FLUSH_EVENTS


def test_a_forked_child_writes_nothing(tmp_path: Path) -> None:
    with dp.Trace(tmp_path / "trace.json"):
        child = os.fork()
        if not child:
            trace.add("child", 0, time.perf_counter())
            os._exit(0)
        os.waitpid(child, 0)
    assert read(tmp_path / "trace.json") == []


def test_replay_is_the_first_batch_again_and_again() -> None:
    asked: list[int] = []

    def batches() -> Any:
        for number in range(3):
            asked.append(number)
            yield [number]

    found = list(dp.replay(batches(), 4))
    assert found == [[0]] * 4
    assert len({id(one) for one in found}) == 1
    assert asked == [0]
    assert list(dp.replay([], 4)) == []
