"""Baselines of the field beside the detectors, on every kind of data that has what each needs: fitted here, scored alike.

- `linear_probe`: logistic regression (ridge regression of values) on one layer, the best on validation; without layers on the
  mean over the steps.
- `mlp`: three layers of 256, 128 and 64 units, the shape of SAPLMA (Azaria and Mitchell 2023), on the mean over the steps of
  that layer; of graphs on the mean over the nodes.
- `logprob`, `entropy`: the mean of `step.logprob` and of `step.entropy` (Malinin and Gales 2021), through a logistic curve.
- `lookback`: the lookback ratio of every head (Chuang et al. 2024), `record.lookback_ratio`.
- `eigenvalues`: the Laplacian's eigenvalues of every head (Binkowski et al. 2025), `record.laplacian_eigenvalues`.

A target per step is predicted from that step alone. Each probe reads only its own layer or field from the disk, and at most
MOST_ROWS rows of the training split; validation and test are scored as a whole, batch by batch.
"""

from __future__ import annotations

import csv
import io
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.compose import TransformedTargetRegressor
from sklearn.decomposition import PCA
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.multiclass import OneVsRestClassifier
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from dali_pipeline import DataError, Dataset, GraphBatch, GraphLoader, SequenceLoader
from dali_pipeline.format.layers import parse_layers, select, to_positions
from dali_pipeline.storage.whole import write_whole
from models.gnn_lstm import node_features
from models.gvae_lstm import nodes_of_records, records_of_nodes
from training.config import TrainConfig
from training.intervals import main_interval
from training.metrics import Floats, Predictions, main_metric
from training.objective import steps_of_records
from training.scoring import plain_targets
from training.target import Batch, Target

MOST_LAYERS = 64
MOST_ROWS = 20_000  # of the training split: the first of its shuffled order; of each split while layers are compared
COMPONENTS = 100
UNITS = (256, 128, 64)
BY_FIELD = {
    "logprob": "step.logprob",
    "entropy": "step.entropy",
    "lookback": "record.lookback_ratio",
    "eigenvalues": "record.laplacian_eigenvalues",
}
BASELINES = ("linear_probe", "mlp", *BY_FIELD)
Splits = dict[str, Predictions]


@dataclass(frozen=True, kw_only=True)
class LayerScores:
    """The main metric of a probe on each layer. layers: their numbers; val, test: one per layer; intervals: 95 % on test."""

    layers: list[int]
    val: list[float]
    test: list[float]
    intervals: list[list[float]]
    metric: str = "auroc"

    @property
    def best(self) -> int:
        """Index of the layer that is best on validation."""
        return int(np.nanargmax(self.val)) if np.isfinite(self.val).any() else 0


@dataclass(frozen=True, kw_only=True, eq=False)
class Reading:
    """What a baseline reads of each record.

    Attributes:
        data: The data set.
        target: What is predicted.
        seed: Seed of the order of the training split.
        features: Returns the features of a batch: (B, T, …) of steps, (B, …) of records.
        options: Arguments of the loader.
    """

    data: Dataset
    target: Target
    seed: int
    features: Callable[[Any], torch.Tensor]
    options: dict[str, Any] = field(default_factory=dict)
    graphs: bool = False

    def parts(self, split: str) -> Iterator[tuple[Floats, Predictions]]:
        """Yield of each batch the rows (M, F) float32, and predictions without scores."""
        short = self.target.name.partition(".")[2]
        options = {**self.options, "fields": [*self.options.get("fields", ()), *([short] if short else [])]}
        common: dict[str, Any] = {"batch_size": 256, "seed": self.seed, "shuffle": split == "train", "device": "cpu"}
        common |= {"rank": 0, "world_size": 1}
        loader: Any = (
            GraphLoader(self.data, split, **common, **options)
            if self.graphs
            else SequenceLoader(self.data, split, engine="torch", **common, **options)
        )
        for batch in loader:
            yield self._rows(batch)

    def _rows(self, batch: Batch) -> tuple[Floats, Predictions]:
        features, target = self.features(batch).float(), self.target
        values = target.of(batch)
        assert values is not None
        counts = torch.ones(len(batch), dtype=torch.int64)
        chosen = batch.valid
        if target.level == "step":
            counts, chosen = batch.lengths, steps_of_records(batch) & batch.valid[:, None]  # type: ignore[union-attr]
        labels, valid = plain_targets(values[chosen], target), batch.valid.tolist()
        found = Predictions(
            task=target.task,
            level=target.level,
            ids=[id_ for id_, real in zip(batch.ids, valid, strict=True) if real],
            positions=batch.positions[batch.valid].numpy(),
            counts=counts[batch.valid].numpy(),
            scores=np.zeros(len(labels), np.float32),
            labels=labels,
            loss=float("nan"),
        )
        rows = features.flatten(chosen.dim()) if features.dim() > chosen.dim() else features.unsqueeze(-1)
        return rows[chosen].numpy(), found

    def fitted(self, make: Callable[[int, int], Any]) -> Any:
        """Fit a model on the first MOST_ROWS rows of the training split whose target is known, and return it.

        Args:
            make: Returns the model for a number of rows and of features.
        """
        rows, labels, count = [], [], 0
        for features, found in self.parts("train"):
            known = replace(found, scores=np.arange(len(features), dtype=np.float32)).known()
            rows.append(features[known.scores.astype(np.int64)])
            labels.append(known.labels)
            count += len(known.labels)
            if count >= MOST_ROWS:
                break
        wanted = np.concatenate(labels)
        if self.target.task != "regression" and (wanted == wanted[0]).all():
            raise DataError(f"the {len(wanted):,} rows looked at of split 'train' have {self.target.name} all {wanted[0]}")
        if wanted.ndim == 2 and wanted.shape[1] == 1:
            wanted = wanted[:, 0]
        values = np.concatenate(rows)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # the number of iterations is part of the baseline
            return make(*values.shape).fit(values, wanted)

    def scored(self, model: Any, split: str, most: int | None = None) -> Predictions:
        """Return the predictions of a fitted model on a split, in file order; of about `most` rows at most."""
        parts, count = [], 0
        for features, found in self.parts(split):
            parts.append(replace(found, scores=scores_of(model, features, self.target)))
            count += len(features)
            if most is not None and count >= most:
                break
        joined = Predictions.join(parts)
        return joined.rows(np.argsort(joined.positions, kind="stable").tolist())


