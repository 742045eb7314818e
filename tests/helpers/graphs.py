"""Graphs as PyG has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch_geometric.data import Data

import dali_pipeline as dp


def as_data(record: dp.Record, layers: Any = slice(None)) -> list[Data]:
    """The record's graphs as PyG would have them."""
    graphs = record.graphs
    node_ends, edge_ends = np.cumsum(graphs.node_counts)[:-1], np.cumsum(graphs.edge_counts)[:-1]
    parts = zip(
        np.split(graphs.x, node_ends),
        np.split(graphs.edge_index, edge_ends, axis=1),
        np.split(graphs.edge_attr, edge_ends),
        strict=True,
    )
    every = [
        Data(x=torch.from_numpy(x).float(), edge_index=torch.from_numpy(edges), edge_attr=torch.from_numpy(attr).float())
        for x, edges, attr in parts
    ]
    return every[layers] if isinstance(layers, slice) else [every[layer] for layer in layers]


FIELDS = {
    "node.pos": dp.Field(dtype="float32", shape=(3,)),
    "node.kind": dp.Field(dtype="uint8"),
    "edge.bond": dp.Field(dtype="int16", shape=(2,)),
    "graph.energy": dp.Field(dtype="float16"),
    "graph.target": dp.Field(dtype="int64", shape=(2,)),
}


def molecules(count: int, layers: int = 2) -> list[list[Data]]:
    rng = torch.Generator().manual_seed(0)
    records = []
    for _ in range(count):
        graphs = []
        for _ in range(layers):
            nodes, edges = (int(torch.randint(low, high, (), generator=rng)) for low, high in ((1, 6), (0, 8)))
            graphs.append(
                Data(
                    x=torch.randn(nodes, 4, generator=rng),
                    edge_index=torch.randint(nodes, (2, edges), generator=rng),
                    edge_attr=torch.rand(edges, generator=rng),
                    pos=torch.randn(nodes, 3, generator=rng),
                    kind=torch.randint(100, (nodes,), generator=rng),
                    bond=torch.randint(-9, 9, (edges, 2), generator=rng),
                    energy=torch.randn(1, generator=rng).half(),
                    target=torch.randint(9, (1, 2), generator=rng),
                )
            )
        records.append(graphs)
    return records


def write_molecules(root: Path, graphs: list[list[Data]]) -> dp.Dataset:
    schema = dp.Schema(x=dp.Field(dtype="float32", shape=(4,)), edge_attr=dp.Field(dtype="float32"), fields=FIELDS)
    with dp.ShardWriter(root, schema, shard_bytes=2048, split=dp.SplitRule.parse("100/0/0")) as writer:
        for number, record in enumerate(graphs):
            writer.write({"id": str(number), "label": number % 2, "graphs": record})
    return dp.open_dataset(root)
