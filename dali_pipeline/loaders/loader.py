"""Loader: what both loaders share. The epoch and step they stand at, the plan, the state; and gathering ahead in threads."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing
from typing import Any, Generic, NamedTuple, TypeVar

from torch.utils.data import IterableDataset, get_worker_info

from dali_pipeline.dataset.dataset import Dataset
from dali_pipeline.dataset.mix import reweighed
from dali_pipeline.errors import DataError, UsageError
from dali_pipeline.format.digest import Delivered, EpochDigest
from dali_pipeline.format.layers import Layers, to_positions
from dali_pipeline.loaders.device import resolve_device
from dali_pipeline.loaders.options import LoaderOptions
from dali_pipeline.loaders.state import LoaderState, StateError
from dali_pipeline.reading.damage import TOLD, log, tell
from dali_pipeline.reading.readahead import ReadAhead
from dali_pipeline.reading.source import BatchSource
from dali_pipeline.runtime.checks import shown, whole
from dali_pipeline.runtime.world import FORKED, WorkersRefused, World
from dali_pipeline.sampling.plan import EpochPlan
from dali_pipeline.types import Ints, Kind, Mask

Batch = TypeVar("Batch", covariant=True)


class Position(NamedTuple):
    """Epoch, steps delivered of it, and `cursors` in the partitions where a step alone does not tell."""

    epoch: int
    step: int
    cursors: tuple[int, ...] = ()


class Made(NamedTuple, Generic[Batch]):
    """A batch as a subclass makes it; with its ids, its valid rows on the CPU, and why, of every record that was left out."""

    batch: Batch
    ids: list[str]
    valid: Mask
    left_out: tuple[str, ...] = ()
    cursors: tuple[int, ...] = ()  # behind it


class Loader(IterableDataset[Batch]):
    """Yields whole batches of this rank, epoch after epoch.

    Every `for` is the next epoch, also after a `break`. An iterator takes its epoch with its first batch, so one that is never
    used takes none. Each iterator is independent of the others; `state_dict` speaks for the one begun last. Subclasses say how
    the batches of a plan are made.
    """

    kind: Kind
    _source: BatchSource

    def __init__(self, data: Dataset, options: LoaderOptions) -> None:
        if not isinstance(data, Dataset):
            raise UsageError(f"data is {shown(data)}; expected what open_dataset gives")
        self.data, self.split, self.num_workers = data, options.split, options.num_workers
        self.dtype, self.skips = options.dtype, options.skips
        self.world = World.detect(options.rank, options.world_size)
        self.device = resolve_device(options.device, self.world)
        self.budgeted = options.budgeted
        self.selection = reweighed(data.select(options.split, self.kind), options.class_balanced, options.group_weights)
        self.order = options.order(self.selection.digest, self.world.world_size)
        self._num_records = self.selection.num_draws or self.selection.num_records
        self._first_plan = self.plan(epoch=0)
        self._num_steps = self._first_plan.num_steps  # the same in every epoch; with a budget there are fewer
        if not self._num_steps and self.num_records:
            raise DataError(f"split {self.split!r} has {self.num_records} records, too few for one batch with drop_last=True")
        self.batch_size = options.batch_size if self.budgeted else self._first_plan.rows(self.world.world_size)  # as delivered
        self._position = Position(0, 0)  # that state_dict tells
        self._next = Position(0, 0)  # that the next iterator begins at
        self._len_of = 0  # the epoch whose steps `len` tells: chosen, under way, or ended last
        self._loaded = False  # a loaded state waits for its iterator
        self._newest: object = None  # the iterator begun last
        self._delivered = Delivered(drawn=bool(self.selection.draws))  # by it
        self.left_out: list[str] = []  # by it: why, of every record
        self._begun_in: int | None = None  # the process that iterates
        self._expected: EpochDigest | None = None  # of a whole epoch, once asked for

    def _positions(self, layers: Layers, axis: str) -> Layers:
        """Where the layers asked for stand, if the set records the numbers of those that it has; else as they are."""
        numbers = self.data.layer_numbers(self.kind)
        numbered = numbers is not None and self.selection.bounds(axis) == (len(numbers), len(numbers))
        if layers is None or numbers is None or not numbered:
            return layers
        try:
            return to_positions(layers, numbers)
        except DataError as error:
            raise DataError(f"{error} in split {self.split!r} of {self.data.root}") from None

    def __len__(self) -> int:
        """Steps of an epoch, the same on every rank."""
        return self._num_steps

    @property
    def num_records(self) -> int:
        """Records of the split, over all ranks, padding not counted; as many draws, where an epoch is draws."""
        return self._num_records

    def num_valid(self, step: int) -> int:
        """Records of the global batch at a step, over all ranks, padding not counted; the same in every epoch.

        Raises UsageError with a budget, whose batches have no number of records.
        """
        if self.budgeted:
            raise UsageError("batches of max_nodes or max_edges have no number of records; count their `valid` rows")
        return self._first_plan.num_valid(whole("step", step))

    def __iter__(self) -> Iterator[Batch]:
        if get_worker_info() is not None:
            raise WorkersRefused
        if self._begun_in not in (None, os.getpid()):
            raise UsageError(FORKED)
        self._begun_in = os.getpid()
        token, delivered = object(), Delivered(drawn=bool(self.selection.draws))
        self._position, self._newest, self._delivered, self.left_out = self._next, token, delivered, []
        return self._run(token, delivered)

    def _run(self, token: object, delivered: Delivered) -> Iterator[Batch]:
        # Only here, with the first batch, the epoch is taken: torchdata makes an iterator that it drops unused where a state is
        # of an ended epoch, and Lightning makes its iterator before it tells the epoch.
        process = os.getpid()
        if process != self._begun_in:
            raise UsageError(FORKED)
        epoch, step, _ = begin = self._position = self._next
        self._len_of = epoch
        self._next, self._loaded = Position(epoch + 1, 0), False
        self._newest, self._delivered = token, delivered
        left_out = self.left_out = []
        plan = self.plan(epoch)
        with closing(ReadAhead(self._source, plan, self.world)) as ahead, closing(self._batches(plan, begin)) as batches:
            ahead.begin(step, begin.cursors)
            for batch, ids, valid, faults, cursors in batches:
                step += 1
                delivered.add(ids, valid, len(faults))
                tell(epoch, faults, left_out)
                if self._newest is token:
                    self._position = Position(epoch, step, cursors)
                yield batch
                if os.getpid() != process:
                    raise UsageError(FORKED)
                ahead.reached(step, cursors)
        if len(left_out) > TOLD:
            log.warning("epoch %d: %d records left out in all", epoch, len(left_out))
        if self._newest is token:
            self._position = self._next  # epoch + 1, unless set_epoch chose another meanwhile

    @abstractmethod
    def gathered(self, plan: EpochPlan, step: int) -> Any:
        """Gather one batch of this rank as stored, in the caller's thread; doctor measures it."""

    @abstractmethod
    def decoded(self, gathered: Any) -> Any:
        """Decode a gathered batch's values to the delivered type, on the device; doctor measures it."""

    @abstractmethod
    def _batches(self, plan: EpochPlan, start: Position) -> Generator[Made[Batch], None, None]:
        """The batches of this rank from `start` to the end of the epoch. Nothing is left behind when closed early."""

    def plan(self, epoch: int) -> EpochPlan:
        """Return the order of an epoch's records, as arithmetic; nothing is read."""
        chosen, lengths = self.selection, self._lengths if self.order.bucket_by_length else None
        return EpochPlan(self.order, epoch, chosen.records, chosen.nbytes, chosen.draws, chosen.num_draws, lengths)

    def _lengths(self, positions: Ints) -> Ints:
        """Of records, where the order asks for them."""
        raise NotImplementedError

    @property
    def digest(self) -> EpochDigest:
        """Of the records that the newest iterator has delivered on this rank so far, padding out; `+` merges ranks.

        Computed from the ids inside the batches. It covers an epoch from where that iterator began: after a resume, add the
        digest of the time before.
        """
        return self._delivered.digest

    def check_digest(self, digest: EpochDigest) -> str:
        """What an epoch's digest, of all ranks together, says in words: `2,816 of 2,816 records, each once`.

        Raises DataError where it is not that, unless records may be left out: then it says how many were. With drop_last=True
        only the number can be checked; draws are counted. The first time it may read the split's ids (a fold, or a data set
        written before manifests kept their sum).
        """
        if not isinstance(digest, EpochDigest):
            raise UsageError(f"digest is {shown(digest)}; expected that of a loader, or a sum of such")
        if self.selection.draws:
            return digest.describe()
        if self.order.drop_last:
            expected, found = self._num_steps * self.order.global_batch_size, digest.records + digest.left_out
            if found > self._num_records or (found != expected and not self.budgeted):
                expected = self._num_records if self.budgeted else expected
                raise DataError(f"the epoch delivered {digest.records:,} records; expected {expected:,} with drop_last=True")
            return f"{digest.records:,} of {self._num_records:,} records, the rest dropped"
        if self._expected is None:
            self._expected = self.selection.expected()
        return digest.check(self._expected)

    def set_epoch(self, epoch: int) -> None:
        """Chooses the next epoch, from its start; where a just loaded state stands in that epoch, the position stays."""
        epoch = whole("epoch", epoch)
        if not (self._loaded and self._next[0] == epoch):
            self._position = self._next = Position(epoch, 0)
            self._len_of = epoch
            self._loaded = False

    def state_dict(self) -> dict[str, Any]:
        """Where the loader stands: batches delivered, whatever was read ahead. Plain JSON, under 1 KB, costs microseconds.

        Behind the last batch, but before the loop has ended, the state still is of that epoch: a loader that takes it
        gives an empty rest, then the next epoch.
        """
        epoch, step, cursors = self._position
        return LoaderState(kind=self.kind, order=self.order, epoch=epoch, step=step, cursors=cursors).to_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The next iterator goes on where `state` stood. Raises StateError, and changes nothing, where it does not fit."""
        found = LoaderState.from_dict(state)
        found.check_fits(self.kind, self.order)
        self._check_place(found)
        self._len_of = found.epoch
        self._position = self._next = Position(found.epoch, found.step, found.cursors)
        self._loaded = True
        self._newest = None

    def _check_place(self, state: LoaderState) -> None:
        if state.step > self._num_steps:
            raise StateError(f"the state is at step {state.step}; an epoch has {self._num_steps}")
