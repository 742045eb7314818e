"""The laws that every loader must keep, written once: both loaders, both engines and every worker count go through them.

Each takes `make(**options)`, which makes a loader of the same data; a law that would hold for an empty loader is no law,
so each checks that something was delivered.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import pytest

import dali_pipeline as dp
from dali_pipeline.loaders.loader import Loader
from tests.helpers.batches import assert_same, content

Make = Callable[..., Loader[Any]]


def each_record_once(make: Make, world_sizes: Iterable[int]) -> None:
    """Laws 1 and 2: over all ranks every record once, padding marked; every rank the same number of equal batches."""
    for world_size in world_sizes:
        ranks = [make(rank=rank, world_size=world_size) for rank in range(world_size)]
        for _ in range(2):
            seen: Counter[str] = Counter()
            steps = set()
            for loader in ranks:
                batches = list(loader)
                steps.add(len(batches))
                assert len(batches) == len(loader)
                for batch in batches:
                    assert len(batch.ids) == loader.batch_size
                    seen.update(one for one, valid in zip(batch.ids, batch.valid.tolist(), strict=True) if valid)
            assert steps == {len(ranks[0])}
            assert len(seen) == ranks[0].num_records > 0
            assert set(seen.values()) == {1}


def a_huge_batch_is_what_there_is(make: Make) -> None:
    """A batch size far above the records costs no more rows than these, and a state goes on with another world."""
    ranks = [make(batch_size=300_000, rank=rank, world_size=2) for rank in range(2)]
    records = ranks[0].num_records
    assert [loader.batch_size for loader in ranks] == [-(-records // 2)] * 2
    for epoch in range(2):
        batches = [next(iter(loader)) for loader in ranks]
        assert [len(loader) for loader in ranks] == [1, 1]
        assert [len(batch.ids) for batch in batches] == [-(-records // 2)] * 2
        seen = [one for batch in batches for one, valid in zip(batch.ids, batch.valid.tolist(), strict=True) if valid]
        alone = make(batch_size=600_000)
        alone.set_epoch(epoch)
        (whole,) = alone
        assert whole.ids == seen
        assert len(seen) == len(set(seen)) == records == ranks[0].num_valid(0)
    alone.load_state_dict(ranks[0].state_dict())
    assert list(alone) == []
    for size in (records, records - 1):
        assert len(next(iter(make(batch_size=size))).ids) == size


def drop_drops(make: Make) -> None:
    """drop_last=True gives whole batches without padding, no record twice, and loses less than one global batch."""
    loader = make(drop_last=True)
    batches = list(loader)
    ids = [one for batch in batches for one in batch.ids]
    assert len(batches) == len(loader) > 0
    assert all(bool(batch.valid.all()) for batch in batches)
    assert len(ids) == len(set(ids)) > loader.num_records - loader.batch_size


def order_ignores(make: Make, *changes: dict[str, Any]) -> None:
    """Law 3: the same batches whatever `changes` say (workers, engine)."""
    expected = [content(batch) for batch in make()]
    for change in changes:
        assert_same(make(**change), expected)


def global_order_ignores_world(make: Make, batch_size: int) -> None:
    """Law 3: the ranks' batches side by side are the one process's batch of the same global size."""
    alone = [batch.ids for batch in make(batch_size=batch_size)]
    for world_size in (2, 4):
        loaders = [make(batch_size=batch_size // world_size, rank=rank, world_size=world_size) for rank in range(world_size)]
        together = [[one for batch in step for one in batch.ids] for step in zip(*loaders, strict=True)]
        assert together == alone


def epochs_differ_and_repeat(make: Make) -> None:
    """A new `for` is the next epoch, in another order; `set_epoch` gives an epoch again; another seed is another order."""
    loader = make()
    first, second = ([content(batch) for batch in loader] for _ in range(2))
    assert [batch["ids"] for batch in first] != [batch["ids"] for batch in second]
    loader.set_epoch(0)
    assert_same(loader, first)
    assert_same(loader, second)
    assert [batch.ids for batch in make(seed=1)] != [batch["ids"] for batch in first]
    for _ in make():
        break
    broken = make()
    for _ in broken:
        break
    assert_same(broken, second)


def resumes_exactly(make: Make, steps: Iterable[int]) -> None:
    """Laws 5 and 6: a state taken at any step, through JSON, gives the rest of the epoch and the next one to the bit."""
    whole = make()
    epochs = [[content(batch) for batch in whole] for _ in range(3)]
    assert len(epochs[0]) > 3
    for stop in steps:
        loader = make()
        list(loader)
        for step, _ in enumerate(loader):
            if step + 1 == stop:
                break
        text = json.dumps(loader.state_dict())
        assert len(text) < 1024
        fresh = make()
        fresh.load_state_dict(json.loads(text))
        assert json.dumps(fresh.state_dict()) == text
        fresh.set_epoch(1)  # as a trainer's loop does; the position stays
        rest = [content(batch) for batch in fresh]
        if stop < len(epochs[1]):
            assert_same(rest, epochs[1][stop:])
        else:
            assert rest == []
        assert_same(fresh, epochs[2])
    between = make()
    list(between)
    fresh = make()
    fresh.load_state_dict(between.state_dict())
    assert_same(fresh, epochs[1])
    fresh.load_state_dict(between.state_dict())
    fresh.set_epoch(0)  # another epoch than the state's: from its start
    assert_same(fresh, epochs[0])


def resumes_with_another_world(make: Make, batch_size: int) -> None:
    """Law 6: a state of 8 ranks goes on with 4, and that of 4 with 1, at the same global batch size."""
    expected = [batch.ids for batch in make(batch_size=batch_size)]
    for before, after in ((8, 4), (4, 1)):
        stopped = [make(batch_size=batch_size // before, rank=rank, world_size=before) for rank in range(before)]
        for loader in stopped:
            for step, _ in enumerate(loader):
                if step == 1:
                    break
        states = [loader.state_dict() for loader in stopped]
        assert all(state == states[0] for state in states)
        ranks = [make(batch_size=batch_size // after, rank=rank, world_size=after) for rank in range(after)]
        for loader in ranks:
            loader.load_state_dict(states[0])
        assert [[one for batch in step for one in batch.ids] for step in zip(*ranks, strict=True)] == expected[2:]


def refuses_foreign_states(make: Make, other: dp.Dataset) -> None:
    """Law 6: a state of another order is refused in one sentence with both values, and nothing changes."""
    loader = make()
    list(loader)
    before = loader.state_dict()
    changes: list[tuple[dict[str, Any], str]] = [
        ({"seed": 5}, "seed 5"),
        ({"batch_size": 3}, "global_batch_size 3"),
        ({"window_bytes": 4096}, "window_bytes 4096"),
        ({"num_partitions": 2}, "partitions 2"),
        ({"drop_last": True}, "drop_last True"),
        ({"split": "val"}, "split 'val'"),
        ({"shuffle": False}, "shuffle False"),
        ({"data": other}, "data set digest"),
    ]
    for change, words in changes:
        with pytest.raises(dp.StateError, match=words):
            loader.load_state_dict(make(**change).state_dict())
    for state in ({}, {**before, "epoch": -1}, {**before, "step": 10**6}, {**before, "order": 3}, {**before, "kind": "words"}):
        with pytest.raises(dp.StateError):
            loader.load_state_dict(state)
    with pytest.raises(dp.StateError, match="of version 1, and this release reads version 3"):
        loader.load_state_dict({**before, "version": 1})
    assert loader.state_dict() == before


def batches_stay(make: Make) -> None:
    """Law 11: a batch handed out is never written to again."""
    batches, copies = [], []
    for batch in make():
        batches.append(batch)
        copies.append(content(batch))
    assert_same(batches, copies)


def iterators_are_independent(make: Make) -> None:
    """Two iterators at once are two epochs, each whole; the state speaks for the one begun last."""
    expected = make()
    epochs = [[batch.ids for batch in expected] for _ in range(2)]
    loader = make()
    one, other = iter(loader), iter(loader)
    interleaved = list(zip(one, other, strict=True))
    assert [a.ids for a, _ in interleaved] == epochs[0]
    assert [b.ids for _, b in interleaved] == epochs[1]
    assert loader.state_dict()["epoch"] in (1, 2)
    loader = make()
    unused = iter(loader)
    iter(loader)
    loader.set_epoch(1)  # behind iter(), as Lightning's order of calls has it
    assert loader.state_dict()["epoch"] == 1
    assert [batch.ids for batch in loader] == epochs[1]
    loader.load_state_dict(make().state_dict())
    assert [batch.ids for batch in unused] == epochs[0]  # begun now, so it goes on where the state stood
    assert [batch.ids for batch in loader] == epochs[1]


def digest_tells_the_epoch(make: Make, world_sizes: Iterable[int]) -> None:
    """Law 12: the merged digests of all ranks are those of every record once; anything less is not."""
    for world_size in world_sizes:
        ranks = [make(rank=rank, world_size=world_size) for rank in range(world_size)]
        words = f"{ranks[0].num_records:,} of {ranks[0].num_records:,} records, each once"
        for _ in range(2):
            for loader in ranks:
                for batch in loader:
                    assert len(batch) == loader.batch_size
            digest = sum((loader.digest for loader in ranks), dp.EpochDigest())
            assert ranks[-1].check_digest(digest) == words
        if world_size > 1:
            with pytest.raises(dp.DataError, match=r"delivered .* expected"):
                ranks[0].check_digest(ranks[0].digest)
            with pytest.raises(dp.DataError, match="delivered"):
                ranks[0].check_digest(digest + ranks[0].digest)
    loader, batches = make(), iter(make())
    for _ in loader:
        break
    first, state = loader.digest, loader.state_dict()
    assert first == dp.EpochDigest.of(next(batches).ids)
    fresh = make()
    fresh.load_state_dict(json.loads(json.dumps(state)))
    list(fresh)
    before = dp.EpochDigest.from_dict(json.loads(json.dumps(first.to_dict())))
    assert fresh.check_digest(before + fresh.digest).endswith("each once")
    with pytest.raises(dp.DataError, match="the epoch delivered"):
        fresh.check_digest(fresh.digest)
    dropped = make(drop_last=True)
    list(dropped)
    assert dropped.check_digest(dropped.digest).endswith("records, the rest dropped")
    with pytest.raises(dp.DataError, match="with drop_last=True"):
        dropped.check_digest(dropped.digest + first)


def loops_end_as_told(make: Make) -> None:
    """A break, an exception, an iterator dropped, `set_epoch` during a loop, and `next` beyond the end: what comes then."""
    whole = make()
    epochs = [[batch.ids for batch in whole] for _ in range(4)]
    loader = make()
    with pytest.raises(KeyError):
        for _ in loader:
            raise KeyError
    assert [batch.ids for batch in loader] == epochs[1]  # the next epoch, nothing of the old one
    dropped = iter(loader)
    next(dropped)
    del dropped
    assert [batch.ids for batch in loader] == epochs[3]
    loader.set_epoch(0)
    running = iter(loader)
    begun = [next(running).ids]
    loader.set_epoch(3)  # speaks of the next `for`; what runs goes on
    assert begun + [batch.ids for batch in running] == epochs[0]
    assert next(running, None) is None
    assert next(running, None) is None
    assert [batch.ids for batch in loader] == epochs[3]


def state_is_cheap(make: Make) -> None:
    """Law 6: JSON under 1 KB, at any step of any epoch, without a look at the data."""
    loader = make()
    loader.load_state_dict({**loader.state_dict(), "epoch": 10**9, "step": len(loader)})
    assert len(json.dumps(loader.state_dict())) < 1024
    batches = iter(loader)
    assert next(batches, None) is None  # an empty rest
    assert loader.state_dict()["epoch"] == 10**9 + 1


def nodes_open_their_own_shards(make: Make, opened: Callable[[], set[str]]) -> None:
    """Law 4: with as many partitions as nodes, no shard is opened by two, and every epoch opens the same ones.

    opened: Returns the shards opened since it was last asked.
    """
    for nodes in (2, 4):
        ranks = [make(batch_size=8, num_partitions=nodes, rank=rank, world_size=nodes, num_workers=0) for rank in range(nodes)]
        met: list[set[str]] = []
        for loader in ranks:
            opened()
            list(loader)
            met.append(opened())
            fresh = make(batch_size=8, num_partitions=nodes, rank=loader.world.rank, world_size=nodes, num_workers=0)
            fresh.set_epoch(5)
            list(fresh)
            assert opened() == met[-1]
        assert all(met)
        assert sum(map(len, met)) == len(set().union(*met))
