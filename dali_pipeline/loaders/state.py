"""LoaderState: the position of a loader as coordinates, and the refusal of a state that does not fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from dali_pipeline.errors import PipelineError
from dali_pipeline.sampling.order import Order
from dali_pipeline.types import Kind

VERSION = 3  # 1: batches crossed more than two groups of the shuffle; 2: keys had names of our own instead of torch's


class StateError(PipelineError):
    """A loader state that belongs to other data or another order, or is no state at all."""


@dataclass(frozen=True, kw_only=True)
class LoaderState:
    """Epoch and step of a loader, with everything that the order depends on. Under 1 KB as JSON.

    Attributes:
        kind: Kind of record that the loader delivers.
        order: Everything that the order of records depends on.
        epoch: Number of the epoch, from 0.
        step: Number of batches delivered in the epoch.
        counted: The steps, or graphs, of each record that are read, if batches are filled by their number; empty for all.
        cursors: Records delivered of each partition over all ranks, with a budget; otherwise empty.
        version: Version of this state's format.
    """

    kind: Kind
    order: Order
    epoch: int
    step: int
    counted: str = ""
    cursors: tuple[int, ...] = ()
    version: int = VERSION

    def to_dict(self) -> dict[str, Any]:
        """Return the state in plain JSON types."""
        return {**dataclasses.asdict(self), "cursors": list(self.cursors)}

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> LoaderState:
        """Return the state that `to_dict` gave; raises StateError for anything else, and for another version."""
        version = state.get("version") if isinstance(state, Mapping) else None
        if isinstance(version, int) and version != VERSION:
            raise StateError(
                f"the state is of version {version}, and this release reads version {VERSION}; "
                "begin the epoch anew with set_epoch"
            )
        try:
            loaded = msgspec.convert(dict(state), cls)
        except (msgspec.ValidationError, TypeError, ValueError) as error:
            raise StateError(f"not a loader state ({error}); expected what state_dict() returned") from None
        if min(loaded.epoch, loaded.step, *loaded.cursors) < 0:
            raise StateError(f"the state is at epoch {loaded.epoch}, step {loaded.step}; expected 0 or more")
        return loaded

    def check_fits(self, kind: Kind, order: Order, counted: str) -> None:
        """Raise StateError, which names the first difference and both values, unless these are the state's own."""
        if self.kind != kind:
            raise StateError(f"the state is of a loader of {self.kind}; this one loads {kind}")
        for field in dataclasses.fields(Order):
            theirs, ours = getattr(self.order, field.name), getattr(order, field.name)
            if theirs != ours:
                name = "data set digest" if field.name == "digest" else field.name
                raise StateError(f"the state has {name} {theirs!r}; this loader has {ours!r}")
        if self.counted != counted:
            what = "steps" if kind == "sequences" else "graphs"
            theirs, ours = self.counted or "that a record has", counted or "that a record has"
            raise StateError(
                f"the state is of batches filled by the {what} {theirs}; this loader fills them by the {what} {ours}"
            )
