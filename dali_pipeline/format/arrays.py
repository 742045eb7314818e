"""Arrays from whatever holds numbers: lists, NumPy arrays, tensors."""

from __future__ import annotations

from typing import Any

import numpy as np

from dali_pipeline.errors import DataError
from dali_pipeline.types import Array


def as_array(name: str, value: Any) -> Array:
    """Return an array of real numbers, float32 for a bfloat16 tensor.

    Raises DataError, which names the field, for ragged lists, texts, masked values and the like.
    """
    if count := masked_values(value):
        raise DataError(f"{name} has {count} masked values, and a data set holds no masks; expected them filled or left out")
    try:
        array = np.asarray(value.float() if str(getattr(value, "dtype", "")) == "torch.bfloat16" else value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"{name} cannot be taken as a NumPy array ({str(error).splitlines()[0]})") from None
    if array.dtype.kind not in "fiub":
        raise DataError(f"{name} is {array.dtype}; expected real numbers")
    return array


def masked_values(value: Any) -> int:
    """Number of values that a masked NumPy array, or a list of some, hides; `np.asarray` would give what lies beneath."""
    if isinstance(value, np.ma.MaskedArray):
        return int(np.ma.getmaskarray(value).sum())
    return sum(map(masked_values, value)) if isinstance(value, list | tuple) else 0
