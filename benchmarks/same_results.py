"""Check whether the loader changes results: the LSTM trained through torch over `.pt` files, and through our loader.

    python -m benchmarks.same_results data/sciq --seeds 3        (some 4 minutes on two cores)

The plain way is what people write: an `IterableDataset` over files of 250 records, read in an order shuffled anew each epoch, a
deque of 250 behind them, batches by torch's `DataLoader`. Model, optimizer, schedule and choice of the epoch are the same; the
order of records is another, so the two differ as two seeds do, and the line at the end says whether by more.
"""

from __future__ import annotations

import random
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from sklearn.metrics import roc_auc_score
from torch.nn import functional
from torch.utils.data import DataLoader, IterableDataset

import dali_pipeline as dp
from benchmarks.probe import load
from dali_pipeline.cli.app import new_app, run
from models import LSTMDetector
from training.config import MODELS, Conduct, TrainConfig
from training.interrupt import Interrupts
from training.metrics import area_under_roc
from training.processes import Processes
from training.randomness import seed_of
from training.statistics import feature_statistics
from training.trainer import Trainer

FILE_RECORDS = DEQUE_RECORDS = 250
Splits = dict[str, tuple[torch.Tensor, torch.Tensor]]
app = new_app()


class PtFiles(IterableDataset[Any]):
    """Train the plain way."""

    def __init__(self, files: list[Path], seed: int) -> None:
        self._files, self._rng = files, random.Random(seed)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, int]]:
        files, held = list(self._files), []
        self._rng.shuffle(files)
        for file in files:
            for record in torch.load(file, weights_only=True):
                held.append(record)
                if len(held) > DEQUE_RECORDS:
                    yield held.pop(self._rng.randrange(len(held)))
        self._rng.shuffle(held)
        yield from held


def plain_way(data: dp.Dataset, files: list[Path], records: int, splits: Splits, config: TrainConfig) -> float:
    """Return the test AUROC of the epoch that is best on validation."""
    torch.manual_seed(seed_of(config.seed, MODELS.index("lstm")))
    model = LSTMDetector(splits["val"][0].shape[2], dropout=config.dropout)
    feature_statistics("lstm", data, config).give(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True)
    steps = config.epochs * -(-records // config.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, total_steps=steps)
    batches = DataLoader(PtFiles(files, config.seed), config.batch_size)
    best = (-1.0, -1.0)
    for _ in range(config.epochs):
        model.train()
        for sequences, labels in batches:
            logits = model(sequences.float(), torch.full((len(labels),), sequences.shape[1])).logits_BK[:, 0]
            optimizer.zero_grad()
            torch.autograd.backward(functional.binary_cross_entropy_with_logits(logits, labels.float()))
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
            optimizer.step()
            schedule.step()
        best = max(best, (auroc(model, *splits["val"]), auroc(model, *splits["test"])))
    return best[1]


@torch.inference_mode()
def auroc(model: LSTMDetector, sequences: torch.Tensor, labels: torch.Tensor) -> float:
    """Return the AUROC of a whole split."""
    model.eval()
    return float(roc_auc_score(labels, model(sequences, torch.full((len(labels),), sequences.shape[1])).logits_BK[:, 0]))


def our_way(data: dp.Dataset, config: TrainConfig, folder: Path) -> float:
    """Train through SequenceLoader and the trainer."""
    alone = Processes(dp.World())
    trainer = Trainer("lstm", data, config, folder, Conduct(device="cpu"), Interrupts(alone), alone)
    while not trainer.finished:
        trainer.train_epoch(lambda step, share: None)
    trainer.writer.wait()
    trainer.load_best()
    return area_under_roc(trainer.predict("test"))


@app.command()
def main(
    data: Annotated[Path, typer.Argument(help="Data set with sequences of equal length, two classes.", show_default=False)],
    seeds: Annotated[int, typer.Option(min=2)] = 3,
    epochs: Annotated[int, typer.Option(min=1, help="Number of epochs.")] = 10,
) -> None:
    """Print the test AUROC of both ways for every seed, their means and spreads."""
    dataset = dp.open_dataset(data)
    fewest, most = dataset.table("train", "sequences").rows["step"]
    if fewest != most or dataset.num_classes != 2:
        raise dp.DataError(f"{data} has sequences of {fewest} to {most} steps, {dataset.num_classes} classes; expected one, 2")
    found: dict[str, list[float]] = {"plain": [], "ours": []}
    with tempfile.TemporaryDirectory() as scratch:
        splits: Splits = {}
        for split in ("train", "val", "test"):
            rows, hits, _ = load(dataset, split)
            splits[split] = torch.from_numpy(rows), torch.from_numpy(hits)
        sequences, labels = splits.pop("train")
        files = []
        for begin in range(0, len(labels), FILE_RECORDS):
            files.append(Path(scratch) / f"{begin}.pt")
            numbers = range(begin, min(begin + FILE_RECORDS, len(labels)))
            torch.save([(sequences[row].half(), int(labels[row])) for row in numbers], files[-1])
        for seed in range(seeds):
            config = TrainConfig(models=("lstm",), epochs=epochs, seed=seed)
            found["plain"].append(plain_way(dataset, files, len(labels), splits, config))
            found["ours"].append(our_way(dataset, config, Path(scratch)))
            print(f"seed {seed}: .pt files {found['plain'][-1]:.4f}, loader {found['ours'][-1]:.4f}", flush=True)
    means, spreads = ({way: measure(each) for way, each in found.items()} for measure in (statistics.mean, statistics.stdev))
    difference, spread = abs(means["plain"] - means["ours"]), max(spreads.values())
    within = "within" if difference <= spread else "beyond"
    print(
        f"test AUROC over {seeds} seeds: .pt files {means['plain']:.4f} ± {spreads['plain']:.4f}, loader {means['ours']:.4f} ± "
        f"{spreads['ours']:.4f}; the means differ by {difference:.4f}, {within} the spread"
    )


if __name__ == "__main__":
    sys.exit(run(app, "benchmarks.same_results"))
