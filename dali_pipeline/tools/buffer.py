"""buffer: the order that a shuffle buffer delivers, which is what a window is held against.

Records 0 to N - 1 enter in order; once `capacity` are inside, one drawn at random leaves for each that enters, and at the end
the rest leave in random order. TensorFlow's `shuffle` and WebDataset's `shuffle` do this.
"""

from __future__ import annotations

import numpy as np

from dali_pipeline.types import Ints


def replay_buffer(num_records: int, capacity: int, rng: np.random.Generator) -> Ints:
    """Delivered order (N,) of a shuffle buffer over records 0 to N - 1: an epoch replayed, by one sort.

    Record i takes the slot that the record delivered before it left, so a record leaves when its slot is next drawn.
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
    """Batches (batches, size) that begin at places `firsts` (batches,), each drawn from an epoch of its own: O(size) a batch.

    Nothing is replayed. Looking back from a batch, each earlier draw hits one of the m slots still looked for with probability
    m / capacity, so the waits are geometric; a slot never hit holds what it was filled with. Exact in law, any N.
    """
    draws = num_records - capacity  # before the buffer runs empty
    places = firsts[:, None] + np.arange(size)
    slots = rng.integers(capacity, size=places.shape)
    for row in np.flatnonzero(places[:, -1] >= draws):  # what is left leaves in random order: slots without repetition
        late = places[row] >= draws
        slots[row, late] = rng.choice(capacity, int(late.sum()), replace=False)
    # filled: (batches, slots) record in each of as many different slots as a batch can draw from, -1 for never refilled
    sought = np.arange(min(size, capacity), 0, -1)
    waits = np.cumsum(rng.geometric(sought / capacity, size=(len(firsts), len(sought))), axis=1)
    hit = np.minimum(firsts, draws)[:, None] - waits  # the draw behind which the slot was filled last; negative for never
    filled = rng.permuted(np.where(hit >= 0, hit + capacity, -1), axis=1)
    earlier = _earlier(slots)  # a slot drawn twice in a batch delivers what came in at the first of both draws
    found = np.take_along_axis(filled, np.maximum(np.cumsum(earlier < 0, axis=1) - 1, 0), axis=1)
    found = np.where(found >= 0, found, slots)
    return np.where(earlier >= 0, firsts[:, None] + earlier + capacity, found)


def _earlier(rows: Ints) -> Ints:
    """Of each value the column where its row last had the same one before, -1 for none."""
    order = np.argsort(rows, axis=1, kind="stable")
    ordered = np.take_along_axis(rows, order, axis=1)
    found = np.full(rows.shape, -1)
    np.put_along_axis(found, order[:, 1:], np.where(ordered[:, 1:] == ordered[:, :-1], order[:, :-1], -1), axis=1)
    return found
