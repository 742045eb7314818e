"""Peers of the graph loader, and the records that they write.

Every batch is a mapping of `graphs` with float32 features, a PyG `Batch` a layer or one of all graphs of all records, `label`
and `id`, the record's number; every epoch is shuffled. Features stored as float16 are widened once they are batched.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info
from torch_geometric.data import Batch as Graphs
from torch_geometric.data import Data, OnDiskDataset
from torch_geometric.loader import DataLoader as GraphDataLoader

from benchmarks.peer import Batch, Epochs, Way
from benchmarks.peers_torch import torch_epochs

IN_MEMORY = "PyG DataLoader, in memory"  # where a record is one graph, the other is the same
FILE_RECORDS, DEQUE_RECORDS = 100, 250
ALWAYS = ("x", "edge_index", "node_counts", "edge_counts")


class Records:
    """The written records: record i has one graph per layer, the label i % 2, the id i.

    x: (N, F), edge_index: (2, E) and edge_attr: (E,) or none, of all graphs of all records, one after the other; an edge's
    nodes are numbered in its graph · node_counts, edge_counts: (records, layers)
    """

    def __init__(self, folder: Path) -> None:
        self.x, self.edge_index, self.node_counts, self.edge_counts = (np.load(folder / f"{name}.npy") for name in ALWAYS)
        weights = folder / "edge_attr.npy"
        self.edge_attr = np.load(weights) if weights.exists() else None
        shape = self.node_counts.shape
        self.node_ends, self.edge_ends = (counts.cumsum().reshape(shape) for counts in (self.node_counts, self.edge_counts))

    def __len__(self) -> int:
        return len(self.node_counts)

    def rows(self, record: int) -> tuple[slice, slice]:
        """Return the ranges of the nodes and the edges of all graphs of a record."""
        nodes, edges = (
            slice(ends[record, 0] - counts[record, 0], ends[record, -1])
            for ends, counts in ((self.node_ends, self.node_counts), (self.edge_ends, self.edge_counts))
        )
        return nodes, edges

    def graph(self, record: int, layer: int) -> Data:
        """Return one graph as stored; the arrays are copies."""
        nodes, edges = self.node_ends[record, layer], self.edge_ends[record, layer]
        node_rows = slice(nodes - self.node_counts[record, layer], nodes)
        edge_rows = slice(edges - self.edge_counts[record, layer], edges)
        return Data(
            x=torch.from_numpy(self.x[node_rows].copy()),
            edge_index=torch.from_numpy(self.edge_index[:, edge_rows].astype(np.int64)),
            edge_attr=None if self.edge_attr is None else torch.from_numpy(self.edge_attr[edge_rows].copy()),
        )

    def record(self, number: int) -> dict[str, Any]:
        """Return a record in the form of PyG users."""
        layers = range(self.node_counts.shape[1])
        return {"graphs": [self.graph(number, layer) for layer in layers], "label": number % 2, "id": number}

    def check(self, batch: Batch) -> list[int]:
        """Return the ids of a batch after checking that it holds the written values."""
        ids, layers = [int(id_) for id_ in batch["id"]], range(self.node_counts.shape[1])
        if isinstance(batch["graphs"], list):
            came, expected = batch["graphs"], [[self.graph(id_, layer) for id_ in ids] for layer in layers]
        else:
            came, expected = [batch["graphs"]], [[self.graph(id_, layer) for id_ in ids for layer in layers]]
        for graphs, parts in zip(came, expected, strict=True):
            whole = widened(Graphs.from_data_list(parts))
            for name in whole.keys():  # noqa: SIM118 - iterating gives pairs
                if graphs[name].dtype != whole[name].dtype or not torch.equal(graphs[name], whole[name]):
                    raise ValueError(f"{name} of records {ids[:3]}… is other than what was written")
        if [int(label) for label in batch["label"]] != [id_ % 2 for id_ in ids]:
            raise ValueError(f"records {ids[:3]}… came with other labels than were written")
        return ids


def write_graphs(folder: Path, arrays: dict[str, np.ndarray[Any, Any]]) -> None:
    """Write the arrays that `Records` reads."""
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)


def widened(graphs: Graphs) -> Graphs:
    """Return features as float32."""
    for name in ("x", "edge_attr"):
        if name in graphs:
            graphs[name] = graphs[name].float()
    return graphs


class PtFiles(Way):
    """A torch `IterableDataset` over `.pt` files of 100 records, through a deque of 250; `Batch.from_data_list` a layer."""

    package, workers = "torch", (0, 2, 4)

    def write(self, folder: Path, records: Records) -> None:
        for begin in range(0, len(records), FILE_RECORDS):
            rows = range(begin, min(begin + FILE_RECORDS, len(records)))
            torch.save([records.record(row) for row in rows], folder / f"{begin:08}.pt")

    def loader(self, folder: Path, batch_size: int, workers: int) -> Epochs:
        data = PtDeque(sorted(folder.glob("*.pt")))
        epochs = torch_epochs(data, workers, batch_size=batch_size, collate_fn=by_layer)
        return lambda: ({**batch, "graphs": [widened(graphs) for graphs in batch["graphs"]]} for batch in epochs())


class PtDeque(IterableDataset[Any]):
    """Loads files, holds 250 records, and yields one of them for each that is loaded."""

    def __init__(self, files: list[Path]) -> None:
        self._files = files
        self._rng = random.Random(0)

    def __iter__(self) -> Iterator[Batch]:
        info, rng, held = get_worker_info(), self._rng, []
        files = self._files[info.id :: info.num_workers] if info else list(self._files)
        rng.shuffle(files)
        for file in files:
            for record in torch.load(file, weights_only=False):  # its own files, and several times as fast
                held.append(record)
                if len(held) > DEQUE_RECORDS:
                    chosen = rng.randrange(len(held))
                    held[chosen], held[-1] = held[-1], held[chosen]
                    yield held.pop()
        rng.shuffle(held)
        yield from held


def by_layer(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Return one PyG `Batch` per layer."""
    layers = zip(*(record["graphs"] for record in records), strict=True)
    return {"graphs": [Graphs.from_data_list(list(layer)) for layer in layers], **numbers(records)}


