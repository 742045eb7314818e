from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

import dali_pipeline as dp
from tests.helpers.records import make_records, write
from tests.helpers.scripts import HELPERS, ROOT
from training.config import MODELS

WORLDS = ["2-1", "2-2", "4-1"]  # processes, and pieces that each one's part of a batch is cut in
Found = dict[str, dict[str, Any]]


def test_processes_pieces_and_signals(tmp_path: Path) -> None:
    """One test, as one script trains for all of it: processes, batches in pieces, runs stopped and gone on with."""
    data = write(tmp_path / "set", make_records(110))
    # the last batch of 16 is padded, so far that the last of 4 processes has nothing else
    assert data.num_records("train", "sequences") % 16 in range(1, 12)
    out = tmp_path / "out"
    out.mkdir()
    command = [sys.executable, str(HELPERS / "ranks.py"), str(data.root), str(out)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    found = {path.stem: json.loads(path.read_text()) for path in out.glob("*.json")}
    assert {code for name, codes in found["codes"].items() if "torn" not in name for code in codes} == {0}, done.stderr
    for model in MODELS:
        for world in WORLDS:
            check_any_number_of_processes_and_pieces_trains_alike(found, data, world, model)
        check_ranks_agree_and_the_first_alone_writes(found, model)
    check_stopped_by_any_signal_at_any_step_the_curve_is_the_same(found, out)


def check_any_number_of_processes_and_pieces_trains_alike(found: Found, data: dp.Dataset, world: str, model: str) -> None:
    alone, first = found["alike-1-1-rank-0"][model], found[f"alike-{world}-rank-0"][model]
    records = data.num_records("train", "sequences")
    assert len(alone["losses"]) == -(-records // 16)
    for name in ("losses", "gradients", "history", "scores"):
        np.testing.assert_allclose(first[name], alone[name], atol=1e-4, err_msg=f"{name} of {model}, {world}")
    assert np.abs(alone["gradients"]).max() > 1e-3
    assert first["ids"] == alone["ids"]
    assert len(set(first["ids"])) == data.num_records("test", "sequences")
    assert first["delivered"] == f"{records} of {records} records, each once"


def check_ranks_agree_and_the_first_alone_writes(found: Found, model: str) -> None:
    first, *others = (found[f"alike-4-1-rank-{rank}"][model] for rank in range(4))
    assert first["files"] == [f"{model}-best.pt", f"{model}-last.pt"]
    for other in others:
        assert other["files"] == []
        assert {key: other[key] for key in other if key != "files"} == {key: first[key] for key in first if key != "files"}


def check_stopped_by_any_signal_at_any_step_the_curve_is_the_same(found: Found, out: Path) -> None:
    """SIGKILL goes on from the last checkpoint, within an epoch; SIGTERM to one of two processes stops both at one step."""
    assert {name: codes for name, codes in found["codes"].items() if "torn" in name} == {
        "torn-1-0": [-9],
        "torn-1-1": [-9],
        "torn-1-2": [-9],
        "torn-1": [0],
        "torn-2-0": [2, -9],
        "torn-2-1": [143, 143],
        "torn-2": [0],
    }
    assert (out / "torn-1.began").read_text().split("\n") == ["0 0", "0 3", "1 0", "1 3", ""]
    assert (out / "torn-2.began").read_text().split("\n") == ["0 0", "0 3", "1 2", ""]  # a step later
    assert len(found["whole-1"]["history"]) == 2
    for name in ("history", "scores", "delivered"):
        assert found["torn-1"][name] == found["whole-1"][name]
    for name in ("history", "scores"):  # begun on two processes, ended on one
        np.testing.assert_allclose(found["torn-2"][name], found["whole-2"][name], atol=1e-4)
