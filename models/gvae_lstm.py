"""Variational graph encoder within each layer, LSTM over the layers. Shapes like in lstm.py.

Kingma and Welling 2014, with a graph encoder like in Kipf and Welling 2016. It reconstructs node features instead of edges,
because the edges of a causal attention graph are mostly given by its order.
"""

from __future__ import annotations

import torch
from torch import nn
from torch_geometric.data import Batch

from models.features import FeatureViews
from models.gnn_lstm import GraphEncoder, ReadOut, node_features, records_of_graphs, to_steps
from models.lstm import Output, StepsHead, mlp_head, outputs_of
from models.moves import to_device
from models.noise import keyed_normal, mix


class GVAELSTMDetector(nn.Module):
    """Detector on graphs: mean and log-variance per node, decoder, LSTM over graphs read out of [raw, mean, log-variance].

    The penalty is reconstruction (mean squared error of the standardised node features) plus `kl_weight` times the KL
    divergence from a standard normal, each the mean over a record's nodes. In training the decoder sees a sample, in
    evaluation the mean; the head always sees mean and log-variance, so that evaluation has no randomness. The sample's
    noise is a function of each record's key and the node's number in the record, so it does not depend on batch or process.
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
        latent: int = 32,
        num_layers: int = 1,
        dropout: float = 0.3,
        kl_weight: float = 1e-3,
    ) -> None:
        super().__init__()
        self.kl_weight, self.per_node = kl_weight, per_node
        width, row = outputs or outputs_of(num_classes), hidden + 2 * latent
        self.views = FeatureViews(features)
        self.encode = GraphEncoder(features, hidden, edge_features, dropout)
        self.mean = nn.Linear(hidden, latent)
        self.log_variance = nn.Linear(hidden, latent)
        self.decode = nn.Sequential(nn.Linear(latent, hidden), nn.ReLU(), nn.Linear(hidden, features))
        self.read_out = ReadOut(features, hidden, dropout, readout)
        self.answer: nn.Module = (
            mlp_head(row, hidden, width, dropout)
            if per_node
            else StepsHead(row, width, hidden=hidden, num_layers=num_layers, dropout=dropout)
        )

    def forward(
        self,
        graphs: Batch,
        graphs_per_record_B: torch.Tensor,
        last_node_G: torch.Tensor,
        noise_keys_B: torch.Tensor | None = None,
    ) -> Output:
        """Return logits and penalties. noise_keys_B: int64 keys of the noise in training, or None for torch's own noise."""
        record_N = records_of_nodes(graphs, graphs_per_record_B)
        x_NF = node_features(graphs)
        views_NF = self.views(x_NF)
        states_NH = self.encode(graphs, views_NF)
        mean_NZ, log_variance_NZ = self.mean(states_NH), self.log_variance(states_NH).clamp(-10, 10)
        latent_NZ = mean_NZ
        if self.training:
            noise_NZ = torch.randn_like(mean_NZ) if noise_keys_B is None else node_noise(noise_keys_B, record_N, mean_NZ)
            latent_NZ = mean_NZ + noise_NZ * (0.5 * log_variance_NZ).exp()
        reconstruction_N = (self.decode(latent_NZ) - self.views.standardised(x_NF)).square().mean(dim=1)
        kl_N = 0.5 * (mean_NZ.square() + log_variance_NZ.exp() - 1 - log_variance_NZ).sum(dim=1)
        penalty_B = record_means(reconstruction_N + self.kl_weight * kl_N, record_N, len(graphs_per_record_B))
        states_NZ = torch.cat([mean_NZ, log_variance_NZ], dim=1)
        rows_GH = self.read_out(graphs, None if self.per_node else last_node_G, states_NZ, views_NF)
        logits = self.answer(rows_GH) if self.per_node else self.answer(*to_steps(rows_GH, graphs_per_record_B))
        return Output(logits, penalty_B)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def records_of_nodes(graphs: Batch, graphs_per_record_B: torch.Tensor) -> torch.Tensor:
    """Return the number of each node's record within the batch: (N,)."""
    return to_device(records_of_graphs(graphs_per_record_B), graphs.x.device)[graphs.batch]


def record_means(values_N: torch.Tensor, record_N: torch.Tensor, records: int) -> torch.Tensor:
    """Return the mean of a value over the nodes of all graphs of each record, (B,)."""
    totals_B = values_N.new_zeros(records).index_add(0, record_N, values_N)
    return totals_B / nodes_of_records(record_N, records)


def nodes_of_records(record_N: torch.Tensor, records: int) -> torch.Tensor:
    """Return the number of nodes of each record, (B,) int64; `bincount` would wait for the GPU."""
    return record_N.new_zeros(records).index_add(0, record_N, torch.ones_like(record_N))


def node_noise(noise_keys_B: torch.Tensor, record_N: torch.Tensor, like_NZ: torch.Tensor) -> torch.Tensor:
    """Return standard normal values (N, Z) from each record's key and the node's number in its record."""
    counts_B = nodes_of_records(record_N, len(noise_keys_B))
    first_B = counts_B.cumsum(0) - counts_B
    number_N = torch.arange(len(record_N), device=record_N.device) - first_B[record_N]
    return keyed_normal(mix(noise_keys_B[record_N] + number_N), like_NZ.shape[1]).to(like_NZ.dtype)
