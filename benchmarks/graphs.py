"""Measure the speed of graph loading, limits and other loaders: `python -m benchmarks.graphs`, some minutes on 2 cores.

Warm page cache, shuffled, the loader alone, features delivered as float32. Traces: 8 graphs a record, of about 32 nodes x 576
float16 and 100 weighted edges, 16 records a batch. Molecules: a graph a record, of about 26 nodes x 9 float32 and 56 edges, 256
a batch, 20,000, which fit in the loader's window. The limit: numpy concatenates slices of arrays in memory, one a record
and array, and torch casts. Beside it, the system copies the features alone from the page cache into one array that is used
again, and torch casts. The peers (benchmarks/peers_graphs.py), each at its fastest number of workers in trials, are
held against our default.
"""

from __future__ import annotations

import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

import dali_pipeline as dp
from benchmarks.harness import Results, alternately, rate, read_rows
from benchmarks.peers import report, running
from benchmarks.peers_graphs import IN_MEMORY, PEERS, Records, write_graphs
from dali_pipeline.cli.app import new_app, run

LIMIT, PAGE_CACHE = "slice and concatenate", "preadv of x, and cast"
app = new_app()


def made(folder: Path, records: int, layers: int, nodes: int, features: int, edges: int, *, weighted: bool) -> Records:
    """Return records whose graphs have about these numbers of nodes and edges, +-25 %; features of traces are float16."""
    rng = np.random.default_rng(0)
    node_counts, edge_counts = (
        rng.integers(mean - mean // 4, mean + mean // 4 + 1, (records, layers)) for mean in (nodes, edges)
    )
    x = rng.standard_normal((node_counts.sum(), features), np.float32)
    ends = rng.random((2, edge_counts.sum())) * np.repeat(node_counts.reshape(-1), edge_counts.reshape(-1))
    arrays: dict[str, np.ndarray[Any, Any]] = {
        "x": x,
        "edge_index": ends.astype(np.int64),
        "node_counts": node_counts,
        "edge_counts": edge_counts,
    }
    if weighted:
        arrays |= {"x": x.astype(np.float16), "edge_attr": rng.random(edge_counts.sum(), np.float32).astype(np.float16)}
    folder.mkdir()
    write_graphs(folder, arrays)
    return Records(folder)


def written(folder: Path, records: Records) -> dp.Dataset:
    """Write a data set of such records."""
    weights = None if records.edge_attr is None else dp.Field(dtype="float16")
    schema = dp.Schema(x=dp.Field(dtype=records.x.dtype.name, shape=records.x.shape[1:]), edge_attr=weights)
    with dp.ShardWriter(folder, schema, split=dp.SplitRule.parse("100/0/0"), shard_bytes=64 << 20) as writer:
        for number in range(len(records)):
            nodes, edges = records.rows(number)
            graphs = dp.Graphs(
                x=records.x[nodes],
                edge_index=records.edge_index[:, edges],
                edge_attr=None if records.edge_attr is None else records.edge_attr[edges],
                node_counts=records.node_counts[number],
                edge_counts=records.edge_counts[number],
            )
            writer.write(dp.Record(id=f"record-{number}", label=number % 2, graphs=graphs))
    return dp.open_dataset(folder)


def gather(records: Records, batch_size: int) -> int:
    """Measure the limit: the contents of batches in random order, without renumbering."""
    order = np.random.default_rng(1).permutation(len(records))
    for begin in range(0, len(order) - batch_size + 1, batch_size):
        nodes, edges = zip(*(records.rows(number) for number in order[begin : begin + batch_size]), strict=True)
        torch.from_numpy(np.concatenate([records.x[rows] for rows in nodes])).to(torch.float32)
        np.concatenate([records.edge_index[:, rows] for rows in edges], axis=1)
        if records.edge_attr is not None:
            torch.from_numpy(np.concatenate([records.edge_attr[rows] for rows in edges])).to(torch.float32)
    return len(order) // batch_size * batch_size


def read(path: Path, records: Records, batch_size: int) -> int:
    """Measure the limit: read the features of the same records from a file in the page cache."""
    order, x = np.random.default_rng(1).permutation(len(records)), records.x
    row, first = x[0].nbytes, path.stat().st_size - x.nbytes
    room = np.empty(batch_size * row * int(records.node_counts.sum(axis=1).max()), np.uint8)
    for begin in range(0, len(order) - batch_size + 1, batch_size):
        nodes = [records.rows(number)[0] for number in order[begin : begin + batch_size]]
        sizes = [(rows.stop - rows.start) * row for rows in nodes]
        nbytes = read_rows(path, [first + rows.start * row for rows in nodes], sizes, room.data)
        torch.from_numpy(room[:nbytes].view(x.dtype)).to(torch.float32)
    return len(order) // batch_size * batch_size


def epoch(loader: dp.GraphLoader) -> int:
    """Run one epoch; return its number of records."""
    return sum(len(batch) for batch in loader)


def compare(results: Results, scenario: str, folder: Path, records: Records, names: list[str], **options: Any) -> None:
    """Measure our loader, the limit and the peers with these names in turn; write a row for each."""
    batch_size, repeats, seconds = options["batch_size"], options["repeats"], options["seconds"]
    data = written(folder / "ours", records)
    counted = {
        LIMIT: partial(gather, records, batch_size),
        PAGE_CACHE: partial(read, folder / "arrays" / "x.npy", records, batch_size),
    }
    for num_workers in ("auto", 0, 2):
        loader = dp.GraphLoader(data, batch_size=batch_size, drop_last=True, num_workers=num_workers)
        counted[f"GraphLoader, workers={num_workers}"] = partial(epoch, loader)
    small = max(1 << 20, int(sum(data.table("train", "graphs").bytes)) // 8)  # a window that the set does not fit in
    for window in ("resident", "gather"):
        loader = dp.GraphLoader(data, batch_size=batch_size, drop_last=True, window=window, window_bytes=small)
        counted[f"GraphLoader, window={window!r} of an eighth"] = partial(epoch, loader)
    with running("graphs", names, folder / "arrays", folder, batch_size=batch_size, seconds=seconds) as peers:
        ways = {name: partial(rate, way, seconds) for name, way in counted.items()}
        rates = alternately(ways | {peer.label: peer.sample for peer in peers if not peer.why}, repeats)
    report(results, scenario, rates, peers, lambda _: LIMIT, ["GraphLoader, workers=auto"])


@app.command()
def main(
    repeats: Annotated[int, typer.Option(min=1, help="Number of repetitions of each measurement.")] = 5,
    records: Annotated[int, typer.Option(help="Number of traces; there are twenty times as many molecules.")] = 1000,
    seconds: Annotated[float, typer.Option(help="Minimum time per sample, in seconds.")] = 1.0,
    peers: Annotated[bool, typer.Option(help="Also measure the other loaders; `make peers` installs them.")] = True,
    folder: Annotated[
        Path | None,
        typer.Option(help="Folder for the temporary data sets. [default: the system's temporary folder]", show_default=False),
    ] = None,
) -> None:
    """Measure every way in turn; write results/graphs.csv."""
    results = Results("graphs", ["torch", "torch-geometric", "numpy"])
    names = list(PEERS) if peers else []
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        where = Path(scratch)
        made_traces = made(where / "arrays", records, 8, 32, 576, 100, weighted=True)
        options = {"repeats": repeats, "seconds": seconds}
        compare(results, "traces, 16 a batch", where, made_traces, names, batch_size=16, **options)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        where = Path(scratch)
        molecules = made(where / "arrays", 20 * records, 1, 26, 9, 56, weighted=False)
        compare(results, "molecules, 256 a batch", where, molecules, [IN_MEMORY] if peers else [], batch_size=256, **options)


if __name__ == "__main__":
    sys.exit(run(app, "benchmarks.graphs"))
