"""Use torchdata's StatefulDataLoader around a GraphLoader: stop within an epoch, and resume bit-identically.

python examples/with_torchdata.py [empty folder]

batch_size=None, for the loader gives whole batches; num_workers=0, for it reads ahead by itself, and refuses more in one
sentence. torchdata then keeps the loader's own state within its own, and fast-forwards nothing.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from torchdata.stateful_dataloader import StatefulDataLoader

import dali_pipeline as dp

NODES, FEATURES, CUT = 5, 8, 7


def write(root: Path) -> dp.Dataset:
    """Write 200 records of one graph each, a ring of five nodes, whose label shows in the first feature."""
    rng, one = np.random.default_rng(0), np.array([NODES])
    ring = np.stack([np.arange(NODES), np.roll(np.arange(NODES), 1)])  # (2, E)
    with dp.ShardWriter(root, dp.Schema(x=dp.Field(dtype="float16", shape=(FEATURES,)))) as writer:
        for number in range(200):
            x = rng.normal(size=(NODES, FEATURES)).astype(np.float16)
            x[:, 0] += 2 * (number % 2)
            graphs = dp.Graphs(x=x, edge_index=ring, edge_attr=None, node_counts=one, edge_counts=one)
            writer.write(dp.Record(id=f"record-{number}", group=f"group-{number}", label=number % 2, graphs=graphs))
    return dp.open_dataset(root)


class Run:
    """All objects of a process; a new instance knows nothing of earlier runs."""

    def __init__(self, data: dp.Dataset) -> None:
        torch.manual_seed(0)
        self.model = torch.nn.Linear(FEATURES, 2)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.loader = dp.GraphLoader(data, batch_size=8, seed=1)
        self.batches = StatefulDataLoader(self.loader, batch_size=None, num_workers=0)
        self.parts = {"model": self.model, "optimizer": self.optimizer, "batches": self.batches}  # of a checkpoint

    def train(self, steps: int | None = None) -> list[str]:
        """Train to the end of the epoch, or for `steps` steps; return the ids in the order delivered."""
        ids: list[str] = []
        for step, batch in enumerate(self.batches, start=1):
            logits = self.model(batch.graphs.x[batch.last_node])  # (B, 2), for a record is one graph here
            loss = torch.nn.functional.cross_entropy(logits[batch.valid], batch.labels[batch.valid])  # padding does not count
            torch.autograd.backward(loss)
            self.optimizer.step()
            self.optimizer.zero_grad()
            ids += batch.ids
            if step == steps:
                break
        return ids


def main(folder: Path) -> None:
    """Compare an uninterrupted run with one that is stopped in its second epoch and then resumed."""
    data, checkpoint = write(folder / "data"), folder / "checkpoint.pt"
    undisturbed, first, second = Run(data), Run(data), Run(data)
    expected = [undisturbed.train() for epoch in range(2)][1]
    before = [first.train(), first.train(steps=CUT)][1]
    torch.save({name: part.state_dict() for name, part in first.parts.items()}, checkpoint)
    for name, state in torch.load(checkpoint, weights_only=True).items():
        second.parts[name].load_state_dict(state)
    after = second.train()
    print(f"cut off after batch {CUT} of {len(second.loader)} in epoch 1, resumed from fresh objects")
    print("the same ids in the same order:", before + after == expected)
    print("the same weights to the bit:", torch.equal(undisturbed.model.weight, second.model.weight))
    print("before + after:", second.loader.check_digest(first.loader.digest + second.loader.digest))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        main(Path(sys.argv[1] if len(sys.argv) > 1 else scratch))