def scores_of(model: Any, rows: Floats, target: Target) -> Floats:
    """Return scores as `Predictions` has them."""
    if target.task == "regression":
        return np.asarray(model.predict(rows), np.float64).reshape(len(rows), -1)
    shares = np.asarray(model.predict_proba(rows), np.float32)
    if target.task == "multilabel":
        return shares[:, -target.outputs :]  # of a single label both classes come
    full = np.zeros((len(rows), target.classes), np.float32)
    full[:, np.asarray(model.classes_, np.int64)] = shares  # a class that no training row had gets 0
    return full[:, 1] if target.task == "binary" else full


def linear(target: Target, rows: int, width: int) -> Any:
    """Return a linear model behind standardised features, of many of them the first principal components."""
    steps: list[Any] = [StandardScaler()]
    if width > COMPONENTS:
        steps.append(PCA(min(COMPONENTS, rows), random_state=0))
    if target.task == "regression":
        return make_pipeline(*steps, RidgeCV(np.logspace(-1, 5, 13)))
    logistic = LogisticRegression(C=0.1, max_iter=1000)
    return make_pipeline(*steps, OneVsRestClassifier(logistic) if target.task == "multilabel" else logistic)


def mlp(target: Target, seed: int) -> Any:
    """Return the network of SAPLMA behind standardised features, stopped early on a tenth of the training rows."""
    common: dict[str, Any] = {"hidden_layer_sizes": UNITS, "early_stopping": True, "random_state": seed, "max_iter": 60}
    if target.task == "regression":
        scaled = TransformedTargetRegressor(MLPRegressor(**common), transformer=StandardScaler())
        return make_pipeline(StandardScaler(), scaled)
    return make_pipeline(StandardScaler(), MLPClassifier(**common))


def layers_of(data: Dataset, asked: str | None) -> list[int]:
    """Return the numbers of the layers to probe, evenly spaced, at most MOST_LAYERS; none if sequences have no layers."""
    schema = data.schema
    if schema.sequence is None:
        return []
    chosen = parse_layers(asked)
    if schema.layer_axis is not None:
        numbers = list(schema.layers or range(schema.sequence.shape[schema.layer_axis]))
        steps = [numbers[position] for position in to_positions(chosen, numbers)]
    else:
        bounds, known = data.select("train", "sequences").bounds("step"), data.layer_numbers("sequences")
        if bounds is None or bounds[0] != bounds[1]:
            return []
        if known is not None and len(known) == bounds[0]:
            steps = [known[position] for position in to_positions(chosen, known)]
        else:
            steps = select(chosen, bounds[0])
    indices = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), MOST_LAYERS)).astype(int))
    return [int(steps[index]) for index in indices]


def of_layer(data: Dataset, target: Target, seed: int, layer: int, *, pooled: bool = False) -> Reading:
    """Return what a probe on one layer reads: its row of the last step, of each step, or with `pooled` the mean over steps."""
    by_number = data.schema.steps == "layer" or data.layer_numbers("sequences") is not None  # otherwise a position
    options: dict[str, Any] = {"layers" if by_number else "steps": [layer]}
    if data.schema.layer_axis is not None:
        options = {"layers": [layer], **({} if pooled or target.level == "step" else {"steps": [-1]})}
    features = _mean_over_steps if target.level == "record" else _steps
    return Reading(data=data, target=target, seed=seed, features=features, options=options)


def _mean_over_steps(batch: Any) -> torch.Tensor:
    """Return the mean over the steps of each record, (B, …): of one step, that step."""
    rows = batch.sequences.float()
    lengths = batch.lengths.view(-1, *[1] * (rows.dim() - 2))
    return torch.as_tensor(rows.sum(dim=1) / lengths)  # behind a sequence's end are zeros


