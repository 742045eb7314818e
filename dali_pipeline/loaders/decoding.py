"""Decoding: stored sequences to delivered ones, on the device; the same arithmetic in torch and in DALI, to the bit."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from dali_pipeline.format.encoding import BFLOAT16
from dali_pipeline.format.layers import Layers, select
from dali_pipeline.format.manifest import FeatureStatistics
from dali_pipeline.format.schema import Field
from dali_pipeline.loaders.sidestream import to_device
from dali_pipeline.types import Array

SPREAD_BYTES = 4 << 20
DALI_DTYPES = {torch.float16: "FLOAT16", torch.float32: "FLOAT"}


@dataclass(frozen=True, kw_only=True, eq=False)
class Decoding:
    """float32(stored) * scale, (that - mean) * inverse, then dtype: whichever of them there is, each rounded on its own.

    bfloat16: whether stored values are its bits, as int16 · scale: (T or 1, *row), mean, inverse: (*row), float32 · idle:
    whether there is nothing to do. Numbers stored as float64 stay so until the end.
    """

    bfloat16: bool
    scale: torch.Tensor | None
    mean: torch.Tensor | None
    inverse: torch.Tensor | None
    dtype: torch.dtype
    idle: bool = False

    @classmethod
    def of(
        cls,
        field: Field,
        layers: Layers,
        statistics: FeatureStatistics | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Decoding:
        """statistics: to normalise with, of every feature of a row; one that never varies becomes 0."""
        scale = mean = inverse = None
        if field.scales:
            rows = np.array(field.scales, np.float32).reshape(-1, *field.shape)
            scale = torch.from_numpy(rows[select(layers, len(rows))] if len(rows) > 1 else rows)
        if statistics is not None:
            mean = torch.tensor(statistics.mean, dtype=torch.float32).reshape(field.shape)
            std = torch.tensor(statistics.std, dtype=torch.float32).reshape(field.shape)
            inverse = 1 / torch.where(std > 0, std, 1)
        scale, mean, inverse = (None if one is None else one.to(device) for one in (scale, mean, inverse))
        bfloat16 = field.dtype == BFLOAT16
        idle = scale is None and mean is None and field.dtype == str(dtype).removeprefix("torch.")
        return cls(bfloat16=bfloat16, scale=scale, mean=mean, inverse=inverse, dtype=dtype, idle=idle)

    @property
    def in_dali(self) -> bool:
        """Whether DALI can do it; it knows neither bfloat16 nor float64."""
        return not self.bfloat16 and self.dtype in DALI_DTYPES

    def run(self, values: torch.Tensor, lengths: Array) -> torch.Tensor:
        """values: (B, T, *row) as stored, on the device; lengths: (B,). Zero behind a sequence's end."""
        if self.bfloat16:
            values = values.view(torch.bfloat16)
        if self.scale is None and self.mean is None:
            return values.to(self.dtype)
        stored, values = values, values.to(torch.float64 if values.dtype == torch.float64 else torch.float32)
        if values is stored:  # the next steps write to it
            values = stored.clone()
        if self.scale is not None:
            values.mul_(self.scale)
        if self.mean is not None and self.inverse is not None:
            values.sub_(self.mean).mul_(self.inverse)
            self._clear_padding(values, lengths)
        return values.to(self.dtype)

    @staticmethod
    def _clear_padding(values: torch.Tensor, lengths: Array) -> None:
        """Zero (B, T, *row) behind each sequence's end: on a GPU by one mask, on a CPU only what is padding."""
        short = np.flatnonzero(lengths < values.shape[1])
        if len(short) and values.is_cuda:
            ends = to_device(torch.from_numpy(lengths), values.device).view(-1, *[1] * (values.dim() - 1))
            steps = torch.arange(values.shape[1], device=values.device).view(-1, *[1] * (values.dim() - 2))
            values.masked_fill_(steps >= ends, 0)
            return
        for row in short.tolist():
            values[row, int(lengths[row]) :] = 0

    def spread(self, values: torch.Tensor, starts: Array, lengths: Array) -> torch.Tensor:
        """`run` of records (R, *row) that are not padded: record i is the `lengths[i]` rows from `starts[i]` on; padded here.

        Decodes some rows at a time, so it takes little memory beside the result (B, T, *row).
        """
        out = torch.zeros((len(lengths), int(lengths.max()), *values.shape[1:]), dtype=self.dtype, device=values.device)
        step = max(1, SPREAD_BYTES // max(1, values[:1].nbytes)) if self.scale is None or len(self.scale) == 1 else len(values)
        for record, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
            for begin in range(0, length, step):
                end = min(begin + step, length)
                out[record, begin:end] = self.run(values[None, start + begin : start + end], np.array([end - begin]))[0]
        return out

    def graph(self, values: Any, device: Literal["cpu", "gpu"]) -> Any:
        """The same, in a DALI graph; padding comes behind it.

        device: where the values are, and where the constants are kept. Those of the CPU would cross to a GPU for every sample.
        """
        from nvidia.dali import fn, types

        if self.scale is not None or self.mean is not None:
            values = fn.cast(values, dtype=types.FLOAT)
        if self.scale is not None:
            values = values * types.Constant(self.scale.cpu().numpy(), device=device)
        if self.mean is not None and self.inverse is not None:
            mean, inverse = (types.Constant(one.cpu().numpy(), device=device) for one in (self.mean, self.inverse))
            values = (values - mean) * inverse
        return fn.cast(values, dtype=getattr(types, DALI_DTYPES[self.dtype]))


def sequence_graph(feed: Callable[[], Array | list[Array]], *, decoding: Decoding | None, pads: bool, **pipeline: Any) -> Any:
    """The DALI graph: external_source, decode, pad; on the GPU where `device_id` names one, else on the CPU.

    feed: gives up to batch_size samples (an array (N, ..., T, F), or a list of (T_i, F)), which stay as they are until the
    output that they became is handed out; or raises StopIteration.
    decoding: None where torch does it: on the CPU it casts three times faster.
    pads: whether to fill samples up to the longest; where False, they come in equal lengths.
    """
    os.environ.setdefault("DALI_MALLOC_POOL_THRESHOLD", str(1 << 20))  # large outputs are used again, not paged in anew
    from nvidia.dali import fn, pipeline_def

    @pipeline_def(**pipeline)  # type: ignore[untyped-decorator]
    def graph() -> Any:
        # no_copy: DALI's threads copy, rather than the caller while it holds the interpreter lock
        values = fn.external_source(feed, batch=True, no_copy=True)
        if pipeline["device_id"] is not None:
            values = values.gpu()
        if decoding is not None:
            values = decoding.graph(values, "cpu" if pipeline["device_id"] is None else "gpu")
        if pads:
            values = fn.pad(values, axes=(0,), fill_value=0)
        return values

    return graph()
