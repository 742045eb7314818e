"""LSTM over the steps of a sequence (the layers of a language model), then a small head.

Shapes, here and in the other models: B records, T steps, F features, H hidden, C classes, K logits (1 for two classes,
else C), N nodes, E edges, G graphs, L maximum number of graphs per record, Z latent.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from models.features import FeatureViews
from models.moves import to_device


class Output(NamedTuple):
    """Output of a detector. logits_BK: K is 1 for two classes; penalty_B: loss to add to each record's own, mostly 0."""

    logits_BK: torch.Tensor
    penalty_B: torch.Tensor


class StepsClassifier(nn.Module):
    """Bidirectional LSTM over packed steps, maximum over the real steps, MLP head: the last part of all three detectors."""

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
        """Return logits_BK. lengths_B: int64 on the CPU, each from 1 to T."""
        device = steps_BTF.device
        if device.type == "cuda" and torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda") == torch.float16:
            return self._classify(steps_BTF, lengths_B)
        # Otherwise in float32: not every processor trains an LSTM in half precision, and cuDNN's, under autocast, computes in
        # float16 whatever type was asked for (aten/src/ATen/cudnn/AutocastRNN.cpp), where bfloat16 expects no loss scaling.
        with torch.autocast(device.type, enabled=False):
            return self._classify(steps_BTF.float(), lengths_B)

    def _classify(self, steps_BTF: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
        longest = steps_BTF.shape[1]
        if int(lengths_B.min()) == longest:  # nothing to pack
            states_BTH, _ = self.lstm(steps_BTF)
            most_BH = states_BTH.amax(dim=1)
        else:
            # sorted by length here, because pack_padded_sequence would wait for the GPU
            order_B = torch.argsort(lengths_B, descending=True, stable=True)
            sorting_B, unsorting_B = to_device(torch.stack([order_B, torch.argsort(order_B)]), steps_BTF.device)
            packed = pack_padded_sequence(steps_BTF.index_select(0, sorting_B), lengths_B[order_B], batch_first=True)
            states, _ = self.lstm(packed)
            states_BTH, _ = pad_packed_sequence(states, batch_first=True, padding_value=-torch.inf, total_length=longest)
            most_BH = states_BTH.amax(dim=1).index_select(0, unsorting_B)
        logits_BK: torch.Tensor = self.head(most_BH)
        return logits_BK


class LSTMDetector(nn.Module):
    """Detector on sequences. features: number of values per step, over all axes."""

    def __init__(
        self, features: int, num_classes: int = 2, *, hidden: int = 64, num_layers: int = 1, dropout: float = 0.3
    ) -> None:
        super().__init__()
        self.embed = nn.Sequential(FeatureViews(features), nn.Linear(2 * features, hidden), nn.Dropout(dropout))
        self.classify = StepsClassifier(hidden, num_classes, hidden=hidden, num_layers=num_layers, dropout=dropout)

    def forward(self, sequences_BTF: torch.Tensor, lengths_B: torch.Tensor) -> Output:
        """Return logits and penalties of a batch.

        Args:
            sequences_BTF: Float, zero behind a sequence's end; a step may have any number of axes.
            lengths_B: int64 on the CPU.
        """
        logits_BK = self.classify(self.embed(sequences_BTF.reshape(*sequences_BTF.shape[:2], -1)), lengths_B)
        return Output(logits_BK, logits_BK.new_zeros(len(logits_BK)))
