"""The resident window of graphs: the batches of the gather."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dali_pipeline as dp
from dali_pipeline.reading.graphsource import GraphSource
from dali_pipeline.reading.graphsuperbatch import GraphGatherer
from dali_pipeline.reading.residency import Residency
from tests.helpers.batches import assert_resumes, assert_same
from tests.helpers.graphs import FIELDS, molecules
from tests.helpers.records import FIELDS as EVERY_FIELD
from tests.helpers.records import SCHEMA, make_records, with_fields, write


@pytest.fixture(scope="module", params=[1, 3])
def data(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> dp.Dataset:
    """Records of one graph and of three, some without edges, with fields of every level."""
    root = tmp_path_factory.mktemp("resident") / "set"
    schema = dp.Schema(x=dp.Field(dtype="float32", shape=(4,)), edge_attr=dp.Field(dtype="float32"), fields=FIELDS)
    with dp.ShardWriter(root, schema, shard_bytes=8192, split=dp.SplitRule.parse("100/0/0")) as writer:
        for number, graphs in enumerate(molecules(300, request.param)):
            writer.write(dp.Record(id=f"molecule-{number}", label=number % 2, graphs=dp.Graphs.stack(graphs, FIELDS)))
    return dp.open_dataset(root)


def both(data: dp.Dataset, **options: Any) -> tuple[dp.GraphLoader, dp.GraphLoader]:
    options = {"batch_size": 4, "window_bytes": 200_000, **options}
    return dp.GraphLoader(data, window="resident", **options), dp.GraphLoader(data, window="gather", **options)


def check(resident: dp.GraphLoader, gathered: dp.GraphLoader, epochs: int = 2) -> None:
    for _ in range(epochs):
        batches = list(resident)
        expected = list(gathered)
        assert len(batches) == len(expected) > 0
        assert_same(batches, expected)
        assert resident.digest == gathered.digest
        assert resident.left_out == gathered.left_out


@pytest.mark.parametrize("window_bytes", [100_000, 10**7])
@pytest.mark.parametrize("options", [{}, {"min_weight": 0.5}, {"layers": [0]}, {"num_workers": 0}, {"fields": []}])
def test_the_window_delivers_what_the_gather_does(data: dp.Dataset, options: dict[str, Any], window_bytes: int) -> None:
    loader, gathered = both(data, window_bytes=window_bytes, **options)
    residency = Residency.of(loader.plan(0), 0, 1)
    assert residency is not None
    assert residency.whole == (window_bytes > 10**6)
    check(loader, gathered)


@pytest.mark.parametrize("options", [{"max_nodes": 60}, {"max_edges": 80, "max_nodes": 400, "min_weight": 0.5}])
def test_a_budget_from_a_window_that_moves(data: dp.Dataset, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    loader, gathered = both(data, **options)
    residency = loader._residency(loader.plan(0))
    assert residency is not None
    assert not residency.whole
    epochs = [list(gathered), list(gathered)]
    monkeypatch.setattr(GraphGatherer, "gather_packed", None)  # every batch is served by the window
    for expected in epochs:
        assert_same(list(loader), expected)
    assert_resumes(loader, both(data, **options)[0], epochs[0])


@pytest.mark.parametrize(
    "options", [{"max_nodes": 150, "num_partitions": 2}, {"max_edges": 200, "num_partitions": 4}, {"shuffle": False}]
)
def test_budgets_and_file_order_if_the_split_fits(data: dp.Dataset, options: dict[str, Any]) -> None:
    check(*both(data, window_bytes=10**7, **options))
    with pytest.raises(dp.UsageError, match="needs a split that fits in the window"):
        both(data, window_bytes=20_000, **options)
    assert dp.GraphLoader(data, batch_size=4, window_bytes=20_000, **options).window == "gather"


def test_a_set_that_fits_is_read_once(data: dp.Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    loader, gathered = both(data, window_bytes=10**7)
    check(loader, gathered, 1)
    expected = list(gathered)
    monkeypatch.setattr(GraphSource, "gather", None)
    assert_same(list(loader), expected)


def test_ranks_that_share_a_set_that_fits(data: dp.Dataset) -> None:
    ranks = [dp.GraphLoader(data, batch_size=8, rank=rank, world_size=2, window="resident") for rank in range(2)]
    whole = [list(batch.ids) for batch in dp.GraphLoader(data, batch_size=16, window="gather")]
    parts = [[list(batch.ids) for batch in loader] for loader in ranks]
    assert whole == [a + b for a, b in zip(*parts, strict=True)]


def test_records_with_fields_of_every_level(tmp_path: Path) -> None:
    schema = dp.Schema(sequence=SCHEMA.sequence, x=SCHEMA.x, edge_attr=SCHEMA.edge_attr, step_axis="layer", fields=EVERY_FIELD)
    records = [with_fields(record, number) for number, record in enumerate(make_records(300))]
    data = write(tmp_path / "set", records, schema=schema, shares="100/0/0")
    for window_bytes in (200_000, 10**7):
        loader, gathered = both(data, window_bytes=window_bytes)
        check(loader, gathered)
        resumed = dp.GraphLoader(data, window="resident", batch_size=4, window_bytes=window_bytes)
        batches = iter(loader)
        taken = [next(batches) for _ in range(30)]
        resumed.load_state_dict(loader.state_dict())
        assert len(taken) == 30
        assert_same(list(resumed), list(batches))


@pytest.mark.parametrize("window_bytes", [200_000, 10**7])
def test_damage_and_nan(tmp_path: Path, window_bytes: int) -> None:
    records = make_records(300)
    records[30].graphs.x[0, 0] = np.nan
    data = write(tmp_path / "set", records, shard_bytes=4000, shares="100/0/0")
    check(*both(data, on_nan="skip", window_bytes=window_bytes), 3)
    path = data.shard_path("train", "graphs", 2)
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    data = dp.open_dataset(tmp_path / "set")
    messages = []
    for loader in both(data, window_bytes=window_bytes):
        with pytest.raises(dp.FormatError, match="graphs-00002") as caught:
            list(loader)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    loader, gathered = both(data, window_bytes=window_bytes, on_error="skip", on_nan="skip")
    check(loader, gathered)
    assert loader.left_out


def test_the_default(data: dp.Dataset) -> None:
    assert dp.GraphLoader(data).window == "resident"
    assert dp.GraphLoader(data, num_workers=1).window == "gather"
    assert dp.GraphLoader(data, class_balanced=True).window == "gather"
    with pytest.raises(dp.UsageError, match="does not go with num_workers, which are processes"):
        dp.GraphLoader(data, num_workers=1, window="resident")
    with pytest.raises(dp.UsageError, match="does not go with class_balanced"):
        dp.GraphLoader(data, class_balanced=True, window="resident")


def test_what_memory_cannot_keep_is_read_past_the_page_cache(data: dp.Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dali_pipeline.storage.direct.LEAST_BYTES", 1)
    monkeypatch.setattr("dali_pipeline.loaders.loader.allowed_memory", lambda: (2, 1))
    resident, gathered = both(data, window_bytes=100_000)
    assert resident._source.past_cache
    assert not gathered._source.past_cache
    check(resident, gathered)
