"""Further fields of graphs, named: from PyG data to shards to PyG batches; and edges left out by their weight."""

from __future__ import annotations

import subprocess
import sys
import time
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch_geometric.data import Batch, Data

import dali_pipeline as dp
from tests.helpers.graphs import FIELDS, molecules, write_molecules
from tests.helpers.records import make_records, write


@pytest.fixture(scope="module")
def graphs() -> list[list[Data]]:
    return molecules(90)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, graphs: list[list[Data]]) -> dp.Dataset:
    return write_molecules(tmp_path_factory.mktemp("fields") / "set", graphs)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("layers", [None, [1], [1, 0]])
def test_they_come_as_attributes_of_the_pyg_batch(
    data: dp.Dataset, graphs: list[list[Data]], num_workers: int, layers: list[int] | None
) -> None:
    for batch in dp.GraphLoader(data, batch_size=7, layers=layers, num_workers=num_workers):
        chosen = [graphs[int(one)][layer] for one in batch.ids for layer in layers or (0, 1)]
        expected = Batch.from_data_list(chosen)
        for name in ("x", "pos", "kind", "bond", "edge_attr", "edge_index", "batch", "ptr", "target"):
            assert torch.equal(batch.graphs[name], expected[name]), name
            assert batch.graphs[name].dtype == expected[name].dtype, name
        assert torch.equal(batch.graphs.energy, expected.energy.float())  # real numbers are widened
        for mine, theirs in zip(batch.graphs.to_data_list(), chosen, strict=True):
            assert torch.equal(mine.pos, theirs.pos)
            assert torch.equal(mine.bond, theirs.bond)
            assert torch.equal(mine.target, theirs.target)
            assert torch.equal(mine.energy, theirs.energy.float())


