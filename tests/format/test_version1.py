"""Sets of format version 1, as a release before this one wrote them: read, checked, trained on and converted as ever.

`version1/set` was written by commit 7dd340d from `make_records(24)` in shards of 2,048 bytes. `version1/epochs.json` holds the
ids of its batches there: batch size 4, seed 3, a window of 2,000 bytes, three epochs.
"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dali_pipeline as dp
from dali_pipeline.ingest.config import ConvertConfig
from dali_pipeline.ingest.convert import convert
from dali_pipeline.tools.verify import verify
from tests.helpers.records import SCHEMA, make_records

HERE = Path(__file__).parent / "version1"


@pytest.fixture
def data(tmp_path: Path) -> dp.Dataset:
    shutil.copytree(HERE / "set", tmp_path / "set")
    return dp.open_dataset(tmp_path / "set")


def test_it_opens_and_is_sound(data: dp.Dataset) -> None:
    assert data.manifest.version == 1
    assert data.digest == json.loads((HERE / "epochs.json").read_text())["digest"]
    assert verify(data.folder).damages == []


@pytest.mark.parametrize("loader", [dp.SequenceLoader, dp.GraphLoader])
def test_epochs_come_in_the_order_of_then(data: dp.Dataset, loader: Any) -> None:
    expected = json.loads((HERE / "epochs.json").read_text())["epochs"][loader.kind]
    batches = loader(data, batch_size=4, seed=3, window_bytes=2000)
    assert [[batch.ids for batch in batches] for _ in range(3)] == expected


def test_records_are_those_that_were_written(data: dp.Dataset) -> None:
    records = {record.id: record.stored(SCHEMA) for record in make_records(24)}
    for split in data.splits:
        for position in range(data.num_records(split, "sequences")):
            record = data.record(split, position)
            np.testing.assert_array_equal(record.sequence, records[record.id].sequence)
            np.testing.assert_array_equal(record.graphs.edge_index, records[record.id].graphs.edge_index)
            assert record.label == records[record.id].label
    for batch in dp.SequenceLoader(data, batch_size=3):
        for row, name in enumerate(batch.ids):
            rows = records[name].sequence.astype(np.float32)
            np.testing.assert_array_equal(batch.sequences[row, : len(rows)].numpy(), rows)


def test_layers_choose_steps_with_one_warning(data: dp.Dataset, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "dali_pipeline"):
        for _ in range(2):
            for batch in dp.SequenceLoader(data, layers=[1, 0], batch_size=2):
                whole = next(iter(dp.SequenceLoader(data.subset("train", batch.positions), shuffle=False, batch_size=2)))
                assert torch.equal(batch.sequences, whole.sequences[:, [1, 0]])
    assert caplog.text.count("does not name its axes (format version 1): layers= chooses steps by position") == 1


def test_converted_anew_it_is_of_version_2(data: dp.Dataset, tmp_path: Path) -> None:
    again = convert(data.folder, tmp_path / "again", ConvertConfig(num_workers=1))
    assert again.manifest.version == 2
    assert verify(tmp_path / "again").damages == []
    for split in data.splits:
        assert again.num_records(split, "graphs") == data.num_records(split, "graphs")


def test_a_flipped_byte_is_found(data: dp.Dataset) -> None:
    path = data.shard_path("train", "sequences", 0)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(dp.FormatError, match=path.name):
        list(dp.SequenceLoader(data))


def test_states_of_then_are_refused(data: dp.Dataset) -> None:
    loader = dp.SequenceLoader(data, batch_size=4)
    with pytest.raises(dp.StateError, match="the state is of version 2, and this release reads version 3"):
        loader.load_state_dict({**loader.state_dict(), "version": 2})
