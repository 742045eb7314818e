"""Leaf: one array, text or number in a container; and the checks and messages that all families share."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dali_pipeline.errors import FormatError
from dali_pipeline.types import Array

BFLOAT16 = "bfloat16"
TEXT = "text"
OBJECT = "object"
_NEAREST = 3  # keys that a message names


class Leaf(NamedTuple):
    """One array, text or number of a container.

    Attributes:
        key: Its key as people write it: "hidden_states", a dotted path such as "most_likely_answer.embedding", "[0]" for an
            item of a tuple or list, "" for a bare array.
        shape: Its full shape; () for a scalar or one text.
        dtype: NumPy's name, "bfloat16", "bool" or "text"; "object" for what cannot be taken.
        why: Why it cannot be taken, if dtype is "object".
    """

    key: str
    shape: tuple[int, ...]
    dtype: str
    why: str = ""


def missing_key(path: Path, key: str, keys: Iterable[str], where: str = "") -> FormatError:
    """Return the error for a key that does not exist, which names the nearest keys that do."""
    names = [str(name) for name in keys]
    nearest = difflib.get_close_matches(key, names, _NEAREST, 0.4) or names[:_NEAREST]
    listed = ", ".join(name or "(the array itself, key '')" for name in nearest) or "none"
    more = f" and {len(names) - len(nearest)} others" if len(names) > len(nearest) else ""
    return FormatError(f"{path}{where} has no key {reprlib.repr(key)}; it has {listed}{more}")


def not_taken(path: Path | str, leaf: Leaf) -> FormatError:
    """Return the error for a leaf that cannot be taken."""
    return FormatError(f"{path}, {leaf.key or 'its content'} cannot be taken: {leaf.why}; expected numbers or texts")


def check_record(path: Path, records: Sequence[str] | None, record: int | None) -> int:
    """Return the number of the record to read, 0 without records; raise FormatError if it does not fit the file."""
    if records is None:
        if record is not None:
            raise FormatError(f"{path} holds no records, but record {record} was asked for; expected no record number")
        return 0
    if record is None:
        raise FormatError(f"{path} holds {len(records)} records; expected the number of one")
    if not 0 <= record < len(records):
        raise FormatError(f"{path} holds {len(records)} records, but record {record} was asked for")
    return record


def row_range(path: Path | str, key: str, shape: tuple[int, ...], begin: int, end: int | None) -> tuple[int, int]:
    """Return first row and row after the last; raise FormatError if the leaf does not have these rows.

    Args:
        path: The file, or the record of it, for messages.
        key: Key of the leaf, for messages.
        shape: Its shape. A scalar counts as one row.
        begin: First row.
        end: Row after the last one; None for all rows.
    """
    rows = shape[0] if shape else 1
    last = rows if end is None else end
    if not 0 <= begin <= last <= rows:
        raise FormatError(f"{path}, {key or 'its array'} has {rows} rows, but rows {begin} to {last} were asked for")
    return begin, last


def from_bfloat16(bits: Array) -> Array:
    """Return float32 with the values of bfloat16, given its 16 bits each as unsigned integers."""
    return np.left_shift(bits, 16, dtype=np.uint32).view(np.float32)


def texts_of(path: Path, key: str, values: Array) -> list[str] | str:
    """Return an array of texts or of bytes in UTF-8 as a list of texts; a scalar as one text."""
    try:
        texts = [value.decode() if isinstance(value, bytes) else value for value in values.reshape(-1).tolist()]
    except ValueError:  # UnicodeDecodeError, or code points that are none
        raise FormatError(f"{path}, {key or 'its array'} holds bytes that are no text in UTF-8; expected texts") from None
    return texts if values.ndim else str(texts[0])


def stacked(path: Path, key: str, values: Sequence[Array | list[str] | str]) -> Array | list[str]:
    """Return the values that a leaf has in several records: texts as a list, arrays stacked.

    Raises:
        FormatError: Their shapes differ, or texts and numbers are mixed.
    """
    texts = [value for value in values if isinstance(value, str)]
    arrays = [value for value in values if isinstance(value, np.ndarray)]
    if values and len(texts) == len(values):
        return texts
    if len(arrays) == len(values) and len({array.shape for array in arrays}) <= 1:
        return np.stack(arrays) if arrays else np.zeros(0)
    raise FormatError(f"{path}, {key} differs in shape between records; expected one shape, or the number of a record")
