"""Order: all that the order of an epoch depends on; and the hashed keys that it is made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import xxhash

from dali_pipeline.errors import UsageError
from dali_pipeline.runtime.checks import one_of, whole
from dali_pipeline.types import Ints

Tail = Literal["pad", "drop"]
TAILS: tuple[Tail, ...] = get_args(Tail)
WINDOW_BYTES = 256 << 20
Keys = npt.NDArray[np.uint64]
RUNS, WITHIN_GROUPS, ACROSS_GROUPS, TURNS, BUCKETS = range(5)  # purposes of a key


@dataclass(frozen=True, kw_only=True)
class Order:
    """All that the order of a split depends on. The same Order and the same shards give the same epochs, for ever.

    digest: of the manifest · window_bytes: of shards open at a time · lanes: disjoint sets of shards, each with a window of
    its own; a global batch takes equal shares of every lane. Lanes differ by a shard or so: tail "pad" fills the shorter
    ones up, "drop" leaves the rest of the longer ones out. bucket_by_length: neighbouring batches exchange records ·
    max_nodes, max_edges: a budget of each rank's batch, which then has no number of records; `global_batch_size` is `lanes`.
    """

    digest: str
    split: str
    seed: int
    shuffle: bool
    max_nodes: int | None = None
    max_edges: int | None = None
    lanes: int
    global_batch_size: int
    window_bytes: int
    tail: Tail
    bucket_by_length: bool = False

    def __post_init__(self) -> None:
        limits = {"seed": (0, 2**64 - 1), "global_batch_size": (1, 2**31), "window_bytes": (1, 2**62), "lanes": (1, 2**31)}
        limits |= {name: (1, 2**62) for name in ("max_nodes", "max_edges") if getattr(self, name) is not None}
        for name, (least, most) in limits.items():
            object.__setattr__(self, name, whole(name, getattr(self, name), least, most))
        one_of("tail", self.tail, TAILS)
        if self.global_batch_size % self.lanes:
            raise UsageError(f"the global batch size {self.global_batch_size} does not divide by {self.lanes} lanes")


def hashed_keys(index: Ints, key: int) -> Keys:
    """A 64-bit key for every index: SplitMix64's finaliser (Steele, Lea and Flood 2014), twice, the second time keyed."""
    return _mix(_mix(index.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)) ^ np.uint64(key))


def _mix(z: Keys) -> Keys:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def purpose_key(order: Order, epoch: int, purpose: int) -> int:
    """A 64-bit key for one purpose in one epoch, from the order's seed, split and data."""
    seed_low, seed_high, split = order.seed & 0xFFFFFFFF, order.seed >> 32, xxhash.xxh32_intdigest(order.split.encode())
    words = [seed_low, seed_high, epoch, purpose, split, int(order.digest, 16)]
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0])
