"""Alike: read many files of one record that differ in nothing but their values, without parsing each of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dali_pipeline.errors import FormatError
from dali_pipeline.format.encoding import storage
from dali_pipeline.ingest.containers.base import BFLOAT16, extent_of
from dali_pipeline.ingest.containers.leaf import from_bfloat16
from dali_pipeline.ingest.containers.source import Extent
from dali_pipeline.ingest.foreign import Block, rows_at_a_time
from dali_pipeline.ingest.layouts.parts import OpenPart
from dali_pipeline.ingest.layouts.plan import Plan, check_row
from dali_pipeline.types import Array

_MOST_HEAD_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Pattern:
    """What files have in common: everything but the bytes of one array.

    Attributes:
        head: All bytes before the array.
        extent: Where the array lies.
        size: Bytes of the file, which ends with the array.
    """

    head: bytes
    extent: Extent
    size: int

    @property
    def files_at_once(self) -> int:
        """Number of files that are read into one block, about 4 MiB."""
        return rows_at_a_time(self.extent.nbytes)

    def block(self, plan: Plan, stored: Array, where: str) -> Block:
        """Return what `read` returned as records; raise FormatError, which names `where`, if they do not follow the plan."""
        narrow = self.extent.dtype == BFLOAT16
        values = plan.axes.oriented(from_bfloat16(stored) if narrow else stored, 1, where)
        check_row(plan, where, values, 1)
        return Block(values, ("sequence",) if narrow else ())

    def read(self, paths: Sequence[Path]) -> Array | None:
        """Return the arrays of files in their stored type, (files, *shape); None unless all of them follow the pattern.

        Costs three system calls per file. What is wrong with a file is left to whoever reads it alone.
        """
        dtype = storage(self.extent.dtype)
        rows = np.empty((len(paths), *self.extent.shape), dtype)
        head = bytearray(len(self.head))
        # one byte more than the file should have, so that a longer one is noticed
        rest = bytearray(1)
        for path, record in zip(paths, rows.reshape(len(paths), -1).view(np.uint8), strict=True):
            try:
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    count = os.preadv(fd, [head, record.data, rest], 0)
                finally:
                    os.close(fd)
            except OSError:
                return None
            if count != self.size or head != self.head:
                return None
        return rows


def pattern_of_files(plan: Plan | None, path: Path) -> Pattern | None:
    """Return the pattern of a file; None unless it holds one record of a sequence alone, which ends the file."""
    if plan is None or not plan.is_named_outside:
        return None
    part = plan.parts[path]
    places = part.places["sequence"]
    if len(part.places) > 1 or len(places) > 1 or places[0].file not in (None, path):
        return None
    opened = OpenPart(part)
    try:
        extent = extent_of(opened.container(), places[0].key)
        size = path.stat().st_size
        # without a head of its own, another file says what the bytes are
        if (
            extent is None
            or not 0 < extent.begin <= _MOST_HEAD_BYTES
            or extent.begin + extent.nbytes != size
            or not extent.nbytes
        ):
            return None
        with path.open("rb") as file:
            head = file.read(extent.begin)
        return Pattern(head=head, extent=extent, size=size) if len(head) == extent.begin else None
    except (FormatError, OSError):  # whoever reads the file alone says so
        return None
    finally:
        opened.close()
