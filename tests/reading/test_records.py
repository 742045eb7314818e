"""Every border is crossed: index parts of 3 records, blocks of 64 bytes, 2 headers and 2 files kept open."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from torch.nn.utils.rnn import pad_sequence
from torch_geometric.data import Batch

import dali_pipeline as dp
from dali_pipeline.format import header as header_module
from dali_pipeline.format import shardfile as shardfile_module
from dali_pipeline.reading import gather as gather_module
from dali_pipeline.reading import records as records_module
from dali_pipeline.sampling import shuffle as shuffle_module
from dali_pipeline.storage import files as files_module
from dali_pipeline.storage import reads
from dali_pipeline.storage.files import Recent
from tests.helpers.graphs import as_data
from tests.helpers.records import make_records, write
from tests.laws import LAWS, Case


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[dp.Dataset, dict[str, dp.Record]]:
    monkeypatch.setattr(header_module, "BLOCKS_OF_VERSION", {1: 64, 2: 64})
    monkeypatch.setattr(shardfile_module, "BLOCK_BYTES", 64)
    monkeypatch.setattr(shuffle_module, "LEAST_RUN_BYTES", 64)
    monkeypatch.setattr(records_module, "INDEX_ROWS", 3)
    monkeypatch.setattr(records_module, "MAX_SHARDS", 2)
    monkeypatch.setattr(records_module, "LEAST_INDEX_BYTES", 1)
    monkeypatch.setattr(records_module, "Files", lambda: files_module.Files(limit=2))
    records = make_records(150)
    return write(tmp_path / "set", records, shard_bytes=1500), {record.id: record for record in records}


@pytest.mark.parametrize("window_bytes", [1, 700, 5000, 1 << 20])
def test_records_are_right_and_come_once(tiny: tuple[dp.Dataset, dict[str, dp.Record]], window_bytes: int) -> None:
    data, records = tiny
    assert len(data.table("train", "graphs")) > 6
    options: dict[str, Any] = {"batch_size": 7, "window_bytes": window_bytes, "seed": window_bytes}
    loaders: list[Any] = [
        dp.SequenceLoader(data, engine="torch", num_workers=3, **options),
        dp.GraphLoader(data, **options),
    ]  # in this process, as workers know of no smaller blocks
    for loader in loaders:
        for _ in range(2):
            seen: list[str] = []
            for batch in loader:
                seen += [one for one, valid in zip(batch.ids, batch.valid.tolist(), strict=True) if valid]
                if isinstance(batch, dp.SequenceBatch):
                    rows = [torch.from_numpy(records[one].sequence).float() for one in batch.ids]
                    assert torch.equal(batch.sequences, pad_sequence(rows, batch_first=True))
                else:
                    expected = Batch.from_data_list([graph for one in batch.ids for graph in as_data(records[one])])
                    for name in ("x", "edge_index", "edge_attr", "ptr"):
                        assert torch.equal(batch.graphs[name], expected[name])
            assert len(seen) == len(set(seen)) == loader.num_records > 90


@pytest.mark.parametrize("law", [name for name in LAWS if name[:2] in ("01", "02", "03", "05", "13")])
def test_laws_hold_across_the_borders(tiny: tuple[dp.Dataset, dict[str, dp.Record]], tmp_path: Path, law: str) -> None:
    def make(**options: Any) -> dp.SequenceLoader:
        return dp.SequenceLoader(**{"data": tiny[0], "batch_size": 8, "window_bytes": 900, "engine": "torch", **options})

    LAWS[law](
        Case(
            make=make,
            kind="sequences",
            folder=tmp_path,
            other=tiny[0],
            changes=[{"num_workers": 0}, {"num_workers": 3}],
            steps=lambda count: (1, 5),
        )
    )


def test_few_files_stay_open(tiny: tuple[dp.Dataset, dict[str, dp.Record]]) -> None:
    before = psutil.Process().num_fds()
    loader = dp.SequenceLoader(tiny[0], engine="torch", num_workers=0)
    list(loader)
    assert psutil.Process().num_fds() <= before + 4  # two of them the memory that workers would share


@pytest.mark.parametrize("kind", ["sequences", "graphs"])
def test_resuming_reads_at_most_one_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Law 5, bytes counted: from a cold process to the first batch of a state in the middle of an epoch."""
    rng = np.random.default_rng(0)
    schema = dp.Schema(sequence=dp.Field(dtype="float32", shape=(256,)), x=dp.Field(dtype="float32", shape=(256,)))
    with dp.ShardWriter(tmp_path / "set", schema, shard_bytes=8 << 20, split=dp.SplitRule.parse("100/0/0")) as writer:
        for number in range(1600):  # 16 KiB a record, 25 MiB in all, of each kind
            rows = rng.random((16, 256), np.float32)
            edges = np.zeros((2, 4), np.int64)
            graphs = dp.Graphs(x=rows, edge_index=edges, edge_attr=None, node_counts=np.array([16]), edge_counts=np.array([4]))
            writer.write({"id": number, "label": 0, "sequence": rows, "graphs": graphs})
    data = dp.open_dataset(tmp_path / "set")
    read = 0
    preadv, read_many = os.preadv, reads.read_many

    def counted(fd: int, buffers: Any, offset: int) -> int:
        nonlocal read
        got: int = preadv(fd, buffers, offset)
        read += got
        return got

    def counted_many(*arguments: Any) -> Any:
        nonlocal read
        got = read_many(*arguments)
        read += int(got.sum())
        return got

    monkeypatch.setattr(os, "preadv", counted)
    monkeypatch.setattr(gather_module, "read_many", counted_many)
    for window_bytes in (6 << 20, 12 << 20):
        options: dict[str, Any] = {"batch_size": 32, "window_bytes": window_bytes, "num_workers": 0}

        def make(options: dict[str, Any] = options) -> Any:
            return (
                dp.SequenceLoader(data, engine="torch", **options) if kind == "sequences" else dp.GraphLoader(data, **options)
            )

        for epoch, step in itertools.product(range(3), (0, 1, 5, 13, 21, 34, 49)):
            loader = make()
            loader.load_state_dict({**loader.state_dict(), "epoch": epoch, "step": step})
            read = 0
            next(iter(loader))
            assert 32 * 16384 <= read <= window_bytes


def test_recent_keeps_to_its_budget() -> None:
    kept: Recent[str, int] = Recent(10)
    for number, name in enumerate("abcdef"):
        assert kept.put(name, number, cost=3) == number
    assert [name for name in "abcdef" if kept.get(name) is not None] == ["d", "e", "f"]
    kept.get("d")
    kept.put("g", 6, cost=3)
    assert [name for name in "defg" if kept.get(name) is not None] == ["d", "f", "g"]
    assert kept.put("d", 99) == 3
    kept.put("huge", 7, cost=1000)
    assert kept.get("huge") == 7
    assert kept.get("g") is None
    kept.clear()
    assert kept.get("huge") is None
    kept.put("h", 8, cost=10)
    assert kept.get("h") == 8
