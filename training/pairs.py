"""Differences between models over several runs, paired by record: intervals over questions and trainings together."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from dali_pipeline.storage.whole import write_whole
from training.config import MODELS, Task
from training.folder import PREDICTIONS_NAME
from training.intervals import difference
from training.metrics import Predictions
from training.report import read_predictions


def paired(folders: Sequence[Path], task: Task) -> list[dict[str, Any]]:
    """Return the difference of each pair of models, of two detectors or of a detector and a baseline, on the test records.

    Args:
        folders: Folder of each run. All have the same test records. A baseline that the first run alone has stands beside all.
        task: Task of the runs.

    Returns:
        Rows of `model`, `beside`, `difference`, `interval`, `std`, `trainings`; none for models on different records.
    """
    runs = [read_predictions(folder / PREDICTIONS_NAME, task) for folder in folders]
    rows: list[dict[str, Any]] = []
    detectors: list[str] = [model for model in runs[0] if model in MODELS]
    pairs: list[tuple[str, str]] = [(one, other) for other, one in combinations(detectors, 2)]
    pairs += [(one, other) for one in detectors for other in runs[0] if other not in MODELS]
    for one, other in pairs:
        whole = [run[other] for run in runs if other in run]
        only = whole[0] if len(whole) == 1 else None  # a baseline that one run alone has stands beside all
        sides = [(run[one], run.get(other, only)) for run in runs if one in run]
        ours = [mine for mine, other_side in sides if other_side is not None]
        theirs = [other_side for _, other_side in sides if other_side is not None]
        if len(ours) < 2:
            continue
        first, groups = ours[0]
        common = set(first.ids) & set(theirs[0][0].ids)
        if not common:
            continue
        names = [id_ for id_ in first.ids if id_ in common]
        by_id = dict(zip(first.ids, groups, strict=True))
        first_side, second_side = ([_in_order(found, names) for found, _ in side] for side in (ours, theirs))
        rows.append({"model": one, "beside": other, **difference(first_side, second_side, [by_id[id_] for id_ in names])})
    return rows


def _in_order(found: Predictions, names: Sequence[str]) -> Predictions:
    rows = {id_: number for number, id_ in enumerate(found.ids)}
    return found.rows([rows[id_] for id_ in names])


def write_differences(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write differences.csv, a row per pair."""
    text = io.StringIO()
    table = csv.writer(text)
    table.writerow(("model", "beside", "metric", "difference", "low", "high", "std", "trainings"))
    for row in rows:
        what = (row["model"], row["beside"], row["metric"], row["difference"])
        table.writerow((*what, *row["interval"], row["std"], row["trainings"]))
    write_whole(path, text.getvalue().encode())


def read_differences(path: Path) -> list[dict[str, Any]]:
    """Return the rows that `write_differences` wrote; none if the file is not there."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [
            {
                "model": row["model"],
                "beside": row["beside"],
                "metric": row["metric"],
                "difference": float(row["difference"]),
                "interval": [float(row["low"]), float(row["high"])],
                "std": float(row["std"]),
                "trainings": int(row["trainings"]),
            }
            for row in csv.DictReader(file)
        ]
