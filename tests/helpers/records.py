"""Small data sets that the tests share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

import dali_pipeline as dp
from dali_pipeline.format.shard import ShardInfo
from dali_pipeline.format.shardfile import ShardFile
from dali_pipeline.types import Array, Kind
from dali_pipeline.writing.openshard import STREAMED

FEATURES, NODE_FEATURES, LAYERS = 8, 4, 3


SCHEMA = dp.Schema(
    sequence=dp.Field(dtype="float16", shape=(FEATURES,)),
    x=dp.Field(dtype="float16", shape=(NODE_FEATURES,)),
    edge_attr=dp.Field(dtype="float16"),
    step_axis="layer",
)


FIELDS = {  # one or two of every level
    "step.token": dp.Field(dtype="int32", pad=-1),
    "step.mask": dp.Field(dtype="bool"),
    "record.score": dp.Field(dtype="float32", shape=(2,)),
    "record.prompt": dp.Field(dtype="text"),
    "node.charge": dp.Field(dtype="float32"),
    "edge.kind": dp.Field(dtype="int8"),
    "graph.energy": dp.Field(dtype="float64"),
}
NAMED = ("charge", "kind", "energy")  # what PyG calls the last three


def with_fields(record: dp.Record, seed: int) -> dp.Record:
    """A record with values of FIELDS, which no other record has."""
    rng = np.random.default_rng(seed)
    steps, nodes = len(record.sequence), len(record.graphs.x)
    graphs, edges = len(record.graphs.node_counts), record.graphs.edge_index.shape[1]
    own = {
        "step.token": rng.integers(0, 50_000, steps).astype(np.int32),
        "step.mask": rng.random(steps) < 0.5,
        "record.score": rng.random(2).astype(np.float32),
        "record.prompt": f"why {record.id}? " * int(rng.integers(3)),
    }
    rows = {
        "node.charge": rng.random(nodes).astype(np.float32),
        "edge.kind": rng.integers(-9, 9, edges).astype(np.int8),
        "graph.energy": rng.random(graphs),
    }
    return replace(record, fields=own, graphs=replace(record.graphs, fields=rows))


def make_records(count: int, *, ragged: bool = True, seed: int = 0, classes: int = 2) -> list[dp.Record]:
    """Records of both kinds, some graphs without edges; the label shows in the first feature, so it can be learned."""
    rng = np.random.default_rng(seed)
    records = []
    for number in range(count):
        label = int(rng.integers(classes))
        steps = int(rng.integers(2, 9)) if ragged else 5
        nodes = rng.integers(1, 6, size=LAYERS) if ragged else np.full(LAYERS, 4)
        edges = rng.integers(0, 7, size=LAYERS)
        sequence = rng.normal(size=(steps, FEATURES))
        sequence[:, 0] += 3 * label
        x = rng.normal(size=(nodes.sum(), NODE_FEATURES))
        x[:, 0] += 3 * label
        records.append(
            dp.Record(
                id=f"record-{number}",
                group=f"group-{number // 2}",
                label=label,
                sequence=sequence.astype(np.float16),
                graphs=dp.Graphs(
                    x=x.astype(np.float16),
                    edge_index=np.concatenate(
                        [rng.integers(0, n, size=(2, e)) for n, e in zip(nodes, edges, strict=True)], axis=1
                    ),
                    edge_attr=rng.random(edges.sum()).astype(np.float16),
                    node_counts=nodes,
                    edge_counts=edges,
                ),
            )
        )
    return records


def write_shard(path: Path, kind: Kind, records: int, arrays: Mapping[str, Array]) -> ShardInfo:
    """A shard of these arrays, whatever they are."""
    name = STREAMED[kind]
    rest = {other: array for other, array in arrays.items() if other != name}
    rows = arrays[name]
    file = ShardFile(path, kind, name, rows.dtype.name, rows.shape[1:], expected_bytes=rows.nbytes)
    file.append(rows)
    return file.close(records, rest)


def write(
    root: Path, records: list[dp.Record], *, shard_bytes: int = 2048, shares: str = "70/15/15", schema: dp.Schema = SCHEMA
) -> dp.Dataset:
    with dp.ShardWriter(root, schema, shard_bytes=shard_bytes, split=dp.SplitRule.parse(shares)) as writer:
        for record in records:
            writer.write(record)
    return dp.open_dataset(root)
