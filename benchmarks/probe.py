"""Baselines of the detectors: a linear probe on every layer, the length of a prompt, and a bag of words.

    python -m benchmarks.probe data/sciq

The probe is the one that train.py draws (training/baselines.py); the layer is chosen on validation. On a data
set that `train.py` made, a bag of words over the prompts and their length stand beside it: they read no hidden state.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import Annotated, Any

import numpy.typing as npt
import torch
import typer
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline

import dali_pipeline as dp
from dali_pipeline.cli.app import new_app, run
from training.baselines import probe_layers
from training.target import find_target

Floats = npt.NDArray[Any]
app = new_app()


def load(data: dp.Dataset, split: str) -> tuple[Floats, Floats, list[str]]:
    """Return a split's sequences (N, T, F) float32, labels (N,) and ids, each record once."""
    loader = dp.SequenceLoader(data, split, batch_size=256, shuffle=False, engine="torch", device="cpu")
    batches = [
        (batch.sequences[batch.valid], batch.labels[batch.valid], batch.ids[: int(batch.valid.sum())]) for batch in loader
    ]
    sequences, labels, ids = zip(*batches, strict=True)
    return torch.cat(sequences).numpy(), torch.cat(labels).numpy(), [id_ for part in ids for id_ in part]


def without_states(splits: dict[str, tuple[Floats, Floats, list[str]]], prompts: Path) -> dict[str, float]:
    """Return the test AUROC of a bag of words and of the prompt's length, whose sign is chosen on training."""
    with prompts.open(newline="", encoding="utf-8") as file:
        texts = {row["id"]: row["prompt"] for row in csv.DictReader(file)}
    train_texts, test_texts = ([texts[id_] for id_ in splits[name][2]] for name in ("train", "test"))
    train_labels, test_labels = splits["train"][1], splits["test"][1]
    words = make_pipeline(CountVectorizer(min_df=2, ngram_range=(1, 2)), LogisticRegression(C=0.1, max_iter=1000))
    words.fit(train_texts, train_labels)
    sign = 1 if roc_auc_score(train_labels, [len(text) for text in train_texts]) >= 0.5 else -1
    return {
        "bag of words": float(roc_auc_score(test_labels, words.decision_function(test_texts))),
        "length alone": float(roc_auc_score(test_labels, [sign * len(text) for text in test_texts])),
    }


@app.command()
def main(
    data: Annotated[Path, typer.Argument(help="Data set with sequences of equal length and two classes.", show_default=False)],
) -> None:
    """Print the test AUROC of a linear probe on every layer, and of what reads no hidden state."""
    dataset = dp.open_dataset(data)
    fewest, most = dataset.table("train", "sequences").rows["step"]
    if fewest != most or dataset.num_classes != 2:
        raise dp.DataError(
            f"{data} has sequences of {fewest} to {most} steps, {dataset.num_classes} classes; expected one length, 2 classes"
        )
    layers = dataset.layer_numbers("sequences") or list(range(most))
    scores, _ = probe_layers(dataset, find_target(dataset, "sequences"), layers, seed=0)
    print(f"{'':24}  val AUROC  test AUROC")
    for layer, val, test in zip(scores.layers, scores.val, scores.test, strict=True):
        print(f"{f'linear probe, layer {layer}':24}  {val:9.3f}  {test:10.3f}")
    print(f"\nchosen on validation: layer {scores.layers[scores.best]}, test AUROC {scores.test[scores.best]:.3f}")
    prompts = data.with_suffix(".csv")
    if prompts.exists():
        for name, auroc in without_states({split: load(dataset, split) for split in ("train", "test")}, prompts).items():
            print(f"{name}: test AUROC {auroc:.3f}")


if __name__ == "__main__":
    sys.exit(run(app, "benchmarks.probe"))
