"""Layers: which steps, or graphs, of each record are read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from dali_pipeline.errors import DataError, UsageError

Layers: TypeAlias = "slice | Sequence[int] | None"


def select(layers: Layers, count: int) -> list[int]:
    """The numbers of the chosen ones among `count` steps or graphs, in the order asked for; raises DataError for none."""
    chosen: list[int] = []
    if layers is None or isinstance(layers, slice):
        chosen = list(range(count))[layers or slice(None)]
    elif all(-count <= layer < count for layer in layers):
        chosen = [layer % count for layer in layers]
    if not chosen:
        raise DataError(f"layers {_asked(layers)} asked of a record with {count}")
    return chosen


def to_positions(layers: Layers, numbers: Sequence[int]) -> list[int]:
    """Return where the chosen layers stand among those whose numbers a set records.

    Args:
        layers: Numbers of layers, of which a negative one counts from the last as stored; a slice from a number on to below
            another, of which a negative one stands for the number at that place; or None for all.
        numbers: Number of each layer as stored.

    Raises:
        DataError: A layer is not there, or none is chosen.
    """
    count = len(numbers)
    if layers is None:
        return list(range(count))
    if isinstance(layers, slice):
        step = 1 if layers.step is None else layers.step
        begin, end = (
            bound if bound is None or bound >= 0 else numbers[max(bound, -count)] for bound in (layers.start, layers.stop)
        )
        if step > 0:
            within = [
                at for at in range(count) if (begin is None or numbers[at] >= begin) and (end is None or numbers[at] < end)
            ]
        else:
            within = [
                at for at in range(count) if (begin is None or numbers[at] <= begin) and (end is None or numbers[at] > end)
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


def parse_layers(text: str | None) -> Layers:
    """`12:20` or `8,16,24`: numbers of layers, where the set records some, else counted from 0 as stored; None for all."""
    if text is None:
        return None
    try:
        if ":" in text:
            begin, end = (int(part) if part else None for part in text.split(":"))
            return slice(begin, end)
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"layers are {text!r}; expected a range such as 12:20 or a list such as 8,16,24") from None
