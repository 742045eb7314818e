from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import make_records, write

import dali_pipeline as dp
from training.config import MODELS

HERE = Path(__file__).parent
WORLDS = ["1-4", "2-1", "2-2", "4-1"]  # processes, and pieces that each one's part of a batch is cut in


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dp.Dataset:
    """So many training records that the last of their batches of 16 is padded, on the last of 4 processes altogether."""
    found = write(tmp_path_factory.mktemp("ranks") / "set", make_records(110))
    assert found.num_records("train", "sequences") % 16 in range(1, 12)
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory, data: dp.Dataset) -> dict[str, dict[str, Any]]:
    """By world, rank and model: what `ranks.py` found."""
    out = tmp_path_factory.mktemp("out")
    command = [sys.executable, str(HERE / "ranks.py"), str(data.root), str(out), str(free_port())]
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return {path.stem: json.loads(path.read_text()) for path in out.glob("*.json")}


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("model", MODELS)
def test_any_number_of_processes_and_pieces_trains_alike(
    ranks: dict[str, dict[str, Any]], data: dp.Dataset, world: str, model: str
) -> None:
    alone, first = ranks["1-1-rank-0"][model], ranks[f"{world}-rank-0"][model]
    assert len(alone["losses"]) == 2 * -(-data.num_records("train", "sequences") // 16)
    for name in ("losses", "gradients", "history", "scores"):
        np.testing.assert_allclose(first[name], alone[name], atol=1e-4, err_msg=name)
    assert np.abs(alone["gradients"]).max() > 1e-3
    assert first["ids"] == alone["ids"]
    assert len(set(first["ids"])) == data.num_records("test", "sequences")
    assert (
        first["delivered"]
        == f"{data.num_records('train', 'sequences')} of {data.num_records('train', 'sequences')} records, each once"
    )


@pytest.mark.parametrize("model", MODELS)
def test_ranks_agree_and_the_first_alone_writes(ranks: dict[str, dict[str, Any]], model: str) -> None:
    first, *others = (ranks[f"4-1-rank-{rank}"][model] for rank in range(4))
    assert first["files"] == [f"{model}-best.pt", f"{model}-last.pt"]
    for other in others:
        assert other["files"] == []
        assert {key: other[key] for key in other if key != "files"} == {key: first[key] for key in first if key != "files"}
