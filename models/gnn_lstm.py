"""Graph network within each layer, LSTM over the layers. Shapes like in lstm.py."""

from __future__ import annotations

import torch
from torch import nn
from torch_geometric.data import Batch
from torch_geometric.nn import GINEConv

from models.features import FeatureViews
from models.lstm import Output, StepsClassifier
from models.moves import to_device


class GraphEncoder(nn.Module):
    """Two GINE convolutions (Hu et al. 2020) over all graphs of all records in one call, the edge weight as edge feature.

    Residual, with one LayerNorm per node. Nothing is normalised over the batch, so the other records of a batch, and the number
    of processes, do not change the result of a record.
    """

    def __init__(self, features: int, hidden: int, edge_features: int, dropout: float) -> None:
        super().__init__()
        self.edge_features = edge_features
        self.embed = nn.Sequential(nn.Linear(2 * features, hidden), nn.Dropout(dropout))
        self.convs = nn.ModuleList(
            GINEConv(nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, hidden)), edge_dim=edge_features)
            for _ in range(2)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(hidden) for _ in range(2))
        self.dropout = nn.Dropout(dropout)

    def forward(self, graphs: Batch, views_NF: torch.Tensor) -> torch.Tensor:
        """Return states_NH. views_NF: views of the nodes' features, from `FeatureViews`."""
        weights_E1 = edge_weights(graphs, self.edge_features)
        states_NH: torch.Tensor = self.embed(views_NF)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            states_NH = states_NH + self.dropout(conv(norm(states_NH), graphs.edge_index, weights_E1))
        return states_NH


class GNNLSTMDetector(nn.Module):
    """Detector on graphs: encoder, state and raw features of the last token, LSTM over the record's graphs, head."""

    def __init__(
        self,
        features: int,
        num_classes: int = 2,
        *,
        edge_features: int = 1,
        hidden: int = 64,
        num_layers: int = 1,
        dropout: float = 0.3,
    ) -> None:
        super().__init__()
        self.views = FeatureViews(features)
        self.encode = GraphEncoder(features, hidden, edge_features, dropout)
        self.raw = nn.Sequential(nn.Linear(2 * features, hidden), nn.Dropout(dropout))
        self.classify = StepsClassifier(2 * hidden, num_classes, hidden=hidden, num_layers=num_layers, dropout=dropout)

    def forward(self, graphs: Batch, graphs_per_record_B: torch.Tensor, last_node_G: torch.Tensor) -> Output:
        """Return logits and penalties of a batch.

        Args:
            graphs: PyG batch, ordered by record.
            graphs_per_record_B: int64 on the CPU, each at least 1.
            last_node_G: int64, the row in x of each graph's last node.
        """
        views_NF = self.views(node_features(graphs))
        states_GH = self.encode(graphs, views_NF)[last_node_G]
        raw_GH = self.raw(views_NF[last_node_G])
        steps_BLF, lengths_B = to_steps(torch.cat([states_GH, raw_GH], dim=1), graphs_per_record_B)
        logits_BK = self.classify(steps_BLF, lengths_B)
        return Output(logits_BK, logits_BK.new_zeros(len(logits_BK)))


def node_features(graphs: Batch) -> torch.Tensor:
    """Return x as (N, F), whatever the number of axes of a node's features."""
    x_NF: torch.Tensor = graphs.x.reshape(len(graphs.x), -1)
    return x_NF


def edge_weights(graphs: Batch, edge_features: int) -> torch.Tensor:
    """Return edge_attr as (E, D) in the type of x; ones if the graphs have none."""
    x_NF: torch.Tensor = graphs.x
    if graphs.edge_attr is None:
        return x_NF.new_ones(graphs.edge_index.shape[1], edge_features)
    weights: torch.Tensor = graphs.edge_attr
    return weights.reshape(-1, edge_features).to(x_NF.dtype)


def to_steps(values_GF: torch.Tensor, graphs_per_record_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return one sequence per record from one row per graph: (B, L, F), zero-padded, and lengths (B,) on the CPU."""
    lengths_B = graphs_per_record_B.cpu()  # no copy: they are on the CPU already
    row_G, longest = padded_rows(lengths_B, values_GF.device)
    steps_RF = values_GF.new_zeros(len(lengths_B) * longest, values_GF.shape[1]).index_copy(0, row_G, values_GF)
    return steps_RF.view(len(lengths_B), longest, -1), lengths_B


@torch.compiler.disable  # type: ignore[untyped-decorator]
def padded_rows(lengths_B: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, int]:
    """Return the row of each graph in steps padded to the longest record, (G,) on the device, and the longest length.

    Computed on the CPU, where the lengths are, so that nothing waits for a GPU. Not compiled, because it depends on values.
    """
    longest, record_G = int(lengths_B.max()), records_of_graphs(lengths_B)
    first_B = lengths_B.cumsum(0) - lengths_B
    return to_device(record_G * longest + torch.arange(len(record_G)) - first_B[record_G], device), longest


def records_of_graphs(graphs_per_record_B: torch.Tensor) -> torch.Tensor:
    """Return the number of each graph's record within the batch: (G,) int64 on the CPU."""
    counts_B = graphs_per_record_B.cpu()
    return torch.repeat_interleave(torch.arange(len(counts_B)), counts_B)
