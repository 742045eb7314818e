"""Single records by position, subsets of a split, and the words that changed before the first release."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dali_pipeline as dp
from dali_pipeline.cli.app import app, run
from dali_pipeline.ingest.config import ConvertConfig
from dali_pipeline.ingest.convert import convert
from tests.helpers.records import SCHEMA, make_records, write


@pytest.fixture(scope="module")
def records() -> dict[str, dp.Record]:
    return {record.id: record for record in make_records(150)}


@pytest.fixture(scope="module")
def data(records: dict[str, dp.Record], tmp_path_factory: pytest.TempPathFactory) -> dp.Dataset:
    return write(tmp_path_factory.mktemp("set") / "set", list(records.values()))


def assert_same_record(found: dp.Record, written: dp.Record) -> None:
    expected = written.stored(SCHEMA)
    assert (found.id, found.group, found.label) == (expected.id, expected.group, expected.label)
    np.testing.assert_array_equal(found.sequence, expected.sequence)
    for name in ("x", "edge_index", "edge_attr", "node_counts", "edge_counts"):
        np.testing.assert_array_equal(getattr(found.graphs, name), getattr(expected.graphs, name))


def in_order(data: dp.Dataset, split: str = "train", loader: Any = dp.SequenceLoader) -> list[str]:
    """The ids of a split in the order of their positions."""
    return [text for batch in loader(data, split, shuffle=False, batch_size=1, num_workers=0) for text in batch.ids]


def test_every_record_is_read_as_it_was_written(data: dp.Dataset, records: dict[str, dp.Record]) -> None:
    for split in data.splits:
        for position, name in enumerate(in_order(data, split)):
            assert_same_record(data.record(split, position), records[name])
    assert data.record("val", -1).id == in_order(data, "val")[-1]


@pytest.mark.parametrize("options", [{"by_layer": True}, {"dtype": "sequence=int8"}, {"dtype": "bfloat16"}])
def test_a_record_is_what_a_loader_delivers(tmp_path: Path, options: dict[str, Any]) -> None:
    source = write(tmp_path / "source", make_records(60, ragged=False), shares="100/0/0")
    data = convert(source.folder, tmp_path / "set", ConvertConfig(num_workers=1, **options))
    for batch in dp.SequenceLoader(data, engine="torch", batch_size=7):
        for row in np.flatnonzero(batch.valid).tolist():
            record = data.record("train", int(batch.positions[row]))
            assert record.id == batch.ids[row]
            np.testing.assert_array_equal(batch.sequences[row].numpy(), record.sequence.astype(np.float32))


def test_halves_that_lie_elsewhere_are_found_by_id(tmp_path: Path) -> None:
    schema = dp.Schema(sequence=SCHEMA.sequence, x=SCHEMA.x, edge_attr=SCHEMA.edge_attr)
    records = make_records(12)
    with dp.ShardWriter(tmp_path / "set", schema, split=dp.SplitRule.parse("100/0/0")) as writer:
        for number, record in enumerate(records):
            parts = {"sequence": record.sequence if number != 4 else None, "graphs": record.graphs if number != 2 else None}
            writer.write({"id": record.id, "label": record.label, "group": record.group, **parts})
    data = dp.open_dataset(tmp_path / "set")
    assert data.record("train", 2).graphs is None
    found = data.record("train", 5)  # among the sequences, of which record 4 has none
    assert found.id == records[6].id
    np.testing.assert_array_equal(found.graphs.x, records[6].stored(SCHEMA).graphs.x)


@pytest.mark.parametrize("position", [10**6, -(10**6), 1.5, "a", None, True])
def test_positions_that_are_not_there(data: dp.Dataset, position: Any) -> None:
    with pytest.raises(dp.UsageError, match=r"position is .*; expected 0 to"):
        data.record("train", position)


def test_a_subset_holds_the_records_chosen_in_their_order(data: dp.Dataset, records: dict[str, dp.Record]) -> None:
    names = in_order(data)
    chosen = [7, 3, 50, 49, 51, 0]
    part = data.subset("train", chosen)
    for loader in (dp.SequenceLoader, dp.GraphLoader):
        assert in_order(part, loader=loader) == [names[position] for position in chosen]
    assert part.num_records("train", "graphs") == part.num_records("train", "sequences") == len(chosen)
    assert part.label_counts("train") == {
        label: count for label in (0, 1) if (count := sum(records[names[position]].label == label for position in chosen))
    }
    assert in_order(part, "val") == in_order(data, "val")
    assert part.digest not in (data.digest, data.subset("train", chosen[::-1]).digest)
    assert part.digest == data.subset("train", np.array(chosen)).digest == data.subset("train", torch.tensor(chosen)).digest
    assert_same_record(part.record("train", 2), records[names[50]])
    assert part.subset("train", [1]).record("train", 0).id == names[3]
    shuffled = dp.SequenceLoader(part, batch_size=4, engine="torch")
    list(shuffled)
    assert shuffled.check_digest(shuffled.digest) == "6 of 6 records, each once"


def test_a_subset_by_mask_or_of_nothing(data: dp.Dataset) -> None:
    count = data.num_records("train", "sequences")
    mask = np.arange(count) % 5 == 0
    assert in_order(data.subset("train", mask)) == in_order(data)[::5]
    assert data.subset("train", []).num_records("train", "sequences") == 0
    fold = data.folds(3)[0]
    assert in_order(fold.subset("val", [2, 0]), "val") == [in_order(fold, "val")[at] for at in (2, 0)]


@pytest.mark.parametrize("positions", [[-1], [10**6], [1, 1], [0.5], "train", [[1]], None, [True], {"a": 1}])
def test_senseless_subsets_are_refused(data: dp.Dataset, positions: Any) -> None:
    with pytest.raises(dp.UsageError, match=r"positions .*; expected whole numbers from 0 to \d+, each once, or \d+ bools"):
        data.subset("train", positions)


def test_a_mix_has_no_subset(data: dp.Dataset) -> None:
    with pytest.raises(dp.UsageError, match="mix subsets instead"):
        dp.mix([data]).subset("train", [0])
    mixed = dp.mix([data.subset("train", [1, 2, 3]), data.subset("train", [0])], weights=[1, 1])
    assert mixed.num_records("train", "graphs") == 4


@pytest.mark.parametrize("loader", [dp.SequenceLoader, dp.GraphLoader])
@pytest.mark.parametrize(
    ("old", "words"),
    [
        ({"workers": 2}, "workers is now called num_workers"),
        ({"lanes": 2}, "lanes is now called num_partitions"),
        ({"tail": "drop"}, "tail is now called drop_last, and tail='drop' is drop_last=True"),
        ({"balance": "label"}, "balance is now called class_balanced, and balance='label' is class_balanced=True"),
        ({"weights": {"a": 2}}, "weights is now called group_weights"),
    ],
)
def test_old_keywords_name_the_new(data: dp.Dataset, loader: Any, old: dict[str, Any], words: str) -> None:
    with pytest.raises(dp.UsageError, match=words):
        loader(data, **old)


def test_only_data_and_split_are_positional(data: dp.Dataset) -> None:
    with pytest.raises(TypeError, match="positional"):
        dp.SequenceLoader(data, "train", 8)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="unexpected keyword argument 'colour'"):
        dp.SequenceLoader(data, colour=1)  # type: ignore[call-arg]
    with pytest.raises(AttributeError, match=r"dp\.Split is now called dp\.SplitRule"):
        dp.Split  # noqa: B018


@pytest.mark.parametrize("flag", ["--workers", "--workers=2", "--lanes"])
def test_old_flags_name_the_new(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flag: str) -> None:
    monkeypatch.setattr("sys.argv", ["dali_pipeline", "convert", "a", "b", flag, "2"])
    assert run(app, "dali_pipeline") == 2
    old = flag.partition("=")[0]
    new = {"--workers": "--num-workers", "--lanes": "--num-partitions"}[old]
    assert capsys.readouterr().err == f"dali_pipeline: {old} is now called {new}\n"


def test_a_graph_per_record_has_its_label_as_y(data: dp.Dataset) -> None:
    for batch in dp.GraphLoader(data, layers=[1], batch_size=9):
        assert torch.equal(batch.graphs.y, batch.labels)
        assert torch.equal(batch.graphs[2].y, batch.labels[2:3])
    assert all("y" not in batch.graphs for batch in dp.GraphLoader(data, batch_size=9))
