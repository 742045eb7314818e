"""WindowFiller: read the pieces of a window in order, a few ahead, and enter them before they are needed."""

from __future__ import annotations

import logging
import os
from abc import abstractmethod
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Generic, Protocol, TypeVar

from dali_pipeline.errors import PipelineError
from dali_pipeline.reading.residency import SLOTS, Group, Piece, RecordNumbers, Residency
from dali_pipeline.runtime.trace import span

log = logging.getLogger("dali_pipeline")
HEADROOM = 1.1  # bytes of a slot, relative to those of this epoch, so that other epochs can use its memory
STAGED_AHEAD = 2  # pieces that are read before they are needed, beside one per thread

Rows = TypeVar("Rows")


class WindowMemory(Protocol):
    """Memory of one window: its slots, records and bytes per slot, and whether all records are there for good."""

    size: tuple[int, int, int]
    kept: bool


Memory = TypeVar("Memory", bound=WindowMemory)


class Memories(Generic[Memory]):
    """Memory of a loader's windows, one per iterator that is under way; used again, and shared once everything is in it.

    A pickled one is empty.
    """

    def __init__(self) -> None:
        self._unused: list[Memory] = []
        self._kept: Memory | None = None

    def __reduce__(self) -> tuple[type[Memories[Memory]], tuple[()]]:
        return type(self), ()

    @property
    def slot_records(self) -> int:
        """Records per slot of the memory there is, as far as it has several slots; 1 if there is none."""
        return max((memory.size[1] for memory in self._unused if memory.size[0] > 1), default=1)

    @property
    def hold_all(self) -> int:
        """Number of records if all are in memory that is kept, otherwise 0."""
        return 0 if self._kept is None else self._kept.size[1]

    def take(self, residency: Residency, allocate: Callable[[Residency], Memory]) -> Memory:
        """Return memory for the window of one iterator; memory of another size is dropped."""
        if self._kept is not None:
            return self._kept
        slots = residency.num_slots, residency.slot_records
        while self._unused:
            memory = self._unused.pop()
            if memory.size[:2] == slots and memory.size[2] >= residency.slot_bytes:
                return memory
        roomy = replace(residency, slot_bytes=int(HEADROOM * residency.slot_bytes))
        memory = allocate(roomy)
        memory.size = (*slots, roomy.slot_bytes)
        return memory

    def give_back(self, memory: Memory, *, kept: bool) -> None:
        """Take the memory back; `kept` says that everything is in it for good."""
        memory.kept |= kept
        if memory.kept:
            self._kept, self._unused = memory, []
        else:
            self._unused.append(memory)


class NoRoomError(PipelineError):
    """Error for a group that has more rows than its slot has room for."""


@dataclass(eq=False)
class Read(Generic[Rows]):
    """A piece that is being read, or is read.

    Attributes:
        piece: The piece.
        place: Where it goes in the window; of a kind that `WindowFiller._plan_read` chooses.
        result: Its rows, or the error of reading it.
    """

    piece: Piece
    place: Any
    result: Future[Rows]


