"""describe: what a person asks first of a data set, as plain values and as text."""

from __future__ import annotations

from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from dali_pipeline.dataset.dataset import Dataset
from dali_pipeline.format.shard import Shard
from dali_pipeline.reading.graphrows import GraphRows
from dali_pipeline.reading.graphsource import GraphSource
from dali_pipeline.reading.rows import SequenceRows
from dali_pipeline.reading.source import SequenceSource
from dali_pipeline.runtime.outside import readable
from dali_pipeline.storage.files import Files
from dali_pipeline.types import Array, Kind

BINS = 20
SAMPLES = 3
MEASURED = 512  # records that the cost of int8 is measured on
OF_ROUNDING = 2.58 / 12**0.5  # the error of rounding to whole numbers, where 2.58 standard deviations are the 99th percentile
COARSE = 0.1  # of a feature's spread: more is said of what int8 costs
BARS = " ▁▂▃▄▅▆▇█"
AXES: dict[Kind, tuple[tuple[str, str], ...]] = {
    "sequences": (("steps", "sequence"),),
    "graphs": (("graphs", "graphs"), ("nodes a graph", "x"), ("edges a graph", "edge_index")),
}


def describe(data: Dataset) -> dict[str, Any]:
    """What a data set holds, in JSON types.

    Keys: root, digest, bytes, kinds, schema, splits (kind -> records), labels (split -> label -> records), shards,
    distributions (name -> least, median, greatest, mean, edges and counts of a histogram), statistics, source, sample. Reads
    the manifest, every shard's offsets (8 bytes a record, 16 a graph) and a few records.
    """
    schema = data.schema
    types = {"sequence": schema.sequence, **schema.of_graphs}
    return {
        "root": readable(data.root),
        "digest": data.digest,
        "bytes": data.nbytes,
        "kinds": list(schema.kinds),
        "schema": {
            name: {"dtype": one.dtype + (" with a scale" if one.scales else ""), "shape": list(one.shape)}
            for name, one in types.items()
            if one is not None
        },
        "splits": {split: {kind: data.num_records(split, kind) for kind in schema.kinds} for split in data.splits},
        "labels": {split: {str(label): count for label, count in data.label_counts(split).items()} for split in data.splits},
        "shards": {kind: sum(len(data.table(split, kind)) for split in data.splits) for kind in schema.kinds},
        "distributions": {name: _distribution(values) for kind in schema.kinds for name, values in _lengths(data, kind)},
        "statistics": _statistics(data),
        "source": data.manifest.source,
        "sample": {kind: _sample(data, kind) for kind in schema.kinds},
    }


def _lengths(data: Dataset, kind: Kind) -> list[tuple[str, Array]]:
    """Of every record, or graph, how many rows it has, by what the rows are."""
    found: dict[str, list[Array]] = {name: [] for name, _ in AXES[kind]}
    files = Files()
    for split in data.splits:
        table = data.table(split, kind)
        for number in range(len(table)):
            shard: Shard = table.open(data.shard_path(split, kind, number), number, files)
            for name, array in AXES[kind]:
                found[name].append(np.diff(shard.read(f"{array}.offsets")))
    return [(name, np.concatenate(parts)) for name, parts in found.items() if parts]


def _distribution(values: Array) -> dict[str, Any]:
    least, greatest = int(values.min()), int(values.max())
    edges = np.unique(np.linspace(least, greatest + 1, min(BINS, greatest - least + 1) + 1).astype(int))
    counts, _ = np.histogram(values, edges)
    return {
        "least": least,
        "median": float(np.median(values)),
        "mean": float(values.mean()),
        "greatest": greatest,
        "edges": edges.tolist(),
        "counts": counts.tolist(),
    }


def _statistics(data: Dataset) -> dict[str, Any] | None:
    found = data.manifest.statistics
    return None if found is None else {"mean": list(found.mean), "std": list(found.std)}


def _sample(data: Dataset, kind: Kind) -> list[dict[str, Any]]:
    """The first records of the first split that has some."""
    split = next((split for split in data.splits if data.num_records(split, kind)), None)
    if split is None:
        return []
    positions = np.arange(min(SAMPLES, data.num_records(split, kind)))
    rows: SequenceRows | GraphRows
    if kind == "sequences":
        source = SequenceSource(data.select(split, kind), data.schema)
        rows = source.gather(positions, len(positions), None)
        shapes = [{"steps": int(length)} for length in rows.lengths]
        firsts = source.unit.values(rows.values)[rows.starts * source.parts_per_record]
    else:
        graphs = GraphSource(data.select(split, kind), data.schema).gather(positions)
        record = np.repeat(np.arange(len(positions)), graphs.graphs_per_record)
        shapes = [
            {
                "graphs": int(graphs.graphs_per_record[row]),
                "nodes": int(graphs.node_counts[record == row].sum()),
                "edges": int(graphs.edge_counts[record == row].sum()),
            }
            for row in range(len(positions))
        ]
        assert data.schema.x is not None
        first_nodes = (np.cumsum(graphs.node_counts) - graphs.node_counts)[np.unique(record, return_index=True)[1]]
        rows, firsts = graphs, data.schema.x.values(graphs.arrays["x"][first_nodes])
    labels = [None] * len(positions) if rows.labels is None else rows.labels.tolist()
    return [
        {"split": split, "id": id_, "label": label, **shape, "first_row": first.reshape(-1)[:6].astype(float).tolist()}
        for id_, label, shape, first in zip(rows.ids, labels, shapes, firsts, strict=True)
    ]


