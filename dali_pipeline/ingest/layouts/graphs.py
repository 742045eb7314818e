"""Graphs of PyG, one per record, in any container: `x`, `edge_index`, `edge_attr`, `y`, and every further attribute.

An attribute with one row per node or edge becomes a field of that level; a number or a text, or one row, one of the record.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dali_pipeline.errors import FormatError, UsageError
from dali_pipeline.format.record import Graphs
from dali_pipeline.format.schema import TAKEN, TAKEN_PARTS
from dali_pipeline.ingest.containers.base import BFLOAT16, OBJECT, TEXT, Container, Leaf
from dali_pipeline.ingest.foreign import ForeignFile, Values, as_text
from dali_pipeline.ingest.layouts.labels import NO_LABEL, LabelRule, label_rule, read_labels, record_entries
from dali_pipeline.ingest.layouts.opening import opened
from dali_pipeline.ingest.layouts.parts import Part
from dali_pipeline.ingest.layouts.plan import Plan, RecordAxes, from_table, own_name
from dali_pipeline.ingest.layouts.recipe import Recipe
from dali_pipeline.ingest.layouts.resolve import starts_of

TRANSFORMS = {"pre_transform.pt", "pre_filter.pt"}  # written by PyG beside processed data
WEIGHTS = ("edge_attr", "edge_weight")
SAMPLED = 64  # records whose shapes tell the level of an attribute
RESPONSE = "response_index"
Targets = Literal["record", "node", "response", "none"]


@dataclass(frozen=True, kw_only=True)
class GraphPlan(Plan):
    """A plan of graphs.

    Attributes:
        levels: Level of every further attribute: "node", "edge", "record" or "text".
        weight: Attribute that becomes edge_attr, or None.
        targets: What the label is one of: a record, a node, or a token of the response that `response_index` names.
    """

    levels: Mapping[str, str]
    weight: str | None
    targets: Targets

    def open(self, path: Path, name: str, local: Path | None = None) -> ForeignFile:
        """Read names and labels of a file; raise FormatError if it does not follow the plan."""
        return _open(self, self.part(path, local), own_name(path, name))


def is_graph(leaves: Mapping[str, Leaf]) -> bool:
    """Return whether keys are those of a PyG graph."""
    edges = leaves.get("edge_index")
    return "x" in leaves and leaves["x"].dtype != OBJECT and edges is not None and edges.shape[:1] == (2,)


def graph_files(files: Sequence[Path]) -> list[Path]:
    """Return the files without those in which PyG notes its transforms."""
    return [path for path in files if str(path).rpartition("/")[2] not in TRANSFORMS]


def graph_plan(root: Path, files: Sequence[Path], recipe: Recipe, what: str) -> GraphPlan:
    """Return how the graphs of files are taken, from the shapes of the first records.

    Args:
        root: The source.
        files: The files of graphs, in order.
        recipe: What the flags say: label, id, group, labels from elsewhere.
        what: Name of the layout, for messages.

    Raises:
        UsageError: The recipe names what graphs do not have.
        FormatError: A file cannot be read.
        DataError: The number of labels by order differs from the number of graphs.
    """
    samples = _samples(files)
    label = recipe.label or "y"
    names = list(dict.fromkeys(name for sample in samples for name in sample))
    if recipe.label is not None and recipe.label not in names:
        raise UsageError(f"{files[0]} has no key {recipe.label!r}; it has {', '.join(names)}")
    weight = next((name for name in WEIGHTS if name in names), None)
    used = {"x", "edge_index", weight, label, recipe.id, recipe.group, "num_nodes"}
    found = {name: _level(name, samples) for name in names if name not in used}
    levels = {name: level for name, level in found.items() if level is not None}
    left = [name for name, level in found.items() if level is None]
    table = None if recipe.labels_from is None else read_labels(recipe.labels_from)
    targets: Targets = "none"
    if recipe.label_kind != "none" and (table is not None or any(label in sample for sample in samples)):
        targets = "record" if table is not None else _targets(label, samples)
    notices = _notices(recipe, label if label in names else None, targets, left)
    parts = {path: Part(path=path, places={}) for path in files}
    counts = [_count(path) for path in files] if table is not None and table.rows is None else None
    rule = NO_LABEL
    if targets == "record":
        rule = label_rule(recipe, table.values if table is not None else _labels(files, label), f"{files[0]}, {label}")
    return GraphPlan(
        recipe=recipe,
        what=what,
        parts=parts,
        per_file=False,
        axes=RecordAxes(),
        rule=rule,
        row_shape=(),
        table=table,
        starts=starts_of(root, [(part, None) for part in parts.values()], counts, table),
        notices=tuple(notices),
        used=() if table is None else (table.path,),
        levels=levels,
        weight=weight,
        targets=targets,
    )


def _notices(recipe: Recipe, label: str | None, targets: Targets, left: Sequence[str]) -> list[str]:
    """Return sentences about the attributes that are left out, and about labels that are no record's."""
    notices = [f"not taken: {', '.join(left)}, as they have no row per node, edge or graph in every record"] if left else []
    if targets == "none" and label is not None and recipe.label_kind != "none":
        notices.append(f"not taken: {label}, which is neither one per graph, nor per node or token of the response")
    if targets in ("node", "response"):
        masked = f", and {RESPONSE} as node.is_target" if targets == "response" else ""
        notices.append(f"{label} is one per node: taken as the field node.target{masked}; records have no label")
    return notices


