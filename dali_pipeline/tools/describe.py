"""Describe a data set, as plain values and as text: records, labels, lengths, types, a sample."""

from __future__ import annotations

from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from dali_pipeline.dataset.dataset import Dataset
from dali_pipeline.format.shard import Shard
from dali_pipeline.reading.graphrows import GraphRows
from dali_pipeline.reading.graphsource import GraphSource
from dali_pipeline.reading.rows import SequenceRows
from dali_pipeline.reading.source import SequenceSource
from dali_pipeline.runtime.outside import readable
from dali_pipeline.runtime.progress import plain_console
from dali_pipeline.storage.files import Files
from dali_pipeline.types import Array, Kind

BINS = 20
SAMPLES = 3
MEASURED = 512  # number of records on which the cost of int8 is measured
OF_ROUNDING = 2.58 / 12**0.5  # error of rounding to whole numbers; 2.58 standard deviations are the 99th percentile
COARSE = 0.1  # if int8 moves features by more than this share of their spread, they are counted in the report
BARS = " ▁▂▃▄▅▆▇█"
AXES: dict[Kind, tuple[tuple[str, str], ...]] = {
    "sequences": (("steps", "sequence"),),
    "graphs": (("graphs", "graphs"), ("nodes a graph", "x"), ("edges a graph", "edge_index")),
}


def describe(data: Dataset) -> dict[str, Any]:
    """Return the contents of a data set in JSON types.

    Reads the manifest, the offsets of every shard (8 bytes per record, 16 per graph) and a few records.

    Returns:
        A dict with the keys root, digest, bytes, kinds, version, in_place (folder of the values, or None), schema, axes (of a
        sequence), layers (numbers by kind), label (kind, shape, class names), values (distribution by split, if labels are
        values), splits (records by split and kind), labels (records by split and label), shards, distributions (least, median,
        greatest, mean, edges and counts of a histogram, by name), statistics, source and sample.
    """
    schema = data.schema
    types = {"sequence": schema.sequence, **schema.of_graphs, **schema.step_fields, **schema.record_fields}
    return {
        "root": readable(data.root),
        "digest": data.digest,
        "bytes": data.nbytes,
        "kinds": list(schema.kinds),
        "version": data.manifest.version,
        "in_place": None if data.files_root is None else readable(data.files_root),
        "schema": {
            name: {"dtype": field.dtype + (" with a scale" if field.scales else ""), "shape": list(field.shape)}
            for name, field in types.items()
            if field is not None
        },
        "axes": [] if schema.sequence is None else [schema.steps, *schema.sequence.axis_names],
        "layers": {kind: data.layer_numbers(kind) for kind in schema.kinds},
        "label": {"kind": schema.labels.kind, "shape": list(schema.labels.shape), "class_names": list(schema.labels.names)},
        "values": _label_values(data),
        "splits": {split: {kind: data.num_records(split, kind) for kind in schema.kinds} for split in data.splits},
        "labels": {split: {str(label): count for label, count in data.label_counts(split).items()} for split in data.splits},
        "shards": {kind: sum(len(data.table(split, kind)) for split in data.splits) for kind in schema.kinds},
        "distributions": {name: _distribution(values) for kind in schema.kinds for name, values in _lengths(data, kind)},
        "statistics": _statistics(data),
        "source": data.manifest.source,
        "sample": {kind: _sample(data, kind) for kind in schema.kinds},
    }


def _lengths(data: Dataset, kind: Kind) -> list[tuple[str, Array]]:
    """Return the number of rows of every record or graph, by the name of the rows."""
    lengths: dict[str, list[Array]] = {name: [] for name, _ in AXES[kind]}
    files = Files()
    for split in data.splits:
        table = data.table(split, kind)
        for number in range(len(table)):
            shard: Shard = table.open(data.shard_path(split, kind, number), number, files)
            for name, array in AXES[kind]:
                lengths[name].append(np.diff(shard.read(f"{array}.offsets")))
    return [(name, np.concatenate(parts)) for name, parts in lengths.items() if parts]


def _label_values(data: Dataset) -> dict[str, Any]:
    """Return the distribution of the labels of each split, if they are values; reads all of them."""
    if data.schema.labels.kind != "value":
        return {}
    kind = data.schema.kinds[0]
    return {split: _distribution(labels) for split in data.splits if len(labels := data.select(split, kind).labels())}


def _distribution(values: Array) -> dict[str, Any]:
    if values.dtype.kind == "f":
        least, greatest = float(values.min()), float(values.max())
        counts, edges = np.histogram(values, BINS)
    else:
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
    statistics = data.manifest.statistics
    return None if statistics is None else {"mean": list(statistics.mean), "std": list(statistics.std)}


def _sample(data: Dataset, kind: Kind) -> list[dict[str, Any]]:
    """Return the first records of the first split that has any."""
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
    """Return the number of records in words, for example `sequences 2,807 train, 586 val; graphs …`."""
    counts = {kind: [f"{data.num_records(split, kind):,} {split}" for split in data.splits] for kind in data.schema.kinds}
    return "; ".join(f"{kind} {', '.join(listed)}" for kind, listed in counts.items())


