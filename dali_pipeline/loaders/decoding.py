"""Decode stored sequences to delivered ones on the device, with bit-identical arithmetic in torch and in DALI."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch

from dali_pipeline.format.encoding import BFLOAT16
from dali_pipeline.format.layers import Layers, select
from dali_pipeline.format.manifest import FeatureStatistics
from dali_pipeline.format.schema import Field
from dali_pipeline.loaders.sidestream import to_device
from dali_pipeline.runtime.memory import Buffers
from dali_pipeline.types import Array

SPREAD_BYTES = 4 << 20
DALI_DTYPES = {torch.float16: "FLOAT16", torch.float32: "FLOAT"}


@dataclass(frozen=True, kw_only=True, eq=False)
class Decoding:
    """The arithmetic `dtype((float32(stored) * scale - mean) * inverse)`, without the parts that are None.

    Every operation rounds on its own. Numbers stored as float64 stay float64 until the cast to `dtype`.

    Attributes:
        bfloat16: Whether stored values are the bits of bfloat16 numbers, as int16.
        scale: (T or 1, *row) float32, or None.
        mean: (*row) float32, or None.
        inverse: (*row) float32, 1 / standard deviation, or None.
        dtype: Type of the result.
        idle: Whether stored values are delivered unchanged.
        on_host: Scale, mean and inverse on the CPU, where DALI takes them without a wait for the GPU.
        buffers: Memory of decoded batches on a CPU; fresh memory costs more than the arithmetic.
    """

    bfloat16: bool
    scale: torch.Tensor | None
    mean: torch.Tensor | None
    inverse: torch.Tensor | None
    dtype: torch.dtype
    idle: bool = False
    on_host: tuple[torch.Tensor | None, ...] = (None, None, None)
    buffers: Buffers = field(default_factory=partial(Buffers, 4))

    @classmethod
    def of(
        cls,
        field: Field,
        layers: Layers,
        statistics: FeatureStatistics | None,
        dtype: torch.dtype,
        device: torch.device,
        row_layers: tuple[int, list[int]] | None = None,
    ) -> Decoding:
        """Return the decoding of a field.

        Args:
            field: Field of the stored sequences.
            layers: Steps that are read, which choose their scales.
            statistics: Statistics to normalise every feature with, or None. A feature that never varies becomes 0.
            dtype: Type of the delivered values.
            device: Device to decode on.
            row_layers: Which axis of a row is the layer, and the numbers of those that are read; None for all.
        """
        scale = mean = inverse = None
        if field.scales:
            rows = np.array(field.scales, np.float32).reshape(-1, *field.shape)
            scale = torch.from_numpy(rows[select(layers, len(rows))] if len(rows) > 1 else rows)
        if statistics is not None:
            mean = torch.tensor(statistics.mean, dtype=torch.float32).reshape(field.shape)
            std = torch.tensor(statistics.std, dtype=torch.float32).reshape(field.shape)
            inverse = 1 / torch.where(std > 0, std, 1)
        if row_layers is not None:
            axis, chosen = row_layers
            index = torch.tensor(chosen)
            scale, mean, inverse = (
                None if tensor is None else tensor.index_select(tensor.dim() - len(field.shape) + axis, index)
                for tensor in (scale, mean, inverse)
            )
        on_host = (scale, mean, inverse)
        scale, mean, inverse = (None if tensor is None else tensor.to(device) for tensor in on_host)
        bfloat16 = field.dtype == BFLOAT16
        idle = scale is None and mean is None and field.dtype == str(dtype).removeprefix("torch.")
        return cls(bfloat16=bfloat16, scale=scale, mean=mean, inverse=inverse, dtype=dtype, idle=idle, on_host=on_host)

    @property
    def in_dali(self) -> bool:
        """Whether DALI can do this decoding; it knows neither bfloat16 nor float64."""
        return not self.bfloat16 and self.dtype in DALI_DTYPES

    def of_steps(self, steps: Array) -> Decoding:
        """Return the decoding of single steps, (N, 1, *row), from these steps of their records, (N,)."""
        if self.scale is None or len(self.scale) == 1:
            return self
        scale = self.scale.index_select(0, to_device(torch.from_numpy(steps.astype(np.int64)), self.scale.device))
        return replace(self, scale=scale[:, None])

    def run(self, values: torch.Tensor, lengths: Array) -> torch.Tensor:
        """Decode values (B, T, *row), which are on the device, of sequences with lengths (B,); zero behind a sequence's end."""
        if self.bfloat16:
            values = values.view(torch.bfloat16)
        if self.scale is None and self.mean is None:
            return values if values.dtype == self.dtype else self._copied(values, self.dtype)
        # a copy, because the next steps write to it
        values = self._copied(values, torch.float64 if values.dtype == torch.float64 else torch.float32)
        if self.scale is not None:
            values.mul_(self.scale)
        if self.mean is not None and self.inverse is not None:
            values.sub_(self.mean).mul_(self.inverse)
            self._clear_padding(values, lengths)
        return values if values.dtype == self.dtype else self._copied(values, self.dtype)

    def _copied(self, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return a copy of values in a type; on a CPU in memory that is reused once nothing refers to it."""
        if values.device.type != "cpu":
            return values.to(dtype, copy=True)
        memory = torch.from_numpy(self.buffers.take(values.numel() * dtype.itemsize))
        return memory.view(dtype).view(values.shape).copy_(values)

    @staticmethod
    def _clear_padding(values: torch.Tensor, lengths: Array) -> None:
        """Set values (B, T, *row) behind each sequence's end to zero: on a GPU by one mask, on a CPU only the padding."""
        short = np.flatnonzero(lengths < values.shape[1])
        if len(short) and values.is_cuda:
            ends = to_device(torch.from_numpy(lengths), values.device).view(-1, *[1] * (values.dim() - 1))
            steps = torch.arange(values.shape[1], device=values.device).view(-1, *[1] * (values.dim() - 2))
            values.masked_fill_(steps >= ends, 0)
            return
        for row in short.tolist():
            values[row, int(lengths[row]) :] = 0

    def spread(self, values: torch.Tensor, starts: Array, lengths: Array) -> torch.Tensor:
        """Decode rows (R, *row) without padding, and return them padded: (B, T, *row).

        Record i is the `lengths[i]` rows that start at row `starts[i]`. Decodes about SPREAD_BYTES at a time, so it takes
        little memory beside the result.
        """
        out = torch.zeros((len(lengths), int(lengths.max()), *values.shape[1:]), dtype=self.dtype, device=values.device)
        step = max(1, SPREAD_BYTES // max(1, values[:1].nbytes)) if self.scale is None or len(self.scale) == 1 else len(values)
        for record, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
            for begin in range(0, length, step):
                end = min(begin + step, length)
                out[record, begin:end] = self.run(values[None, start + begin : start + end], np.array([end - begin]))[0]
        return out

    def graph(self, values: Any, device: Literal["cpu", "gpu"]) -> Any:
        """Add the same arithmetic to a DALI graph, before the padding.

        Args:
            values: Node of the stored values.
            device: Device of the values and the constants. Constants on the CPU would be copied to a GPU for every sample.
        """
        from nvidia.dali import fn, types

        scale, mean, inverse = (
            None if tensor is None else types.Constant(tensor.numpy(), device=device) for tensor in self.on_host
        )
        if scale is not None or mean is not None:
            values = fn.cast(values, dtype=types.FLOAT)
        if scale is not None:
            values = values * scale
        if mean is not None and inverse is not None:
            values = (values - mean) * inverse
        return fn.cast(values, dtype=getattr(types, DALI_DTYPES[self.dtype]))


def sequence_graph(feed: Callable[[], Any], *, decoding: Decoding | None, pads: bool, **pipeline: Any) -> Any:
    """Return a DALI graph of external_source, decode and pad; on the GPU `device_id`, or on the CPU if that is None.

    Args:
        feed: Returns up to batch_size samples, an array (N, ..., T, F), a list of (T_i, F) or DALI's own list, or raises
            StopIteration. The samples must stay unchanged until their output is handed out.
        decoding: None if torch decodes, which casts three times faster on the CPU.
        pads: Whether to pad samples to the longest. If False, all samples have equal lengths.
        **pipeline: Arguments of DALI's `pipeline_def`.
    """
    os.environ.setdefault(
        "DALI_MALLOC_POOL_THRESHOLD", str(1 << 20)
    )  # reuse the memory of large outputs; do not page it in anew
    from nvidia.dali import fn, pipeline_def

    @pipeline_def(**pipeline)  # type: ignore[untyped-decorator]
    def graph() -> Any:
        # no_copy: DALI's threads copy; otherwise the caller would, while it holds the interpreter lock
        values = fn.external_source(feed, batch=True, no_copy=True)
        if pipeline["device_id"] is not None:
            values = values.gpu()
        if decoding is not None:
            values = decoding.graph(values, "cpu" if pipeline["device_id"] is None else "gpu")
        if pads:
            values = fn.pad(values, axes=(0,), fill_value=0)
        return values

    return graph()
