"""Buffers: memory that is reused once nothing refers to it any more."""

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
PAGE_BYTES = 4096  # what places in files and addresses are compared by; pages may be larger
_KEPT_BYTES = 192 << 20
_OURS = 2  # references to an unused piece: the local name, and the argument of getrefcount


class Buffers:
    """Page-aligned memory for batches; thread-safe.

    Fresh memory costs a page fault every 4 KiB, which took longer than reading into it. A piece is reused when the last array
    or tensor that refers to it is gone, so a batch that is kept does not change. Reference counts show that: a finaliser would
    run wherever a batch is dropped, and swallow a Ctrl-C that arrives inside it.

    Args:
        kept: Pieces remembered, those in use included; at most _KEPT_BYTES together, so a huge batch leaves no memory behind.
            Default: 12.
        pinned: Whether a GPU may read the memory asynchronously. Who starts such a read keeps the array until it is finished.
            Default: False.
    """

    def __init__(self, kept: int = 12, *, pinned: bool = False) -> None:
        self._pieces: deque[Array] = deque(maxlen=kept)
        self._pinned = pinned

    def __reduce__(self) -> tuple[Callable[..., Buffers], tuple[()]]:
        return partial(type(self), self._pieces.maxlen or 0, pinned=self._pinned), ()

    def take(self, nbytes: int, phase: int = 0) -> Array:
        """Return `nbytes` bytes, uint8, not initialised; large ones begin `phase` bytes (below 4096) after a page boundary."""
        assert phase < PAGE_BYTES, "there would be too little memory behind it"
        if nbytes < _UNIT // 2:  # the allocator reuses it anyway
            return pinned_bytes(nbytes) if self._pinned else np.empty(nbytes, np.uint8)
        piece_bytes = -(-(nbytes + PAGE_BYTES) // _UNIT) * _UNIT
        base = self._find(piece_bytes)
        if base is None:
            base = pinned_bytes(piece_bytes) if self._pinned else fresh_bytes(piece_bytes)  # the base of every view
        view: Array = base[phase : phase + nbytes]
        self._pieces.append(base)
        while sum(len(piece) for piece in list(self._pieces)) > _KEPT_BYTES:
            with contextlib.suppress(IndexError):  # another thread was first
                self._pieces.popleft()
        return view

    def _find(self, min_bytes: int) -> Array | None:
        """Return an unused piece, large enough and at most twice as large; smaller unused ones are dropped."""
        for _ in range(len(self._pieces)):
            try:
                piece = self._pieces.popleft()
            except IndexError:  # another thread has taken it
                return None
            if sys.getrefcount(piece) == _OURS:
                if min_bytes <= len(piece) <= 2 * min_bytes:
                    return piece
                if len(piece) < min_bytes:
                    continue
            self._pieces.append(piece)
        return None


def pinned_bytes(nbytes: int) -> Array:
    """Return `nbytes` bytes, uint8, that a GPU may read from; torch caches and reuses such memory."""
    import torch

    memory: Array = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True).numpy()
    return memory


def fresh_bytes(nbytes: int) -> Array:
    """Return `nbytes` bytes, uint8, zero, in huge pages if the system has them; pages that are never written take no memory."""
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8)
