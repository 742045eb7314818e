"""Write history.csv, a row per model and epoch, and predictions.parquet, a row per model and record."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dali_pipeline.storage.whole import write_whole
from training.metrics import Predictions
from training.trainer import HistoryRow

HISTORY_COLUMNS = ("model", "epoch", "train_loss", "val_loss", "val_auroc", "lr", "seconds")


def write_history(path: Path, histories: Mapping[str, Sequence[HistoryRow]]) -> None:
    """Write history.csv as a whole, so that no row is lost or doubled."""
    text = io.StringIO()
    rows = csv.DictWriter(text, HISTORY_COLUMNS)
    rows.writeheader()
    for model, history in histories.items():
        rows.writerows({"model": model, **row} for row in history)
    write_whole(path, text.getvalue().encode())


def prediction_table(
    ids: Sequence[str], groups: Sequence[bytes], labels: Any, scores: np.ndarray[Any, Any], split: str
) -> pa.Table:
    """Return a table with the columns id, group, label, score, split; for C classes score_0 … instead of score."""
    columns = {"id": pa.array(ids, pa.string()), "group": pa.array([group.decode() for group in groups], pa.string())}
    classes = np.asarray(labels)
    columns["label"] = pa.array(classes, pa.int64(), mask=classes < 0)  # null without classes
    if scores.ndim == 1:
        columns["score"] = pa.array(scores)
    else:
        columns |= {f"score_{number}": pa.array(column) for number, column in enumerate(scores.T)}
    return pa.table({**columns, "split": pa.array([split] * len(ids), pa.string())})


def write_predictions(
    path: Path, found: Mapping[str, Mapping[str, Predictions]], groups: Mapping[str, Mapping[str, Sequence[bytes]]]
) -> None:
    """Write predictions.parquet with the score of each record, by model and split. groups: a name per record, likewise."""
    tables = [
        prediction_table(scored.ids, groups[model][split], scored.labels, scored.scores, split).add_column(
            0, "model", pa.array([model] * len(scored.ids), pa.string())
        )
        for model, splits in found.items()
        for split, scored in splits.items()
    ]
    content = io.BytesIO()
    pq.write_table(pa.concat_tables(tables), content)
    write_whole(path, content.getvalue())
