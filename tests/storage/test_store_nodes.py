"""Two nodes of two processes on one machine: each node's cache holds its own partition's shards, and no other."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import boto3
import pytest

from dali_pipeline.ingest.upload import upload
from dali_pipeline.sampling.plan import deal_shards
from tests.helpers.records import make_records, write
from tests.helpers.scripts import HELPERS, ROOT
from tests.helpers.stores import s3


@pytest.mark.slow
def test_each_node_caches_its_own_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write(tmp_path / "set", make_records(120), shares="100/0/0")
    with s3() as server:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "key")
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        boto3.client("s3").create_bucket(Bucket="nodes")
        upload(data.folder, "s3://nodes/set")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        torchrun = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nnodes=2",
            "--nproc-per-node=2",
            "--master-addr=127.0.0.1",
        ]
        script = [f"--master-port={port}", str(HELPERS / "nodes.py"), "s3://nodes/set", str(tmp_path)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        nodes = [
            subprocess.Popen([*torchrun, f"--node-rank={node}", *script], env=environment, stderr=subprocess.PIPE, text=True)
            for node in range(2)
        ]
        errors = [node.communicate(timeout=120)[1] for node in nodes]
        assert [node.returncode for node in nodes] == [0, 0], errors
    told = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(4)]
    assert [one["node"] for one in told] == ["0", "0", "1", "1"]
    assert sum(one["records"] for one in told) == data.num_records("train", "sequences") == 120
    assert len({name for one in told for batch in one["ids"] for name in batch}) == 120
    table = data.table("train", "sequences")
    partition_of = deal_shards(data.select("train", "sequences").records, 2)
    for node in range(2):
        cached = {path.name.split("-")[0] for path in (tmp_path / f"cache-{node}").glob("??/*")}
        assert cached == {table.digest(shard) for shard in range(len(table)) if partition_of[shard] == node}