def rounding_errors(data: Dataset) -> Array | None:
    """Return the error of int8 for each feature of a sequence, (F,), relative to the spread of its usual values.

    Returns None if the data set stores no int8 sequences, or has no statistics. The spread is the 99th percentile of the
    distance from the median over the first MEASURED records of the training split, which outliers do not change. The error is 1
    if an outlier makes the scale so coarse that all other values become 0. A feature that never varies has error 0.
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
    """Return a sentence about the error of int8 storage, or an empty text if the data set stores no int8."""
    errors = rounding_errors(data)
    if errors is None:
        return ""
    worst, coarse = int(errors.argmax()), int((errors > COARSE).sum())
    sentence = (
        f"int8 moves a feature by {float(np.median(errors)):.2%} of its usual spread at the median, "
        f"and feature {worst} most, by {float(errors[worst]):.0%}"
    )
    if coarse:
        sentence += (
            f"; {coarse:,} of {len(errors):,} lose more than {COARSE:.0%}, as with outliers: clip them, or store float16"
        )
    return sentence


def print_description(report: dict[str, Any]) -> None:
    """Print a description as tables on standard output; piped output is never wrapped."""
    console = plain_console()
    console.print(
        f"{report['root']}: {' and '.join(report['kinds'])}, {report['bytes'] / 1e9:.3f} GB, digest {report['digest'][:8]}"
    )
    if report["in_place"]:
        console.print(f"  in place: the values lie in files below {report['in_place']}")
    for name, facts in report["schema"].items():
        console.print(f"  {name}: {facts['dtype']} {tuple(facts['shape'])} a row")
    for sentence in _axes_and_labels(report):
        console.print(f"  {sentence}")
    table = Table("split", *report["kinds"], "labels", box=box.SIMPLE_HEAD)
    for split, counts in report["splits"].items():
        table.add_row(split, *(f"{count:,}" for count in counts.values()), _labels_of(report, split))
    console.print(table)
    table = Table("of each", "least", "median", "mean", "greatest", "distribution", box=box.SIMPLE_HEAD)
    for name, facts in report["distributions"].items():
        cells = [f"{facts[key]:,}" for key in ("least",)] + [
            f"{facts['median']:,.1f}",
            f"{facts['mean']:,.1f}",
            f"{facts['greatest']:,}",
        ]
        table.add_row(name, *cells, sparkline(facts["counts"]))
    console.print(table)
    if report["statistics"]:
        mean, std = (np.array(report["statistics"][key]) for key in ("mean", "std"))
        console.print(
            f"features of the training split: {len(mean)}, means {mean.min():.3g} to {mean.max():.3g}, "
            f"standard deviations {std.min():.3g} to {std.max():.3g}"
        )
    for kind, sample in report["sample"].items():
        for facts in sample:
            shape = ", ".join(f"{facts[key]} {key}" for key in ("steps", "graphs", "nodes", "edges") if key in facts)
            row = " ".join(f"{value:.3g}" for value in facts["first_row"])
            console.print(
                f"{kind} {facts['split']} {facts['id']!r}: label {facts['label']}, {shape}, first row {row} …", markup=False
            )


def _axes_and_labels(report: dict[str, Any]) -> list[str]:
    """Return what the axes, the layers and the labels are, in words; nothing about what is as usual."""
    sentences = []
    if report["version"] > 1 and report["axes"]:
        sentences.append(f"axes of a sequence: {', '.join(report['axes'])}")
    for kind, numbers in report["layers"].items():
        if numbers:
            first, last = numbers[0], numbers[-1]
            listed = f"{first} to {last}" if numbers == list(range(first, last + 1)) else ", ".join(map(str, numbers))
            sentences.append(f"layers of the {kind}: {listed}")
    label = report["label"]
    if label["kind"] != "class" or label["class_names"]:
        names = f", named {', '.join(label['class_names'])}" if label["class_names"] else ""
        shape = f" of shape {tuple(label['shape'])}" if label["shape"] else ""
        sentences.append(f"label: {label['kind']}{shape}{names}")
    return sentences


def _labels_of(report: dict[str, Any], split: str) -> str:
    """Return the records of each label of a split, or the distribution of its values."""
    if split in report["values"]:
        facts = report["values"][split]
        return f"{facts['least']:.3g} to {facts['greatest']:.3g}, median {facts['median']:.3g} {sparkline(facts['counts'])}"
    several = report["label"]["kind"] == "multilabel"
    total = max(1, max(report["splits"][split].values()) if several else sum(report["labels"][split].values()))
    return ", ".join(f"{label}: {count:,} ({count / total:.0%})" for label, count in report["labels"][split].items())


def sparkline(counts: list[int]) -> str:
    """Return a histogram as one line of text; the bar of a count above 0 is never empty."""
    largest = max(counts, default=0) or 1
    return "".join(BARS[0 if not count else max(1, round(count / largest * (len(BARS) - 1)))] for count in counts)
