"""Target: what the detectors learn to predict, and how a batch holds it; found by a look at every value of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from dali_pipeline import DataError, Dataset, GraphBatch, SequenceBatch, UsageError
from dali_pipeline.dataset.single import text_at
from dali_pipeline.format.encoding import TEXT
from dali_pipeline.format.layers import Layers, parse_layers, to_positions
from dali_pipeline.format.schema import Field, Schema
from dali_pipeline.storage.files import Files
from dali_pipeline.types import Kind
from training.config import TASKS, Task

Batch = SequenceBatch | GraphBatch
SPLITS = ("train", "val", "test")
MOST_CLASSES = 4096  # the memory of some metrics grows with the square of the number of classes
LABEL_DTYPES = {"class": "int64", "multilabel": "bool", "value": "float32"}
LEVELS = ("record", "step", "node")  # of targets


@dataclass(frozen=True, kw_only=True)
class Target:
    """What is predicted.

    Attributes:
        name: "label", "record.NAME", "step.NAME" or "node.NAME".
        task: "binary", "multiclass", "multilabel" (several labels at once) or "regression".
        shape: Shape of one target: (K,) of several labels, any shape of a value, () of a class.
        classes: Number of classes; 0 of several labels and of values.
        mean: Mean of each number of a value in the training split; empty of other tasks.
        spread: Its standard deviation there.
    """

    name: str
    task: Task
    shape: tuple[int, ...] = ()
    classes: int = 0
    mean: tuple[float, ...] = ()
    spread: tuple[float, ...] = ()

    @property
    def level(self) -> str:
        """What has one target each: "record", "step" or "node"."""
        return level_of_target(self.name)

    @property
    def outputs(self) -> int:
        """Number of outputs of a detector, K."""
        if self.task == "binary":
            return 1
        return self.classes if self.task == "multiclass" else int(np.prod(self.shape))

    @property
    def metric(self) -> str:
        """The metric that chooses the best epoch."""
        return "r2" if self.task == "regression" else "auroc"

    @property
    def missing(self) -> float:
        """What stands for a target that is not known."""
        return float("nan") if self.task == "regression" else -1

    def of(self, batch: Batch) -> torch.Tensor | None:
        """Return the targets of a batch: (B, *shape), (B, T, *shape) of steps, (N, *shape) of nodes; None if it has none.

        In the type that the loader delivers: `Objective` and `Scored` make classes of bools and whole floats.
        """
        short = self.name.partition(".")[2]
        if self.name == "label":
            values: torch.Tensor | None = batch.labels
        elif self.level == "node":
            values = batch.graphs[short] if isinstance(batch, GraphBatch) and short in batch.graphs else None
        else:
            values = batch.fields.get(short)
        return values

    def known(self, values: torch.Tensor) -> torch.Tensor:
        """Return which targets of `of` are known, bool with the axes before `shape`: a class below 0 marks one that is not."""
        if self.classes:
            return values >= 0
        return torch.ones(values.shape[: values.dim() - len(self.shape)], dtype=torch.bool, device=values.device)

    def scaled(self, logits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Return values (M, K) from a detector's outputs, which are deviations in standard deviations."""
        # float64: values about a large mean differ by less than a float32 can tell
        return np.asarray(logits.astype(np.float64) * np.array(self.spread) + np.array(self.mean))


def level_of_target(name: str) -> str:
    """Return "record" of a label or a record field, "step" or "node"."""
    return "record" if name == "label" else name.partition(".")[0]


def targets_of(schema: Schema) -> dict[str, Field]:
    """Return everything in a data set that could be predicted, by name: its labels, and fields of records, steps and nodes."""
    fields = {**schema.step_fields, **schema.record_fields, **schema.named}
    possible = {name: field for name, field in fields.items() if level_of_target(name) in LEVELS and field.dtype != TEXT}
    if schema.labels.kind in LABEL_DTYPES:
        return {"label": Field(dtype=LABEL_DTYPES[schema.labels.kind], shape=schema.labels.shape), **possible}
    return possible


def same_kind(one: Field | None, other: Field | None) -> bool:
    """Return whether two fields hold the same kind of target, of the same shape: classes and labels, or values."""
    if one is None or other is None:
        return False
    return one.shape == other.shape and _is_whole(one) == _is_whole(other)


def _is_whole(field: Field) -> bool:
    return not field.scale and (field.dtype == "bool" or field.dtype.startswith(("int", "uint")))


def target_field(data: Dataset, name: str) -> Field:
    """Return the field of a target; raises UsageError if the data set has none of that name."""
    possible = targets_of(data.schema)
    if name not in possible:
        has = ", ".join(possible) or "none that could be one"
        raise UsageError(f"{data.root} has no target {name!r}; expected one of its labels and fields by level: {has}")
    return possible[name]


