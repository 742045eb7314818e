"""doctor names the stage that holds the others up, whatever it is, says so to scripts, and knows what it cannot run."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from functools import wraps
from pathlib import Path
from typing import Any

import pytest

import dali_pipeline as dp
import train as train_module
from dali_pipeline.cli.app import app, run
from dali_pipeline.loaders.collate import Collator
from dali_pipeline.loaders.decoding import Decoding
from dali_pipeline.loaders.resident import ResidentWindow
from dali_pipeline.loaders.residentgraphs import GraphWindow
from dali_pipeline.reading.graphsuperbatch import GraphGatherer
from dali_pipeline.reading.superbatch import SequenceGatherer
from dali_pipeline.runtime import machine
from dali_pipeline.tools import doctor, knobs
from dali_pipeline.tools.knobs import Knob, Setup, knobs_of, predict

PAUSE = 0.05
TRIED = ("num_workers", "dtype", "batch_size", "engine", "window_bytes")  # the others take more than options


def slowly(function: Any, pause: float = PAUSE) -> Any:
    @wraps(function)  # by whose name a worker finds it, as quick as ever
    def slow(*arguments: Any, **options: Any) -> Any:
        time.sleep(pause)
        return function(*arguments, **options)

    return slow


def examined(data: dp.Dataset, kind: Any, step: Any = lambda batch: None, window: Any = "gather") -> dict[str, Any]:
    told: list[str] = []
    setup = Setup(batch_size=8, num_workers=0, engine="torch", window=window)
    found = doctor.examine(data, kind, setup, lambda loader: step, told.append, seconds=0.05)
    stages = ["disk", "page cache", "gather", "decode", *(["collate"] if kind == "graphs" else []), "model"]
    assert told == [*stages, "together", "twice the batch", "a change"]
    assert list(found["stages"]) == stages
    json.dumps(found)
    best = max(
        (name for name in found["knobs"] if name.split("=")[0] in TRIED), key=lambda one: found["knobs"][one]["predicted"]
    )
    promised = found["knobs"][best]["predicted"] / found["together"]["records_per_second"]
    assert (found["next"] is not None) == (promised >= doctor.WORTH_TRYING)
    if found["next"]:
        assert found["next"] == {"change": best, **found["knobs"][best]}
        assert found["next"]["measured"] > 0
    assert all(
        (one["measured"] is not None) == (name == best and found["next"] is not None) for name, one in found["knobs"].items()
    )
    return found


@pytest.mark.parametrize("kind", ["sequences", "graphs"])
def test_a_slow_model_is_fed(data: dp.Dataset, kind: Any) -> None:
    found = examined(data, kind, slowly(lambda batch: None))
    assert (found["narrowest"], found["verdict"]) == ("model", "fed")
    assert found["stages"]["model"]["records_per_second"] <= 8 / PAUSE
    assert found["together"]["wait_share"] < 0.5


@pytest.mark.parametrize("kind", ["sequences", "graphs"])
def test_a_slow_gather_is_named_and_a_change_tried(data: dp.Dataset, kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    where = SequenceGatherer if kind == "sequences" else GraphGatherer
    monkeypatch.setattr(where, "gather", slowly(where.gather))
    found = examined(data, kind)
    assert (found["narrowest"], found["verdict"]) == ("gather", "input-bound")
    assert found["together"]["wait_share"] > 0.5


@pytest.mark.parametrize("kind", ["sequences", "graphs"])
def test_a_slow_window_is_a_slow_gather(data: dp.Dataset, kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    where = ResidentWindow if kind == "sequences" else GraphWindow
    monkeypatch.setattr(where, "superbatch", slowly(where.superbatch))
    found = examined(data, kind, window="resident")
    assert (found["narrowest"], found["verdict"]) == ("gather", "input-bound")


def test_a_slow_collation_is_named(data: dp.Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Collator, "_graphs", staticmethod(slowly(Collator._graphs)))
    found = examined(data, "graphs")
    assert (found["narrowest"], found["verdict"]) == ("collate", "input-bound")


@pytest.mark.parametrize("kind", ["sequences", "graphs"])
def test_a_slow_decode_is_named(data: dp.Dataset, kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind == "sequences":
        monkeypatch.setattr(Decoding, "run", slowly(Decoding.run))
    else:
        monkeypatch.setattr(Collator, "_delivered", slowly(Collator._delivered))
    found = examined(data, kind)
    assert (found["narrowest"], found["verdict"]) == ("decode", "input-bound")
    assert found["next"] is not None
    assert found["next"]["change"] == "dtype=torch.float16"
    assert found["next"]["predicted"] > 1.1 * found["together"]["records_per_second"]


def test_a_slow_disk_counts_where_the_data_do_not_fit(data: dp.Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, read, direct = os.open, os.preadv, set[int]()

    def noting(path: Any, flags: int, *rest: Any, **options: Any) -> int:
        fd = opened(path, flags, *rest, **options)
        (direct.add if flags & os.O_DIRECT else direct.discard)(fd)
        return fd

    def slow_disk(fd: int, *rest: Any) -> int:
        time.sleep(4 * PAUSE if fd in direct else 0)
        return read(fd, *rest)

    monkeypatch.setattr(os, "open", noting)
    monkeypatch.setattr(os, "preadv", slow_disk)
    fits = examined(data, "sequences", slowly(lambda batch: None))
    assert (fits["narrowest"], fits["verdict"], fits["from_disk"]) == ("model", "fed", False)
    assert fits["stages"]["disk"]["records_per_second"] < fits["stages"]["model"]["records_per_second"]
    assert fits["knobs"]["a disk twice as fast"]["predicted"] == fits["together"]["records_per_second"]
    monkeypatch.setattr(doctor, "describe_machine", lambda root: {**machine.describe_machine(root), "memory_available": 1})
    found = examined(data, "sequences", slowly(lambda batch: None))
    assert (found["narrowest"], found["verdict"], found["from_disk"]) == ("disk", "input-bound", True)
    now, faster = found["together"]["records_per_second"], found["knobs"]["a disk twice as fast"]["predicted"]
    assert faster > 1.5 * now


def called(patch: pytest.MonkeyPatch, name: str, *arguments: object) -> int:
    patch.setattr("sys.argv", [name, *map(str, arguments)])
    return run(train_module.app if name == "train.py" else app, name)


def test_scripts_can_trust_it(data: dp.Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    training = ["--data", data.root, "--batch-size", 8, "--doctor"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(doctor, "SECONDS", 0.05)
        code = called(patch, "train.py", *training, "--json")
        found = json.loads(capsys.readouterr().out)  # and nothing else
        assert code == {"fed": 0, "input-bound": 1}[found["verdict"]]
        assert {"disk", "gather", "model"} <= found["stages"].keys()
        assert (found["model"], found["batch_size"]) == ("lstm", 8)
        assert called(patch, "train.py", *training, "--model", "gnn_lstm", "--layers", "0:2") in (0, 1)
        told = capsys.readouterr().out
        assert "narrowest" in told
        assert "machine: " in told
        assert "convert --dtype" not in told  # float16 is the smallest that graphs are stored in
        assert "a disk twice as fast" in told
        assert "gnn_lstm on" in told
        for wrong, words in (
            ((*training, "--num-workers", "many"), "expected auto or a whole number"),
            ((*training, "--device", "tpu"), "device is 'tpu'"),
            (("--data", data.root, "--json"), "--json prints what --doctor finds"),
        ):
            assert called(patch, "train.py", *wrong) == 2
            assert words in capsys.readouterr().err


STEP = """
import time

