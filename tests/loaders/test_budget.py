"""Batches filled up to a number of nodes and edges: what a budget promises, beside the laws (test_laws.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dali_pipeline as dp
from dali_pipeline.reading.graphsuperbatch import GraphGatherer
from tests import laws
from tests.helpers.batches import assert_same
from tests.helpers.records import make_records, write

NODES, EDGES = 60, 70  # a record of the fixture has up to 4 graphs of up to a dozen nodes


@pytest.fixture(params=[0, pytest.param(2, marks=pytest.mark.slow)])
def make(data: dp.Dataset, request: pytest.FixtureRequest) -> laws.Make:
    def make_loader(**options: Any) -> dp.GraphLoader:
        usual = {"data": data, "max_nodes": NODES, "max_edges": EDGES, "window_bytes": 6000, "num_workers": request.param}
        return dp.GraphLoader(**{**usual, **options})

    return make_loader


@pytest.fixture
def plain(data: dp.Dataset) -> laws.Make:
    """In the caller's own thread alone."""
    return lambda **options: dp.GraphLoader(
        **{"data": data, "max_nodes": NODES, "max_edges": EDGES, "window_bytes": 6000, "num_workers": 0, **options}
    )


def sizes(batch: dp.GraphBatch) -> tuple[int, int]:
    return batch.graphs.num_nodes, batch.graphs.num_edges


def of(record: dp.Record) -> tuple[int, int]:
    return int(record.graphs.node_counts.sum()), int(record.graphs.edge_counts.sum())


def test_batches_are_as_full_as_the_budget_allows(make: laws.Make, records: dict[str, dp.Record]) -> None:
    batches = list(make())
    assert len(batches) > 5
    for batch, behind in zip(batches, [*batches[1:], None], strict=True):
        nodes, edges = sizes(batch)
        assert (nodes, edges) == tuple(np.sum([of(records[one]) for one in batch.ids], axis=0))
        assert len(batch) == 1 or (nodes <= NODES and edges <= EDGES)
        if behind is not None:  # the next record would have been too much
            more = of(records[behind.ids[0]])
            assert nodes + more[0] > NODES or edges + more[1] > EDGES
    assert len({len(batch) for batch in batches}) > 1


def test_a_state_of_another_budget_is_refused(plain: laws.Make, data: dp.Dataset) -> None:
    loader = plain()
    list(loader)
    state = loader.state_dict()
    changes: list[tuple[dict[str, Any], str]] = [
        ({"max_nodes": 80}, "max_nodes 60; this loader has 80"),
        ({"max_edges": None}, "max_edges 70.* has None"),
    ]
    for change, words in [*changes, ({"seed": 3}, "seed 0"), ({"num_partitions": 2}, "partitions 1")]:
        with pytest.raises(dp.StateError, match=words):
            plain(**change).load_state_dict(state)
    with pytest.raises(dp.StateError, match="the state has max_nodes 60; this loader has None"):
        dp.GraphLoader(data, window_bytes=6000).load_state_dict(state)
    for places in ([], [1, 2], [10**6], [-1]):
        with pytest.raises(dp.StateError, match="the state is at"):
            loader.load_state_dict({**state, "step": 2, "places": places})


def test_a_record_over_the_budget_is_alone_or_refused(plain: laws.Make, records: dict[str, dp.Record]) -> None:
    most = max(of(record)[0] for record in records.values()) - 1
    big = {record.id for record in records.values() if of(record)[0] > most}
    batches = list(plain(max_nodes=most, max_edges=None, split="train"))
    over = [batch for batch in batches if sizes(batch)[0] > most]
    assert all(len(batch) == 1 for batch in over)
    assert {batch.ids[0] for batch in over} == {one for batch in batches for one in batch.ids} & big
    loader = plain(max_nodes=14, max_edges=None, oversize="raise")
    seen: list[str] = []
    with pytest.raises(dp.DataError, match=r"record '.*' has \d+ nodes; expected at most max_nodes=14, or oversize='alone'"):
        for batch in loader:
            seen += batch.ids
    expected = [batch.ids for batch in plain(max_nodes=14, max_edges=None)]
    refused = next(at for at, ids in enumerate(expected) if of(records[ids[0]])[0] > 14)
    # the batch before the refused record could not be closed
    assert seen == [one for ids in expected[: max(0, refused - 1)] for one in ids]


def test_layers_count_alone(plain: laws.Make, records: dict[str, dp.Record]) -> None:
    for batch in plain(layers=[0], max_edges=None):
        assert sizes(batch)[0] == sum(int(records[one].graphs.node_counts[0]) for one in batch.ids) <= NODES


def test_draws_fit_the_budget_too(plain: laws.Make) -> None:
    loader = plain(class_balanced=True)
    batches = list(loader)
    assert sum(len(batch) for batch in batches) == loader.num_records
    assert all(sizes(batch)[0] <= NODES or len(batch) == 1 for batch in batches)
    fresh = plain(class_balanced=True)
    for step, _ in enumerate(fresh):
        if step == 2:
            break
    other = plain(class_balanced=True)
    other.load_state_dict(fresh.state_dict())
    assert_same(other, batches[3:])


def test_a_budget_that_makes_no_sense_is_refused(plain: laws.Make) -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"max_nodes": 0}, "max_nodes is 0; expected a whole number from 1"),
        ({"max_edges": 2.5}, "max_edges is 2.5"),
        ({"on_error": "skip"}, "need the size of every record"),
        ({"oversize": "drop"}, "oversize is 'drop'; expected 'alone' or 'raise'"),
        ({"num_partitions": 2, "world_size": 3, "rank": 0}, "partitions is 2 and world_size 3; expected one to be a multiple"),
    ]
    for options, words in wrong:
        with pytest.raises(dp.UsageError, match=words):
            plain(**options)


