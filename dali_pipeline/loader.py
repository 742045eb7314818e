"""Loader: what both loaders share. The epoch and step they stand at, the plan, the state; and gathering ahead in threads."""

from __future__ import annotations

from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, TypeVar

import torch
from torch.utils.data import IterableDataset, get_worker_info

from dali_pipeline.manifest import Dataset
from dali_pipeline.plan import EpochPlan, Order, Tail
from dali_pipeline.schema import DataError, Kind, UsageError
from dali_pipeline.source import Layers
from dali_pipeline.state import LoaderState, StateError
from dali_pipeline.world import World

Batch = TypeVar("Batch", covariant=True)
Workers = int | Literal["auto"]
T = TypeVar("T")
R = TypeVar("R")


class Loader(IterableDataset[Batch]):
    """Yields whole batches of this rank, epoch after epoch.

    Every `for` is the next epoch, also after a `break`. Each iterator is independent of the others; `state_dict` speaks for
    the one begun last. Subclasses say how the batches of a plan are made.
    """

    kind: Kind

    def __init__(
        self,
        data: Dataset,
        *,
        split: str,
        batch_size: int,
        shuffle: bool,
        seed: int,
        device: str | torch.device,
        window_bytes: int,
        lanes: int,
        workers: Workers,
        tail: Tail,
        on_error: str,
        rank: int | None,
        world_size: int | None,
    ) -> None:
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise UsageError(f"batch_size is {batch_size!r}; expected a whole number of at least 1")
        if workers != "auto" and (isinstance(workers, bool) or not isinstance(workers, int) or workers < 0):
            raise UsageError(f"workers is {workers!r}; expected 'auto' or a whole number of at least 0")
        if not isinstance(data, Dataset):
            raise UsageError(f"data is {data!r}; expected what open_dataset gives")
        if not isinstance(shuffle, bool):
            raise UsageError(f"shuffle is {shuffle!r}; expected True or False")
        if on_error != "raise":
            raise UsageError(f"on_error is {on_error!r}; expected 'raise'")
        self.data, self.split, self.batch_size, self.workers = data, split, batch_size, workers
        self.world = World.detect(rank, world_size)
        self.device = resolve_device(device, self.world)
        self.order = Order(
            digest=data.digest,
            split=split,
            seed=seed,
            shuffle=shuffle,
            global_batch_size=batch_size * self.world.world_size,
            window_bytes=window_bytes,
            lanes=lanes,
            tail=tail,
        )
        self._table = data.table(split, self.kind)
        self._num_steps = self._plan(epoch=0).num_steps  # the same in every epoch
        if not self._num_steps and self.num_records:
            raise DataError(f"split {split!r} has {self.num_records} records, too few for one batch with tail='drop'")
        self._position = (0, 0)  # epoch and step that state_dict tells
        self._next = (0, 0)  # epoch and step that the next iterator begins at
        self._loaded = False  # a loaded state waits for its iterator
        self._newest: object = None  # the iterator begun last

    def __len__(self) -> int:
        """Steps of an epoch, the same on every rank."""
        return self._num_steps

    @property
    def num_records(self) -> int:
        """Records of the split, over all ranks, padding not counted."""
        return sum(self._table.records)

    def __iter__(self) -> Iterator[Batch]:
        if get_worker_info() is not None:
            raise UsageError(
                "this loader has workers of its own; wrap it with DataLoader(loader, batch_size=None, num_workers=0)"
            )
        epoch, step = self._next
        self._position, self._next, self._loaded = (epoch, step), (epoch + 1, 0), False
        self._newest = token = object()
        return self._run(token, epoch, step)

    def _run(self, token: object, epoch: int, step: int) -> Iterator[Batch]:
        for batch in self._batches(self._plan(epoch), step):
            step += 1
            if self._newest is token:
                self._position = (epoch, step)
            yield batch
        if self._newest is token:
            self._position = self._next  # epoch + 1, unless set_epoch chose another meanwhile

    @abstractmethod
    def _batches(self, plan: EpochPlan, start: int) -> Iterator[Batch]:
        """The batches of this rank from step `start` to the end of the epoch, nothing left behind when closed early."""

    def _plan(self, epoch: int) -> EpochPlan:
        return EpochPlan(self.order, epoch, self._table.records, self._table.bytes)

    def set_epoch(self, epoch: int) -> None:
        """Chooses the next epoch, from its start; where a just loaded state stands in that epoch, the position stays."""
        if isinstance(epoch, bool) or not isinstance(epoch, int) or epoch < 0:
            raise UsageError(f"epoch is {epoch!r}; expected a whole number of at least 0")
        if not (self._loaded and self._next[0] == epoch):
            self._position = self._next = (epoch, 0)
            self._loaded = False

    def state_dict(self) -> dict[str, Any]:
        """Where the loader stands: batches delivered, whatever was read ahead. Plain JSON, under 1 KB, costs microseconds.

        Behind the last batch, but before the loop has ended, the state still is of that epoch: a loader that takes it
        gives an empty rest, then the next epoch.
        """
        epoch, step = self._position
        return LoaderState(kind=self.kind, order=self.order, epoch=epoch, step=step).to_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The next iterator goes on where `state` stood. Raises StateError, and changes nothing, where it does not fit."""
        found = LoaderState.from_dict(state)
        found.check_fits(self.kind, self.order)
        if found.step > self._num_steps:
            raise StateError(f"the state is at step {found.step}; an epoch has {self._num_steps}")
        self._position = self._next = (found.epoch, found.step)
        self._loaded = True
        self._newest = None


def resolve_device(device: str | torch.device, world: World) -> torch.device:
    """`auto`: this process's own GPU where there is one, else the CPU. Raises UsageError for a GPU that is not there."""
    if device == "auto":
        return (
            torch.device("cuda", world.local_rank % torch.cuda.device_count())
            if torch.cuda.is_available()
            else torch.device("cpu")
        )
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        found = torch.device("meta")
    if found.type not in ("cpu", "cuda"):
        raise UsageError(f"device is {str(device)!r}; expected 'auto', 'cpu', 'cuda' or 'cuda:N'")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"device is {str(device)!r}, but torch sees {torch.cuda.device_count()} GPUs")
    return torch.device("cuda", torch.cuda.current_device()) if found.type == "cuda" and found.index is None else found


def check_delivery(layers: Layers, dtype: torch.dtype) -> None:
    """Raises UsageError for layers that choose nothing in particular, or a dtype that is no floating type of torch."""
    whole = isinstance(layers, Sequence) and all(isinstance(each, int) and not isinstance(each, bool) for each in layers)
    if layers is not None and not isinstance(layers, slice) and not whole:
        raise UsageError(f"layers are {layers!r}; expected a slice, a list of whole numbers, or None")
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise UsageError(f"dtype is {dtype!r}; expected a floating type such as torch.float32")


def map_ahead(function: Callable[[T], R], items: Iterable[T], threads: int) -> Generator[R, None, None]:
    """`map` in order, `threads` background threads working up to two results ahead each; 0 is the caller's own thread.

    Closed early, it waits for what is running and leaves no thread behind.
    """
    if not threads:
        yield from map(function, items)
        return
    pool = ThreadPoolExecutor(threads, thread_name_prefix="gather")
    pending: deque[Any] = deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > 2 * threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
