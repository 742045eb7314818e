"""Raw memory maps: numbers without a header, whose shape and dtype a JSON file beside them says."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from dali_pipeline.errors import FormatError
from dali_pipeline.ingest.containers.leaf import BFLOAT16, Leaf, check_record, missing_key
from dali_pipeline.ingest.containers.source import Extent, Source, Stored, dtype_named
from dali_pipeline.types import Array

_MOST_SIDECAR_BYTES = 1 << 20
_MOST_AXES = 32


def sidecar_of(path: Path) -> Path | None:
    """Return the JSON file that describes a raw file: its name with .meta or .json instead of, or after, its suffix."""
    plain = path.with_name(path.name.removesuffix(".gz"))
    names = [plain.with_suffix(suffix) for suffix in (".meta", ".json")]
    names += [plain.with_name(plain.name + suffix) for suffix in (".meta", ".json")]
    return next((name for name in names if name.is_file()), None)


class RawContainer:
    """A raw file: one array, with the key ""."""

    records: Sequence[str] | None = None

    def __init__(self, path: Path) -> None:
        self.path = path
        shape, dtype = self._described()
        self._source = Source(path, "numbers")
        itemsize = 2 if isinstance(dtype, str) else dtype.itemsize
        if math.prod(shape) * itemsize != self._source.size:
            raise FormatError(
                f"{path} has {self._source.size} bytes; expected {math.prod(shape) * itemsize} for {dtype} {list(shape)}"
            )
        self._leaf = Leaf("", shape, BFLOAT16 if isinstance(dtype, str) else dtype.name)
        self._stored = Stored(self._source, "", 0, shape, dtype)

    def _described(self) -> tuple[tuple[int, ...], np.dtype[Any] | str]:
        """Return shape and dtype from the file beside."""
        beside = sidecar_of(self.path)
        if beside is None:
            raise FormatError(f"{self.path} has no {self.path.stem}.meta or .json beside it; expected one with shape and dtype")
        try:
            with beside.open("rb") as file:
                text = file.read(_MOST_SIDECAR_BYTES + 1)
            about = msgspec.json.decode(text[:_MOST_SIDECAR_BYTES])
        except (OSError, msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise FormatError(f"{beside} cannot be read as JSON ({str(error)[:99]}); expected shape and dtype") from None
        shape, name = (about.get("shape"), about.get("dtype")) if isinstance(about, dict) else (None, None)
        shape = shape if isinstance(shape, list) else [-1]
        sound = len(shape) <= _MOST_AXES and all(type(size) is int and size >= 0 for size in shape)
        dtype = dtype_named(name) if isinstance(name, str) else None
        if not sound or dtype is None:
            raise FormatError(
                f"{beside} says shape {str(shape)[:99]} and dtype {str(name)[:99]}; expected a list of sizes, and a name such "
                "as float16 or torch.bfloat16"
            )
        return tuple(shape), dtype

    def leaves(self, record: int = 0) -> list[Leaf]:
        """Return the one leaf."""
        return [self._leaf]

    def read(self, key: str, begin: int = 0, end: int | None = None, record: int | None = None) -> Array:
        """Return rows of the array; bfloat16 as float32."""
        check_record(self.path, None, record)
        if key:
            raise missing_key(self.path, key, [""])
        return self._stored.rows(begin, end)

    def extent(self, key: str) -> Extent | None:
        """Return where the array lies in the file."""
        return None if key else self._stored.extent

    def close(self) -> None:
        """Close the file."""
        self._source.close()
