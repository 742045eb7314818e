"""Order: everything that the order of an epoch depends on, and the hashed keys that it is computed from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import xxhash

from dali_pipeline.errors import UsageError
from dali_pipeline.runtime.checks import truth, whole
from dali_pipeline.types import Ints

WINDOW_BYTES = 256 << 20
Keys = npt.NDArray[np.uint64]
RUNS, WITHIN_GROUPS, ACROSS_GROUPS, TURNS, BUCKETS = range(5)  # purposes of a key


@dataclass(frozen=True, kw_only=True)
class Order:
    """Everything that the order of a split depends on. The same Order and the same shards always give the same epochs.

    Attributes:
        digest: Digest of the manifest, 32 hexadecimal digits.
        split: Name of the split.
        seed: Seed of the shuffle, 0 to 2**64 - 1.
        shuffle: Whether records are shuffled; otherwise they come in file order.
        max_nodes: Budget of nodes per rank and batch, or None. With a budget, a batch has no fixed number of records, and
            `global_batch_size` is `num_partitions`.
        max_edges: Budget of edges per rank and batch, or None.
        max_steps: Budget of steps of sequences per rank and batch, or None.
        count_padding: Whether the steps of a batch are counted with its padding.
        num_partitions: Number of disjoint sets of shards, each with a window of its own. A global batch takes an equal share of
            each.
        global_batch_size: Records per step over all ranks.
        window_bytes: Bytes of shards that are shuffled together at a time.
        drop_last: Partitions differ by about a shard. False fills the shorter ones up with padding; True leaves out the rest of
            the longer ones.
        bucket_by_length: Whether neighbouring batches exchange records, so that lengths within a batch are alike.
        unit: What is shuffled: "record", or "step" for single steps of sequences, which then count as records.
        mask: Name of the step field that says which steps are delivered, or None.
    """

    digest: str
    split: str
    seed: int
    shuffle: bool
    max_nodes: int | None = None
    max_edges: int | None = None
    max_steps: int | None = None
    count_padding: bool = True
    num_partitions: int
    global_batch_size: int
    window_bytes: int
    drop_last: bool
    bucket_by_length: bool = False
    unit: str = "record"
    mask: str | None = None

    def __post_init__(self) -> None:
        limits = {
            "seed": (0, 2**64 - 1),
            "global_batch_size": (1, 2**31),
            "window_bytes": (1, 2**62),
            "num_partitions": (1, 2**31),
        }
        limits |= {name: (1, 2**62) for name in ("max_nodes", "max_edges", "max_steps") if getattr(self, name) is not None}
        for name, (least, most) in limits.items():
            object.__setattr__(self, name, whole(name, getattr(self, name), least, most))
        object.__setattr__(self, "drop_last", truth("drop_last", self.drop_last))
        if self.global_batch_size % self.num_partitions:
            raise UsageError(
                f"the global batch size {self.global_batch_size} does not divide by {self.num_partitions} partitions"
            )


def hashed_keys(index: Ints, key: int) -> Keys:
    """Return a 64-bit key per index: the finaliser of SplitMix64 (Steele, Lea and Flood 2014), twice, the second time keyed."""
    return _mix(_mix(index.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)) ^ np.uint64(key))


def hashed_order(index: Ints, key: int) -> Ints:
    """Return the order that sorts distinct `index` by its hashed keys, (N,).

    Every step of the hash can be reversed, so keys are distinct too, and the order does not depend on the sort. Numbers are
    sorted several times faster than they are argsorted: these are the keys with their lowest bits replaced by where they were.
    """
    keys, bits = hashed_keys(index, key), np.uint64(len(index).bit_length())
    behind = (np.uint64(1) << bits) - np.uint64(1)
    packed = keys & ~behind
    packed |= np.arange(len(keys), dtype=np.uint64)
    packed.sort()
    order: Ints = (packed & behind).view(np.int64)
    packed >>= bits
    alike = np.flatnonzero(packed[1:] == packed[:-1])  # neighbours whose keys differ in their lowest bits alone
    if len(alike):
        alike = np.union1d(alike, alike + 1)
        order[alike] = order[alike][np.argsort(keys[order[alike]])]
    return order


def _mix(z: Keys) -> Keys:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def purpose_key(order: Order, epoch: int, purpose: int) -> int:
    """Return a 64-bit key for one purpose in one epoch, from the order's seed, split and data."""
    seed_low, seed_high, split = order.seed & 0xFFFFFFFF, order.seed >> 32, xxhash.xxh32_intdigest(order.split.encode())
    words = [seed_low, seed_high, epoch, purpose, split, int(order.digest, 16)]
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0])