def make_step(loader):
    assert loader.batch_size in (8, 16)
    return lambda batch: time.sleep(0.05)

nothing = 3
"""


def test_the_loader_alone_and_beside_a_step_of_ones_own(
    data: dp.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "steps_of_mine.py").write_text(STEP)
    monkeypatch.chdir(tmp_path)
    options = ["doctor", data.root, "--seconds", "0.05", "--batch-size", 8]
    picture = tmp_path / "stages.png"
    assert called(monkeypatch, "dali_pipeline", *options, "--json", "--plot", picture) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["verdict"], found["model"]) == ("no model", "no model")
    assert "model" not in found["stages"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert called(monkeypatch, "dali_pipeline", *options, "--records", "graphs") == 0
    assert "train.py --doctor, holds that against a model" in capsys.readouterr().out
    assert called(monkeypatch, "dali_pipeline", *options, "--json", "--step", "steps_of_mine:make_step") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["narrowest"], found["verdict"], found["model"]) == ("model", "fed", "steps_of_mine:make_step")
    for wrong, words in (
        (["doctor", tmp_path], "not a data set"),
        ([*options, "--step", "steps_of_mine"], "expected MODULE:FUNCTION"),
        ([*options, "--step", "steps_of_mine:absent"], "has no attribute 'absent'"),
        ([*options, "--step", "no_such_module:step"], "No module named 'no_such_module'"),
        ([*options, "--step", "steps_of_mine:nothing"], "is no function"),
        ([*options, "--device", "tpu"], "device is 'tpu'"),
        (["predict", data.root, "--checkpoint", "x.pt"], "python predict.py --checkpoint FILE.pt --data SET"),
    ):
        assert called(monkeypatch, "dali_pipeline", *wrong) == 2
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1


def test_what_is_likely_a_mistake_is_said(tmp_path: Path) -> None:
    sound = {**machine.describe_machine(tmp_path), "gpu_in_machine": False, "shared_memory": 8 << 30, "open_files": 65536}
    sound |= {"file_system": "ext4", "free_disk": 1 << 40, "gpus": [], "cores": 4.0, "threads": 4, "visible_gpus": None}
    sound |= {"memory": 16 << 30, "memory_available": 8 << 30}
    assert machine.warnings_about(sound) == []
    for change, words in (
        ({"gpu_in_machine": True, "cuda": None}, "a GPU that torch does not see: torch 2.* is a build without CUDA"),
        ({"gpu_in_machine": True, "cuda": "12.6", "driver": "470.82"}, "a build for CUDA 12.6, the driver is 470.82"),
        ({"gpu_in_machine": True, "cuda": "12.6", "visible_gpus": ""}, "CUDA_VISIBLE_DEVICES is ''; unset it"),
        ({"cores": 1.5}, "4 threads on 1.5 allowed cores.* OMP_NUM_THREADS=2"),
        ({"memory_available": 300 << 20}, "315 MB of 17,180 MB of memory"),
        ({"shared_memory": 64 << 20}, "--shm-size"),
        ({"open_files": 256}, "ulimit -n"),
        ({"file_system": "nfs4"}, "network file system"),
        ({"free_disk": 10}, "of disk are free"),
    ):
        (warning,) = machine.warnings_about({**sound, **change})
        assert re.search(words, warning), warning
    assert machine.file_system(Path("/proc")) == "proc"


def test_damage_is_exit_2_and_serial_loading_is_told(
    data: dp.Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(data.folder, tmp_path / "set")
    for path in (tmp_path / "set" / "train").glob("sequences-*"):
        path.write_bytes(path.read_bytes()[:-8] + bytes(8))
    monkeypatch.setattr("sys.argv", ["dali_pipeline", "doctor", str(tmp_path / "set"), "--seconds", "0.05"])
    assert run(app, "dali_pipeline") == 2
    assert "sequences-000" in capsys.readouterr().err
    monkeypatch.setattr(SequenceGatherer, "gather", slowly(SequenceGatherer.gather))
    found = examined(data, "sequences", lambda batch: time.sleep(2 * PAUSE * len(batch) / 8))
    assert (found["narrowest"], found["verdict"]) == ("model", "input-bound")
    assert found["next"]["change"] == "num_workers=1"


def test_what_each_knob_promises(data: dp.Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knobs, "allowed_cores", lambda: 8.0)
    now = Setup(batch_size=8, num_workers=0, engine="torch", device="cpu")
    rates = {"page cache": 1e9, "gather": 100.0, "decode": 200.0, "model": 50.0}  # 10, 5 and 20 ms
    found = knobs_of(data.schema, "sequences", now, larger_batch=2.0)

    def ms(name: str, **more: float) -> float:
        return round(1000 / predict(rates | more, "sequences", now, found[name] if name else Knob()), 3)

    assert ms("") == 35
    assert ms("", disk=10.0) == 100  # the disk works beside the others, and is slower
    assert ms("num_workers=1") == ms("num_workers=4") == 25  # gathering is hidden
    assert ms("dtype=torch.float16") == 32.5
    assert ms("batch_size=16") == 25
    assert ms("engine='dali'") == 45
    assert ms("window_bytes=512 << 20") == 35
    assert ms("layers=, half of them") == 5 + 2.5 + 10
    assert ms("convert --dtype sequence=int8") == 30
    assert ms("convert --dtype sequence=int8", disk=10.0) == 50
    assert ms("a disk twice as fast", disk=10.0) == 50
    assert ms("a disk twice as fast") == 35
    monkeypatch.setattr(knobs, "allowed_cores", lambda: 1.0)
    assert ms("num_workers=1") == 35  # two threads on one core take turns
    assert "num_workers=4" not in knobs_of(data.schema, "sequences", now, 1.0)