def test_the_rest_of_the_tool_knows_them(data: dp.Dataset, tmp_path: Path) -> None:
    for command in (["verify", data.root], ["inspect", data.root], ["convert", data.root, tmp_path / "again"]):
        done = subprocess.run([sys.executable, "-m", "dali_pipeline", *map(str, command)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        if command[0] == "inspect":
            assert "node.pos" in done.stdout
    again = dp.open_dataset(tmp_path / "again")
    assert again.schema.named == FIELDS
    ours, theirs = (
        {
            one: graph
            for batch in dp.GraphLoader(each, batch_size=1)
            for one, graph in zip(batch.ids, [batch.graphs], strict=True)
        }
        for each in (data, again)
    )
    shared = ours.keys() & theirs.keys()
    assert len(shared) > 10
    assert all(
        torch.equal(ours[one].target, theirs[one].target) and torch.equal(ours[one].pos, theirs[one].pos) for one in shared
    )


def test_a_field_of_another_length_is_found_by_verify(tmp_path: Path, graphs: list[list[Data]]) -> None:
    from safetensors.numpy import load_file

    schema = dp.Schema(x=dp.Field(dtype="float32", shape=(4,)), fields={"node.pos": FIELDS["node.pos"]})
    with dp.ShardWriter(tmp_path / "set", schema, split=dp.SplitRule.parse("100/0/0")) as writer:
        for number, record in enumerate(graphs[:5]):
            writer.write({"id": str(number), "label": 0, "graphs": record})
    shard = next((tmp_path / "set" / "train").glob("graphs-*"))
    assert load_file(shard)["node.pos"].shape[1] == 3  # any tool of the field opens it
    content = bytearray(shard.read_bytes())
    at = content.find(load_file(shard)["node.pos"].tobytes())
    content[at] ^= 1
    shard.write_bytes(content)
    done = subprocess.run([sys.executable, "-m", "dali_pipeline", "verify", tmp_path / "set"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "node.pos" in done.stdout + done.stderr
    with pytest.raises(dp.FormatError, match=r"node\.pos"):
        list(dp.GraphLoader(dp.open_dataset(tmp_path / "set"), num_workers=0))


@pytest.mark.parametrize(
    "name", ["edge.face", "node.index2", "node.subgraph_batch", "node.counts", "graph.offsets", "node.class"]
)
def test_names_that_would_be_lost_or_joined_otherwise_are_refused(name: str) -> None:
    x = dp.Field(dtype="float32", shape=(3,))
    with pytest.raises(dp.UsageError, match=r"expected step\., record\., node\."):
        dp.Schema(x=x, fields={name: x})


def test_what_pyg_has_as_methods_is_refused_by_the_writer(tmp_path: Path) -> None:
    x = dp.Field(dtype="float32", shape=(3,))
    for name in ("node.to", "node.keys", "graph.is_cuda", "node.size"):
        with pytest.raises(dp.UsageError, match="has a meaning of its own in a PyG batch"):
            dp.ShardWriter(tmp_path / "set", dp.Schema(x=x, fields={name: x}))
    assert not (tmp_path / "set").exists()


def test_rows_belong_to_their_own_graph(tmp_path: Path) -> None:
    """Not only must their sum be right."""
    schema = dp.Schema(
        x=dp.Field(dtype="float32", shape=(1,)),
        edge_attr=dp.Field(dtype="float32"),
        fields={"node.pos": dp.Field(dtype="float32")},
    )

    def graphs(pos: list[int], attr: list[int], scalar: bool = False) -> list[Data]:
        found = []
        for nodes, rows, weights in zip((2, 3), pos, attr, strict=True):
            edges = torch.zeros(2, nodes, dtype=torch.int64)
            found.append(Data(x=torch.ones(nodes, 1), edge_index=edges, edge_attr=torch.ones(weights), pos=torch.ones(rows)))
        if scalar:
            found[1].pos = torch.tensor(1.0)
        return found

    with dp.ShardWriter(tmp_path / "set", schema) as writer:
        wrong = [
            (graphs([3, 2], [2, 3]), "record '1': graph 0, node.pos: 3 rows; expected 2, one a node"),
            (graphs([2, 3], [3, 2]), "record '1': graph 0, edge_attr: 3 rows; expected 2, one an edge"),
            (graphs([2, 3], [2, 3], scalar=True), "record '1': node.pos has rows of different shapes"),
        ]
        for record, words in wrong:
            with pytest.raises(dp.DataError, match=words):
                writer.write({"id": "1", "label": 0, "graphs": record})
        writer.write({"id": "2", "label": 0, "graphs": graphs([2, 3], [2, 3])})


def test_targets_are_never_narrower_than_stored(tmp_path: Path) -> None:
    exact = 1_000_000_000.25
    schema = dp.Schema(
        x=dp.Field(dtype="float16", shape=(1,)),
        fields={
            "graph.e": dp.Field(dtype="float64"),
            "graph.f": dp.Field(dtype="float32"),
            "node.h": dp.Field(dtype="bfloat16"),
        },
    )
    graph = Data(
        x=torch.ones(1, 1), edge_index=torch.zeros(2, 0, dtype=torch.int64),
        e=torch.tensor([exact], dtype=torch.float64), f=torch.tensor([-1e5]), h=torch.tensor([3.0]),
    )  # fmt: skip
    with dp.ShardWriter(tmp_path / "set", schema, split=dp.SplitRule.parse("100/0/0")) as writer:
        writer.write({"id": "1", "label": 0, "graphs": [graph]})
    (batch,) = dp.GraphLoader(dp.open_dataset(tmp_path / "set"), batch_size=1, dtype=torch.float16)
    assert (batch.graphs.e.item(), batch.graphs.f.item(), batch.graphs.h.item()) == (exact, -1e5, 3.0)
    assert batch.graphs.x.dtype == torch.float16
    again = [
        sys.executable,
        "-m",
        "dali_pipeline",
        "convert",
        tmp_path / "set",
        tmp_path / "again",
        "--dtype",
        "node.h=bfloat16",
    ]
    done = subprocess.run([*map(str, again), "--split", "100/0/0"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert dp.open_dataset(tmp_path / "again").schema.named["node.h"].dtype == "bfloat16"


def test_what_does_not_fit_is_refused_in_a_sentence(tmp_path: Path) -> None:
    x = dp.Field(dtype="float32", shape=(4,))
    for key in ("pos", "node.", "layer.pos", "node.x", "graph.batch", "graph.num_nodes", "node._store", "node.a b"):
        with pytest.raises(dp.UsageError, match=r"expected step\., record\., node\., edge\. or graph\."):
            dp.Schema(x=x, fields={key: x})
    with pytest.raises(dp.UsageError, match=r"'node.a' at two levels; expected a name at one level only"):
        dp.Schema(x=x, fields={"node.a": x, "graph.a": x})
    with pytest.raises(dp.UsageError, match="needs `x`"):
        dp.Schema(sequence=x, fields={"node.a": x})
    schema = dp.Schema(x=x, fields={"node.pos": FIELDS["node.pos"]})
    ((graph,),) = molecules(1, layers=1)
    wrong: list[tuple[Any, str]] = [
        (torch.zeros(len(graph.x) + 1, 3), r"record '1': graph 0, node.pos: \d+ rows; expected \d+, one a node"),
        (torch.zeros(len(graph.x), 2), r"record '1', node.pos has rows of shape \(2,\); expected \(3,\)"),
        (None, "record '1': node.pos"),
    ]
    with dp.ShardWriter(tmp_path / "set", schema) as writer:
        for pos, words in wrong:
            graph.pos = pos
            with pytest.raises(dp.DataError, match=words):
                writer.write({"id": "1", "label": 0, "graphs": [graph]})
        graph.pos = torch.zeros(len(graph.x), 3)
        writer.write({"id": "2", "label": 0, "graphs": [graph]})
    assert dp.open_dataset(tmp_path / "set").num_records("train", "graphs") <= 1


@pytest.mark.parametrize("num_workers", [0, 2])
def test_light_edges_are_left_out(data: dp.Dataset, graphs: list[list[Data]], num_workers: int) -> None:
    dropped = 0
    for batch in dp.GraphLoader(data, batch_size=7, min_weight=0.5, num_workers=num_workers):
        chosen = []
        for one in batch.ids:
            for graph in graphs[int(one)]:
                heavy = graph.edge_attr >= 0.5
                dropped += int((~heavy).sum())
                light = graph.clone()
                light.edge_index, light.edge_attr, light.bond = (
                    graph.edge_index[:, heavy],
                    graph.edge_attr[heavy],
                    graph.bond[heavy],
                )
                chosen.append(light)
        expected = Batch.from_data_list(chosen)
        for name in ("x", "edge_index", "edge_attr", "bond", "pos", "batch"):
            assert torch.equal(batch.graphs[name], expected[name]), name
        assert [graph.num_edges for graph in batch.graphs.to_data_list()] == [graph.num_edges for graph in chosen]
    assert dropped > 100
    everything = next(iter(dp.GraphLoader(data, min_weight=2)))
    assert everything.graphs.num_edges == 0
    assert everything.graphs.num_nodes > 0


def test_float16_weights_are_held_against_the_number_itself(tmp_path: Path) -> None:
    """0.1 is 0.09998 in float16: smaller than 0.1, whatever the weights' type is."""
    schema = dp.Schema(x=dp.Field(dtype="float32", shape=(1,)), edge_attr=dp.Field(dtype="float16"))
    edges = torch.zeros(2, 2, dtype=torch.int64)
    with dp.ShardWriter(tmp_path / "set", schema, split=dp.SplitRule.parse("100/0/0")) as writer:
        graph = Data(x=torch.ones(1, 1), edge_index=edges, edge_attr=torch.tensor([0.1, 0.11]))
        writer.write({"id": "1", "label": 0, "graphs": [graph]})
    for least, kept in ((0.1, 1), (1e9, 0)):
        (batch,) = dp.GraphLoader(dp.open_dataset(tmp_path / "set"), batch_size=1, min_weight=least)
        assert batch.graphs.num_edges == kept


def test_weights_that_are_none_are_refused(data: dp.Dataset, tmp_path: Path) -> None:
    for least in (float("nan"), "1", True):
        with pytest.raises(dp.UsageError, match=r"min_weight is .*; expected a number"):
            dp.GraphLoader(data, min_weight=least)  # type: ignore[arg-type]
    with dp.ShardWriter(tmp_path / "set", dp.Schema(x=dp.Field(dtype="float32", shape=(4,)))) as writer:
        writer.write({"id": "1", "label": 0, "graphs": molecules(1)[0]})
    with pytest.raises(dp.UsageError, match="for data with no edge_attr; expected one weight an edge"):
        dp.GraphLoader(dp.open_dataset(tmp_path / "set"), min_weight=0.5)


def test_older_sets_keep_their_digest(tmp_path: Path) -> None:
    """A schema without further fields is written as ever, so no state of an older data set is refused."""
    write(tmp_path / "set", make_records(4))
    assert '"fields"' not in (tmp_path / "set" / "manifest.json").read_text()


def test_layers_read_their_own_bytes_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter of wide layers is a quarter of the bytes read."""
    from dali_pipeline.storage.reads import read_many

    rng = np.random.default_rng(0)
    schema = dp.Schema(x=dp.Field(dtype="float32", shape=(512,)), edge_attr=dp.Field(dtype="float32"))
    with dp.ShardWriter(tmp_path / "set", schema, split=dp.SplitRule.parse("100/0/0")) as writer:
        for number in range(32):
            nodes, edges = np.full(8, 16), np.full(8, 20)
            graphs = dp.Graphs(
                x=rng.normal(size=(128, 512)).astype(np.float32),
                edge_index=rng.integers(0, 16, (2, 160)),
                edge_attr=rng.random(160).astype(np.float32),
                node_counts=nodes,
                edge_counts=edges,
            )
            writer.write({"id": str(number), "label": 0, "graphs": graphs})
    data = dp.open_dataset(tmp_path / "set")
    read: list[int] = []

    def counted(fds: Any, offsets: Any, addresses: Any, sizes: Any) -> Any:
        read.append(int(np.sum(sizes)))
        return read_many(fds, offsets, addresses, sizes)

    monkeypatch.setattr("dali_pipeline.reading.gather.read_many", counted)
    found = {}
    for name, layers in (("all", None), ("some", slice(2, 4)), ("apart", [1, 6])):
        loader = dp.GraphLoader(data, batch_size=4, layers=layers, num_workers=0)
        list(loader)  # hashes every block, whole
        read.clear()
        list(loader)
        found[name] = sum(read)
    assert found["all"] == 32 * 8 * (16 * 512 * 4 + 20 * (2 + 4))
    assert found["some"] == found["apart"] == found["all"] // 4
    # what is read ahead: nodes of those layers, and of edges, of which a layer is less than a page, all between
    asked: list[int] = []

    def noted(fd: int, offset: int, nbytes: int) -> bool:
        asked.append(nbytes)
        return True

    monkeypatch.setattr("dali_pipeline.format.shard.prefetch", noted)
    for layers, expected in ((slice(2, 4), 2), ([1, 6], 2), (None, 8)):
        loader = dp.GraphLoader(data, batch_size=4, layers=layers, num_workers=0)
        list(loader)
        asked.clear()
        for _ in loader:
            time.sleep(0.02)  # what is read ahead stops with the epoch
        of_x = 32 * expected * 16 * 512 * 4
        assert of_x <= sum(asked) <= of_x + 32 * 8 * 20 * (2 + 4)


class _Fake:
    """Stands for a stream: notes what is said to it."""

    def __init__(self, log: list[str]) -> None:
        self.log = log

    def record_event(self) -> str:
        self.log.append("recorded")
        return "event"

    def wait_event(self, event: str) -> None:
        assert event == "event"
        self.log.append("waited")

    def __enter__(self) -> None:
        self.log.append("side")

    def __exit__(self, *_: object) -> None:
        self.log.append("own")


def test_a_batch_is_on_its_way_before_the_one_before_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of calls, with streams that are none; on a GPU the test below runs it."""
    from dali_pipeline.loaders.sidestream import a_batch_ahead

    log: list[str] = []
    monkeypatch.setattr("dali_pipeline.loaders.sidestream._side_stream", lambda device: _Fake(log))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: _Fake(log))

    def batches() -> Any:
        for number in range(3):
            log.append(f"made {number}")
            yield number
        raise KeyError

    seen = []
    ahead = a_batch_ahead(batches(), lambda batch: [torch.zeros(1)], torch.device("cuda"))
    with pytest.raises(KeyError):
        for batch in ahead:
            log.append(f"used {batch}")
            seen.append(batch)
    assert seen == [0, 1, 2]  # the error comes behind them
    made, used = ([log.index(f"{what} {number}") for number in range(3)] for what in ("made", "used"))
    assert made[1] < used[0] < made[2] < used[1]
    assert log.count("waited") == log.count("recorded") == 3
    assert log[made[0] - 1] == "side"


def test_a_batch_that_was_let_go_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """While one is used, the next alone is held beside it."""
    from dali_pipeline.loaders.sidestream import a_batch_ahead

    monkeypatch.setattr("dali_pipeline.loaders.sidestream._side_stream", lambda device: _Fake([]))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: _Fake([]))
    made: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []

    def batches() -> Any:
        for _ in range(4):
            alive.append(sum(one() is not None for one in made))
            batch = torch.zeros(1)
            made.append(weakref.ref(batch))
            yield batch
            del batch

    ahead = a_batch_ahead(batches(), lambda batch: [batch], torch.device("cuda"))
    batch = next(ahead)
    while True:
        del batch
        batch = next(ahead, None)
        if batch is None:
            break
    assert alive == [0, 1, 1, 1]
