"""Encodings of field values in a file: plain numbers, bfloat16, and int8 with a scale."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

BFLOAT16 = "bfloat16"
TEXT = "text"  # UTF-8, as bytes and offsets
LARGEST = 127  # largest int8 with a scale; -128 is not used
_DIGITS = 3  # significant digits of a scale: enough, and short in JSON
_LEAST = 1e-30  # smallest scale in float32
Array = npt.NDArray[Any]
_INFINITE = {"float16": (0x7C00, 0xFC00), BFLOAT16: (0x7F80, 0xFF80)}  # bits of the positive and the negative infinity
Scale = tuple[tuple[float, ...], ...]


def storage(dtype: str) -> np.dtype[Any]:
    """Return the NumPy type that stores a dtype; uint16 for bfloat16, which NumPy lacks."""
    return np.dtype({BFLOAT16: "uint16", TEXT: "uint8"}.get(dtype, dtype))


def encode(rows: Array, dtype: str, scale: Scale | Array | None) -> tuple[Array, bool]:
    """Encode rows (T, *row), and tell whether a value was lost, not merely rounded.

    bfloat16 and int8 round to the nearest, halves to even.

    Args:
        rows: Rows of one record.
        dtype: Name of the stored type.
        scale: One flat row per step, or one row for all steps; None for no scale.

    Returns:
        The stored rows, and whether the type could not hold a value.
    """
    if scale is not None:
        steps = np.asarray(scale, np.float32).reshape(len(scale), *rows.shape[1:])
        with np.errstate(all="ignore"):
            quotients = np.rint(rows.astype(np.float32) / steps)
            stored = quotients.clip(-LARGEST, LARGEST).astype(np.int8)
        return stored, not bool((np.abs(quotients) <= LARGEST).all())
    if dtype == BFLOAT16:
        with np.errstate(over="ignore"):
            wide = rows.astype(np.float32, copy=False)
        bits = wide.view(np.uint32)
        if wide is rows and not np.bitwise_or.reduce(bits, axis=None) & 0xFFFF:  # they were bfloat16 before, as in many files
            return _one_nan((bits >> 16).astype(np.uint16)), False
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        rounded[np.isnan(wide)] = 0x7FC0
        return rounded, bool((((rounded & 0x7FFF) == 0x7F80) & np.isfinite(rows)).any())
    with np.errstate(over="ignore", invalid="ignore"):
        cast = rows.astype(dtype)
    if cast.dtype.kind == "f":
        return cast, bool((np.isinf(cast) & np.isfinite(rows)).any())
    return cast, not np.array_equal(cast, rows)


def _one_nan(bits: Array) -> Array:
    """Give every NaN among bits of bfloat16 the same bits, in place, as rounding does; return them."""
    if bits.view(np.int16).max(initial=0) > 0x7F80 or bits.max(initial=0) > 0xFF80:
        bits[(bits & 0x7FFF) > 0x7F80] = 0x7FC0
    return bits


def decode(rows: Array, dtype: str, scale: Scale | Array | None, first: int = 0) -> Array:
    """Decode stored rows: the rows themselves, or float32 if they are encoded.

    Args:
        rows: Stored rows.
        dtype: Name of the stored type.
        scale: As for `encode`.
        first: Number of steps before the rows, counted from the start of a record.
    """
    if scale is not None:
        steps = (first + np.arange(len(rows))) % len(scale)
        return rows.astype(np.float32) * np.asarray(scale, np.float32).reshape(len(scale), *rows.shape[1:])[steps]
    if dtype == BFLOAT16:
        return (rows.astype(np.uint32) << 16).view(np.float32)
    return rows


def all_finite(rows: Array, dtype: str) -> bool:
    """Return whether no stored value is NaN or infinite; integers always are finite.

    NaN and infinity have the highest bit patterns of their sign.
    """
    if dtype not in _INFINITE:
        return bool(np.isfinite(rows).all())
    positive, negative = _INFINITE[dtype]
    return bool(rows.view(np.int16).max(initial=0) < positive and rows.view(np.uint16).max(initial=0) < negative)


def scale_for(greatest: Array) -> Scale:
    """Return the scale by which values of at most `greatest` (T or 1, *row), 0 or more, fit into int8; 1 where all are 0."""
    flat = greatest.reshape(len(greatest), -1).astype(np.float64) / LARGEST
    flat = np.where(flat > 0, flat.clip(_LEAST), 1)
    unit = 10.0 ** (np.floor(np.log10(flat)) + 1 - _DIGITS)
    rounded = np.ceil(flat / unit - 1e-9) * unit  # rounded up, so that the greatest value fits
    return tuple(tuple(float(f"{number:.{_DIGITS - 1}e}") for number in row) for row in rounded.tolist())


def holds(wide: str, narrow: str) -> bool:
    """Return whether type `wide` can represent every value of type `narrow`."""
    if wide == narrow:
        return True
    # bfloat16 has 8 bits of significand and the exponents of float32
    if narrow == BFLOAT16:
        return wide in ("float32", "float64")
    if wide == BFLOAT16:
        return narrow in ("bool", "int8", "uint8")
    return np.can_cast(narrow, wide)
