"""What batches of both kinds share: labels, names, positions and further fields of their records."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from itertools import accumulate, pairwise, repeat
from typing import Any, TypeAlias

import torch

from dali_pipeline.format.encoding import BFLOAT16
from dali_pipeline.format.schema import Schema
from dali_pipeline.loaders.sidestream import to_device_together
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


def moved_with_fields(
    tensors: Sequence[torch.Tensor], rows: Mapping[str, FieldRows], schema: Schema, dtype: torch.dtype, device: torch.device
) -> tuple[list[torch.Tensor], Fields]:
    """Move tensors, and the step and record fields of several batches, to the device in one copy.

    Args:
        tensors: Further tensors of the same batches.
        rows: Stored rows by the names after their dots.
        schema: The schema, which has the fields.
        dtype: Floating type of the loader.
        device: Device of the result.

    Returns:
        The tensors; and the fields: real numbers in `dtype`, or wider if they are stored so; whole numbers as int64; bools;
        texts as they are.
    """
    if not rows:
        return to_device_together(tensors, device), {}
    schema_fields = {**schema.step_fields, **schema.record_fields}
    stored_types = {name.partition(".")[2]: field.dtype for name, field in schema_fields.items()}
    stored = {name: _stored(column, stored_types[name]) for name, column in rows.items() if not isinstance(column, list)}
    moved = to_device_together([*tensors, *stored.values()], device)
    fields: Fields = dict(rows)
    for name, tensor in zip(stored, moved[len(tensors) :], strict=True):
        fields[name] = tensor.to(torch.promote_types(tensor.dtype, dtype)) if tensor.is_floating_point() else tensor
    return moved[: len(tensors)], fields


def _stored(rows: Array, dtype: str) -> torch.Tensor:
    if dtype == BFLOAT16:
        return torch.from_numpy(rows.view("int16")).view(torch.bfloat16)
    return torch.from_numpy(rows.astype("int64") if rows.dtype.kind in "iu" else rows)


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
