"""Graph network within each layer, LSTM over the layers. Shapes like in lstm.py."""

from __future__ import annotations

import torch
from torch import nn
from torch_geometric.data import Batch
from torch_geometric.nn import GINEConv
from torch_geometric.utils import scatter

from models.features import FeatureViews, Standardised
from models.lstm import Output, StepsHead, mlp_head, outputs_of
from models.moves import to_device


class GraphEncoder(nn.Module):
    """GINE convolutions (Hu et al. 2020) over all graphs of all records in one call, with standardised edge features.

    Residual, with one LayerNorm per node. Nothing is normalised over the batch, so the other records of a batch, and the number
    of processes, do not change the result of a record.
    """

    def __init__(self, features: int, hidden: int, edge_features: int, dropout: float, *, convolutions: int = 2) -> None:
        super().__init__()
        self.edge_features = edge_features
        self.edge_views = Standardised(edge_features)
        self.embed = nn.Sequential(nn.Linear(2 * features, hidden), nn.Dropout(dropout))
        self.convs = nn.ModuleList(
            GINEConv(nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, hidden)), edge_dim=edge_features)
            for _ in range(convolutions)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(hidden) for _ in range(convolutions))
        self.dropout = nn.Dropout(dropout)

    def forward(self, graphs: Batch, views_NF: torch.Tensor) -> torch.Tensor:
        """Return states_NH. views_NF: views of the nodes' features, from `FeatureViews`."""
        weights_ED = self.edge_views(edge_weights(graphs, self.edge_features))
        states_NH: torch.Tensor = self.embed(views_NF)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            states_NH = states_NH + self.dropout(conv(norm(states_NH), graphs.edge_index, weights_ED))
        return states_NH


class ReadOut(nn.Module):
    """One row per graph, (G, ·): states of its nodes, and their raw features through a linear layer.

    Args:
        features: Number of values per node, over all axes.
        hidden: Width of the raw part.
        dropout: Dropout rate.
        readout: Which node, or what over all nodes of a graph: "last", "mean", "sum" or "max".
    """

    def __init__(self, features: int, hidden: int, dropout: float, readout: str) -> None:
        super().__init__()
        self.readout = readout
        self.raw = nn.Sequential(nn.Linear(2 * features, hidden), nn.Dropout(dropout))

    def forward(
        self, graphs: Batch, last_node_G: torch.Tensor | None, states_NH: torch.Tensor, views_NF: torch.Tensor
    ) -> torch.Tensor:
        """Return the rows; without last nodes the row of every node, (N, ·)."""
        if last_node_G is None:
            return torch.cat([self.raw(views_NF), states_NH], dim=1)
        if self.readout == "last":
            return torch.cat([self.raw(views_NF[last_node_G]), states_NH[last_node_G]], dim=1)
        rows_NH = torch.cat([self.raw(views_NF), states_NH], dim=1)
        row_GH: torch.Tensor = scatter(rows_NH, graphs.batch, dim=0, dim_size=len(last_node_G), reduce=self.readout)
        return row_GH


class GNNLSTMDetector(nn.Module):
    """Detector on graphs: encoder, state and raw features of each graph, LSTM over the record's graphs, head.

    Args:
        features: Number of values per node, over all axes.
        num_classes: Number of classes: one output for two, otherwise one each. Default: 2.
        outputs: Number of outputs, K, instead: of several labels at once, or of a value. Default: as `num_classes` says.
        edge_features: Number of values per edge. Default: 1.
        readout: How the nodes of a graph become one row: "last" node (the last token of an attention graph), "mean", "sum" or
            "max". Default: "last".
        per_node: Whether to answer for every node instead of every record. Default: False.
        hidden: Width of the encoder, the LSTM in each direction, and the head. Default: 64.
        num_layers: Layers of the LSTM. Default: 1.
        dropout: Dropout rate. Default: 0.3.
    """

    def __init__(
        self,
        features: int,
        num_classes: int = 2,
        *,
        outputs: int | None = None,
        edge_features: int = 1,
        readout: str = "last",
        per_node: bool = False,
        hidden: int = 64,
        num_layers: int = 1,
        dropout: float = 0.3,
    ) -> None:
        super().__init__()
        self.per_node = per_node
        width = outputs or outputs_of(num_classes)
        self.views = FeatureViews(features)
        self.encode = GraphEncoder(features, hidden, edge_features, dropout)
        self.read_out = ReadOut(features, hidden, dropout, readout)
        self.answer: nn.Module = (
            mlp_head(2 * hidden, hidden, width, dropout)
            if per_node
            else StepsHead(2 * hidden, width, hidden=hidden, num_layers=num_layers, dropout=dropout)
        )

    def forward(self, graphs: Batch, graphs_per_record_B: torch.Tensor, last_node_G: torch.Tensor) -> Output:
        """Return logits and penalties of a batch.

        Args:
            graphs: PyG batch, ordered by record.
            graphs_per_record_B: int64 on the CPU, each at least 1.
            last_node_G: int64, the row in x of each graph's last node.
        """
        views_NF = self.views(node_features(graphs))
        rows_GH = self.read_out(graphs, None if self.per_node else last_node_G, self.encode(graphs, views_NF), views_NF)
        logits = self.answer(rows_GH) if self.per_node else self.answer(*to_steps(rows_GH, graphs_per_record_B))
        return Output(logits, logits.new_zeros(len(graphs_per_record_B)))


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
