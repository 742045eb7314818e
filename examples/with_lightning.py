"""Use Lightning with a SequenceLoader as `train_dataloaders`: stop within an epoch, and resume by `ckpt_path`.

python examples/with_lightning.py [empty folder]

No DataLoader around it. Lightning asks the loader for its length and so prefetches nothing; it keeps the loader's state
in every checkpoint, but counts epochs by itself and takes the state up only within one: hence `on_train_start`.
"""

import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import lightning
import numpy as np
import torch

import dali_pipeline as dp

FEATURES, CUT = 16, 25


def write(root: Path) -> dp.Dataset:
    """Write 200 sequences of 3 to 8 steps, whose label shows in every feature."""
    rng = np.random.default_rng(0)
    with dp.ShardWriter(root, dp.Schema(sequence=dp.Field(dtype="float16", shape=(FEATURES,)))) as writer:
        for number in range(200):
            rows = rng.normal(number % 2, size=(rng.integers(3, 9), FEATURES)).astype(np.float16)
            writer.write({"id": f"record-{number}", "group": f"group-{number}", "label": number % 2, "sequence": rows})
    return dp.open_dataset(root)


class Detector(lightning.LightningModule):
    """A linear layer on the mean of each sequence. cut: checkpoint that it writes after step CUT before it fails."""

    def __init__(self, loader: dp.SequenceLoader, cut: Path | None) -> None:
        super().__init__()
        self.loader, self.cut, self.ids = loader, cut, list[str]()
        self.linear = torch.nn.Linear(FEATURES, 2)

    def on_train_start(self) -> None:
        """Set the epoch; otherwise a resume at the end of an epoch would repeat the order of epoch 0, or lose an epoch."""
        self.loader.set_epoch(self.current_epoch)

    def training_step(self, batch: dp.SequenceBatch) -> torch.Tensor:
        """Return the loss without padding rows."""
        self.ids += batch.ids
        logits = self.linear(batch.sequences.sum(1) / batch.lengths.to(self.device)[:, None])
        return torch.nn.functional.cross_entropy(logits[batch.valid], batch.labels[batch.valid])

    def on_train_batch_end(self, *_: object) -> None:
        """Save at the same point as ModelCheckpoint(every_n_train_steps=...)."""
        if self.cut and self.global_step == CUT:
            self.trainer.save_checkpoint(self.cut, weights_only=False)
            raise ConnectionAbortedError("cut off")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return an optimizer with a state, so that a resume must restore more than weights."""
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def fit(data: dp.Dataset, cut: Path | None = None, resume: Path | None = None) -> Detector:
    """Train two epochs with new objects."""
    lightning.seed_everything(0, verbose=False)
    loader = dp.SequenceLoader(data, batch_size=8, seed=1)
    module = Detector(loader, cut)
    trainer = lightning.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with suppress(ConnectionAbortedError):
        trainer.fit(module, train_dataloaders=loader, ckpt_path=resume, weights_only=True)
    return module


def main(folder: Path) -> None:
    """Compare an uninterrupted run with one that is stopped in its second epoch and then resumed."""
    data, checkpoint = write(folder / "data"), folder / "cut.ckpt"
    undisturbed, first, second = fit(data), fit(data, cut=checkpoint), fit(data, resume=checkpoint)
    steps = len(second.loader)
    print(f"cut off after batch {CUT - steps} of {steps} in epoch 1, resumed from fresh objects")
    print("the same ids in the same order:", first.ids + second.ids == undisturbed.ids)
    print("the same weights to the bit:", torch.equal(undisturbed.linear.weight, second.linear.weight))
    print("before + after:", second.loader.check_digest(first.loader.digest + second.loader.digest))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        main(Path(sys.argv[1] if len(sys.argv) > 1 else scratch))