def _steps(batch: Any) -> torch.Tensor:
    return torch.as_tensor(batch.sequences)


def _mean_over_nodes(batch: GraphBatch) -> torch.Tensor:
    """Return the mean over the nodes of all graphs of each record, (B, F)."""
    record_N = records_of_nodes(batch.graphs, batch.graphs_per_record)
    x_NF = node_features(batch.graphs).float()
    totals: torch.Tensor = x_NF.new_zeros(len(batch), x_NF.shape[1]).index_add(0, record_N, x_NF)
    return totals / nodes_of_records(record_N, len(batch)).clamp(min=1)[:, None]


def probe_layers(data: Dataset, target: Target, layers: list[int], seed: int) -> tuple[LayerScores, Splits]:
    """Fit a linear probe on each layer; return the scores of all, and the predictions of the best on validation."""
    scores: dict[str, list[Any]] = {"val": [], "test": [], "intervals": []}
    groups = data.select("test", "sequences").texts("groups")
    best: tuple[float, Reading, Any] | None = None
    for layer in layers:
        reading = of_layer(data, target, seed, layer)
        model = reading.fitted(partial(linear, target))
        found = {split: reading.scored(model, split, MOST_ROWS) for split in ("val", "test")}
        for split, predictions in found.items():
            scores[split].append(main_metric(predictions))
        test = found["test"]
        scores["intervals"].append(main_interval(test, [groups[position] for position in test.positions]))
        score = float(np.nan_to_num(scores["val"][-1], nan=-np.inf))
        if best is None or score > best[0]:  # among ties the first, like `LayerScores.best`
            best = score, reading, model
    assert best is not None
    _, reading, model = best
    whole = {split: reading.scored(model, split) for split in ("val", "test")}
    return LayerScores(layers=layers, metric=target.metric, **scores), whole


def write_layers(path: Path, scores: LayerScores) -> None:
    """Write layers.csv, a row per layer."""
    text = io.StringIO()
    rows = csv.writer(text)
    rows.writerow(("layer", f"val_{scores.metric}", f"test_{scores.metric}", "test_low", "test_high"))
    rows.writerows(
        (layer, val, test, *interval)
        for layer, val, test, interval in zip(scores.layers, scores.val, scores.test, scores.intervals, strict=True)
    )
    write_whole(path, text.getvalue().encode())


def readings(data: Dataset, target: Target, config: TrainConfig, best: int | None) -> dict[str, Reading]:
    """Return what each baseline reads, by its name, of those that the data have what they need for; the probe of layers apart.

    Args:
        data: The data set.
        target: What is predicted.
        config: Settings of the run.
        best: Layer that the linear probe chose, or None.
    """
    common: dict[str, Any] = {"data": data, "target": target, "seed": config.seed}
    found: dict[str, Reading] = {}
    schema = data.schema
    if schema.sequence is not None and target.level != "node":
        if best is not None:
            found["mlp"] = of_layer(data, target, config.seed, best, pooled=True)
        else:
            features = _mean_over_steps if target.level == "record" else _steps
            found["linear_probe"] = found["mlp"] = Reading(**common, features=features)
    elif target.level == "record":
        found["linear_probe"] = found["mlp"] = Reading(**common, features=_mean_over_nodes, graphs=True)
    for name, stored in BY_FIELD.items():
        kinds = schema.record_fields if stored.startswith("record.") else schema.step_fields
        if stored not in kinds or stored == target.name or (target.level != "record" and stored.startswith("record.")):
            continue
        if target.level == "node":
            continue
        values = _field(stored, mean=stored.startswith("step.") and target.level == "record")
        # of a sequence that no baseline looks at one layer is enough
        options: dict[str, Any] = {"fields": [stored.partition(".")[2]]}
        if schema.layer_axis is not None:
            options["layers"] = [(schema.layers or [0])[0]]
        found[name] = Reading(**common, features=values, options=options, graphs=schema.sequence is None)
    return found


def _field(name: str, *, mean: bool) -> Callable[[Any], torch.Tensor]:
    """Return a function from a batch to a field, or to its mean over the steps of each record, (B, …)."""
    short = name.partition(".")[2]

    def features(batch: Any) -> torch.Tensor:
        values: torch.Tensor = batch.fields[short].float()
        if not mean:
            return values
        real = steps_of_records(batch).view(*values.shape[:2], *[1] * (values.dim() - 2))
        return torch.as_tensor((values * real).sum(dim=1) / batch.lengths.view(-1, *[1] * (values.dim() - 2)))

    return features


def baseline(name: str, reading: Reading, seed: int) -> Splits:
    """Fit one baseline, and return its predictions of validation and test."""
    target = reading.target
    model = reading.fitted(partial(linear, target) if name != "mlp" else lambda _rows, _width: mlp(target, seed))
    return {split: reading.scored(model, split) for split in ("val", "test")}
