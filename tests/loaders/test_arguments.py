"""Arguments that make no sense are refused in one sentence; whatever stands for a whole number is one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

import dali_pipeline as dp
from dali_pipeline.runtime.checks import real, whole
from tests.helpers.records import SCHEMA, make_records

NONSENSE: list[Any] = [
    None, True, -1, 2.5, float("nan"), "x", b"x", [], ["a"], [None], {}, {"a": 1}, (), slice(0, 3, 0), slice("a"), object(),
    np.array([1, 2]), np.float32(2), torch.tensor([1, 2]), torch.empty(2, device="meta"), torch.empty((), device="meta"),
    2**70, 10**400, int, "\0", "\ud800", 1j, [[1], [1, 2]], np.ma.masked, np.datetime64("2020"),
]  # fmt: skip
LOADER = [
    "split", "batch_size", "shuffle", "seed", "layers", "device", "dtype", "window_bytes", "num_partitions", "num_workers",
    "drop_last", "on_error", "rank", "world_size", "class_balanced", "group_weights", "on_nan",
]  # fmt: skip
SEQUENCES, GRAPHS = ["engine", "normalize", "bucket_by_length"], ["max_nodes", "max_edges", "oversize", "min_weight"]


def refused_or_taken(call: Callable[[Any], object]) -> int:
    """How many of NONSENSE are refused, each in one line; any error of another kind is raised."""
    words = []
    for value in NONSENSE:
        try:
            call(value)
        except dp.PipelineError as error:
            words.append(str(error))
    assert all("\n" not in each and len(each) < 700 for each in words)
    return len(words)


@pytest.mark.parametrize(
    ("kind", "name"), [*(("s", one) for one in LOADER + SEQUENCES), *(("g", one) for one in LOADER + GRAPHS)]
)
def test_loaders(data: dp.Dataset, kind: str, name: str) -> None:
    def make(value: Any) -> None:
        make_loader: Any = dp.SequenceLoader if kind == "s" else dp.GraphLoader
        ranks = {"rank": 0, "world_size": 1} if name in ("rank", "world_size") else {}
        make_loader(data, **{"num_workers": 0, **ranks, name: value})

    assert refused_or_taken(make) > 15


@pytest.mark.parametrize("name", ["set_epoch", "num_valid", "load_state_dict", "check_digest"])
def test_methods(data: dp.Dataset, name: str) -> None:
    assert refused_or_taken(getattr(dp.SequenceLoader(data), name)) > 20


@pytest.mark.parametrize(
    "call",
    [
        dp.open_dataset,
        dp.mix,
        lambda value: dp.Field(dtype=value),
        lambda value: dp.Field(dtype="float16", shape=value),
        lambda value: dp.Field(dtype="int8", shape=(1,), scale=value),
        lambda value: dp.Field(dtype="int8", by_layer=value),
        dp.Field.scaled,
        lambda value: dp.Schema(sequence=value),
        lambda value: dp.Schema(x=dp.Field(dtype="int8"), edge_attr=value),
        lambda value: dp.Schema(x=dp.Field(dtype="int8"), fields=value),
        lambda value: dp.SplitRule(shares=value),
        lambda value: dp.SplitRule(seed=value),
        dp.SplitRule.parse,
        dp.Record.of,
        dp.Graphs.stack,
        lambda value: dp.Graphs.stack(make_records(1), value),
        lambda value: dp.World(rank=value, world_size=9),
        lambda value: dp.World(world_size=value),
    ],
)
def test_functions(call: Callable[[Any], object]) -> None:
    assert refused_or_taken(call) > 15


def test_data_sets(data: dp.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    calls: list[Callable[[Any], object]] = [
        data.folds,
        lambda value: data.folds(2, value),
        lambda value: dp.mix([data], weights=[value]),
        lambda value: dp.mix([data], weights=value),
        dp.mix,
        lambda value: data.num_records(value, "graphs"),
        lambda value: data.num_records("train", value),
        data.label_counts,
        lambda value: dp.open_dataset("memory://x", cache_dir="cache" if value is None else value),
        lambda value: dp.open_dataset("memory://x", cache_dir=tmp_path, cache_bytes=value),
    ]
    for call in calls:
        assert refused_or_taken(call) > 15


@pytest.mark.parametrize("name", ["root", "schema", "shard_bytes", "split", "source", "fingerprint"])
def test_writers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)

    def make(value: Any) -> None:
        number = len(list(tmp_path.iterdir()))
        arguments = {"root": tmp_path / f"{number}", "schema": SCHEMA, name: value}
        with dp.ShardWriter(**arguments) as writer:
            writer.write(make_records(1)[0])

    assert refused_or_taken(make) > 15


@pytest.mark.parametrize("name", ["id", "label", "group", "sequence", "graphs"])
def test_records(tmp_path: Path, name: str) -> None:
    record = make_records(1)[0]
    fields = {each: getattr(record, each) for each in ("id", "label", "group", "sequence", "graphs")}
    numbers = iter(range(10**6))
    with dp.ShardWriter(tmp_path / "set", SCHEMA) as writer:
        writer.write(make_records(2)[1])
        assert refused_or_taken(lambda value: writer.write({**fields, "id": next(numbers), name: value})) > 5


@pytest.mark.parametrize("name", ["x", "edge_index", "edge_attr", "node_counts", "edge_counts"])
def test_graphs(tmp_path: Path, name: str) -> None:
    graphs = make_records(3)[2].graphs
    assert graphs.edge_counts.sum() > 1
    fields = {each: getattr(graphs, each) for each in ("x", "edge_index", "edge_attr", "node_counts", "edge_counts")}
    with dp.ShardWriter(tmp_path / "set", SCHEMA) as writer:
        writer.write(make_records(2)[1])

        def write(value: Any) -> None:
            writer.write({"id": "a", "label": 0, "graphs": dp.Graphs(**{**fields, name: value})})

        assert refused_or_taken(write) == len(NONSENSE)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda data: dp.mix(cast("Any", {data: 0.7})),
            r"mix takes a list of data sets and a list of weights, such as mix\(\[a, b\], weights=\[0.7, 0.3\]\)",
        ),
        (
            lambda data: dp.SequenceLoader(data, group_weights=cast("Any", ["rare"])),
            r"group_weights is \['rare'\]; expected weights by group",
        ),
        (lambda data: dp.SequenceLoader(data, layers=slice(0, 3, 0)), r"layers are slice\(0, 3, 0\); expected a slice"),
        (lambda data: dp.GraphLoader(data, layers=slice("a", "b")), r"layers are slice\('a', 'b', None\); expected a slice"),
        (lambda data: dp.SequenceLoader(dp.mix([data]), normalize=True), "a mix has no feature statistics, as those of its"),
    ],
)
def test_words(data: dp.Dataset, call: Callable[[dp.Dataset], object], words: str) -> None:
    with pytest.raises(dp.PipelineError, match=words):
        call(data)


@pytest.mark.parametrize("name", ["label", "sequence"])
def test_a_tensor_without_values_is_named(tmp_path: Path, name: str) -> None:
    record = {"id": "a", "label": 1, "sequence": make_records(1)[0].sequence, name: torch.empty((), device="meta")}
    with pytest.raises(dp.DataError, match=f"record 'a'.*{name}"), dp.ShardWriter(tmp_path / "set", SCHEMA) as writer:
        writer.write(record)


def test_shares_may_be_a_text(tmp_path: Path) -> None:
    for name, split in (("text", "60/20/20"), ("split", dp.SplitRule.parse("60/20/20"))):
        with dp.ShardWriter(tmp_path / name, SCHEMA, split=split) as writer:
            for record in make_records(40):
                writer.write(record)
    assert dp.open_dataset(tmp_path / "text").digest == dp.open_dataset(tmp_path / "split").digest
    with pytest.raises(dp.UsageError, match="expected shares of train/val/test such as 70/15/15"):
        dp.ShardWriter(tmp_path / "no", SCHEMA, split="most/few/none")
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("number", [np.int64, np.uint8, torch.tensor])
def test_any_whole_number_is_taken(data: dp.Dataset, number: Callable[[int], Any]) -> None:
    plain: dict[str, Any] = {"batch_size": 4, "seed": 3, "num_partitions": 2, "num_workers": 1, "window_bytes": 200}
    plain |= {"rank": 1, "world_size": 2}
    plain_loader = dp.SequenceLoader(data, layers=[0, 1], shuffle=True, **plain)
    given: dict[str, Any] = {name: number(value) for name, value in plain.items()}
    given |= {"layers": [number(0), number(1)], "shuffle": np.bool_(True)}
    loader = dp.SequenceLoader(data, **given)
    for each in (loader, plain_loader):
        each.set_epoch(number(2))
    assert [batch.ids for batch in loader] == [batch.ids for batch in plain_loader]
    assert loader.state_dict() == plain_loader.state_dict()
    assert all(type(value) is not np.int64 for value in loader.state_dict()["order"].values())
    graphs = dp.GraphLoader(data, max_nodes=number(90), layers=slice(number(0), number(2)))
    assert [batch.ids for batch in graphs] == [batch.ids for batch in dp.GraphLoader(data, max_nodes=90, layers=slice(0, 2))]
    assert [one.digest for one in data.folds(number(3), number(1))] == [one.digest for one in data.folds(3, 1)]


def test_numbers() -> None:
    assert [whole("n", value) for value in (3, np.int8(3), np.array(3), torch.tensor(3))] == [3] * 4
    assert real("n", np.float32(0.5), "a number") == real("n", torch.tensor(0.5), "a number") == 0.5
    for value in (True, np.True_, torch.tensor(True), 3.0, "3", -1):
        with pytest.raises(dp.UsageError, match=r"n is .*; expected a whole number of at least 0"):
            whole("n", value)
