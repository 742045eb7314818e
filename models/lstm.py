"""LSTM over the steps of a sequence (the layers of a language model), then a small head.

Shapes, here and in the other models: B records, T steps, F features, H hidden, K outputs (1 for two classes, C for more, one
per label of several, one per number of a value), N nodes, E edges, G graphs, L maximum number of graphs per record, Z latent.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from models.features import FeatureViews
from models.moves import to_device


class Output(NamedTuple):
    """Output of a detector.

    Attributes:
        logits_BK: (B, K), one row per record; (B, T, K) of a detector per step, any value behind a sequence's end; (N, K) of
            one per node.
        penalty_B: Loss to add to each record's own, mostly 0.
    """

    logits_BK: torch.Tensor
    penalty_B: torch.Tensor


class StepsHead(nn.Module):
    """Bidirectional LSTM over packed steps, maximum over the real steps, MLP head: the last part of all three detectors.

    With `per_step` there is no maximum, and the head answers for every step.
    """

    def __init__(
        self, features: int, outputs: int, *, hidden: int, num_layers: int, dropout: float, per_step: bool = False
    ) -> None:
        super().__init__()
        between = dropout if num_layers > 1 else 0.0
        self.per_step = per_step
        self.lstm = nn.LSTM(features, hidden, num_layers, batch_first=True, bidirectional=True, dropout=between)
        self.head = mlp_head(2 * hidden, hidden, outputs, dropout)

    # not compiled: whether to pack depends on the lengths, and the LSTM is one call either way
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, steps_BTF: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
        """Return logits (B, K), or (B, T, K) per step. lengths_B: int64 on the CPU, each from 1 to T."""
        device = steps_BTF.device
        if device.type == "cuda" and torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda") == torch.float16:
            return self._answer(steps_BTF, lengths_B)
        # Otherwise in float32: not every processor trains an LSTM in half precision, and cuDNN's, under autocast, computes in
        # float16 whatever type was asked for (aten/src/ATen/cudnn/AutocastRNN.cpp), where bfloat16 expects no loss scaling.
        with torch.autocast(device.type, enabled=False):
            return self._answer(steps_BTF.float(), lengths_B)

    def _answer(self, steps_BTF: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
        longest = steps_BTF.shape[1]
        if int(lengths_B.min()) == longest:  # nothing to pack
            states_BTH, _ = self.lstm(steps_BTF)
            answered = states_BTH if self.per_step else states_BTH.amax(dim=1)
        else:
            # sorted by length here, because pack_padded_sequence would wait for the GPU
            order_B = torch.argsort(lengths_B, descending=True, stable=True)
            sorting_B, unsorting_B = to_device(torch.stack([order_B, torch.argsort(order_B)]), steps_BTF.device)
            packed = pack_padded_sequence(steps_BTF.index_select(0, sorting_B), lengths_B[order_B], batch_first=True)
            states, _ = self.lstm(packed)
            behind = 0.0 if self.per_step else -torch.inf
            states_BTH, _ = pad_packed_sequence(states, batch_first=True, padding_value=behind, total_length=longest)
            answered = (states_BTH if self.per_step else states_BTH.amax(dim=1)).index_select(0, unsorting_B)
        logits: torch.Tensor = self.head(answered)
        return logits


def outputs_of(num_classes: int) -> int:
    """Return the number of logits for so many classes: one for two, which is that of class 1."""
    return 1 if num_classes == 2 else num_classes


def mlp_head(features: int, hidden: int, outputs: int, dropout: float) -> nn.Sequential:
    """Return the head of every detector: one hidden layer, with dropout before both layers."""
    return nn.Sequential(
        nn.Dropout(dropout), nn.Linear(features, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, outputs)
    )


class LSTMDetector(nn.Module):
    """Detector on sequences.

    Args:
        features: Number of values per step, over all axes.
        num_classes: Number of classes: one output for two, otherwise one each. Default: 2.
        outputs: Number of outputs, K, instead: of several labels at once, or of a value. Default: as `num_classes` says.
        layer_axis: Which axis of a step's row the LSTM runs over, instead of the steps; the batches then have one step per
            record, and `features` counts the values of one layer of it. Default: None, over the steps.
        per_step: Whether to answer for every step instead of every record. Default: False.
        hidden: Width of the LSTM in each direction, and of the head. Default: 64.
        num_layers: Layers of the LSTM. Default: 1.
        dropout: Dropout rate. Default: 0.3.
    """

    def __init__(
        self,
        features: int,
        num_classes: int = 2,
        *,
        outputs: int | None = None,
        layer_axis: int | None = None,
        per_step: bool = False,
        hidden: int = 64,
        num_layers: int = 1,
        dropout: float = 0.3,
    ) -> None:
        super().__init__()
        self.layer_axis = layer_axis
        self.embed = nn.Sequential(FeatureViews(features), nn.Linear(2 * features, hidden), nn.Dropout(dropout))
        width = outputs or outputs_of(num_classes)
        self.answer = StepsHead(hidden, width, hidden=hidden, num_layers=num_layers, dropout=dropout, per_step=per_step)

    def forward(self, sequences_BTF: torch.Tensor, lengths_B: torch.Tensor) -> Output:
        """Return logits and penalties of a batch.

        Args:
            sequences_BTF: Float, zero behind a sequence's end; a step may have any number of axes.
            lengths_B: int64 on the CPU.
        """
        steps_BTF, lengths_B = over_layers(sequences_BTF, lengths_B, self.layer_axis)
        logits = self.answer(self.embed(steps_BTF.flatten(2) if steps_BTF.dim() > 2 else steps_BTF.unsqueeze(-1)), lengths_B)
        return Output(logits, logits.new_zeros(len(logits)))


def over_layers(
    sequences_BTF: torch.Tensor, lengths_B: torch.Tensor, layer_axis: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the layers of the only step of each record as its steps, (B, L, …), and their number; unchanged without axis."""
    if layer_axis is None:
        return sequences_BTF, lengths_B
    steps_BLF = sequences_BTF.movedim(2 + layer_axis, 1).squeeze(2)
    return steps_BLF, torch.full_like(lengths_B, steps_BLF.shape[1])
