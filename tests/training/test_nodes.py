"""Two nodes, as two launchers on one machine: torchrun with its usual flags, train.py, and a partition for each."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import dali_pipeline as dp
from tests.helpers.records import make_records, write
from tests.helpers.scripts import ROOT


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@pytest.mark.slow
def test_two_nodes_train_as_one_process_does(tmp_path: Path) -> None:
    """The losses and scores are those of one process, and each node opens its own shards alone."""
    data = write(tmp_path / "set", make_records(150))
    flags = [
        "--data",
        data.root,
        "--model",
        "lstm",
        "--epochs",
        "1",
        "--batch-size",
        "16",
        "--dropout",
        "0",
        "--num-partitions",
        "2",
    ]
    train = ["train.py", *map(str, flags), "--device", "cpu", "--output-dir"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--rdzv-id", "two-nodes"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", *rendezvous]
    nodes = [
        subprocess.Popen(
            [*launch, *train, str(tmp_path / "two")], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for _ in range(2)
    ]
    for node in nodes:
        _, errors = node.communicate(timeout=200)
        assert node.returncode == 0, errors.decode()
    subprocess.run([sys.executable, *train, str(tmp_path / "one")], cwd=ROOT, env=environment, check=True, capture_output=True)
    histories = [np.genfromtxt(tmp_path / name / "history.csv", delimiter=",", names=True) for name in ("one", "two")]
    for column in ("train_loss", "val_loss", "val_auroc"):
        np.testing.assert_allclose(histories[0][column], histories[1][column], atol=1e-4)
    one, two = (json.loads((tmp_path / name / "metrics.json").read_text())["lstm"]["test"] for name in ("one", "two"))
    np.testing.assert_allclose(one["auroc"], two["auroc"], atol=1e-4)
    assert json.loads((tmp_path / "two" / "starts.json").read_text())[0]["processes"] == 2
    assert json.loads((tmp_path / "two" / "config.json").read_text())["num_partitions"] == 2


def test_valid_rows_are_counted_over_partitions(tmp_path: Path) -> None:
    data = write(tmp_path / "set", make_records(150))
    for num_partitions in (1, 2, 4):
        ranks = [
            dp.SequenceLoader(data, batch_size=4, rank=rank, world_size=4, num_partitions=num_partitions, engine="torch")
            for rank in range(4)
        ]
        told = [ranks[0].num_valid(step) for step in range(len(ranks[0]))]
        assert told == [sum(int(batch.valid.sum()) for batch in step) for step in zip(*ranks, strict=True)]
        assert sum(told) == ranks[0].num_records
