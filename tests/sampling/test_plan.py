from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dali_pipeline.errors import DataError, UsageError
from dali_pipeline.sampling import order as order_module
from dali_pipeline.sampling import plan as plan_module
from dali_pipeline.sampling.draws import Draws
from dali_pipeline.sampling.order import Order, hashed_keys
from dali_pipeline.sampling.plan import EpochPlan, deal_shards
from dali_pipeline.sampling.shuffle import WindowShuffle


def order(**options: Any) -> Order:
    default: dict[str, Any] = {"digest": "0" * 31 + "7", "split": "train", "seed": 0, "shuffle": True}
    default |= {"global_batch_size": 4, "window_bytes": 1 << 20, "num_partitions": 1, "drop_last": False}
    return Order(**{**default, **options})


def test_hashed_order_sorts_by_whole_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the upper bits of some keys are equal, which random keys hardly ever have."""
    rng = np.random.default_rng(0)
    for size in (0, 1, 2, 7, 1000, 5000):
        index = rng.permutation(10 * size)[:size]
        assert order_module.hashed_order(index, 5).tolist() == np.argsort(hashed_keys(index, 5)).tolist()
    for alike in (1, 3, 500):  # keys in a row that differ in the lowest bits alone
        keys = rng.choice(2**20, 1000, replace=False).astype(np.uint64) << np.uint64(40)
        keys[:alike] = keys[0] | rng.permutation(alike).astype(np.uint64)
        keys = rng.permutation(keys)
        monkeypatch.setattr(order_module, "hashed_keys", lambda index, key, keys=keys: keys)
        assert order_module.hashed_order(np.arange(1000), 0).tolist() == np.argsort(keys).tolist()


shards = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 300)), min_size=1, max_size=30)
worlds = st.integers(1, 16)


@settings(deadline=None, max_examples=150)
@given(
    shards=shards,
    world_size=worlds,
    batch_size=st.integers(1, 7),
    num_partitions=st.integers(1, 4),
    seed=st.integers(0, 2**64 - 1),
    epoch=st.integers(0, 1000),
    window_share=st.sampled_from([0.01, 0.05, 0.3, 2.0]),
    shuffle=st.booleans(),
    drop_last=st.booleans(),
)
def test_every_record_once_in_equal_steps(
    shards: list[tuple[int, int]],
    world_size: int,
    batch_size: int,
    num_partitions: int,
    seed: int,
    epoch: int,
    window_share: float,
    shuffle: bool,
    drop_last: bool,
) -> None:
    """Laws 1 to 4 of the plan alone, for any sizes of shards, worlds, partitions and windows."""
    records = [n for n, _ in shards]
    nbytes = [n * size for n, size in shards]
    num_partitions = min(num_partitions, len(shards))
    size = batch_size * world_size * num_partitions
    window = max(1, int(window_share * sum(nbytes)))
    settings = order(
        seed=seed,
        shuffle=shuffle,
        global_batch_size=size,
        window_bytes=window,
        num_partitions=num_partitions,
        drop_last=drop_last,
    )
    plan = EpochPlan(settings, epoch, records, nbytes)
    alone = [plan.batch(step) for step in range(plan.num_steps)]
    taken = np.concatenate([batch.positions[batch.valid] for batch in alone]) if alone else np.array([], np.int64)
    assert len(np.unique(taken)) == len(taken)
    if not drop_last:
        assert sorted(taken) == list(range(sum(records)))
    else:
        assert all(batch.valid.all() for batch in alone)
    for step, batch in enumerate(alone):
        ranks = [plan.batch(step, rank, world_size) for rank in range(world_size)]
        assert {len(rank.positions) for rank in ranks} == {plan.rows(world_size)}
        assert plan.rows(world_size) <= batch_size * num_partitions
        if plan.rows(world_size) < batch_size * num_partitions:
            assert plan.num_steps == 1
        found, valid = (np.concatenate([getattr(rank, name) for rank in ranks]) for name in ("positions", "valid"))
        assert np.array_equal(found[valid], batch.positions[batch.valid])
        if plan.num_steps > 1:
            assert np.array_equal(found, batch.positions)


@settings(deadline=None, max_examples=60)
@given(shards=shards, num_partitions=st.integers(2, 4), epoch=st.integers(0, 5))
def test_partitions_are_disjoint_shards(shards: list[tuple[int, int]], num_partitions: int, epoch: int) -> None:
    """Law 4: with as many ranks as partitions, a rank meets only its own shards, in every epoch."""
    num_partitions = min(num_partitions, len(shards))
    records = np.array([n for n, _ in shards])
    plan = EpochPlan(
        order(global_batch_size=2 * num_partitions, num_partitions=num_partitions, window_bytes=500),
        epoch,
        records,
        [n * s for n, s in shards],
    )
    ends = np.cumsum(records)
    partition_of_shard = deal_shards(records, num_partitions)
    for step in range(plan.num_steps):
        for rank in range(num_partitions):
            met = np.searchsorted(ends, plan.batch(step, rank, num_partitions).positions, side="right")
            assert set(partition_of_shard[met]) == {rank}
    totals = [records[partition_of_shard == partition].sum() for partition in range(num_partitions)]
    assert max(totals) - min(totals) <= records.max()


def test_window_bounds_what_is_open() -> None:
    """At any place the records come from at most one window of bytes, and neighbouring places share a part of it."""
    records, nbytes = [64] * 256, [1 << 20] * 256  # 16 KiB a record, 256 MiB
    window = 16 << 20
    plan = EpochPlan(order(window_bytes=window, global_batch_size=64), 0, records, nbytes)
    # runs of an eighth of a shard, each charged for the one hash block that it lies in
    shards = [set(plan.batch(step).positions // 8) for step in range(plan.num_steps)]
    opened: dict[int, int] = {}
    closed: dict[int, int] = {}
    for step, met in enumerate(shards):
        for shard in met:
            opened.setdefault(shard, step)
            closed[shard] = step
    for step in range(plan.num_steps):
        assert sum(opened[shard] <= step <= closed[shard] for shard in opened) * (1 << 20) <= 1.5 * window
    first, last = shards[0], shards[-1]
    assert not first & last
    assert all(len(met) > 4 for met in shards)
    assert all(now & after for now, after in itertools.pairwise(shards))


def test_small_partition_is_a_full_permutation() -> None:
    """All that fits in the window mixes evenly: any quarter of the epoch holds a quarter of each quarter of the file."""
    plan = EpochPlan(order(window_bytes=1 << 30, global_batch_size=1000), 3, [1000] * 4, [4096] * 4)
    table = [np.bincount(plan.batch(step).positions // 1000, minlength=4) for step in range(4)]
    assert np.abs(np.array(table) - 250).max() < 60
    assert plan.num_steps == 4


def test_file_order_without_shuffle() -> None:
    plan = EpochPlan(order(shuffle=False), 9, [3, 4], [10, 10])
    assert [plan.batch(step).positions.tolist() for step in range(2)] == [[0, 1, 2, 3], [4, 5, 6, 6]]
    assert plan.batch(1).valid.tolist() == [True, True, True, False]


def test_golden_order() -> None:
    """Pinned: an epoch begun with one version of this package, NumPy or Python must go on with another. Never change this
    without a new version of the state, which refuses the old one."""
    plan = EpochPlan(order(window_bytes=4), 1, [4, 4, 3, 5], [2 << 20] * 4)
    assert [plan.batch(step).positions.tolist() for step in range(4)] == [
        [9, 14, 6, 1],
        [11, 12, 0, 13],
        [8, 7, 10, 5],
        [3, 2, 15, 4],
    ]
    # runs within shards, several windows, two partitions
    plan = EpochPlan(order(window_bytes=64 << 20, num_partitions=2), 2, [40, 60, 20], [40 << 20, 60 << 20, 20 << 20])
    assert [plan.batch(step).positions.tolist() for step in (0, 7, 14, 29)] == [
        [43, 88, 100, 33],
        [66, 71, 111, 32],
        [85, 74, 27, 8],
        [91, 79, 103, 107],
    ]


def test_keys_are_a_bijection_that_depends_on_the_key() -> None:
    index = np.arange(100_000)
    one, other = hashed_keys(index, 1), hashed_keys(index, 2)
    assert len(np.unique(one)) == len(index)
    assert (np.argsort(one) != np.argsort(other)).mean() > 0.99
    assert abs(np.corrcoef(np.argsort(one), np.argsort(other))[0, 1]) < 0.02


def test_orders_differ_by_everything_that_they_depend_on() -> None:
    base = EpochPlan(order(), 0, [50, 50], [100, 100])
    no_change: dict[str, Any] = {}
    orders = [
        EpochPlan(order(**change), epoch, [50, 50], [100, 100]).batch(0).positions.tolist()
        for change, epoch in [
            (no_change, 1),
            ({"seed": 1}, 0),
            ({"seed": 2**32}, 0),
            ({"digest": "9"}, 0),
            ({"split": "val"}, 0),
        ]
    ]
    orders.append(base.batch(0).positions.tolist())
    assert len({tuple(one) for one in orders}) == len(orders)


def test_empty_split_has_no_steps() -> None:
    assert EpochPlan(order(), 0, [], []).num_steps == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"seed": -1}, "seed is -1"),
        ({"global_batch_size": 0}, "global_batch_size is 0"),
        ({"window_bytes": 0}, "window_bytes is 0"),
        ({"drop_last": "keep"}, "drop_last is 'keep'"),
        ({"num_partitions": 3}, "does not divide by 3 partitions"),
    ],
)
def test_senseless_orders_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        order(**options)


def test_more_partitions_than_shards_are_refused() -> None:
    with pytest.raises(DataError, match="has 2 shards"):
        EpochPlan(order(num_partitions=4), 0, [3, 3], [10, 10])


def test_an_order_is_made_once_and_only_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """`len` makes none, a rank its own partitions alone, draws each pass once, however often they come back to its border."""
    made: list[int] = []

    class Noted(WindowShuffle):
        def __init__(self, settings: Order, number: int, *sizes: Any) -> None:
            made.append(number)
            super().__init__(settings, number, *sizes)

    monkeypatch.setattr(plan_module, "WindowShuffle", Noted)
    records, nbytes = [10] * 8, [100] * 8
    plan = EpochPlan(order(num_partitions=4, global_batch_size=8), 3, records, nbytes)
    assert (plan.num_steps, made) == (10, [])
    for step in range(plan.num_steps):
        plan.batch(step, rank=1, world_size=4)
    assert made == [3]
    made.clear()
    few = [Draws(begin=0, end=1, share=1.0), Draws(begin=1, end=8, share=1.0)]
    plan = EpochPlan(order(global_batch_size=8), 2, records, nbytes, few, 80)
    for step in range(plan.num_steps):
        plan.batch(step)
    assert made.count(1) == 1  # draws 80 to 119 of 70 records: the last of pass 1 …
    assert sorted(set(made)) == [1, 8, 9, 10, 11]  # … and of 10 records passes 8 to 11
    assert len(made) == 5


@pytest.mark.parametrize(("world_size", "rows"), [(1, 20), (2, 10), (3, 7), (7, 3), (30, 1)])
def test_an_epochs_only_batch_has_the_rows_that_it_needs(world_size: int, rows: int) -> None:
    """A rank's batch is min(batch_size, ceil(records / world_size)) rows; the order is that of the size asked for."""
    huge = EpochPlan(order(global_batch_size=200_000 * 210), 3, [8, 12], [80, 120])
    parts = [huge.batch(0, rank, world_size) for rank in range(world_size)]
    assert (huge.num_steps, huge.rows(world_size)) == (1, rows)
    assert {len(part.positions) for part in parts} == {rows}
    positions, valid = (np.concatenate([getattr(part, name) for part in parts]) for name in ("positions", "valid"))
    assert sorted(positions[valid]) == list(range(20))
    assert np.array_equal(positions[valid], huge.positions(0, np.arange(20)))
    assert huge.num_valid(0) == 20
    for size in (1, 2, rows, rows + 1):
        plan = EpochPlan(order(global_batch_size=size * world_size), 3, [8, 12], [80, 120])
        assert plan.rows(world_size) == min(size, rows)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_an_only_batch_has_whole_partitions(world_size: int) -> None:
    plan = EpochPlan(order(global_batch_size=4000, num_partitions=2), 0, [7, 12, 3], [70, 120, 30])
    parts = [plan.batch(0, rank, world_size) for rank in range(world_size)]
    assert plan.num_steps == 1
    assert plan.rows(world_size) * world_size == 24  # twice the longer partition
    assert sorted(np.concatenate([part.positions[part.valid] for part in parts])) == list(range(22))
