"""What batches of both kinds share: labels, names, positions and further fields of their records."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from itertools import accumulate, pairwise, repeat
from typing import Any, TypeAlias

import torch

from dali_pipeline.format.encoding import BFLOAT16
from dali_pipeline.format.schema import Field, Schema
from dali_pipeline.loaders.sidestream import to_device
from dali_pipeline.reading.rows import FieldRows
from dali_pipeline.types import Array

Fields: TypeAlias = dict[str, Any]  # tensors, and lists of texts


@dataclass(frozen=True, kw_only=True, eq=False)
class RecordBatch:
    """The part of a batch that both kinds share; `SequenceBatch` and `GraphBatch` document it."""

    labels: torch.Tensor  # None without labels; typed as if always there, so that a loop over classes needs no check
    valid: torch.Tensor
    ids: list[str]
    positions: torch.Tensor
    fields: Fields = dataclass_field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)


def field_tensors(rows: Mapping[str, FieldRows], schema: Schema, dtype: torch.dtype, device: torch.device) -> Fields:
    """Move the step and record fields of several batches to the device.

    Args:
        rows: Stored rows by the names after their dots.
        schema: The schema, which has the fields.
        dtype: Floating type of the loader.
        device: Device of the result.

    Returns:
        Real numbers in `dtype`, or wider if they are stored so; whole numbers as int64; bools; texts as they are.
    """
    fields = {name.partition(".")[2]: field for name, field in {**schema.step_fields, **schema.record_fields}.items()}
    return {
        name: stored if isinstance(stored, list) else _tensor(stored, fields[name], dtype, device)
        for name, stored in rows.items()
    }


def _tensor(stored: Array, field: Field, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if field.dtype == BFLOAT16:
        bits = to_device(torch.from_numpy(stored.view("int16")), device).view(torch.bfloat16)
        return bits.to(torch.promote_types(torch.bfloat16, dtype))
    if stored.dtype.kind in "iu":
        return to_device(torch.from_numpy(stored.astype("int64")), device)
    tensor = to_device(torch.from_numpy(stored), device)
    return tensor if tensor.dtype == torch.bool else tensor.to(torch.promote_types(tensor.dtype, dtype))


def cut_fields(fields: Fields, schema: Schema, sizes: Sequence[int], steps: Sequence[int], *, packed: bool) -> Iterator[Fields]:
    """Cut the fields of several batches of sequences; yield those of each batch.

    Args:
        fields: Fields of all batches: rows of steps of all records; (N, *row) of records.
        schema: The schema, which tells step fields from record fields.
        sizes: Records of each batch, B.
        steps: Steps of the longest record of each batch, T, to which all are padded; if packed, of all its records, S.
        packed: Whether step fields are (S, *row) instead of (B, T, *row).
    """
    if not fields:
        yield from repeat({}, len(sizes))
        return
    per_step = {name.partition(".")[2] for name in schema.step_fields}
    step_rows = list(steps) if packed else [size * longest for size, longest in zip(sizes, steps, strict=True)]
    ends = [0, *accumulate(sizes)]
    parts: dict[str, Sequence[Any]] = {}
    for name, field in fields.items():
        if isinstance(field, list):
            parts[name] = [field[begin:end] for begin, end in pairwise(ends)]
        else:
            parts[name] = torch.split(field, step_rows if name in per_step else list(sizes))
    for number, (size, longest) in enumerate(zip(sizes, steps, strict=True)):
        batch = {name: batches[number] for name, batches in parts.items()}
        if not packed:
            batch |= {name: part.view(size, longest, *part.shape[1:]) for name, part in batch.items() if name in per_step}
        yield batch


def moved_fields(fields: Fields, device: str | torch.device) -> Fields:
    """Return the fields on a device; texts as they are."""
    return {name: field if isinstance(field, list) else field.to(device) for name, field in fields.items()}


def tensors_of(fields: Fields) -> Iterator[torch.Tensor]:
    """Yield the fields that are tensors."""
    yield from (field for field in fields.values() if isinstance(field, torch.Tensor))
