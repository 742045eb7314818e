"""Use Accelerate with a SequenceLoader: `save_state` within an epoch, `load_state` in new objects, bit-identical resume.

python examples/with_accelerate.py [empty folder]

The loader is registered for checkpointing and not passed to `prepare`: it shards by rank and delivers on its device by
itself, so `prepare(loader)` only hands it back as it is. A DataLoader around it, prepared, fails at its first batch, for
rank 0 would read for all and slice tensors; with dispatch_batches=False it is read one ahead, and a saved state skips one.
For the same reason `accumulate` cannot see where an epoch ends: its last, unfinished group goes on in the next one.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

import dali_pipeline as dp

FEATURES, CUT = 16, 7


def write(root: Path) -> dp.Dataset:
    """Write 200 sequences of 3 to 8 steps, whose label shows in the first feature."""
    rng = np.random.default_rng(0)
    with dp.ShardWriter(root, dp.Schema(sequence=dp.Field(dtype="float16", shape=(FEATURES,)))) as writer:
        for number in range(200):
            rows = rng.normal(size=(rng.integers(3, 9), FEATURES)).astype(np.float16)
            rows[:, 0] += 2 * (number % 2)
            writer.write({"id": f"record-{number}", "group": f"group-{number}", "label": number % 2, "sequence": rows})
    return dp.open_dataset(root)


class Run:
    """All objects of a process; a new instance knows nothing of earlier runs."""

    def __init__(self, data: dp.Dataset) -> None:
        torch.manual_seed(0)
        self.accelerator = Accelerator(cpu=True)
        model = torch.nn.Linear(FEATURES, 2)
        self.model, self.optimizer = self.accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.01))
        self.loader = dp.SequenceLoader(data, batch_size=8, seed=1, device=self.accelerator.device)
        self.accelerator.register_for_checkpointing(self.loader)

    def train(self, steps: int | None = None) -> list[str]:
        """Train to the end of the epoch, or for `steps` steps; return the ids in the order delivered."""
        ids: list[str] = []
        for step, batch in enumerate(self.loader, start=1):
            logits = self.model(batch.sequences.sum(1) / batch.lengths.to(self.loader.device)[:, None])
            loss = torch.nn.functional.cross_entropy(logits[batch.valid], batch.labels[batch.valid])  # padding does not count
            self.accelerator.backward(loss)
            self.optimizer.step()
            self.optimizer.zero_grad()
            ids += batch.ids
            if step == steps:
                break
        return ids


def main(folder: Path) -> None:
    """Compare an uninterrupted run with one that is stopped in its second epoch and then resumed."""
    data = write(folder / "data")
    undisturbed, first, second = Run(data), Run(data), Run(data)
    expected = [undisturbed.train() for epoch in range(2)][1]
    before = [first.train(), first.train(steps=CUT)][1]
    first.accelerator.save_state(str(folder / "checkpoint"))

    second.accelerator.load_state(str(folder / "checkpoint"))
    after = second.train()
    print(f"cut off after batch {CUT} of {len(second.loader)} in epoch 1, resumed from fresh objects")
    print("the same ids in the same order:", before + after == expected)
    print("the same weights to the bit:", torch.equal(undisturbed.model.weight, second.model.weight))
    print("before + after:", second.loader.check_digest(first.loader.digest + second.loader.digest))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        main(Path(sys.argv[1] if len(sys.argv) > 1 else scratch))
