"""LoaderOptions: check the arguments that both loaders share."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch

from dali_pipeline.errors import FormatError, PipelineError, UsageError
from dali_pipeline.format.layers import Layers
from dali_pipeline.reading.source import NotFiniteError, Wanted
from dali_pipeline.runtime.checks import MOST, one_of, shown, truth, whole
from dali_pipeline.sampling.order import Order

NumWorkers = int | Literal["auto"]
OnError = Literal["raise", "skip"]
OnNan = Literal["keep", "raise", "skip"]
WindowKind = Literal["auto", "resident", "gather"]
Unit = Literal["record", "step"]
TRUTHS = ("shuffle", "bucket_by_length", "class_balanced", "count_padding", "packed")


@dataclass(frozen=True, kw_only=True, eq=False)
class LoaderOptions:
    """The arguments that both loaders share, in plain Python types; `SequenceLoader` documents each.

    Raises:
        UsageError: A loader does not accept an argument.
    """

    split: str
    batch_size: int
    shuffle: bool
    seed: int
    drop_last: bool
    num_workers: NumWorkers
    layers: Layers
    fields: Collection[str] | None
    device: str | torch.device
    dtype: torch.dtype
    window_bytes: int
    num_partitions: int
    on_error: OnError
    on_nan: OnNan
    class_balanced: bool
    group_weights: Mapping[str, float] | None
    rank: int | None
    world_size: int | None
    bucket_by_length: bool = False
    max_nodes: int | None = None
    max_edges: int | None = None
    max_steps: int | None = None
    count_padding: bool = True
    packed: bool = False
    steps: Layers = None
    unit: Unit = "record"
    mask: str | None = None
    labels: str | None = None

    def __post_init__(self) -> None:
        one_of("on_error", self.on_error, get_args(OnError))
        one_of("on_nan", self.on_nan, get_args(OnNan))
        plain = {name: truth(name, getattr(self, name)) for name in TRUTHS}
        object.__setattr__(self, "batch_size", whole("batch_size", self.batch_size, 1))
        object.__setattr__(self, "window_bytes", whole("window_bytes", self.window_bytes, 1, 2**62))
        if not (isinstance(self.num_workers, str) and self.num_workers == "auto"):
            expected = "'auto' or a whole number of at least 0"
            object.__setattr__(self, "num_workers", whole("num_workers", self.num_workers, expected=expected))
        if not isinstance(self.dtype, torch.dtype) or not self.dtype.is_floating_point:
            raise UsageError(f"dtype is {shown(self.dtype)}; expected a floating type such as torch.float32")
        object.__setattr__(self, "layers", plain_selection("layers", self.layers))
        object.__setattr__(self, "steps", plain_selection("steps", self.steps))
        names = self.fields
        if names is not None and (
            not isinstance(names, list | tuple | set | frozenset) or not all(isinstance(name, str) for name in names)
        ):
            raise UsageError(f"fields are {shown(names)}; expected a list of names such as ['token_ids'], [] or None")
        for name, value in plain.items():
            object.__setattr__(self, name, value)
        self._check_unit()

    def _check_unit(self) -> None:
        """Raise UsageError for what does not go with single steps, and for a mask or labels of theirs without them."""
        one_of("unit", self.unit, get_args(Unit))
        purposes = {"mask": "leaves out single steps", "labels": "are those of single steps"}
        for name, purpose in purposes.items():
            given = getattr(self, name)
            if given is not None and not isinstance(given, str):
                raise UsageError(f"{name} is {shown(given)}; expected the name of a step field such as 'loss_mask', or None")
            if given is not None and self.unit == "record":
                raise UsageError(f"{name} {purpose}, so it goes with unit='step' only; expected {name}=None")
        if self.unit == "record":
            return
        unfit = {
            "max_steps": self.max_steps is not None,
            "bucket_by_length=True": self.bucket_by_length,
            "packed=True": self.packed,
            "class_balanced=True": self.class_balanced,
            "group_weights": self.group_weights is not None,
        }
        for name, given in unfit.items():
            if given:
                raise UsageError(f"unit='step' delivers single steps, batch_size of them at a time; it does not go with {name}")

    @property
    def budgeted(self) -> bool:
        """Whether batches have a number of nodes, edges or steps instead of a number of records."""
        return any(limit is not None for limit in (self.max_nodes, self.max_edges, self.max_steps))

    @property
    def skips(self) -> tuple[type[PipelineError], ...]:
        """The errors for which a record is left out."""
        errors: list[type[PipelineError]] = []
        if self.on_error == "skip":
            errors.append(FormatError)
        if self.on_nan == "skip":
            errors.append(NotFiniteError)
        return tuple(errors)

    def wanted(self, layers: Layers, row_layers: Sequence[int] | None = None) -> Wanted:
        """Return what is read of each record, from the positions of the chosen steps or graphs, and of layers of a row."""
        return Wanted(
            layers=layers,
            row_layers=row_layers,
            fields=self.fields if self.fields is None or self.labels is None else {*self.fields, self.labels},
            window_bytes=self.window_bytes,
            finite=self.on_nan != "keep",
        )

    def order(self, digest: str, world_size: int) -> Order:
        """Return everything that the order of records depends on, for data with this digest."""
        return Order(
            digest=digest,
            split=self.split,
            seed=self.seed,
            shuffle=self.shuffle,
            max_nodes=self.max_nodes,
            max_edges=self.max_edges,
            max_steps=self.max_steps,
            count_padding=self.count_padding,
            global_batch_size=self.num_partitions if self.budgeted else self.batch_size * world_size,
            window_bytes=self.window_bytes,
            num_partitions=self.num_partitions,
            drop_last=self.drop_last,
            bucket_by_length=self.bucket_by_length,
            unit=self.unit,
            mask=self.mask,
        )


def plain_selection(name: str, chosen: Layers) -> Layers:
    """Return `layers` or `steps` as plain ints in a slice or a list; raises UsageError for anything else."""
    if chosen is None:
        return None
    expected = "a slice, a list of whole numbers, or None"
    try:
        if isinstance(chosen, slice):
            begin, end, step = (
                None if bound is None else whole(name, bound, -MOST) for bound in (chosen.start, chosen.stop, chosen.step)
            )
            if step != 0:
                return slice(begin, end, step)
        elif isinstance(chosen, Sequence | np.ndarray) and not isinstance(chosen, str | bytes) and np.ndim(chosen) == 1:
            return [whole(name, number, -MOST) for number in chosen]
    except (UsageError, ValueError):  # nested lists of different lengths
        pass
    raise UsageError(f"{name} are {shown(chosen)}; expected {expected}")
