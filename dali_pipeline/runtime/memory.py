"""Buffers: memory that is used again once nothing looks at it any more."""

from __future__ import annotations

import contextlib
import mmap
import sys
from collections import deque
from collections.abc import Callable
from functools import partial

import numpy as np

from dali_pipeline.types import Array

_UNIT = 2 << 20  # a huge page
_PAGE = 4096
_KEPT_BYTES = 192 << 20
_OURS = 2  # references to a piece that nothing else looks at: the name that asks, and the question


class Buffers:
    """Page-aligned memory by the piece, for batches; thread-safe.

    Fresh memory costs a page fault every 4 KiB, which took longer than reading into it. A piece is handed out again when the
    last array or tensor that looks into it is gone, so a batch that is kept stays what it is. That is seen by its count of
    references: a finaliser would run wherever a batch is let go, and swallow a Ctrl-C that strikes inside it. kept: pieces
    remembered, those in use too; of _KEPT_BYTES together at most, so a huge batch leaves no memory behind. pinned: whether a
    GPU may read it while nobody waits; whoever has it do so holds on to the array until it is through.
    """

    def __init__(self, kept: int = 12, *, pinned: bool = False) -> None:
        self._pieces: deque[Array] = deque(maxlen=kept)
        self._pinned = pinned

    def __reduce__(self) -> tuple[Callable[..., Buffers], tuple[()]]:
        return partial(type(self), self._pieces.maxlen or 0, pinned=self._pinned), ()

    def take(self, nbytes: int, phase: int = 0) -> Array:
        """`nbytes` bytes, uint8, of any content; where they are many, `phase` bytes (below 4096) behind a page's begin."""
        if nbytes < _UNIT // 2:  # kept by the allocator anyway
            return pinned_bytes(nbytes) if self._pinned else np.empty(nbytes, np.uint8)
        wanted = -(-(nbytes + _PAGE) // _UNIT) * _UNIT
        whole = self._find(wanted)
        if whole is None:
            whole = pinned_bytes(wanted) if self._pinned else _fresh(wanted)  # what every view has for its base
        part: Array = whole[phase : phase + nbytes]
        self._pieces.append(whole)
        while sum(len(piece) for piece in list(self._pieces)) > _KEPT_BYTES:
            with contextlib.suppress(IndexError):  # another thread was first
                self._pieces.popleft()
        return part

    def _find(self, wanted: int) -> Array | None:
        """A piece that nothing looks at, large enough and not more than twice as large; smaller ones are let go."""
        for _ in range(len(self._pieces)):
            try:
                piece = self._pieces.popleft()
            except IndexError:  # another thread looks at it
                return None
            if sys.getrefcount(piece) == _OURS:
                if wanted <= len(piece) <= 2 * wanted:
                    return piece
                if len(piece) < wanted:
                    continue
            self._pieces.append(piece)
        return None


def pinned_bytes(nbytes: int) -> Array:
    """Return `nbytes` bytes, uint8, that a GPU may read from; torch keeps such memory and hands it out again."""
    import torch

    memory: Array = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True).numpy()
    return memory


def _fresh(nbytes: int) -> Array:
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8)
