"""Short graphs of a split that fits in its window, held in memory: equal to what is read, and no more than a window."""

from __future__ import annotations

import pickle
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dali_pipeline as dp
from dali_pipeline.reading.graphrows import GraphRows
from dali_pipeline.reading.graphsource import GraphSource
from dali_pipeline.reading.source import BatchSource, Wanted
from tests.helpers.graphs import FIELDS, molecules
from tests.helpers.records import make_records, write


def sources(data: dp.Dataset, **options: Any) -> tuple[GraphSource, GraphSource]:
    """One that may hold, once it does, and one that may not."""
    least = options.pop("min_weight", None)
    wanted, selection = Wanted(**options), data.select("train", "graphs")
    one, other = (GraphSource(selection, data.schema, wanted, min_weight=least, may_hold=hold) for hold in (True, False))
    for _ in range(3):
        one.gather(np.arange(one.num_records))
    return one, other


def holds(loader: dp.GraphLoader) -> bool:
    return loader._source._in_memory is not None


def check_equal(one: GraphRows, other: GraphRows) -> None:
    for name in (field.name for field in fields(GraphRows) if field.name != "arrays"):
        assert np.array_equal(getattr(one, name), getattr(other, name)), name
    assert one.arrays.keys() == other.arrays.keys()
    for name, array in one.arrays.items():
        assert array.dtype == other.arrays[name].dtype
        assert np.array_equal(array, other.arrays[name]), name


@pytest.fixture(scope="module", params=[1, 3])
def data(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> dp.Dataset:
    """Records of one graph and of three, some without edges, with fields of every level."""
    root = tmp_path_factory.mktemp("held") / "set"
    schema = dp.Schema(x=dp.Field(dtype="float32", shape=(4,)), edge_attr=dp.Field(dtype="float32"), fields=FIELDS)
    with dp.ShardWriter(root, schema, shard_bytes=8192, split=dp.SplitRule.parse("100/0/0")) as writer:
        for number, graphs in enumerate(molecules(300, request.param)):
            writer.write(dp.Record(id=f"molecule-{number}", label=number % 2, graphs=dp.Graphs.stack(graphs, FIELDS)))
    return dp.open_dataset(root)


@pytest.mark.parametrize("options", [{}, {"min_weight": 0.5}, {"finite": True}])
def test_what_is_held_equals_what_is_read(data: dp.Dataset, options: dict[str, Any]) -> None:
    one, other = sources(data, **options)
    assert one._in_memory is not None
    assert one._in_memory._table is not None
    rng = np.random.default_rng(0)
    for positions in (rng.permutation(300), rng.integers(300, size=40), np.array([299]), np.array([7, 7, 0])):
        check_equal(one.gather(positions), other.gather(positions))


def test_a_loader_holds_after_its_first_epoch_and_reads_no_more(data: dp.Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    loader, ranks = (
        dp.GraphLoader(data, batch_size=16),
        [dp.GraphLoader(data, batch_size=8, rank=at, world_size=2) for at in (0, 1)],
    )
    assert [holds(each) for each in (loader, *ranks)] == [True, False, False]
    for _ in loader:
        pass
    brought: list[bool] = []
    monkeypatch.setattr(GraphSource, "_read", None)
    monkeypatch.setattr(BatchSource, "prefetch", lambda *_: brought.append(True))
    later = list(loader)
    assert not brought
    monkeypatch.undo()
    for each in ranks:
        each.set_epoch(1)
    for whole, *parts in zip(later, *ranks, strict=True):
        assert whole.ids == [one for part in parts for one in part.ids]
        ours, theirs = whole.graphs.to_data_list(), [graph for part in parts for graph in part.graphs.to_data_list()]
        for one, other in zip(ours, theirs, strict=True):
            assert all(one[name].equal(other[name]) for name in ("x", "edge_index", "edge_attr", "bond", "energy"))
    assert loader.check_digest(loader.digest) == "300 of 300 records, each once"
    again = pickle.loads(pickle.dumps(loader._source._in_memory))
    assert again._table is None


@pytest.mark.parametrize(
    "options", [{"shuffle": False}, {"num_workers": 1}, {"layers": [0]}, {"window_bytes": 30_000}, {"class_balanced": True}]
)
def test_others_are_read(data: dp.Dataset, options: dict[str, Any]) -> None:
    assert not holds(dp.GraphLoader(data, batch_size=16, **options))


def test_long_records_and_folds_are_read(data: dp.Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not holds(dp.GraphLoader(data.folds(2)[0], batch_size=16))
    monkeypatch.setattr("dali_pipeline.reading.inmemory.SHORT_RECORD_BYTES", 50)
    assert not holds(dp.GraphLoader(data, batch_size=16))


def test_one_process_of_several_on_a_node_holds_nothing(data: dp.Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert not holds(dp.GraphLoader(data, batch_size=16, rank=0, world_size=4))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert holds(dp.GraphLoader(data, batch_size=16, rank=0, world_size=4))


def test_damage_is_not_held_and_named_by_who_reads_it(tmp_path: Path) -> None:
    data = write(tmp_path / "set", make_records(60), shard_bytes=4000, shares="100/0/0")
    path = data.shard_path("train", "graphs", 2)
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    source = GraphSource(data.select("train", "graphs"), data.schema, may_hold=True)
    sound = np.arange(data.table("train", "graphs").records[0])
    first = source.gather(sound)
    for _ in range(60):
        check_equal(source.gather(sound), first)
    assert source._in_memory is not None
    assert source._in_memory._table is None
    assert not source._in_memory._arrays
    with pytest.raises(dp.FormatError, match="graphs-00002"):
        source.gather(np.arange(60))


def test_values_that_are_not_finite_are_held_and_named(tmp_path: Path) -> None:
    records = make_records(40)
    records[30].graphs.x[0, 0] = np.nan
    data = write(tmp_path / "set", records, shares="100/0/0")
    loader = dp.GraphLoader(data, batch_size=8, on_nan="skip")
    for _ in range(3):
        assert sum(int(batch.valid.sum()) for batch in loader) == 39
        assert [records[30].id in told for told in loader.left_out] == [True]
    assert loader._source._in_memory is not None
    assert loader._source._in_memory._table is not None
