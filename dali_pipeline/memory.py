"""Buffers: memory that is used again once nothing looks at it any more."""

from __future__ import annotations

import contextlib
import mmap
import weakref
from collections import deque

import numpy as np

from dali_pipeline.schema import Array

_UNIT = 2 << 20  # a huge page
_PAGE = 4096


class Buffers:
    """Page-aligned memory by the piece, for batches; thread-safe.

    Fresh memory costs a page fault every 4 KiB, which took longer than reading into it. A piece comes back when the last array
    or tensor that looks into it is gone, so a batch that is kept stays what it is. kept: pieces held ready for the next.
    """

    def __init__(self, kept: int = 6) -> None:
        self._ready: deque[mmap.mmap] = deque(maxlen=kept)
        self._kept = kept

    def __reduce__(self) -> tuple[type[Buffers], tuple[int]]:
        return Buffers, (self._kept,)

    def take(self, nbytes: int, phase: int = 0) -> Array:
        """`nbytes` bytes, uint8, of any content; where they are many, `phase` bytes (below 4096) behind a page's begin."""
        if nbytes < _UNIT // 2:  # kept by the allocator anyway
            return np.empty(nbytes, np.uint8)
        wanted = -(-(nbytes + _PAGE) // _UNIT) * _UNIT
        memory = self._find(wanted)
        if memory is None:
            memory = mmap.mmap(-1, wanted, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            if hasattr(mmap, "MADV_HUGEPAGE"):
                with contextlib.suppress(OSError):  # a kernel without huge pages
                    memory.madvise(mmap.MADV_HUGEPAGE)
        whole = np.frombuffer(memory, np.uint8)  # what every view has for its base
        weakref.finalize(whole, self._ready.append, memory).atexit = False
        return whole[phase : phase + nbytes]

    def _find(self, wanted: int) -> mmap.mmap | None:
        """A piece that is large enough, and not more than twice as large; smaller ones are let go."""
        for _ in range(len(self._ready)):
            try:
                memory = self._ready.popleft()
            except IndexError:
                return None
            if wanted <= len(memory) <= 2 * wanted:
                return memory
            if len(memory) > wanted:
                self._ready.append(memory)
        return None