def test_planning_ahead_reads_no_more_than_delivery(plain: laws.Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch is planned from the sizes of records near it: nothing of the rest of the epoch is looked at."""
    from dali_pipeline.reading.graphsource import GraphSource

    asked: list[int] = []
    sizes_of = GraphSource.sizes

    def counted(self: GraphSource, positions: Any) -> Any:
        asked.append(len(positions))
        return sizes_of(self, positions)

    monkeypatch.setattr(GraphSource, "sizes", counted)
    loader = plain(window_bytes=6000)
    next(iter(loader))
    assert 0 < sum(asked) < loader.num_records // 3
    asked.clear()
    batches = iter(loader)
    for _ in range(8):
        next(batches)
    fresh = plain(window_bytes=6000)
    fresh.load_state_dict(loader.state_dict())
    asked.clear()
    next(iter(fresh))
    assert 0 < sum(asked) < loader.num_records // 3


def test_damage_comes_behind_the_batches_before_it(tmp_path: Path) -> None:
    data = write(tmp_path / "set", make_records(200, seed=3))
    whole = [batch.ids for batch in dp.GraphLoader(data, max_nodes=NODES, num_workers=0, shuffle=False)]
    shard = sorted((tmp_path / "set" / "train").glob("graphs-*"))[2]
    shard.write_bytes(shard.read_bytes()[:-40])
    batches, seen = iter(dp.GraphLoader(data, max_nodes=NODES, num_workers=0, shuffle=False)), []
    with pytest.raises(dp.FormatError, match=shard.name):
        while True:
            seen.append(next(batches).ids)
    before = data.manifest.splits["train"]["graphs"].records[:2]
    assert seen == [ids for ids, end in zip(whole, np.cumsum([len(each) for each in whole]), strict=True) if end < sum(before)]
    assert seen


def test_values_left_out_leave_the_budget_as_it_is(tmp_path: Path) -> None:
    """Nothing takes their place, for it might be larger; a batch of nothing else is one row, which is not valid."""
    made = make_records(200, seed=3)
    data = write(tmp_path / "sound", made)
    first = [batch.ids for batch in dp.GraphLoader(data, max_nodes=NODES, num_workers=0, shuffle=False)]
    strange = {*first[1], first[3][0]}  # a whole batch, and one record
    for record in made:
        if record.id in strange:
            record.graphs.x[0, 0] = np.nan
    data = write(tmp_path / "set", made)
    loader = dp.GraphLoader(data, max_nodes=NODES, num_workers=0, shuffle=False, on_nan="skip")
    batches = list(loader)
    assert [batch.ids for batch in batches if batch.valid.all()] == [first[0], first[2], first[3][1:], *first[4:]]
    assert (len(batches[1]), batches[1].valid.tolist()) == (1, [False])
    assert all(sizes(batch)[0] <= NODES for batch in batches)
    assert f"{len(strange)} left out" in loader.check_digest(loader.digest)


@pytest.mark.slow
def test_many_records_pass_between_processes(tmp_path: Path) -> None:
    """What is asked and what is answered is each more than a pipe holds: neither side may wait for the other."""
    rng, one = np.random.default_rng(0), np.array([1])
    with dp.ShardWriter(tmp_path / "set", dp.Schema(x=dp.Field(dtype="uint8")), split=dp.SplitRule.parse("100/0/0")) as writer:
        for number in range(40_000):
            graphs = dp.Graphs(
                x=rng.integers(0, 9, 1),
                edge_index=np.zeros((2, 0), np.int64),
                edge_attr=None,
                node_counts=one,
                edge_counts=one - 1,
            )
            writer.write({"id": f"record-{number:020}", "label": 0, "graphs": graphs})
    loader = dp.GraphLoader(dp.open_dataset(tmp_path / "set"), max_nodes=1000, num_workers=1)
    assert len(list(loader)) == 40
    assert loader.check_digest(loader.digest).endswith("each once")


def test_an_epoch_of_no_steps_is_an_error(plain: laws.Make) -> None:
    with pytest.raises(dp.DataError, match="split 'val' has too few records for a batch on each of 8 ranks"):
        list(plain(split="val", max_nodes=10**6, world_size=8, rank=0, drop_last=True))
    with pytest.raises(dp.UsageError, match="have no number of records"):
        plain().num_valid(0)


def test_folds_and_empty_splits(plain: laws.Make, data: dp.Dataset, tmp_path: Path) -> None:
    for fold in data.folds(3):
        loader = plain(data=fold, num_partitions=2, rank=0, world_size=2)
        other = plain(data=fold, num_partitions=2, rank=1, world_size=2)
        ids = [one for batch in (*loader, *other) if batch.valid.all() for one in batch.ids]
        assert len(ids) == len(set(ids)) == fold.num_records("train", "graphs")
    empty = plain(data=write(tmp_path / "set", make_records(30), shares="100/0/0"), split="val")
    assert (len(empty), list(empty)) == (0, [])


def test_batches_are_gathered_several_at_once(plain: laws.Make, monkeypatch: pytest.MonkeyPatch) -> None:
    met, gather = [], GraphGatherer.gather_portion

    def noted(self: GraphGatherer, portion: Any) -> Any:
        met.append(portion)
        return gather(self, portion)

    monkeypatch.setattr(GraphGatherer, "gather_portion", noted)
    batches = list(plain(window="gather"))
    assert sum(len(portion.sizes) for portion in met) == len(batches)
    assert [len(portion.sizes) for portion in met][:3] == [1, 2, 4]
