"""Linear probes on each step of the sequences, which is a layer of a language model, to find the most informative layer.

Every probe reads only its own layer from the disk (`layers=` of the loader), so all probes together read the data once, and
memory holds one layer of `MOST_RECORDS` records.
"""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from dali_pipeline import DataError, Dataset, SequenceLoader
from dali_pipeline.format.layers import parse_layers, select, to_positions
from dali_pipeline.storage.whole import write_whole
from training.intervals import auroc_interval
from training.metrics import Floats, Predictions, area_under_roc

MOST_LAYERS = 64
MOST_RECORDS = 20_000  # records of a split: the first of its shuffled order
COMPONENTS = 100


@dataclass(frozen=True, kw_only=True)
class LayerScores:
    """AUROC of a probe on each layer. layers: their numbers; val, test: one AUROC per layer; intervals: 95 % on test."""

    layers: list[int]
    val: list[float]
    test: list[float]
    intervals: list[list[float]]

    @property
    def best(self) -> int:
        """Index of the layer that is best on validation."""
        return int(np.argmax(self.val))


def layers_of(data: Dataset, asked: str | None) -> list[int]:
    """Return the numbers of the layers to probe, evenly spaced, at most MOST_LAYERS; none if sequences differ in length."""
    if "sequences" not in data.schema.kinds:
        return []
    bounds = data.select("train", "sequences").bounds("step")
    if bounds is None or bounds[0] != bounds[1]:
        return []
    chosen, numbers = parse_layers(asked), data.layer_numbers("sequences")
    if numbers is not None and len(numbers) == bounds[0]:
        steps = [numbers[position] for position in to_positions(chosen, numbers)]
    else:
        steps = select(chosen, bounds[0])
    indices = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), MOST_LAYERS)).astype(int))
    return [int(steps[index]) for index in indices]


def probe_layers(data: Dataset, steps: list[int], seed: int) -> LayerScores:
    """Fit a probe on each step: standardise, PCA to 100 components, logistic regression."""
    scores: dict[str, list[Any]] = {"val": [], "test": [], "intervals": []}
    groups = data.select("test", "sequences").texts("groups")
    for step in steps:
        train, labels, _ = _layer(data, "train", step, seed)
        pca = PCA(min(COMPONENTS, *train.shape), random_state=0)
        model = make_pipeline(StandardScaler(), pca, LogisticRegression(C=0.1, max_iter=1000)).fit(train, labels)
        for split in ("val", "test"):
            predictions = _predictions(model, *_layer(data, split, step, seed), data.num_classes)
            scores[split].append(area_under_roc(predictions))
        scores["intervals"].append(auroc_interval(predictions, [groups[position] for position in predictions.positions]))
    return LayerScores(layers=steps, **scores)


def write_layers(path: Path, scores: LayerScores) -> None:
    """Write layers.csv, a row per layer."""
    text = io.StringIO()
    rows = csv.writer(text)
    rows.writerow(("layer", "val_auroc", "test_auroc", "test_low", "test_high"))
    rows.writerows(
        (layer, val, test, *interval)
        for layer, val, test, interval in zip(scores.layers, scores.val, scores.test, scores.intervals, strict=True)
    )
    write_whole(path, text.getvalue().encode())


def _layer(data: Dataset, split: str, step: int, seed: int) -> tuple[Floats, Floats, Floats]:
    """Return one step of a split's sequences, (N, F) float32, with labels and positions, (N,); N is about MOST_RECORDS."""
    whole: dict[str, Any] = {"rank": 0, "world_size": 1, "engine": "torch", "device": "cpu"}
    loader = SequenceLoader(data, split, batch_size=256, seed=seed, steps=[step], **whole)
    parts, count = [], 0
    for batch in loader:
        parts.append((batch.sequences[batch.valid].flatten(1), batch.labels[batch.valid], batch.positions[batch.valid]))
        count += len(parts[-1][1])
        if count >= MOST_RECORDS:
            break
    rows, labels, positions = (torch.cat(part).numpy() for part in zip(*parts, strict=True))
    if (labels == labels[0]).all():
        raise DataError(f"the {count:,} records looked at of split {split!r} have labels all {labels[0]}")
    return rows, labels, positions


def _predictions(model: Any, rows: Floats, labels: Floats, positions: Floats, classes: int) -> Predictions:
    shares = np.zeros((len(rows), classes), np.float32)
    shares[:, model.classes_] = model.predict_proba(rows)
    scores = shares[:, 1] if classes == 2 else shares
    ids = [str(position) for position in positions.tolist()]
    return Predictions(ids=ids, positions=positions, scores=scores, labels=labels, loss=float("nan"))
