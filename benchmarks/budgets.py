"""Measure the memory that a budget of nodes saves: `python -m benchmarks.budgets`, a minute on 2 cores.

Graphs with a long tail (nodes lognormal, some 30 in the middle and 2,000 at the end, three edges a node). One epoch in
batches of a fixed number of records, and one in batches of a budget: of the fixed batches' mean number of nodes, and of their
largest. For each: nodes and edges a batch, the memory that a step of PyG's GIN keeps for its backward pass (bytes of the saved
tensors, counted, so the same on every machine and device), and how much of what has to be there for the largest batch lies
idle in the mean one.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch_geometric.nn.models import GIN

import dali_pipeline as dp
from benchmarks.harness import Results
from dali_pipeline.cli.app import new_app, run

FEATURES = 16
app = new_app()


def written(folder: Path, records: int) -> dp.Dataset:
    """Write records of one graph each."""
    rng = np.random.default_rng(0)
    with dp.ShardWriter(
        folder, dp.Schema(x=dp.Field(dtype="float16", shape=(FEATURES,))), split=dp.SplitRule.parse("100/0/0")
    ) as writer:
        for number in range(records):
            nodes = int(np.clip(rng.lognormal(np.log(30), 1.0), 2, 2000))
            graphs = dp.Graphs(
                x=rng.standard_normal((nodes, FEATURES), np.float32).astype(np.float16),
                edge_index=rng.integers(0, nodes, (2, 3 * nodes)),
                edge_attr=None,
                node_counts=np.array([nodes]),
                edge_counts=np.array([3 * nodes]),
            )
            writer.write({"id": number, "label": number % 2, "graphs": graphs})
    return dp.open_dataset(folder)


def saved_bytes(model: torch.nn.Module, batch: dp.GraphBatch) -> int:
    """Return the bytes that a forward pass keeps for the backward pass, each storage once."""
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = model(batch.graphs.x, batch.graphs.edge_index)  # held, as the saved tensors are, until the pass is over
    del out
    return sum(kept.values())


def measure(results: Results, model: torch.nn.Module, data: dp.Dataset, way: str, **options: Any) -> tuple[int, int]:
    """Write the rows of one epoch; return the mean and the largest number of nodes."""
    nodes, edges, memory = [], [], []
    for batch in dp.GraphLoader(data, **options):
        nodes.append(batch.graphs.num_nodes)
        edges.append(batch.graphs.num_edges)
        memory.append(saved_bytes(model, batch) / 1e6)
    for what, unit, values in (("nodes a batch", "", nodes), ("edges a batch", "", edges), ("kept for backward", "MB", memory)):
        results.add(way, what, unit, [float(value) for value in values])
    idle = 100 * (1 - np.mean(memory) / max(memory))
    results.add(way, "of the largest batch's memory idle in the mean one", "%", [float(idle)])
    return round(float(np.mean(nodes))), max(nodes)


@app.command()
def main(
    records: Annotated[int, typer.Option(min=100)] = 20_000,
    batch_size: Annotated[int, typer.Option(min=1, help="Records per batch, for batches with a fixed number of records.")] = 64,
) -> None:
    """Measure both ways; write results/budgets.csv."""
    torch.manual_seed(0)
    results = Results("budgets", ["torch", "torch-geometric", "numpy"])
    model = GIN(in_channels=FEATURES, hidden_channels=64, num_layers=3)
    with tempfile.TemporaryDirectory() as scratch:
        data = written(Path(scratch) / "set", records)
        mean, largest = measure(results, model, data, f"{batch_size} records a batch", batch_size=batch_size)
        measure(results, model, data, f"max_nodes={mean:,}, as many as those on average", max_nodes=mean)
        measure(results, model, data, f"max_nodes={largest:,}, as many as their largest", max_nodes=largest)


if __name__ == "__main__":
    sys.exit(run(app, "benchmarks.budgets"))