def summary(data: Dataset) -> str:
    """`sequences 2,807 train, 586 val; graphs …`."""
    counts = {kind: [f"{data.num_records(split, kind):,} {split}" for split in data.splits] for kind in data.schema.kinds}
    return "; ".join(f"{kind} {', '.join(listed)}" for kind, listed in counts.items())


def rounding_errors(data: Dataset) -> Array | None:
    """Return how far int8 moves each feature of a sequence, (F,), as a share of the spread of its usual values; or None.

    One outlier makes a feature's scale so coarse that all its other values become 0: that is an error of 1. The spread is the
    99th percentile of the distance from the median over the first MEASURED records of training, which outliers do not move; a
    feature that never varies has no error.
    """
    field, statistics = data.schema.sequence, data.manifest.statistics
    scales = None if field is None else field.scales
    count = min(MEASURED, data.num_records("train", "sequences")) if scales else 0
    if not count or scales is None or statistics is None:
        return None
    rows = SequenceSource(data.select("train", "sequences"), data.schema).gather(np.arange(count), count, None)
    # (records, steps or 1, F): values in units of their scale
    units = rows.values.reshape(-1, len(scales), len(statistics.std)).astype(np.float32)
    spread = np.percentile(np.abs(units - np.median(units, axis=0)), 99, axis=0)
    errors = np.minimum(1, OF_ROUNDING / np.where(spread > 0, spread, OF_ROUNDING)).max(axis=0)
    return np.where(np.array(statistics.std) > 0, errors, 0.0)


def describe_rounding(data: Dataset) -> str:
    """Say what int8 costs the features of a data set; an empty text where it stores none."""
    errors = rounding_errors(data)
    if errors is None:
        return ""
    worst, coarse = int(errors.argmax()), int((errors > COARSE).sum())
    told = (
        f"int8 moves a feature by {float(np.median(errors)):.2%} of its usual spread at the median, "
        f"and feature {worst} most, by {float(errors[worst]):.0%}"
    )
    if coarse:
        told += f"; {coarse:,} of {len(errors):,} lose more than {COARSE:.0%}, as with outliers: clip them, or store float16"
    return told


def print_description(found: dict[str, Any]) -> None:
    """As tables on standard output; piped output is never folded."""
    console = plain_console()
    console.print(
        f"{found['root']}: {' and '.join(found['kinds'])}, {found['bytes'] / 1e9:.3f} GB, digest {found['digest'][:8]}"
    )
    for name, one in found["schema"].items():
        console.print(f"  {name}: {one['dtype']} {tuple(one['shape'])} a row")
    table = Table("split", *found["kinds"], "labels", box=box.SIMPLE_HEAD)
    for split, counts in found["splits"].items():
        total = max(1, sum(found["labels"][split].values()))
        labels = ", ".join(f"{label}: {count:,} ({count / total:.0%})" for label, count in found["labels"][split].items())
        table.add_row(split, *(f"{count:,}" for count in counts.values()), labels)
    console.print(table)
    table = Table("of each", "least", "median", "mean", "greatest", "distribution", box=box.SIMPLE_HEAD)
    for name, one in found["distributions"].items():
        cells = [f"{one[key]:,}" for key in ("least",)] + [
            f"{one['median']:,.1f}",
            f"{one['mean']:,.1f}",
            f"{one['greatest']:,}",
        ]
        table.add_row(name, *cells, sparkline(one["counts"]))
    console.print(table)
    if found["statistics"]:
        mean, std = (np.array(found["statistics"][key]) for key in ("mean", "std"))
        console.print(
            f"features of the training split: {len(mean)}, means {mean.min():.3g} to {mean.max():.3g}, "
            f"standard deviations {std.min():.3g} to {std.max():.3g}"
        )
    for kind, sample in found["sample"].items():
        for one in sample:
            shape = ", ".join(f"{one[key]} {key}" for key in ("steps", "graphs", "nodes", "edges") if key in one)
            row = " ".join(f"{value:.3g}" for value in one["first_row"])
            console.print(
                f"{kind} {one['split']} {one['id']!r}: label {one['label']}, {shape}, first row {row} …", markup=False
            )


def plain_console() -> Console:
    """Standard output for tables; piped, it is neither folded nor coloured."""
    console = Console(highlight=False, markup=False)
    return console if console.is_terminal else Console(highlight=False, markup=False, width=200)


def sparkline(counts: list[int]) -> str:
    """A histogram in a line of text; a bar is never empty where something is."""
    most = max(counts, default=0) or 1
    return "".join(BARS[0 if not count else max(1, round(count / most * (len(BARS) - 1)))] for count in counts)
