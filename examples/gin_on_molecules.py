"""Train PyG's GIN on molecule-like graphs, in batches with a budget of nodes, so that memory stays constant for any sizes.

python examples/gin_on_molecules.py [empty folder]

Small graphs with a long tail, trees with some rings; one is of class 1 where a nitrogen is bound to an oxygen, which no atom
can see alone. Each atom's element and degree are its features; its place `pos` and the bonds' `order` come along as named
fields. The model is PyG's, unchanged; it meets the loader in one line.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch_geometric.nn import MLP, global_add_pool
from torch_geometric.nn.models import GIN

import dali_pipeline as dp

CARBON, NITROGEN, OXYGEN = range(3)
RECORDS, EPOCHS, MAX_NODES = 3000, 6, 1500


def molecule(rng: np.random.Generator) -> tuple[dp.Graphs, int]:
    """Return one graph and its class; graphs have at least 5 nodes, 20 at the median, sometimes 200."""
    nodes = int(np.clip(rng.lognormal(3, 0.6), 5, 400))
    parents = np.array([rng.integers(max(0, atom - 4), atom) for atom in range(1, nodes)])  # a tree, long rather than bushy
    rings = rng.integers(0, nodes, (2, nodes // 8))
    pairs = np.concatenate([np.stack([np.arange(1, nodes), parents]), rings[:, rings[0] != rings[1]]], axis=1)
    element = rng.choice(3, nodes, p=[0.9, 0.05, 0.05])
    if rng.random() < 0.4:  # so that both classes are common
        at = rng.integers(pairs.shape[1])
        element[pairs[0, at]], element[pairs[1, at]] = NITROGEN, OXYGEN
    edges = np.concatenate([pairs, pairs[::-1]], axis=1)  # (2, E), each bond in both directions
    degree = np.bincount(edges[0], minlength=nodes)
    x = np.concatenate([np.eye(3)[element], np.minimum(degree, 6)[:, None] / 6], axis=1)
    order = rng.integers(1, 4, pairs.shape[1])
    graphs = dp.Graphs(
        x=x.astype(np.float16),
        edge_index=edges,
        edge_attr=None,
        node_counts=np.array([nodes]),
        edge_counts=np.array([edges.shape[1]]),
        fields={"node.pos": rng.normal(size=(nodes, 3)).astype(np.float32), "edge.order": np.tile(order, 2).astype(np.uint8)},
    )
    bound = (element[edges[0]] == NITROGEN) & (element[edges[1]] == OXYGEN)
    return graphs, int(bound.any())


def write(root: Path) -> dp.Dataset:
    """Write all molecules as shards."""
    fields = {"node.pos": dp.Field(dtype="float32", shape=(3,)), "edge.order": dp.Field(dtype="uint8")}
    rng = np.random.default_rng(0)
    with dp.ShardWriter(root, dp.Schema(x=dp.Field(dtype="float16", shape=(4,)), fields=fields)) as writer:
        for number in range(RECORDS):
            graphs, label = molecule(rng)
            writer.write(dp.Record(id=f"molecule-{number}", label=label, graphs=graphs))
    return dp.open_dataset(root)


class Classifier(torch.nn.Module):
    """GIN (Xu et al. 2019) from PyG, with a sum over nodes and two classes."""

    def __init__(self) -> None:
        super().__init__()
        self.gnn = GIN(in_channels=4, hidden_channels=32, num_layers=3)
        self.head = MLP([32, 32, 2], norm=None)

    def forward(self, x: torch.Tensor, edge_index: torch.Tensor, batch: torch.Tensor, num_graphs: int) -> torch.Tensor:
        """Return logits (B, 2)."""
        logits: torch.Tensor = self.head(global_add_pool(self.gnn(x, edge_index), batch, num_graphs))
        return logits


def accuracy(model: Classifier, loader: dp.GraphLoader) -> float:
    """Return the share of records that the model classifies correctly, without padding."""
    model.eval()
    right = total = 0
    with torch.no_grad():
        for batch in loader:
            graphs = batch.graphs
            predicted = model(graphs.x, graphs.edge_index, graphs.batch, graphs.num_graphs).argmax(dim=1)
            right += int((predicted == batch.labels)[batch.valid].sum())
            total += int(batch.valid.sum())
    return right / total


def main(folder: Path) -> None:
    """Write the data, train, and print the accuracy and the largest batch, with and without a budget of nodes."""
    torch.manual_seed(0)
    data, model = write(folder / "molecules"), Classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.005)
    train = dp.GraphLoader(data, max_nodes=MAX_NODES)
    sizes, records = [], []
    for epoch in range(EPOCHS):
        model.train()
        for batch in train:
            graphs = batch.graphs
            logits = model(graphs.x, graphs.edge_index, graphs.batch, graphs.num_graphs)
            loss = torch.nn.functional.cross_entropy(logits[batch.valid], batch.labels[batch.valid])
            torch.autograd.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            sizes.append(graphs.num_nodes)
            records.append(len(batch))
        words = train.check_digest(train.digest)
        print(f"epoch {epoch}: {words}; val accuracy {accuracy(model, dp.GraphLoader(data, 'val')):.3f}")
    fixed = [batch.graphs.num_nodes for batch in dp.GraphLoader(data, batch_size=round(np.mean(records)))]
    print(f"nodes a batch: {np.mean(sizes):.0f} of at most {MAX_NODES}, the largest {max(sizes)}")
    print(f"with {round(np.mean(records))} records a batch instead: {np.mean(fixed):.0f}, the largest {max(fixed)}")
    print(f"test accuracy: {accuracy(model, dp.GraphLoader(data, 'test')):.3f}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        main(Path(sys.argv[1] if len(sys.argv) > 1 else scratch))
