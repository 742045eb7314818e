"""Layers: which steps, or graphs, of each record are read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import xxhash

from dali_pipeline.errors import DataError, UsageError

Layers: TypeAlias = "slice | Sequence[int] | None"


def select(layers: Layers, count: int) -> list[int]:
    """Return the numbers of the chosen layers among `count` steps or graphs, in the order asked for.

    Raises DataError if none is chosen, or one is not there.
    """
    chosen: list[int] = []
    if layers is None or isinstance(layers, slice):
        chosen = list(range(count))[layers or slice(None)]
    elif all(-count <= layer < count for layer in layers):
        chosen = [layer % count for layer in layers]
    if not chosen:
        raise DataError(f"layers {_asked(layers)} asked of a record with {count}")
    return chosen


def to_positions(layers: Layers, numbers: Sequence[int]) -> list[int]:
    """Return the positions of the chosen layers among those whose numbers a data set records.

    Args:
        layers: Numbers of layers; a negative number counts from the last one as stored. A slice goes from one number to below
            another; a negative bound stands for the number at that position. None means all.
        numbers: Number of each layer as stored.

    Raises:
        DataError: A layer is not there, or none is chosen.
    """
    count = len(numbers)
    if layers is None:
        return list(range(count))
    if isinstance(layers, slice):
        step = 1 if layers.step is None else layers.step
        lower, upper = (
            bound if bound is None or bound >= 0 else numbers[max(bound, -count)] for bound in (layers.start, layers.stop)
        )
        if step > 0:
            within = [
                position
                for position in range(count)
                if (lower is None or numbers[position] >= lower) and (upper is None or numbers[position] < upper)
            ]
        else:
            within = [
                position
                for position in range(count)
                if (lower is None or numbers[position] <= lower) and (upper is None or numbers[position] > upper)
            ]
        chosen = within[::step]
    else:
        chosen = [count + layer if layer < 0 else numbers.index(layer) if layer in numbers else -1 for layer in layers]
    if not chosen or min(chosen) < 0:
        raise DataError(f"layers {_asked(layers)} asked of records with the layers {', '.join(map(str, numbers))}")
    return chosen


def _asked(layers: Layers) -> str:
    if isinstance(layers, slice):
        return f"{layers.start or 0}:{'' if layers.stop is None else layers.stop}"
    return str(layers)


def described(layers: Layers) -> str:
    """Return the chosen layers as a text under 100 characters, equal for equal choices; empty for all."""
    if layers is None or layers == slice(None):
        return ""
    if isinstance(layers, slice):
        return ":".join("" if bound is None else str(bound) for bound in (layers.start, layers.stop, layers.step or 1))
    text = ",".join(map(str, layers))
    return text if len(text) < 60 else f"{len(layers)} of them, {xxhash.xxh3_64_hexdigest(text.encode())}"


def parse_layers(text: str | None) -> Layers:
    """Read `12:20` or `8,16,24`; None for all.

    The numbers are those that the data set records. If it records none, layers count from 0 as stored.
    """
    if text is None:
        return None
    try:
        if ":" in text:
            begin, end = (int(part) if part else None for part in text.split(":"))
            return slice(begin, end)
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"layers are {text!r}; expected a range such as 12:20 or a list such as 8,16,24") from None
