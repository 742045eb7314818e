"""Types and constants that all folders share."""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]  # any stored type
Ints = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
Kind = Literal["sequences", "graphs"]
KINDS: tuple[Kind, ...] = get_args(Kind)
BLOCK_BYTES = 256 << 10  # of a shard's hash blocks, from version 2 on
