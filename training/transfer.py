"""The table of a detector on other data, beside that of the data that it was trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dali_pipeline import Dataset, UsageError
from training.folder import METRICS_NAME
from training.intervals import intervals
from training.metrics import Predictions, Threshold, measure
from training.results import print_table, read_metrics
from training.target import Target

MOST_ROWS = 5_000_000  # of a table: some 100 bytes of memory each


class Tally:
    """Scores, targets and groups of what was scored so far, up to MOST_ROWS rows whose target is known."""

    def __init__(self, target: Target) -> None:
        self._target, self._parts, self._groups = target, list[Predictions](), list[bytes]()
        self._rows, self._unfit, self.full = 0, 0, False

    def add(self, found: Predictions, groups: Sequence[bytes]) -> None:
        """Add the predictions of a batch, with the group of each record."""
        if self._target.classes:  # a class that the detector has no output for
            strange = found.labels >= self._target.classes
            self._unfit += int(strange.sum())
            found = replace(found, labels=np.where(strange, -1, found.labels))
        known = found.known()
        known = known.where(np.all(np.isfinite(known.scores), axis=tuple(range(1, known.scores.ndim))))
        self.full = self.full or self._rows + len(known.scores) > MOST_ROWS
        if self.full or not len(known.scores):
            return
        self._rows += len(known.scores)
        self._parts.append(replace(known, ids=[]))  # a table needs no names
        self._groups += groups

    @property
    def task(self) -> str:
        """The task."""
        return self._target.task

    def half(self) -> Threshold:
        """Return 0.5 as a threshold, of each label."""
        return 0.5 if self._target.task == "binary" else [0.5] * self._target.outputs

    def metrics(self, threshold: Threshold) -> dict[str, Any]:
        """Return an entry as those of metrics.json; raises UsageError, in a sentence, if there is nothing to measure."""
        name = self._target.name
        if self.full:
            raise UsageError(f"no table: more than {MOST_ROWS:,} rows; score one split at a time by --split")
        if not self._parts:
            raise UsageError(f"no table: no record has both a {name} that this detector knows and a finite score")
        joined = Predictions.join(self._parts)
        if (joined.labels == joined.labels[0]).all():
            raise UsageError(f"no table: {name} is constant in what was scored")
        return {
            "task": joined.task,
            "target": name,
            "test": measure(joined, threshold),
            "test_interval": intervals(joined, self._groups, threshold),
            "threshold": threshold,
            "left_out": self._unfit,
        }


def tell_transfer(checkpoint: Path, name: str, data: Dataset, split: str | None, tally: Tally) -> None:
    """Print the metrics on what was scored, beside those that train.py wrote next to the checkpoint, with its threshold."""
    try:
        own = {part: value for part, value in read_metrics(checkpoint.parent)[name].items() if part != "against"}
    except (UsageError, LookupError):
        own = None
    binary = tally.task in ("binary", "multilabel")
    threshold = own["threshold"] if own is not None else tally.half() if binary else None
    try:
        found = tally.metrics(threshold)
    except UsageError as error:
        print(error)
        return
    results = {} if own is None else {f"{name}, its own test split": own}
    results[f"{name}, {data.root.name}, {split or 'all splits'}"] = found
    chosen = "; the threshold is that of its training" if own is not None and threshold else ""
    print_table(results, f"Metrics on {data.root.name}, beside the data of the training{chosen}")
    if own is None:
        half = "; the threshold is 0.5" if binary else ""
        print(f"{checkpoint.parent} holds no {METRICS_NAME} of the training to compare with{half}")
    if found["left_out"]:
        print(f"{found['left_out']:,} rows left out of the table: their class is one that the training did not have")
