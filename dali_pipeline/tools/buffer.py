"""Simulate the order that a shuffle buffer delivers, to compare it with the order of a shuffle window.

Records 0 to N - 1 enter in order. Once `capacity` records are inside, a record drawn at random leaves for each that enters. At
the end the rest leave in random order. TensorFlow's `shuffle` and WebDataset's `shuffle` do this.
"""

from __future__ import annotations

import numpy as np

from dali_pipeline.types import Ints


def replay_buffer(num_records: int, capacity: int, rng: np.random.Generator) -> Ints:
    """Return the order (N,) in which a shuffle buffer delivers records 0 to N - 1 in one epoch; costs one sort.

    A record takes the slot of the record that was delivered just before, so it leaves when its slot is drawn next.
    """
    picks = rng.integers(capacity, size=num_records - capacity)
    slots = np.concatenate([np.arange(capacity), picks])  # (N,) slot that each record enters
    order = np.argsort(slots, kind="stable")  # by slot, then by time
    followed = np.append(slots[order[:-1]] == slots[order[1:]], False)
    delivered = np.empty(num_records, np.int64)
    delivered[order[1:][followed[:-1]] - capacity] = order[followed]
    delivered[num_records - capacity :] = rng.permutation(order[~followed])
    return delivered


def sample_buffer(num_records: int, capacity: int, firsts: Ints, size: int, rng: np.random.Generator) -> Ints:
    """Sample batches (batches, size) that begin at places `firsts` (batches,), each from an epoch of its own.

    Costs O(size) per batch, because no epoch is replayed. Backwards from a batch, each earlier draw hits one of the m slots
    that are still sought with probability m / capacity, so the waits are geometric. A slot that is never hit holds its first
    record. The distribution is exact for any N.
    """
    draws = num_records - capacity  # before the buffer runs empty
    places = firsts[:, None] + np.arange(size)
    slots = rng.integers(capacity, size=places.shape)
    for row in np.flatnonzero(places[:, -1] >= draws):  # the rest leaves in random order: slots without repetition
        late = places[row] >= draws
        slots[row, late] = rng.choice(capacity, int(late.sum()), replace=False)
    # filled: (batches, slots) record in each different slot that a batch can draw from; -1 if the slot was never refilled
    sought = np.arange(min(size, capacity), 0, -1)
    waits = np.cumsum(rng.geometric(sought / capacity, size=(len(firsts), len(sought))), axis=1)
    hit = np.minimum(firsts, draws)[:, None] - waits  # the draw after which the slot was last filled; negative for never
    filled = rng.permuted(np.where(hit >= 0, hit + capacity, -1), axis=1)
    earlier = _earlier(slots)  # a slot that is drawn twice delivers the record that entered at the first draw
    held = np.take_along_axis(filled, np.maximum(np.cumsum(earlier < 0, axis=1) - 1, 0), axis=1)
    held = np.where(held >= 0, held, slots)
    return np.where(earlier >= 0, firsts[:, None] + earlier + capacity, held)


def _earlier(rows: Ints) -> Ints:
    """Return, for each value, the column of the last equal value before it in its row, or -1."""
    order = np.argsort(rows, axis=1, kind="stable")
    ordered = np.take_along_axis(rows, order, axis=1)
    earlier = np.full(rows.shape, -1)
    np.put_along_axis(earlier, order[:, 1:], np.where(ordered[:, 1:] == ordered[:, :-1], order[:, :-1], -1), axis=1)
    return earlier
