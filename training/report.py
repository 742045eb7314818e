"""Write history.csv, a row per model and epoch, and predictions.parquet, a row per model and record."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dali_pipeline.storage.whole import write_whole
from training.config import Task
from training.metrics import Predictions
from training.trainer import HistoryRow


def write_history(path: Path, histories: Mapping[str, Sequence[HistoryRow]]) -> None:
    """Write history.csv as a whole, so that no row is lost or doubled."""
    text = io.StringIO()
    columns = dict.fromkeys(name for history in histories.values() for row in history for name in row)
    rows = csv.DictWriter(text, ("model", *columns))
    rows.writeheader()
    for model, history in histories.items():
        rows.writerows({"model": model, **row} for row in history)
    write_whole(path, text.getvalue().encode())


def prediction_table(found: Predictions, groups: Sequence[bytes], split: str) -> pa.Table:
    """Return a table with a row per record, step or node: id, group, (step or node,) label, score, split.

    The score is the probability of label 1. Several classes have the columns score_0 …, several labels also label_0 …; values
    have `prediction` instead, several numbers of a value prediction_0 …. A label that is not known is null.
    """
    counts = found.counts.tolist()
    ids = np.repeat(np.array(found.ids, object), counts)
    columns = {
        "id": pa.array(ids.tolist(), pa.string()),
        "group": pa.array([group.decode() for group in found.of_rows(groups)], pa.string()),
    }
    if found.level != "record":
        columns["row"] = pa.array(np.concatenate([np.arange(count) for count in counts]), pa.int64())
    values = found.task == "regression"
    labels = found.labels.reshape(len(found.labels), -1)
    for number, column in enumerate(labels.T):
        unknown = ~np.isfinite(column) if values else column < 0
        name = "label" if labels.shape[1] == 1 else f"label_{number}"
        columns[name] = pa.array(column, pa.float64() if values else pa.int64(), mask=unknown)
    scores = found.scores.reshape(len(found.scores), -1)
    for number, column in enumerate(scores.T):
        word = "prediction" if values else "score"
        columns[word if scores.shape[1] == 1 else f"{word}_{number}"] = pa.array(column)
    return pa.table({**columns, "split": pa.array([split] * len(ids), pa.string())})


def write_predictions(
    path: Path, found: Mapping[str, Mapping[str, Predictions]], groups: Mapping[str, Mapping[str, Sequence[bytes]]]
) -> None:
    """Write predictions.parquet with the score of each record, by model and split. groups: a name per record, likewise."""
    tables = [
        table.add_column(0, "model", pa.array([model] * len(table), pa.string()))
        for model, splits in found.items()
        for split, scored in splits.items()
        for table in [prediction_table(scored, groups[model][split], split)]
    ]
    content = io.BytesIO()
    pq.write_table(pa.concat_tables(tables, promote_options="default"), content)
    write_whole(path, content.getvalue())


def read_predictions(path: Path, task: Task, split: str = "test") -> dict[str, tuple[Predictions, list[bytes]]]:
    """Return the predictions that `write_predictions` wrote of a split, with the group of each record, by model."""
    table = pq.read_table(path)
    found: dict[str, tuple[Predictions, list[bytes]]] = {}
    for model in dict.fromkeys(table["model"].to_pylist()):
        own = table.filter(pc.and_(pc.equal(table["model"], model), pc.equal(table["split"], split)))
        word = "prediction" if task == "regression" else "score"
        scores, labels = (_columns(own, part) for part in (word, "label"))
        ids, groups = own["id"].to_pylist(), own["group"].to_pylist()
        begins = [0] if "row" not in own.column_names else np.flatnonzero(own["row"].to_numpy() == 0).tolist()
        begins = list(range(len(ids))) if "row" not in own.column_names else begins
        if task != "regression":
            labels = np.nan_to_num(labels.astype(np.float64), nan=-1).astype(np.int64)
        predictions = Predictions(
            task=task,
            level="step" if "row" in own.column_names else "record",
            ids=[ids[begin] for begin in begins],
            positions=np.arange(len(begins)),
            counts=np.diff([*begins, len(ids)]),
            scores=scores[:, 0] if task == "binary" else scores,
            labels=labels[:, 0] if task in ("binary", "multiclass") else labels,
            loss=float("nan"),
        )
        found[model] = predictions, [groups[begin].encode() for begin in begins]
    return found


def _columns(table: pa.Table, word: str) -> np.ndarray[Any, Any]:
    """Return the columns named `word`, or word_0 …, that hold anything, as (M, K)."""
    names = [name for name in table.column_names if name.partition("_")[0] == word and table[name].null_count < len(table)]
    return np.stack([table[name].to_numpy() for name in names], axis=1)
