"""Layers: which steps, or graphs, of each record are read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from dali_pipeline.schema import DataError, UsageError

Layers: TypeAlias = "slice | Sequence[int] | None"


def select(layers: Layers, count: int) -> list[int]:
    """The numbers of the chosen ones among `count` steps or graphs, in the order asked for; raises DataError for none."""
    chosen: list[int] = []
    if layers is None or isinstance(layers, slice):
        chosen = list(range(count))[layers or slice(None)]
    elif all(-count <= layer < count for layer in layers):
        chosen = [layer % count for layer in layers]
    if not chosen:
        asked = f"{layers.start or 0}:{'' if layers.stop is None else layers.stop}" if isinstance(layers, slice) else layers
        raise DataError(f"layers {asked} asked of a record with {count}")
    return chosen


def parse_layers(text: str | None) -> Layers:
    """`12:20` or `8,16,24`, counted from 0 among the steps (or graphs) as stored; None for all."""
    if text is None:
        return None
    try:
        if ":" in text:
            begin, end = (int(part) if part else None for part in text.split(":"))
            return slice(begin, end)
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"layers are {text!r}; expected a range such as 12:20 or a list such as 8,16,24") from None
