"""LSTM over the steps of a sequence (the layers of a language model), then a small head.

Shapes, here and in the other models: B records, T steps, F features, H hidden, C classes, K logits (1 for two classes,
else C), N nodes, E edges, G graphs, L graphs a record at most, Z latent.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from models.features import FeatureViews


class Output(NamedTuple):
    """What a detector gives. logits_BK: K is 1 for two classes · penalty_B: loss to add to each record's own, 0 for most."""

    logits_BK: torch.Tensor
    penalty_B: torch.Tensor


class StepsClassifier(nn.Module):
    """Bidirectional LSTM over packed steps, maximum over the real ones, MLP head. What all three detectors end in."""

    def __init__(self, features: int, num_classes: int, *, hidden: int, num_layers: int, dropout: float) -> None:
        super().__init__()
        between = dropout if num_layers > 1 else 0.0
        self.lstm = nn.LSTM(features, hidden, num_layers, batch_first=True, bidirectional=True, dropout=between)
        self.head = nn.Sequential(
            nn.Dropout(dropout),
            nn.Linear(2 * hidden, hidden),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, 1 if num_classes == 2 else num_classes),
        )

    # not compiled: whether to pack depends on the lengths, and the LSTM is one call either way
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, steps_BTF: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
        """lengths_B: int64 on the CPU, each from 1 to T. Returns logits_BK."""
        if steps_BTF.device.type == "cpu":  # where torch's LSTM cannot be trained in half precision on every processor
            with torch.autocast("cpu", enabled=False):
                return self._classify(steps_BTF.float(), lengths_B)
        return self._classify(steps_BTF, lengths_B)

    def _classify(self, steps_BTF: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
        longest = steps_BTF.shape[1]
        if int(lengths_B.min()) == longest:  # nothing to pack
            states_BTH, _ = self.lstm(steps_BTF)
        else:
            packed = pack_padded_sequence(steps_BTF, lengths_B, batch_first=True, enforce_sorted=False)
            states, _ = self.lstm(packed)
            states_BTH, _ = pad_packed_sequence(states, batch_first=True, padding_value=-torch.inf, total_length=longest)
        logits_BK: torch.Tensor = self.head(states_BTH.amax(dim=1))
        return logits_BK


class LSTMDetector(nn.Module):
    """Sequences to logits. features: numbers of a step, however many axes they have."""

    def __init__(
        self, features: int, num_classes: int = 2, *, hidden: int = 64, num_layers: int = 1, dropout: float = 0.3
    ) -> None:
        super().__init__()
        self.embed = nn.Sequential(FeatureViews(features), nn.Linear(2 * features, hidden), nn.Dropout(dropout))
        self.classify = StepsClassifier(hidden, num_classes, hidden=hidden, num_layers=num_layers, dropout=dropout)

    def forward(self, sequences_BTF: torch.Tensor, lengths_B: torch.Tensor) -> Output:
        """sequences_BTF: float, zero behind a sequence's end, a step of any number of axes · lengths_B: int64 on the CPU."""
        logits_BK = self.classify(self.embed(sequences_BTF.reshape(*sequences_BTF.shape[:2], -1)), lengths_B)
        return Output(logits_BK, logits_BK.new_zeros(len(logits_BK)))