@dataclass(kw_only=True)
class Seen:
    """What a look at every target of a split found.

    Attributes:
        known: Targets that are known.
        least, most: Smallest and largest value.
        whole: Whether all are whole numbers.
        counts: Records, steps or nodes per class or label.
        sums, squares: Of each number of a value, about `origin`.
    """

    known: int = 0
    least: float = np.inf
    most: float = -np.inf  # an int of whole labels, which a float may round
    whole: bool = True
    counts: np.ndarray[Any, Any] = field(default_factory=lambda: np.zeros(0, np.int64))
    sums: Any = 0.0
    squares: Any = 0.0
    origin: Any = None

    def moments(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return mean and standard deviation of each number of a value."""
        mean = self.sums / max(1, self.known)
        spread = np.sqrt(np.maximum(self.squares / max(1, self.known) - mean**2, 0))
        return tuple(np.ravel(self.origin + mean).tolist()), tuple(np.ravel(spread).tolist())


def find_target(
    data: Dataset,
    kind: Kind,
    name: str = "label",
    task: str | None = None,
    *,
    layers: str | None = None,
    splits: Sequence[str] = SPLITS,
) -> Target:
    """Look at every value of a target, and return what can be learned; reads that column alone.

    Args:
        data: The data set.
        kind: Kind of record whose targets are looked at.
        name: "label", "record.NAME", "step.NAME" or "node.NAME".
        task: Task, or None for what the values are: bools and whole numbers are classes, real numbers values.
        layers: Steps or graphs of each record that are trained on, in the form that `parse_layers` reads. Default: all.
        splits: Splits that have to have it, the training split first. Default: train, val and test.

    Raises:
        UsageError: There is no such target, or no such task on it.
        DataError: The target is constant, holds NaN, or a class is missing where it is needed; the metrics would be undefined.
    """
    stored = target_field(data, name)
    if task is not None and task not in TASKS:
        raise UsageError(f"task is {task!r}; expected one of {', '.join(TASKS)}")
    where = f"{name} of {data.root}"
    of_layers = layers_of_target(data, kind, name, layers)
    if name == "label" and data.schema.labels.kind == "class" and task in (None, "binary", "multiclass"):
        seen = {split: _counted(data.label_counts(split, kind)) for split in splits if split in data.splits}
    else:
        seen = {split: _look(data, split, kind, name, stored, task, of_layers) for split in splits if split in data.splits}
    asked = task or _task_of(stored, seen)
    _check_task(asked, stored, seen, where)
    if missing := [split for split in splits if split not in seen or not seen[split].known]:
        absent = f"no records of {kind}" if level_of_target(name) == "record" else f"no {level_of_target(name)} with {name}"
        raise DataError(f"split {missing[0]!r} of {data.root} has {absent}; expected some in {', '.join(splits)}")
    if asked == "regression":
        _check_spread(seen, where)
        mean, spread = seen["train"].moments()
        return Target(name=name, task=asked, shape=stored.shape, mean=mean, spread=spread)
    most = max(one.most for one in seen.values())
    if asked != "multilabel" and most >= MOST_CLASSES:
        raise DataError(
            f"{data.root} has the {'label' if name == 'label' else name} {int(most)}, and a detector has an output for every "
            f"number up to it; expected classes below {MOST_CLASSES}: number the classes 0, 1, 2 … and write the set anew, or "
            "give --task regression"
        )
    _check_classes(asked, seen, where, (str(data.root), "labels" if name == "label" else name, kind))
    if asked == "multilabel":
        return Target(name=name, task=asked, shape=stored.shape)
    named = len(data.schema.labels.names) if name == "label" else 0
    classes = max(2, named, *(int(one.most) + 1 for one in seen.values()))
    if asked == "binary" and task is None and classes > 2:  # names of more classes than occur
        asked = "multiclass"
    if asked == "binary" and classes > 2:
        raise UsageError(f"task binary on {where}, whose classes reach {classes - 1}; expected 0 and 1, or --task multiclass")
    return Target(name=name, task="binary" if classes == 2 and task is None else asked, classes=classes)


def layers_of_target(data: Dataset, kind: Kind, name: str, layers: str | None) -> Layers:
    """Return the positions of the steps or graphs whose targets are trained on; None for all.

    Layers of tokens choose no steps, so they leave out no target.
    """
    chosen = parse_layers(layers)
    if chosen is None or level_of_target(name) == "record" or (kind == "sequences" and data.schema.layer_axis is not None):
        return None
    numbers, axis = data.layer_numbers(kind), "step" if kind == "sequences" else "graph"
    if numbers is not None and data.select("train", kind).bounds(axis) == (len(numbers), len(numbers)):
        return to_positions(chosen, numbers)
    return chosen


def _counted(counts: Mapping[int, int]) -> Seen:
    """Return what the counts of the manifest say, without reading labels."""
    if not counts:
        return Seen()
    total = np.zeros(min(max(counts), MOST_CLASSES) + 1, np.int64)
    for number, count in counts.items():
        total[min(number, MOST_CLASSES)] += count
    return Seen(known=int(total.sum()), least=min(counts), most=max(counts), counts=total)


def _look(data: Dataset, split: str, kind: Kind, name: str, stored: Field, task: str | None, layers: Layers) -> Seen:
    """Look at all values of one split, of these layers."""
    seen, selection = Seen(), data.select(split, kind)
    # a class below 0: not known
    marks = _is_whole(stored) and task != "regression" and not stored.shape and level_of_target(name) != "record"
    for values, counts, positions in selection.field_values("labels" if name == "label" else name, stored, layers):
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            row = int(np.argmax(~np.isfinite(values).reshape(len(values), -1).all(axis=1)))
            record = int(positions[np.searchsorted(np.cumsum(counts), row, side="right")])
            shards, number, at = selection.at(record)
            record_id = text_at(shards.open(number, Files(1)), "ids", at)
            raise DataError(
                f"{name} of {data.root} holds a value that is no finite number in record {record_id!r} of "
                f"split {split!r}; expected finite targets: leave such records out when the set is written"
            )
        numbers = values.astype(np.float64) if values.dtype.kind == "f" else values.astype(np.int64)
        if marks:
            numbers = numbers[numbers >= 0]
        if not len(numbers):
            continue
        seen.known += len(numbers)
        seen.least, seen.most = min(seen.least, float(numbers.min())), max(seen.most, float(numbers.max()))
        seen.whole = seen.whole and bool((numbers == np.floor(numbers)).all())
        if seen.origin is None:
            seen.origin = numbers[0].astype(np.float64)
        deviations = numbers.astype(np.float64) - seen.origin  # about the first: sums of squares of large values lose digits
        seen.sums, seen.squares = seen.sums + deviations.sum(axis=0), seen.squares + (deviations**2).sum(axis=0)
        seen.counts = _added(seen, numbers, stored)
    return seen


def _added(seen: Seen, numbers: np.ndarray[Any, Any], stored: Field) -> np.ndarray[Any, Any]:
    """Return the counts of classes, or of labels set, with those of more values."""
    if stored.shape:
        return np.asarray((seen.counts if len(seen.counts) else 0) + (numbers != 0).sum(axis=0))
    if not seen.whole or seen.least < 0:
        return seen.counts
    more = np.bincount(np.minimum(numbers, MOST_CLASSES).astype(np.int64), minlength=len(seen.counts))
    more[: len(seen.counts)] += seen.counts
    return more


def _task_of(stored: Field, seen: Mapping[str, Seen]) -> Task:
    """Return the task that the type of a target suggests."""
    if not _is_whole(stored):
        return "regression"
    if stored.shape:
        return "multilabel"
    return "binary" if max((one.most for one in seen.values()), default=0) <= 1 else "multiclass"


def _check_task(task: str, stored: Field, seen: Mapping[str, Seen], where: str) -> None:
    """Raise UsageError if values of this type and shape allow no such task."""
    fits = all(one.whole and one.least >= 0 for one in seen.values() if one.known)
    zero_one = fits and all(one.most <= 1 for one in seen.values() if one.known)
    if task == "multilabel" and not (len(stored.shape) == 1 and zero_one):
        raise UsageError(
            f"task multilabel on {where}, which has rows of shape {stored.shape}, {_range(seen)}; expected (K,) of 0 and 1"
        )
    if task in ("binary", "multiclass") and (stored.shape or not fits):
        raise UsageError(
            f"task {task} on {where}, which has rows of shape {stored.shape}, {_range(seen)}; expected one whole "
            "number from 0 on each"
        )


def _range(seen: Mapping[str, Seen]) -> str:
    known = [one for one in seen.values() if one.known]
    if not known:
        return "without values"
    kind = "whole numbers" if all(one.whole for one in known) else "numbers"
    return f"{kind} from {min(one.least for one in known):g} to {max(one.most for one in known):g}"


def _check_spread(seen: Mapping[str, Seen], where: str) -> None:
    """Raise DataError if a value never varies in a split."""
    for split in seen:
        _, spread = seen[split].moments()
        if still := [number for number, width in enumerate(spread) if not width > 0]:
            which = f"number {still[0]} of {where}" if len(spread) > 1 else where
            raise DataError(f"{which} is constant in split {split!r}; expected values that vary in train, val and test")


def _check_classes(task: str, seen: Mapping[str, Seen], where: str, words: tuple[str, str, Kind]) -> None:
    """Raise DataError for a split of one class, a class that train lacks, or a label that is never set."""
    train = seen["train"].counts
    for split in seen:
        counts, known = seen[split].counts, seen[split].known
        if task == "multilabel":
            never = np.flatnonzero((counts == 0) | (counts == known)) if split == "train" else np.zeros(0, np.int64)
            if len(never):
                state = "never set" if counts[never[0]] == 0 else "always set"
                raise DataError(
                    f"label {never[0]} of {where} is {state} in split 'train'; expected each in some records and not in others"
                )
            if not ((counts > 0) & (counts < known)).any():
                raise DataError(f"{where} is constant in split {split!r}; expected labels that vary in train, val and test")
            continue
        there = np.flatnonzero(counts)
        if len(there) < 2:
            root, name, kind = words
            raise DataError(
                f"split {split!r} of {root} has {name} all {there[0]} in its {kind}; "
                "expected at least two classes in train, val and test"
            )
        if lacking := [number for number in there.tolist() if number >= len(train) or not train[number]]:
            raise DataError(
                f"split {split!r} has class {lacking[0]} in {where}, and split 'train' has none of it; expected every class in "
                "train: write the set with another split"
            )