class WindowFiller(Generic[Rows]):
    """Fills a window along one epoch. A subclass says where a piece goes, how it is read, and how it is entered.

    A piece that cannot be read leaves its group out of the window: `serves` is False for the steps that draw from it. Whoever
    gathers their records meets the same error, and reports it or leaves records out.

    Args:
        residency: What lies in the window when.
        start: The first step that is delivered; what only earlier ones draw from is not read.
        threads: Threads that read; 0 reads in the caller's thread.
        record_bytes: Bytes of a record as stored, on average.
        direct: Whether reading a piece writes to the window, so that it must wait until its slot is free.
        kept: Whether everything is in the window already.
    """

    def __init__(
        self, residency: Residency, start: int, *, threads: int, record_bytes: float, direct: bool, kept: bool
    ) -> None:
        self._residency, self._record_bytes, self._direct, self._threads = residency, record_bytes, direct, threads
        groups = [] if kept else [group for group in residency.groups if group.last > start]
        self._fills_all = not kept and residency.whole and len(groups) == len(residency.groups)
        self._groups, self._upcoming = deque(groups), deque[Piece]()
        self._left: Counter[int] = Counter()  # pieces that are not entered yet, by the step that needs them
        self._reads: deque[Read[Rows]] = deque()  # in order, not yet taken
        self._failed: list[Group] = []
        self._overflowed, self._process = 0, os.getpid()
        self._free_until = 0  # the next step: slots whose groups are behind it may be written
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="window") if threads and groups else None

    def serves(self, steps: range) -> bool:
        """Return whether all records of these steps are in the window; not if one of their groups could not be read."""
        return not any(group.needed < steps.stop and steps.start < group.last for group in self._failed)

    def reach(self, step: int, end: int | None = None) -> int:
        """Enter the pieces that some steps need, as far as their slots are free.

        Args:
            step: The first of the steps; all before it are delivered.
            end: The step after the last of them. Default: only `step`.

        Returns:
            The first step that needs a piece that is not entered, or the number of steps. It is smaller than `end` if the steps
            need more groups than the window has slots.
        """
        self._free_until = max(self._free_until, step)
        end = step + 1 if end is None else end
        while (piece := self._next()) is not None and piece.group.needed < end and piece.group.free <= self._free_until:
            self._enter_next()
        return self._residency.end if piece is None else piece.group.needed

    def passed(self, steps: range) -> None:
        """Enter some pieces that later steps need, so that they come evenly; these steps are delivered."""
        self._free_until = steps.stop
        if (piece := self._next()) is None:
            return
        needed = piece.group.needed
        for _ in range(-(-self._left[needed] * len(steps) // max(1, needed - steps.start))):
            piece = self._next()
            if piece is None or piece.group.needed != needed or piece.group.free > self._free_until:
                break
            self._enter_next()
        self._read_ahead()

    @property
    def holds_all(self) -> bool:
        """Whether all records are in the window, and stay there."""
        return self._fills_all and not self._failed and self._next() is None

    @property
    def fails(self) -> bool:
        """Whether a group could not be read, or had no room."""
        return bool(self._failed)

    def close(self) -> None:
        """Wait for the reads in flight; leave no thread behind."""
        if self._overflowed:
            log.warning(
                "groups of the shuffle with more rows than the resident window has room for: %d of %d; their batches were "
                "gathered, as window='gather' does for all",
                self._overflowed,
                len(self._residency.groups),
            )
        if self._pool is not None and os.getpid() == self._process:
            self._pool.shutdown(wait=True, cancel_futures=True)

    @property
    @abstractmethod
    def _numbers(self) -> RecordNumbers:
        """Numbers of the records that are in the window."""

    @abstractmethod
    def _plan_read(self, piece: Piece) -> tuple[Any, Callable[[], Rows]]:
        """Return where a piece goes in the window, and the function that reads it; called in order. May raise PipelineError."""

    @abstractmethod
    def _enter(self, read: Read[Rows], rows: Rows) -> None:
        """Enter a piece that is read into the window."""

    def _next(self) -> Piece | None:
        """Return the first piece that is not entered yet."""
        return self._reads[0].piece if self._reads else self._unread()

    def _unread(self) -> Piece | None:
        """Return the first piece that is not being read yet."""
        while self._upcoming or self._groups:
            if not self._upcoming:
                pieces = self._residency.pieces(self._groups.popleft(), self._record_bytes, direct=self._direct)
                self._upcoming.extend(pieces)
                self._left[self._upcoming[0].group.needed] += len(self._upcoming)
            piece = self._upcoming[0]
            if piece.group.last > self._free_until or piece.first != piece.group.first:
                return piece
            # nobody draws from this group any more, as its batches were gathered
            self._left[piece.group.needed] -= len(self._upcoming)
            self._upcoming.clear()
            self._fills_all = False
        return None

    def _read_ahead(self) -> None:
        """Begin to read the next pieces, one per thread and some more, as far as they may be written."""
        while self._pool is not None and len(self._reads) < self._threads + STAGED_AHEAD:
            piece = self._unread()
            if piece is None or (self._direct and not self._may_write(piece.group)):
                return
            self._reads.append(self._begin())

    def _may_write(self, group: Group) -> bool:
        """Return whether a group's slot is free: nobody draws from what is there, and nothing is being read to it."""
        slot = group.partition, group.number % SLOTS
        others = (read.piece.group for read in self._reads)
        busy = any((other.partition, other.number % SLOTS) == slot and other != group for other in others)
        return group.free <= self._free_until and (self._residency.whole or not busy)

    def _begin(self) -> Read[Rows]:
        """Begin to read the next piece; without threads, read it."""
        piece, place, done = self._upcoming.popleft(), None, Future[Rows]()
        try:
            place, read = self._plan_read(piece)
            if self._pool is not None:
                return Read(piece, place, self._pool.submit(_spanned, read))
            done.set_result(_spanned(read))
        except PipelineError as error:
            done.set_exception(error)
        return Read(piece, place, done)

    def _take(self) -> tuple[Read[Rows], Rows | None]:
        """Return the next piece and its rows; None if it could not be read."""
        self._read_ahead()
        if not self._reads:
            self._reads.append(self._begin())
            self._read_ahead()
        read = self._reads[0]  # among them until it is done, because it may be writing to its slot
        try:
            return read, read.result.result()
        except PipelineError:
            return read, None
        finally:
            self._reads.popleft()

    def _enter_next(self) -> None:
        """Enter the next piece; if it could not be read, note its group."""
        self._note(*self._take())

    def _note(self, read: Read[Rows], rows: Rows | None) -> None:
        group = read.piece.group
        self._left[group.needed] -= 1
        if read.piece.first == group.first:
            self._numbers.begin(group)
        if group in self._failed:
            return
        if rows is None:
            self._failed.append(group)
            self._overflowed += isinstance(read.result.exception(), NoRoomError)
        else:
            self._enter(read, rows)


def _spanned(read: Callable[[], Rows]) -> Rows:
    with span("read piece"):
        return read()
