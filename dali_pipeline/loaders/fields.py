"""Further fields and labels of a batch, from stored arrays to tensors on the device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import repeat
from typing import Any, TypeAlias

import torch

from dali_pipeline.format.encoding import BFLOAT16
from dali_pipeline.format.schema import Field, Schema
from dali_pipeline.loaders.sidestream import to_device
from dali_pipeline.reading.rows import FieldRows
from dali_pipeline.types import Array

Fields: TypeAlias = dict[str, Any]  # tensors, and lists of texts


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


def cut_fields(fields: Fields, schema: Schema, batch_size: int, longest: Sequence[int]) -> Iterator[Fields]:
    """Cut the fields of several batches of sequences; yield those of each batch, step fields as (B, T, *row).

    Args:
        fields: Fields of all batches: rows of steps, each record padded to the longest of its batch; (N, *row) of records.
        schema: The schema, which tells step fields from record fields.
        batch_size: Records per batch, B.
        longest: Steps of the longest record of each batch, T.
    """
    if not fields:
        yield from repeat({}, len(longest))
        return
    per_step = {name.partition(".")[2] for name in schema.step_fields}
    step_rows = [batch_size * steps for steps in longest]
    parts: dict[str, Sequence[torch.Tensor | list[str]]] = {}
    for name, field in fields.items():
        if isinstance(field, list):
            parts[name] = [field[begin : begin + batch_size] for begin in range(0, len(field), batch_size)]
        else:
            parts[name] = torch.split(field, step_rows if name in per_step else batch_size)
    for number, steps in enumerate(longest):
        batch: Fields = {}
        for name, batches in parts.items():
            part = batches[number]
            if name in per_step and isinstance(part, torch.Tensor):
                part = part.view(batch_size, steps, *part.shape[1:])
            batch[name] = part
        yield batch


def moved_fields(fields: Fields, device: str | torch.device) -> Fields:
    """Return the fields on a device; texts as they are."""
    return {name: field if isinstance(field, list) else field.to(device) for name, field in fields.items()}


def tensors_of(fields: Fields) -> Iterator[torch.Tensor]:
    """Yield the fields that are tensors."""
    yield from (field for field in fields.values() if isinstance(field, torch.Tensor))
