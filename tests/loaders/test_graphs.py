from __future__ import annotations

import gc
import os
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from torch_geometric.data import Batch

import dali_pipeline as dp
from tests import laws
from tests.helpers.batches import assert_same
from tests.helpers.graphs import as_data
from tests.helpers.records import SCHEMA, make_records, write


@pytest.fixture(params=[0, pytest.param(2, marks=pytest.mark.slow), "auto"])
def num_workers(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def make(data: dp.Dataset, num_workers: Any) -> laws.Make:
    def make_loader(**options: Any) -> dp.GraphLoader:
        return dp.GraphLoader(**{"data": data, "batch_size": 16, "window_bytes": 6000, "num_workers": num_workers, **options})

    return make_loader


def test_a_state_of_sequences_is_refused(make: laws.Make, data: dp.Dataset) -> None:
    with pytest.raises(dp.StateError, match="loader of sequences; this one loads graphs"):
        make().load_state_dict(dp.SequenceLoader(data, batch_size=16, window_bytes=6000).state_dict())


@pytest.mark.parametrize("layers", [None, slice(1, None), [2, 0], [-1]])
def test_a_batch_is_what_pyg_makes_of_the_same_graphs(make: laws.Make, records: dict[str, dp.Record], layers: Any) -> None:
    count = 0
    for batch in make(layers=layers):
        graphs = [one for name in batch.ids for one in as_data(records[name], slice(None) if layers is None else layers)]
        if len(graphs) == len(batch):  # a record is one graph, and its label the graph's y
            for name, graph in zip(batch.ids, graphs, strict=True):
                graph.y = torch.tensor([records[name].label])
        expected = Batch.from_data_list(graphs)
        assert type(batch.graphs) is type(expected)
        assert set(batch.graphs.keys()) == set(expected.keys())
        for name in expected.keys():  # noqa: SIM118 (a PyG Batch is no mapping)
            assert batch.graphs[name].dtype == expected[name].dtype
            assert torch.equal(batch.graphs[name], expected[name]), name
        assert batch.graphs.num_graphs == expected.num_graphs == len(graphs)
        for ours, theirs in zip(batch.graphs.to_data_list(), graphs, strict=True):
            assert set(ours.keys()) == set(theirs.keys())
            for name in theirs.keys():  # noqa: SIM118 (PyG Data is no mapping)
                assert torch.equal(ours[name], theirs[name])
        chosen = np.arange(3)[slice(None) if layers is None else layers]
        assert batch.layer_index.tolist() == np.tile(chosen, len(batch)).tolist()
        assert batch.graphs_per_record.tolist() == [len(chosen)] * len(batch)
        assert torch.equal(batch.last_node, expected.ptr[1:] - 1)
        assert batch.labels.tolist() == [records[name].label for name in batch.ids]
        count += len(batch)
    assert count >= 200


def test_indices_of_any_width_meet_in_one_batch(tmp_path: Path) -> None:
    """A shard stores the narrowest type that serves; a batch from shards of several is right all the same."""
    rng = np.random.default_rng(0)
    records = []
    for number, nodes in enumerate([5, 300, 70_000] * 4):
        edges = rng.integers(0, nodes, size=(2, 50))
        edges[:, 0] = nodes - 1
        graphs = dp.Graphs(
            x=rng.normal(size=(nodes, 4)).astype(np.float16),
            edge_index=edges,
            edge_attr=rng.random(50).astype(np.float16),
            node_counts=np.array([nodes]),
            edge_counts=np.array([50]),
        )
        records.append(dp.Record(id=str(number), label=0, graphs=graphs))
    data = write(tmp_path / "set", records, shard_bytes=1, shares="100/0/0")
    (batch,) = dp.GraphLoader(data, batch_size=12, num_workers=0)
    expected = Batch.from_data_list([as_data(records[int(name)])[0] for name in batch.ids])
    assert torch.equal(batch.graphs.edge_index, expected.edge_index)


def test_graphs_without_edge_features(tmp_path: Path) -> None:
    schema = dp.Schema(x=SCHEMA.x)
    with dp.ShardWriter(tmp_path / "set", schema, split=dp.SplitRule.parse("100/0/0")) as writer:
        for record in make_records(20):
            writer.write(record)
    batch, *_ = dp.GraphLoader(dp.open_dataset(tmp_path / "set"))
    assert "edge_attr" not in batch.graphs
    assert len(batch.graphs.to_data_list()) == 48


def test_damage_crosses_the_process_border_in_one_sentence(tmp_path: Path, num_workers: Any) -> None:
    data = write(tmp_path / "set", make_records(100), shard_bytes=1500)
    path = data.shard_path("train", "graphs", 3)
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    good = 0
    with pytest.raises(dp.FormatError, match=r"^[^\n]*graphs-00003\.safetensors[^\n]*damaged[^\n]*$"):
        for _ in dp.GraphLoader(data, batch_size=2, shuffle=False, num_workers=num_workers):
            good += 1
    assert good == sum(data.table("train", "graphs").records[:3]) // 2


def children() -> set[psutil.Process]:
    """Processes that this one has started, other tests' too."""
    return set(psutil.Process().children())


def test_a_worker_that_is_killed_is_an_error_not_a_hang(tmp_path: Path) -> None:
    data = write(tmp_path / "set", make_records(400))
    loader, before = dp.GraphLoader(data, batch_size=1, num_workers=2), children()
    words = r"^a worker process of the graph loader died \(killed by signal 9\); expected enough memory .* num_workers=0$"
    with pytest.raises(dp.PipelineError, match=words):
        for step, _ in enumerate(loader):
            if step == 3:
                os.kill((children() - before).pop().pid, signal.SIGKILL)
    assert children() <= before


def test_what_crosses_lies_in_memory_that_is_shared_and_used_again(data: dp.Dataset) -> None:
    """Anonymous, so that no file of /dev/shm is needed; a result that its room does not suffice for comes through the pipe."""
    before = len(psutil.Process().memory_maps(grouped=False))
    for arena_bytes in (1 << 20, 100):
        loader = dp.GraphLoader(data, num_workers=2)
        loader._arena_bytes = arena_bytes
        batches = iter(loader)
        held = [next(batches) for _ in range(3)]
        maps = psutil.Process().memory_maps(grouped=False)
        assert not [one.path for one in maps if one.path.startswith("/dev/shm") and "/sem." not in one.path]
        assert len(maps) < before + 60  # threads that read ahead have some of their own
        assert_same([*held, *batches], dp.GraphLoader(data, num_workers=0))


def test_memory_that_cannot_be_had_is_one_sentence(data: dp.Dataset) -> None:
    loader = dp.GraphLoader(data, num_workers=1)
    loader._arena_bytes = 1 << 62
    with pytest.raises(dp.PipelineError, match=r"^1 worker processes with 2 x .* cannot be had .* or num_workers=0$"):
        next(iter(loader))


def test_no_process_is_left_behind(make: laws.Make) -> None:
    loader = make()
    list(loader)  # opens every shard
    before, others = psutil.Process().num_fds(), children()
    for _ in range(5):
        next(iter(loader))
    gc.collect()
    assert children() <= others
    assert psutil.Process().num_fds() <= before


def test_a_whole_epoch_of_batches_from_processes_can_be_held(data: dp.Dataset) -> None:
    """They are copied out of the shared memory, which costs a file descriptor an array."""
    before = psutil.Process().num_fds()
    held = list(dp.GraphLoader(data, batch_size=2, num_workers=2, dtype=torch.float16))
    gc.collect()
    assert len(held) > 100
    assert psutil.Process().num_fds() < before + 40


def test_workers_tell_each_other_what_is_sound(data: dp.Dataset) -> None:
    loader = dp.GraphLoader(data, num_workers=2)
    list(loader)
    index = loader._gatherer.source._index
    assert index._sound[index._shard(0).array("x").first_block] == 1


def test_auto_starts_a_thread_where_there_are_cores_for_it_and_no_process(
    data: dp.Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    for cores, threads in ((2, 0), (8, 1)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: range(cores))
        loader, before = iter(dp.GraphLoader(data, window="gather")), children()
        next(loader)
        assert children() <= before
        assert sum(thread.name.startswith("gather") for thread in threading.enumerate()) == threads
        del loader
        assert not any(thread.name.startswith("gather") for thread in threading.enumerate())


@pytest.mark.parametrize(
    ("nodes", "edge", "words"),
    [
        ([4, 4], [0, 4], r"graph 1 of record 'b' has 4 nodes and the edge \(0, 4\); expected indices below 4"),
        ([8, 0], [0, 3], r"graph 1 of record 'b' has no nodes; expected at least one"),
    ],
)
def test_wrong_content_with_a_right_hash_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_workers: Any, nodes: list[int], edge: list[int], words: str
) -> None:
    """Write what a foreign tool might: our own writer refuses it, so its check is taken away here."""
    edges = np.array([[0, edge[0]], [1, edge[1]]])
    counts = [np.array([4, 4]), np.array(nodes)]
    records = [
        dp.Record(
            id=name,
            label=0,
            graphs=dp.Graphs(
                x=np.ones((8, 4), np.float16),
                edge_index=edges if name == "b" else edges.clip(0, 1),
                edge_attr=np.ones(2, np.float16),
                node_counts=node_counts,
                edge_counts=np.array([1, 1]),
            ),
        )
        for name, node_counts in zip("ab", counts, strict=True)
    ]
    monkeypatch.setattr("dali_pipeline.writing.openshard.graph_rows", lambda record, _: record.graphs)
    data = write(tmp_path / "set", records, shares="100/0/0")
    good = 0
    with pytest.raises(dp.FormatError, match=rf"^[^\n]*graphs-00000\.safetensors: {words}$"):
        for _ in dp.GraphLoader(data, batch_size=1, shuffle=False, num_workers=num_workers):
            good += 1
    assert good == 1
    (only, *_) = dp.GraphLoader(data, batch_size=1, shuffle=False, num_workers=num_workers, on_error="skip")
    assert only.ids == ["a"]


def test_numbers_of_nodes_do_not_overflow(tmp_path: Path) -> None:
    """Nodes of a batch are numbered in int64, however narrow the stored indices are."""
    schema = dp.Schema(x=dp.Field(dtype="float16", shape=(1,)))
    with dp.ShardWriter(tmp_path / "set", schema, split=dp.SplitRule.parse("100/0/0")) as writer:
        for number in range(400):
            graphs = dp.Graphs(
                x=np.zeros((200, 1)),
                edge_index=np.array([[199, 0], [0, 199]]),
                edge_attr=None,
                node_counts=np.array([200]),
                edge_counts=np.array([2]),
            )
            writer.write({"id": number, "label": 0, "graphs": graphs})
    for window in ("resident", "gather"):
        (batch,) = dp.GraphLoader(dp.open_dataset(tmp_path / "set"), batch_size=400, window=window)
        assert batch.graphs.edge_index.dtype == torch.int64
        assert batch.graphs.edge_index.max() == 400 * 200 - 1 > 2**16
