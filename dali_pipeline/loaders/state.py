"""LoaderState: where a loader stands, as coordinates; and the one-sentence refusal of a state that does not fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from dali_pipeline.errors import PipelineError
from dali_pipeline.sampling.order import Order
from dali_pipeline.types import Kind

VERSION = 3  # 1: before batches were kept within two groups of the shuffle; 2: before its words were torch's


class StateError(PipelineError):
    """A loader state that belongs to other data or another order, or is no state at all."""


@dataclass(frozen=True, kw_only=True)
class LoaderState:
    """Epoch and step (batches delivered in it), with everything that the order depends on. Under 1 KB as JSON.

    cursors: with a budget, records delivered of each partition, over all ranks.
    """

    kind: Kind
    order: Order
    epoch: int
    step: int
    cursors: tuple[int, ...] = ()
    version: int = VERSION

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
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
            found = msgspec.convert(dict(state), cls)
        except (msgspec.ValidationError, TypeError, ValueError) as error:
            raise StateError(f"not a loader state ({error}); expected what state_dict() returned") from None
        if min(found.epoch, found.step, *found.cursors) < 0:
            raise StateError(f"the state is at epoch {found.epoch}, step {found.step}; expected 0 or more")
        return found

    def check_fits(self, kind: Kind, order: Order) -> None:
        """Raises StateError naming the first difference, and both values, unless the state is of this kind and order."""
        if self.kind != kind:
            raise StateError(f"the state is of a loader of {self.kind}; this one loads {kind}")
        for field in dataclasses.fields(Order):
            theirs, ours = getattr(self.order, field.name), getattr(order, field.name)
            if theirs != ours:
                name = "data set digest" if field.name == "digest" else field.name
                raise StateError(f"the state has {name} {theirs!r}; this loader has {ours!r}")
