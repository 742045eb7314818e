"""Train a sparse autoencoder and a probe per token on single steps, in an order that mixes the tokens of all texts.

python examples/sparse_autoencoder.py [empty folder]
python examples/sparse_autoencoder.py --data a/data/set --layer 12

Without --data the states are made up: every token has a class, and its state of each layer is a sum of a few of FEATURES
directions, the same few often enough in tokens of one class. The autoencoder keeps the TOP largest of its units per token, and
is judged by what users of such models report: explained variance, and the share of units that ever fire. The probe reads one
layer, and predicts the class of each token, a step field. Tokens of the prompt are masked, so neither sees them.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import dali_pipeline as dp

LAYERS, HIDDEN, FEATURES, ACTIVE, TOP = 3, 64, 48, 4, 8
RECORDS, EPOCHS, BATCH_SIZE = 600, 6, 256


def write_states(folder: Path) -> dp.Dataset:
    """Write texts of 20 to 60 tokens, with states [T, L, H], the class of each token, and which tokens are the answer."""
    rng = np.random.default_rng(0)
    directions = rng.standard_normal((LAYERS, FEATURES, HIDDEN)).astype(np.float32) / HIDDEN**0.5
    schema = dp.Schema(
        sequence=dp.Field(dtype="float16", shape=(LAYERS, HIDDEN), axes=("layer", "feature")),
        step_axis="token",
        label=dp.Label(kind="none"),
        fields={"step.loss_mask": dp.Field(dtype="bool"), "step.token_class": dp.Field(dtype="int32")},
    )
    with dp.ShardWriter(folder, schema, split=dp.SplitRule.parse("80/20/0"), shard_bytes=1 << 20) as writer:
        for number in range(RECORDS):
            tokens = int(rng.integers(20, 61))
            classes = rng.integers(0, 2, tokens)
            weights = np.zeros((tokens, FEATURES), np.float32)
            for token, half in enumerate(classes):  # each class has a half of the directions
                chosen = half * FEATURES // 2 + rng.choice(FEATURES // 2, ACTIVE, replace=False)
                weights[token, chosen] = rng.uniform(1, 2, ACTIVE)
            states = np.einsum("tf,lfh->tlh", weights, directions)
            fields = {"step.loss_mask": np.arange(tokens) >= tokens // 4, "step.token_class": classes}
            writer.write({"id": f"text {number}", "sequence": states, "fields": fields})
    return dp.open_dataset(folder)


class SparseAutoencoder(nn.Module):
    """A linear encoder of which the TOP largest units stay, and a linear decoder."""

    def __init__(self, hidden: int, units: int) -> None:
        super().__init__()
        self.encode, self.decode = nn.Linear(hidden, units), nn.Linear(units, hidden)
        with torch.no_grad():
            self.encode.weight.copy_(self.decode.weight.T)

    def forward(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the states as decoded, (N, H), and the units, (N, U), most of them zero."""
        units = torch.relu(self.encode(states))
        largest = units.topk(TOP, dim=1)
        units = torch.zeros_like(units).scatter(1, largest.indices, largest.values)
        return self.decode(units), units


def loader(data: dp.Dataset, split: str, layer: int, mask: str | None, **options: Any) -> Any:
    """Return a loader of single steps of one layer, which yields `dp.StepBatch`."""
    return dp.SequenceLoader(data, split, unit="step", batch_size=BATCH_SIZE, layers=[layer], mask=mask, **options)


def train_autoencoder(data: dp.Dataset, layer: int, mask: str | None) -> SparseAutoencoder:
    """Train on all epochs; check after each that every token came once."""
    batches = loader(data, "train", layer, mask)
    hidden = next(iter(batches)).values.shape[1]
    batches.set_epoch(0)
    model = SparseAutoencoder(hidden, 2 * hidden).to(batches.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for epoch in range(EPOCHS):
        for batch in batches:
            decoded, _ = model(batch.values)
            loss = ((decoded - batch.values)[batch.valid] ** 2).sum(1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch}: loss {loss.item():.4f}, {batches.check_digest(batches.digest)}")
    return model


@torch.no_grad()
def report(model: SparseAutoencoder, data: dp.Dataset, layer: int, mask: str | None) -> tuple[float, float]:
    """Return explained variance and the share of units that fire, over the validation split."""
    batches = [(batch.values, *model(batch.values), batch.valid) for batch in loader(data, "val", layer, mask, shuffle=False)]
    states, decoded, units = (torch.cat([batch[part][batch[3]] for batch in batches]) for part in range(3))
    residual = ((states - decoded) ** 2).sum() / ((states - states.mean(0)) ** 2).sum()
    return 1 - residual.item(), (units > 0).any(0).float().mean().item()


def train_probe(data: dp.Dataset, layer: int, mask: str | None) -> float:
    """Train a linear probe per token on the step field token_class; return its accuracy on the validation split."""
    batches = loader(data, "train", layer, mask, normalize=True)
    probe = nn.Linear(HIDDEN, 2).to(batches.device)
    optimizer = torch.optim.Adam(probe.parameters(), lr=1e-2)
    for _ in range(EPOCHS):
        for batch in batches:
            losses = nn.functional.cross_entropy(probe(batch.values), batch.fields["token_class"], reduction="none")
            optimizer.zero_grad()
            loss = losses[batch.valid].mean()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    right = total = 0
    for batch in loader(data, "val", layer, mask, normalize=True, shuffle=False):
        hits = probe(batch.values).argmax(1) == batch.fields["token_class"]
        right, total = right + int(hits[batch.valid].sum()), total + int(batch.valid.sum())
    return right / total


def main(folder: Path, root: str | None = None, layer: int = 1) -> None:
    """Train both; with data of your own, the autoencoder alone, on every token."""
    torch.manual_seed(0)
    data = write_states(folder / "states") if root is None else dp.open_dataset(root)
    mask = "loss_mask" if root is None else None
    variance, live = report(train_autoencoder(data, layer, mask), data, layer, mask)
    print(f"explained variance {variance:.3f}")
    print(f"share of live features {live:.3f}")
    if root is None:
        print(f"accuracy of the probe per token {train_probe(data, layer, mask):.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train a sparse autoencoder on single steps.")
    parser.add_argument("folder", nargs="?", help="where made-up states are written; a temporary folder by default")
    parser.add_argument("--data", help="a data set of hidden states with a train and a val split")
    parser.add_argument("--layer", type=int, default=1, help="the layer to read, by its number")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        main(Path(given.folder or scratch), given.data, given.layer)
