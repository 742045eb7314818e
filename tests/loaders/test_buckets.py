"""bucket_by_length: less padding, and every law as without it."""

from __future__ import annotations

from typing import Any

import pytest

import dali_pipeline as dp
from tests import laws


@pytest.fixture
def make(data: dp.Dataset) -> laws.Make:
    def make_loader(**options: Any) -> dp.SequenceLoader:
        chosen = {"data": data, "batch_size": 16, "window_bytes": 10**6, "engine": "torch", "bucket_by_length": True, **options}
        return dp.SequenceLoader(**chosen)

    return make_loader


@pytest.mark.parametrize(
    ("num_partitions", "most"), [(1, 0.25), (4, 0.95)]
)  # few records a partition, and last batches, allow no more
@pytest.mark.parametrize("world_size", [1, 2])
def test_padding_is_less_and_batches_are_mixed(make: laws.Make, world_size: int, num_partitions: int, most: float) -> None:
    def padding(bucket: bool) -> float:
        total = real = 0
        for rank in range(world_size):
            options = {
                "rank": rank,
                "world_size": world_size,
                "batch_size": 8,
                "num_partitions": num_partitions,
                "window_bytes": 10**6,
            }
            loader = make(bucket_by_length=bucket, **options)
            for batch in (batch for _ in range(5) for batch in loader):  # epochs, whose order is another on every machine
                total += batch.sequences.shape[0] * batch.sequences.shape[1]
                real += int(batch.lengths.sum())
        return 1 - real / total

    assert padding(True) < most * padding(False)
    lengths = [int(batch.lengths.max()) for batch in make(window_bytes=10**6)]
    assert lengths != sorted(lengths)


def test_two_epochs_have_other_batches(make: laws.Make) -> None:
    loader = make(window_bytes=10**6)
    first, second = ([frozenset(batch.ids) for batch in loader] for _ in range(2))
    assert len(set(first) & set(second)) < len(first) / 4


def test_unshuffled_is_by_length(make: laws.Make) -> None:
    batches = [batch for batch in make(shuffle=False, window_bytes=10**6) if batch.valid.all()]
    lengths = [length for batch in batches for length in batch.lengths.tolist()]
    assert lengths == sorted(lengths)
    assert len(lengths) > 100
    with pytest.raises(dp.UsageError, match="bucket_by_length is 1; expected True or False"):
        make(bucket_by_length=1)