def _samples(files: Sequence[Path]) -> list[dict[str, Leaf]]:
    """Return the leaves of some records, spread over the files; raise the first error if none can be read."""
    samples: list[dict[str, Leaf]] = []
    error: FormatError | None = None
    for path in files[:: max(1, len(files) // SAMPLED)]:
        try:
            container = opened(path)
        except FormatError as caught:
            error = error or caught
            continue
        count = 1 if container.records is None else len(container.records)
        samples += [
            {leaf.key: leaf for leaf in container.leaves(record) if not leaf.why.startswith("it is None")}
            for record in range(0, count, max(1, count // SAMPLED))
        ]
        container.close()
        if len(samples) >= SAMPLED:
            break
    if not samples and error is not None:
        raise error
    return [sample for sample in samples if is_graph(sample)]


def _sizes(sample: Mapping[str, Leaf]) -> tuple[int, int]:
    return sample["x"].shape[0], sample["edge_index"].shape[1]


def _level(name: str, samples: Sequence[Mapping[str, Leaf]]) -> str | None:
    """Return the level at which all samples of an attribute fit; None if there is none."""
    leaves = [sample[name] for sample in samples if name in sample]
    if len(leaves) < len(samples) or any(leaf.dtype == OBJECT for leaf in leaves) or not name.isidentifier():
        return None
    if all(leaf.dtype == TEXT for leaf in leaves):
        return "text" if all(leaf.shape == () for leaf in leaves) else None
    rows = [leaf.shape[1:] for leaf in leaves]
    fits = {
        "node": all(leaf.shape[:1] == (_sizes(sample)[0],) for leaf, sample in zip(leaves, samples, strict=True)),
        "edge": all(leaf.shape[:1] == (_sizes(sample)[1],) for leaf, sample in zip(leaves, samples, strict=True)),
        "record": all(leaf.shape[:1] in ((), (1,)) for leaf in leaves),
    }
    order = ("edge", "record", "node") if "edge" in name else ("record", "node", "edge")
    level = next((level for level in order if fits[level]), None)
    is_free = name not in TAKEN and not any(part in name for part in TAKEN_PARTS) and not name.startswith("_")
    if len(set(rows)) > 1 or (level in ("node", "edge") and not is_free):
        return None
    return level


def _targets(label: str, samples: Sequence[Mapping[str, Leaf]]) -> Targets:
    """Return what labels are one of, by their shapes."""
    own = [sample for sample in samples if label in sample]
    if all(sample[label].shape[:1] in ((), (1,)) for sample in own):
        return "record"
    if all(sample[label].shape[:1] == (_sizes(sample)[0],) for sample in own):
        return "node"
    if all(RESPONSE in sample for sample in own):
        return "response"
    return "record" if len({sample[label].shape for sample in own}) == 1 else "none"


def _labels(files: Sequence[Path], label: str) -> list[Any]:
    """Return the labels of the first file, or of all if they are no whole numbers."""
    values: list[Any] = []
    for path in files:
        try:
            container = opened(path)
        except FormatError:
            continue
        try:
            values += _column(container, label)
        except FormatError:  # raised again, with its file, when the labels are read
            continue
        finally:
            container.close()
        if values and all(np.asarray(value).dtype.kind in "iub" for value in values):
            break
    return values


def _column(container: Container, key: str) -> list[Any]:
    values = [container.read(key)] if container.records is None else record_entries(container, key)
    return [value[0] if isinstance(value, np.ndarray) and value.ndim > 1 and len(value) == 1 else value for value in values]


def _count(path: Path) -> int:
    container = opened(path)
    try:
        return 1 if container.records is None else len(container.records)
    finally:
        container.close()


def _open(plan: GraphPlan, part: Part, name: str) -> ForeignFile:
    container = opened(part.path)
    try:
        count = 1 if container.records is None else len(container.records)
        recipe = plan.recipe
        texts = {what: _texts(part.path, container, key) for what, key in (("id", recipe.id), ("group", recipe.group)) if key}
        if not texts:
            texts["id"] = [name] if container.records is None else [f"{name}-{row}" for row in range(count)]
        given = [None] * count
        if plan.table is None and plan.targets == "record":
            given = _column(container, recipe.label or "y")
    finally:
        container.close()
    ids, groups = texts.get("id"), texts.get("group") or texts["id"]
    if plan.table is not None:
        given = from_table(plan, part.path, ids or groups, part.listed)
    where = f"{part.path}, record {{}}" if count > 1 else str(part.path)
    rule: LabelRule = plan.rule
    return ForeignFile(
        path=part.path,
        kinds=("graphs",),
        ids=ids,
        groups=groups,
        labels=[rule.of(where.format(repr(key)), label) for key, label in zip(ids or groups, given, strict=True)],
        label=rule.label,
        values=partial(_values, plan, part.path),
    )


def _texts(path: Path, container: Container, key: str) -> list[str]:
    values = [value.item() if isinstance(value, np.ndarray) and value.size == 1 else value for value in _column(container, key)]
    return [as_text(path, key, value) for value in values]


def _values(plan: GraphPlan, path: Path) -> Iterator[Values]:
    container = opened(path)
    try:
        for record in range(1 if container.records is None else len(container.records)):
            number = None if container.records is None else record
            yield _record(plan, path, container, number)
    finally:
        container.close()


def _record(plan: GraphPlan, path: Path, container: Container, record: int | None) -> Values:
    leaves = {leaf.key: leaf for leaf in container.leaves(record or 0)}
    where = str(path) if record is None else f"{path}, record {record}"
    if not is_graph(leaves):
        raise FormatError(f"{where} has {', '.join(leaves) or 'nothing'}; expected a graph with x and edge_index")

    def read(name: str) -> Any:
        if name not in leaves:
            raise FormatError(f"{where} has no {name}, which the first graphs have")
        return container.read(name, record=record)

    x, edges = np.asarray(read("x")), np.asarray(read("edge_index"))
    attr = None
    if plan.weight is not None and (plan.weight in leaves or edges.shape[1]):
        attr = np.asarray(read(plan.weight))
        attr = attr[:, 0] if attr.ndim == 2 and attr.shape[1] == 1 else attr
    fields = {f"{level}.{name}": np.asarray(read(name)) for name, level in plan.levels.items() if level in ("node", "edge")}
    others = [name for name, level in plan.levels.items() if level not in ("node", "edge")]
    record_fields = {f"record.{name}": _one(read(name)) for name in others}
    taken_as = {"x": "x", plan.weight: "edge_attr"} | {name: f"{level}.{name}" for name, level in plan.levels.items()}
    narrow = [key for name, key in taken_as.items() if name in leaves and leaves[name].dtype == BFLOAT16]
    if plan.targets in ("node", "response"):
        fields |= _node_targets(plan, where, read, len(x))
    graphs = Graphs(
        x=x,
        edge_index=edges if edges.size else np.zeros((2, 0), np.int64),
        edge_attr=attr,
        node_counts=np.array([len(x)]),
        edge_counts=np.array([edges.shape[1]]),
        fields=fields,
    )
    return Values(None, graphs, tuple(narrow), record_fields)


def _one(value: Any) -> Any:
    """Return a text as it is, and a number or the only row of an array as an array."""
    if isinstance(value, str):
        return value
    array = np.asarray(value)
    return array[0] if array.ndim else array


def _node_targets(plan: GraphPlan, where: str, read: Any, nodes: int) -> dict[str, Any]:
    """Return the field node.target, and node.is_target if only the tokens of a response have a label."""
    values = np.asarray(read(plan.recipe.label or "y"))
    if plan.targets == "node":
        return {"node.target": values}
    rows = np.asarray(read(RESPONSE)).reshape(-1)
    if len(rows) == 1 != len(values):
        rows = np.arange(int(rows[0]), int(rows[0]) + len(values))
    if rows.dtype.kind == "b" and len(rows) == nodes:
        rows = np.flatnonzero(rows)
    if values.ndim == 0 or len(rows) != len(values) or (len(rows) and not 0 <= rows.min() <= rows.max() < nodes):
        count = len(values) if values.ndim else 1
        raise FormatError(
            f"{where} has {count} labels for {len(rows)} entries of {RESPONSE}; expected one each, of {nodes} nodes"
        )
    target, is_target = np.zeros((nodes, *values.shape[1:]), values.dtype), np.zeros(nodes, np.bool_)
    target[rows], is_target[rows] = values, True
    return {"node.target": target, "node.is_target": is_target}
