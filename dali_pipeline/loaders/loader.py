"""Loader: the base of both loaders. Keeps epoch, step and state, plans epochs, and checks what was delivered."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Collection, Generator, Iterator, Mapping
from contextlib import closing
from typing import Any, Generic, NamedTuple, TypeVar, get_args

import torch
from torch.utils.data import IterableDataset, get_worker_info

from dali_pipeline.dataset.dataset import Dataset
from dali_pipeline.dataset.mix import reweighed
from dali_pipeline.errors import DataError, PipelineError, UsageError
from dali_pipeline.format.digest import Delivered, EpochDigest
from dali_pipeline.format.layers import Layers, described, to_positions
from dali_pipeline.loaders.device import check_window, resolve_device
from dali_pipeline.loaders.options import LoaderOptions, WindowKind
from dali_pipeline.loaders.state import LoaderState, StateError
from dali_pipeline.reading.damage import TOLD, log, tell
from dali_pipeline.reading.readahead import ReadAhead
from dali_pipeline.reading.residency import Residency
from dali_pipeline.reading.source import BatchSource
from dali_pipeline.reading.window import Memories, WindowFiller
from dali_pipeline.runtime.ahead import LONG_RECORD_BYTES
from dali_pipeline.runtime.checks import one_of, shown, whole
from dali_pipeline.runtime.container import allowed_memory
from dali_pipeline.runtime.world import FORKED, WorkersRefused, World
from dali_pipeline.sampling.budget import BudgetPlan, Packed
from dali_pipeline.sampling.plan import EpochPlan
from dali_pipeline.types import Array, Ints, Kind, Mask

Batch = TypeVar("Batch", covariant=True)
WINDOW_SHARE = 0.5  # of the memory that is available
WINDOW_THREADS = 4  # at least so many read pieces of a window: some wait for the disk while others hash


class Position(NamedTuple):
    """Epoch, steps delivered in it, and, with a budget, the records delivered of each partition (`cursors`)."""

    epoch: int
    step: int
    cursors: tuple[int, ...] = ()


class LoadedBatch(NamedTuple, Generic[Batch]):
    """A batch from a subclass, with what the loader needs to count it.

    hashes: (B,) uint64, XXH3-64 of the ids of its rows. valid: (B,) bool on the CPU. left_out: the reason for each record that
    was left out. cursors: records delivered of each partition after this batch, with a budget.
    """

    batch: Batch
    hashes: Array
    valid: Mask
    left_out: tuple[str, ...] = ()
    cursors: tuple[int, ...] = ()


class Loader(IterableDataset[Batch]):
    """Iterate over whole batches of this rank, epoch after epoch; the base of `SequenceLoader` and `GraphLoader`.

    Every `for` is the next epoch, also after a `break`. An iterator takes its epoch with its first batch, so an iterator that
    is never used takes none. Iterators are independent of each other; `state_dict` describes the one that began last.

    Attributes:
        data: The data set.
        split: Name of the split.
        world: Rank and world size.
        device: Device of the batches.
        batch_size: Records per batch of this rank, as delivered.
        order: Everything that the order of records depends on.
        selection: Records of the split.
        left_out: The newest iterator's reasons, one per record that it left out.
    """

    kind: Kind
    _source: BatchSource
    _memories: Memories[Any]
    _threads: int
    _share_read: float = 1.0  # of the bytes of a record; less if layers are chosen
    _oversize = "alone"  # what becomes of a record that exceeds the budget on its own
    _epoch_steps = (-1, 0)  # an epoch, and its number of steps with the budget

    def __init__(self, data: Dataset, options: LoaderOptions) -> None:
        if not isinstance(data, Dataset):
            raise UsageError(f"data is {shown(data)}; expected what open_dataset gives")
        self.data, self.split, self.num_workers = data, options.split, options.num_workers
        self.dtype, self.skips = options.dtype, options.skips
        self.world = World.detect(options.rank, options.world_size)
        self.device = resolve_device(options.device, self.world)
        self.budgeted = options.budgeted
        selection = data.select(options.split, self.kind)
        if options.class_balanced and data.schema.labels.kind != "class":
            kind = data.schema.labels.kind
            raise DataError(f"class_balanced needs one class per record; the labels of {data.root} are of kind {kind!r}")
        self._check_fields(options.fields)
        self.selection = reweighed(selection, options.class_balanced, options.group_weights)
        self.order = options.order(self.selection.digest, self.world.world_size)
        self._check_budget(options)
        self._counts = self._count(options)
        self._num_records = self.selection.num_draws or self.selection.num_records
        if self.order.unit == "step":
            self._num_records, together = int(self._counts.sum()), self.order.global_batch_size
            if 0 < self._num_records < together:
                raise UsageError(
                    f"a step of {self.world.world_size} processes takes {together} rows, and split {self.split!r} has "
                    f"{self._num_records} to deliver; expected a smaller batch_size"
                )
        self._first_plan = self.plan(epoch=0)
        self._num_steps = self._first_plan.num_steps  # the same in every epoch; an upper bound with a budget
        if not self._num_steps and self.num_records:
            raise DataError(
                f"split {self.split!r} has {self.num_records} {self._what}, too few for one batch with drop_last=True"
            )
        self.batch_size = options.batch_size if self.budgeted else self._first_plan.rows(self.world.world_size)  # as delivered
        self._position = Position(0, 0)  # returned by state_dict
        self._next = Position(0, 0)  # start of the next iterator
        self._len_epoch = 0  # the epoch whose steps `len` returns: chosen, in progress, or ended last
        self._loaded = False  # whether a loaded state waits for its iterator
        self._counted = ""  # what of each record fills batches; `_fill_by`
        self._newest_iterator: object = None  # token of the iterator that began last
        self._delivered = Delivered(drawn=bool(self.selection.draws))  # records that the newest iterator delivered
        self.left_out: list[str] = []
        self._iterating_process: int | None = None  # id of the process that iterates
        self._expected_digest: EpochDigest | None = None  # digest of a whole epoch, computed when it is first needed

    def _count(self, options: LoaderOptions) -> Ints:
        """Return what each entry of the selection adds to an epoch, (entries,): its records."""
        return self.selection.records

    def _check_budget(self, options: LoaderOptions) -> None:
        """Raise UsageError for options that do not go with a budget."""
        if not self.budgeted:
            return
        what = "max_steps needs" if options.max_steps is not None else "max_nodes and max_edges need"
        if options.on_error == "skip":
            raise UsageError(f"{what} the size of every record; expected on_error='raise'")
        if options.bucket_by_length:
            raise UsageError("max_steps and bucket_by_length exclude each other; give one")
        partitions, ranks = self.order.num_partitions, self.world.world_size
        if ranks % partitions and partitions % ranks:
            raise UsageError(
                f"num_partitions is {partitions} and world_size {ranks}; expected one to be a multiple of the other, "
                "for with a budget every rank's batches come from whole partitions"
            )

    def _check_fields(self, names: Collection[str] | None) -> None:
        """Raise UsageError for the name of a field that records of this kind do not have."""
        schema = self.data.schema
        own = schema.step_fields if self.kind == "sequences" else schema.named
        known = [name.partition(".")[2] for name in (*own, *schema.record_fields)]
        for name in names or ():
            if name not in known:
                raise UsageError(f"fields has {name!r}; expected some of {', '.join(known) or 'none, as there are none'}")

    def _fill_by(self, chosen: Layers) -> None:
        """Keep in the state which steps, or graphs, of each record are read, if batches depend on their number."""
        depends = self.budgeted or self.order.bucket_by_length or self.order.unit == "step"
        self._counted = described(chosen) if depends else ""

    def _positions(self, layers: Layers, axis: str) -> Layers:
        """Return the positions of the layers asked for, if the data set records the numbers of its layers; else `layers`."""
        numbers = self.data.layer_numbers(self.kind)
        numbered = numbers is not None and self.selection.bounds(axis) == (len(numbers), len(numbers))
        if layers is None or numbers is None or not numbered:
            return layers
        try:
            return to_positions(layers, numbers)
        except DataError as error:
            raise DataError(f"{error} in split {self.split!r} of {self.data.root}") from None

    def __len__(self) -> int:
        """Return the number of steps per epoch, the same on every rank.

        With a budget the number differs a little between epochs. It is then that of the epoch that `set_epoch` chose, that is
        in progress, or that ended last; it costs a pass over the index of all shards, and raises errors that are found there.
        """
        if not self.budgeted:
            return self._num_steps
        if self._epoch_steps[0] != self._len_epoch:
            self._epoch_steps = self._len_epoch, self._budget(self.plan(self._len_epoch)).num_steps(self.world.world_size)
        return self._epoch_steps[1]

    def _budget(self, plan: EpochPlan) -> BudgetPlan:
        return BudgetPlan(plan, self._source.sizes, self._source.name, alone=self._oversize == "alone")

    def _packed_batches(self, budget: BudgetPlan, start: Position, longest: int, most_records: int) -> Iterator[Any]:
        """Yield the packed batches; yield an error instead of raising it, so that it follows the batches before it."""
        rank, world_size = self.world.rank, self.world.world_size
        try:
            yield from budget.superbatches(start.step, start.cursors, rank, world_size, longest, most_records)
        except PipelineError as error:
            yield error

    def _packed_from_window(
        self, window: WindowFiller[Any], budget: BudgetPlan, start: Position, longest: int, most_records: int
    ) -> Iterator[tuple[list[Packed], bool]]:
        """Yield packed batches, and whether all their records are in the window; who delivers the batches tells the window."""
        for packed in self._packed_batches(budget, start, longest, most_records):
            if isinstance(packed, PipelineError):
                raise packed
            while packed:
                taken: list[Packed] = packed
                if self._by_record:
                    reached = window.reach(packed[0].begin, packed[0].end)
                    taken = [batch for batch in packed if batch.end <= reached] or packed[:1]
                    steps = range(packed[0].begin, taken[-1].end)
                else:  # all at once
                    reached, steps = window.reach(0), range(1)
                self._window_fails |= window.fails
                yield taken, steps.stop <= reached and window.serves(steps)
                packed = packed[len(taken) :]

    @property
    def num_records(self) -> int:
        """Number of records per epoch over all ranks, without padding; the number of draws if an epoch consists of draws.

        With unit="step" steps are counted instead of records, here and in `num_valid`.
        """
        return self._num_records

    def num_valid(self, step: int) -> int:
        """Return the number of records in the global batch of a step, without padding; the same in every epoch.

        Args:
            step: Number of the step in the epoch, from 0.

        Returns:
            Number of records over all ranks.

        Raises:
            UsageError: The loader has a budget, such as `max_nodes`; its batches have no number of records.
        """
        if self.budgeted:
            raise UsageError("batches of max_nodes, max_edges or max_steps have no number of records; count their `valid` rows")
        return self._first_plan.num_valid(whole("step", step))

    def __iter__(self) -> Iterator[Batch]:
        if get_worker_info() is not None:
            raise WorkersRefused
        if self._iterating_process not in (None, os.getpid()):
            raise UsageError(FORKED)
        self._iterating_process = os.getpid()
        token, delivered = object(), Delivered(drawn=bool(self.selection.draws))
        self._position, self._newest_iterator, self._delivered, self.left_out = self._next, token, delivered, []
        return self._run(token, delivered)

    def _run(self, token: object, delivered: Delivered) -> Iterator[Batch]:
        # The epoch is taken here, with the first batch, and not before. torchdata creates an iterator that it drops unused if
        # a state is of an ended epoch, and Lightning creates its iterator before it sets the epoch.
        process = os.getpid()
        if process != self._iterating_process:
            raise UsageError(FORKED)
        epoch, step, _ = begin = self._position = self._next
        self._len_epoch = epoch
        self._next, self._loaded = Position(epoch + 1, 0), False
        self._newest_iterator, self._delivered = token, delivered
        left_out = self.left_out = []
        plan = self.plan(epoch)
        with closing(self._read_ahead_of(plan)) as ahead, closing(self._batches(plan, begin)) as batches:
            ahead.begin(step, begin.cursors)
            for batch, hashes, valid, faults, cursors in batches:
                step += 1
                delivered.add(hashes, valid, len(faults))
                tell(epoch, faults, left_out)
                if self._newest_iterator is token:
                    self._position = Position(epoch, step, cursors)
                yield batch
                if os.getpid() != process:
                    raise UsageError(FORKED)
                ahead.reached(step, cursors)
        if len(left_out) > TOLD:
            log.warning("epoch %d: %d records left out in all", epoch, len(left_out))
        if self._newest_iterator is token:
            self._position = self._next  # epoch + 1, unless set_epoch chose another one meanwhile

    def _read_ahead_of(self, plan: EpochPlan) -> ReadAhead:
        # a window with threads reads ahead itself, until it fails, or if it does not serve the epoch
        windowed = self._window_threads > 0 and self.selection.cache_bytes is None
        self._window_fails = not (windowed and self.window == "resident")
        return ReadAhead(self._source, plan, self.world, idle=lambda: not self._window_fails)

    def _choose_window(self, asked: WindowKind, unfit: str = "") -> None:
        """Set where batches are put together; raise UsageError if a resident window is asked for and cannot be.

        Args:
            asked: The loader's argument.
            unfit: An argument that no resident window goes with. Default: none.
        """
        one_of("window", asked, get_args(WindowKind))
        # they read long pieces, without the interpreter lock
        self._window_threads = max(self._threads, WINDOW_THREADS) if self.num_workers == "auto" else self._threads
        self.window: WindowKind = "gather"
        if asked == "gather" or (asked == "auto" and not self._window_pays()):
            return
        why = f"does not go with {unfit}" if unfit else self._no_window()
        if why and asked == "resident":
            raise UsageError(f"window='resident' {why}; or window='gather'")
        self.window = "gather" if why else "resident"
        # a window without threads has its bytes read ahead through the page cache
        self._source.past_cache = self.window == "resident" and self._window_threads > 0 and not self._fits_memory()

    @property
    def _by_record(self) -> bool:
        """Whether the window counts records: with a budget, whose batches then come from one partition in its order."""
        return self.budgeted and self.order.num_partitions == self.world.world_size == 1

    def _window_start(self, start: Position) -> int:
        """Return where an epoch begins as the window counts: a record with `_by_record`, otherwise a step."""
        return sum(start.cursors) if self._by_record else start.step

    def _fits_memory(self) -> bool:
        """Return whether the page cache can keep what this node reads in an epoch."""
        nbytes = self._share_read * self.selection.record_bytes * self.selection.num_records
        return nbytes * min(1, self.world.local_world_size / self.world.world_size) <= allowed_memory()[1]

    def _spills(self) -> bool:
        """Return whether the page cache cannot keep what this node reads, but its windows take half of the memory at most."""
        residency = None if self._fits_memory() or not self.selection.num_records else self._residency(self._first_plan)
        return residency is not None and self._affords(residency)

    def _affords(self, residency: Residency) -> bool:
        """Return whether the windows of this node take half of its memory at most."""
        return self._window_nbytes(residency) * self.world.local_world_size <= allowed_memory()[1] * WINDOW_SHARE

    def _window_pays(self) -> bool:
        """Return whether a resident window is faster than a gather."""
        if self.device.type == "cuda":
            return True
        if self.selection.cache_bytes is not None:
            return False
        return self.selection.record_bytes < LONG_RECORD_BYTES or self._spills()

    @property
    def _needs_all(self) -> str:
        """The argument for which records are needed in another order than that of the shuffle, or ""."""
        needs = {
            "shuffle=False": not self.order.shuffle,
            "bucket_by_length": self.order.bucket_by_length,
            "a budget over several partitions or processes": self.budgeted and not self._by_record,
        }
        return next((name for name, holds in needs.items() if holds), "")

    def _residency(self, plan: EpochPlan) -> Residency | None:
        rank, world_size, least = self.world.rank, self.world.world_size, self._memories.slot_records
        if records := self._memories.hold_all:
            return Residency.of_all(plan, records, by_record=self._by_record)
        return Residency.of(plan, rank, world_size, least, at_once=bool(self._needs_all), by_record=self._by_record)

    def _no_window(self) -> str:
        """Return why there can be no resident window, or ""."""
        if self.selection.draws:
            return "does not go with class_balanced, group_weights or the weights of a mix"
        if not self.selection.num_records:
            return "has no records to hold"
        if self.selection.bounds(self._source.axis) is None:
            return f"needs the fewest and most {self._source.axis}s of a record in every manifest; convert the data again"
        residency = self._residency(self._first_plan)
        if residency is None and self._needs_all:
            more = f"expected more window_bytes than {self.order.window_bytes}"
            return f"with {self._needs_all} needs a split that fits in the window; {more}"
        partitions, world_size = self.order.num_partitions, self.world.world_size
        if residency is None and partitions % world_size:
            return (
                f"needs whole partitions for each of {world_size} processes; expected num_partitions to be a multiple of that, "
                f"or more window_bytes than {self.order.window_bytes}"
            )
        if residency is None:
            return (
                f"has room for three groups of the shuffle, and batches of {self.batch_size} need more at once; expected a "
                f"smaller batch_size, or more window_bytes than {self.order.window_bytes}"
            )
        if self.device.type == "cuda":
            try:
                check_window(self.device, self._window_nbytes(residency))
            except UsageError as error:
                return f"does not fit: {error}"
        return ""

    def _window_memory(self, residency: Residency) -> Any:
        """Allocate the memory of a window."""
        raise NotImplementedError

    def _memory_of(self, residency: Residency) -> Any:
        """Return the memory for an iterator's window; raise UsageError if the device has too little."""
        try:
            return self._memories.take(residency, self._window_memory)
        except torch.OutOfMemoryError:
            gigabytes = self._window_nbytes(residency) / 1e9
            raise UsageError(
                f"the resident window takes {gigabytes:.2f} GB on {self.device}, which has less left; expected a smaller "
                f"window_bytes than {self.order.window_bytes}, fewer layers, a narrower dtype, or window='gather'"
            ) from None

    def _window_nbytes(self, residency: Residency) -> int:
        """Return the bytes of a resident window on a GPU."""
        raise NotImplementedError

    @abstractmethod
    def gathered(self, plan: EpochPlan, step: int) -> Any:
        """Gather one batch of this rank as stored, in the caller's thread; `doctor` measures this.

        Args:
            plan: Order of an epoch, from `plan`.
            step: Number of the step in the epoch, from 0.
        """

    @abstractmethod
    def decoded(self, gathered: Any) -> Any:
        """Decode a gathered batch's values to the delivered type, on the device; `doctor` measures this."""

    @abstractmethod
    def _batches(self, plan: EpochPlan, start: Position) -> Generator[LoadedBatch[Batch], None, None]:
        """Yield the batches of this rank from `start` to the end of the epoch; release everything when closed early."""

    def plan(self, epoch: int) -> EpochPlan:
        """Return the order of an epoch's records, as arithmetic; reads nothing.

        Args:
            epoch: Number of the epoch, from 0.
        """
        chosen, lengths = self.selection, self._lengths if self.order.bucket_by_length else None
        counts, nbytes = self._counts, chosen.nbytes
        if not chosen.draws and not counts.all():  # positions stay the same without the shards that deliver nothing
            counts, nbytes = counts[counts > 0], nbytes[counts > 0]
        return EpochPlan(self.order, epoch, counts, nbytes, chosen.draws, chosen.num_draws and self._num_records, lengths)

    def _lengths(self, positions: Ints) -> Ints:
        """Return the lengths of records; called only if the order depends on them."""
        raise NotImplementedError

    @property
    def digest(self) -> EpochDigest:
        """Digest of the records that the newest iterator has delivered on this rank so far, without padding.

        `+` merges the digests of several ranks. The digest is computed from the ids inside the batches. It begins where the
        iterator began: after a resume, add the digest from before the stop.
        """
        return self._delivered.digest

    def check_digest(self, digest: EpochDigest) -> str:
        """Check that an epoch delivered every record once.

        With drop_last=True only the number of records can be checked. If an epoch consists of draws, they are counted. If
        records may be left out, the result says how many were. The first call may read the ids of the split: for a fold, or for
        a data set that was written before manifests kept the sum of the ids.

        Args:
            digest: Sum of the `digest` of all ranks after a whole epoch.

        Returns:
            A sentence, for example `2,816 of 2,816 records, each once`.

        Raises:
            DataError: Records are missing, or were delivered more than once.
            UsageError: `digest` is no digest.
        """
        if not isinstance(digest, EpochDigest):
            raise UsageError(f"digest is {shown(digest)}; expected that of a loader, or a sum of such")
        if self.selection.draws:
            return digest.describe(self._what)
        if self.order.drop_last:
            expected, delivered = self._num_steps * self.order.global_batch_size, digest.records + digest.left_out
            if delivered > self._num_records or (delivered != expected and not self.budgeted):
                expected = self._num_records if self.budgeted else expected
                raise DataError(
                    f"the epoch delivered {digest.records:,} {self._what}; expected {expected:,} with drop_last=True"
                )
            return f"{digest.records:,} of {self._num_records:,} {self._what}, the rest dropped"
        if self._expected_digest is None:
            self._expected_digest = self._expected()
        return digest.check(self._expected_digest, self._what)

    def _expected(self) -> EpochDigest:
        """Return the digest of an epoch that delivers everything once."""
        return self.selection.expected()

    @property
    def _what(self) -> str:
        """What an epoch counts, in words."""
        return "steps of records" if self.order.unit == "step" else "records"

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iterator delivers, from its start.

        Keeps the position if `load_state_dict` has just loaded one in the same epoch.

        Args:
            epoch: Number of the epoch, from 0.

        Raises:
            UsageError: `epoch` is not a whole number of at least 0.
        """
        epoch = whole("epoch", epoch)
        if not (self._loaded and self._next[0] == epoch):
            self._position = self._next = Position(epoch, 0)
            self._len_epoch = epoch
            self._loaded = False

    def state_dict(self) -> dict[str, Any]:
        """Return the position of the loader: batches delivered, not batches read ahead.

        Plain JSON, under 1 KB, costs microseconds. After the last batch, but before the loop has ended, the state still belongs
        to that epoch: a loader that loads it yields an empty rest of the epoch, then the next epoch.
        """
        epoch, step, cursors = self._position
        state = LoaderState(kind=self.kind, order=self.order, epoch=epoch, step=step, counted=self._counted, cursors=cursors)
        return state.to_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next iterator continue at a position that `state_dict` returned.

        Args:
            state: State of a loader of the same kind, data, order and world size.

        Raises:
            StateError: The state does not fit this loader; the loader is unchanged.
        """
        loaded = LoaderState.from_dict(state)
        loaded.check_fits(self.kind, self.order, self._counted)
        self._check_position(loaded)
        self._len_epoch = loaded.epoch
        self._position = self._next = Position(loaded.epoch, loaded.step, loaded.cursors)
        self._loaded = True
        self._newest_iterator = None

    def _check_position(self, state: LoaderState) -> None:
        if not self.budgeted:
            if state.step > self._num_steps:
                raise StateError(f"the state is at step {state.step}; an epoch has {self._num_steps}")
            return
        expected = [self._first_plan.length(partition) for partition in range(self.order.num_partitions)]
        num_cursors = len(expected) if state.step else 0
        if len(state.cursors) != num_cursors or any(map(int.__gt__, state.cursors, expected)):
            raise StateError(
                f"the state is at cursors {list(state.cursors)} of step {state.step}; the partitions have {expected} records"
            )