def at_once(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Return one PyG `Batch`, like ours; a third faster."""
    return {"graphs": Graphs.from_data_list([graph for record in records for graph in record["graphs"]]), **numbers(records)}


def numbers(records: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Return labels and ids."""
    return {name: torch.tensor([record[name] for record in records]) for name in ("label", "id")}


class InMemory(Way):
    """PyG's `DataLoader` over a list of records in memory, float32 from the beginning; it makes a `Batch` a layer."""

    package, workers = "torch-geometric", (0, 2, 4)

    def write(self, folder: Path, records: Records) -> None:
        self._records = [records.record(number) for number in range(len(records))]
        for record in self._records:
            record["graphs"] = [widened(graph) for graph in record["graphs"]]

    def loader(self, folder: Path, batch_size: int, workers: int) -> Epochs:
        options = {"batch_size": batch_size, "shuffle": True, "persistent_workers": workers > 0}
        return partial(iter, GraphDataLoader(self._records, num_workers=workers, **options))


class InMemoryAtOnce(InMemory):
    """The same list through torch's `DataLoader`, into one `Batch`."""

    def loader(self, folder: Path, batch_size: int, workers: int) -> Epochs:
        return torch_epochs(self._records, workers, batch_size=batch_size, shuffle=True, collate_fn=at_once)


class OnDisk(Way):
    """PyG's `OnDiskDataset` (sqlite, with a schema, as that is the faster way), a row a record, a query a batch."""

    package, workers = "torch-geometric", (0, 2, 4)

    def write(self, folder: Path, records: Records) -> None:
        self._features = records.x.shape[1]
        data = RecordsOnDisk(folder, self._features)
        data.extend([records.record(number) for number in range(len(records))], batch_size=100)
        data.close()

    def loader(self, folder: Path, batch_size: int, workers: int) -> Epochs:
        data = RecordsOnDisk(folder, self._features)
        epochs = torch_epochs(data, workers, batch_size=batch_size, shuffle=True, collate_fn=at_once)
        return lambda: ({**batch, "graphs": widened(batch["graphs"])} for batch in epochs())


class RecordsOnDisk(OnDiskDataset):  # type: ignore[misc]
    """Return the rows of the arrays of all layers, one after the other, and the number of each."""

    def __init__(self, folder: Path, features: int) -> None:
        half, long = torch.float16, torch.int64
        super().__init__(
            str(folder),
            schema={
                "x": {"dtype": half, "size": (-1, features)},
                "edge_index": {"dtype": long, "size": (2, -1)},
                "edge_attr": {"dtype": half, "size": (-1,)},
                "node_counts": {"dtype": long, "size": (-1,)},
                "edge_counts": {"dtype": long, "size": (-1,)},
                "label": int,
                "id": int,
            },
        )

    def __del__(self) -> None:
        self.close()

    def serialize(self, record: dict[str, Any]) -> dict[str, Any]:
        graphs = record["graphs"]
        return {
            "x": torch.cat([graph.x for graph in graphs]),
            "edge_index": torch.cat([graph.edge_index for graph in graphs], dim=1),
            "edge_attr": torch.cat([graph.edge_attr for graph in graphs]),
            "node_counts": torch.tensor([graph.num_nodes for graph in graphs]),
            "edge_counts": torch.tensor([graph.num_edges for graph in graphs]),
            "label": record["label"],
            "id": record["id"],
        }

    def deserialize(self, row: dict[str, Any]) -> dict[str, Any]:
        nodes, edges = row["node_counts"].tolist(), row["edge_counts"].tolist()
        parts = zip(row["x"].split(nodes), row["edge_index"].split(edges, dim=1), row["edge_attr"].split(edges), strict=True)
        graphs = [Data(x=x, edge_index=edge_index, edge_attr=edge_attr) for x, edge_index, edge_attr in parts]
        return {"graphs": graphs, "label": row["label"], "id": row["id"]}


PEERS: dict[str, type[Way]] = {
    ".pt IterableDataset": PtFiles,
    IN_MEMORY: InMemory,
    "PyG graphs in memory, one Batch": InMemoryAtOnce,
    "PyG OnDiskDataset": OnDisk,
}
