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
import torch

import dali_pipeline as dp
from dali_pipeline.loader import Loader

Make = Callable[..., Loader[Any]]


def content(batch: Any) -> dict[str, Any]:
    """Everything that a batch holds, copied."""
    if isinstance(batch, dp.SequenceBatch):
        tensors = {"sequences": batch.sequences, "lengths": batch.lengths}
    else:
        tensors = {name: batch.graphs[name] for name in ("x", "edge_index", "edge_attr", "batch", "ptr")}
        tensors |= {
            "graphs_per_record": batch.graphs_per_record,
            "layer_index": batch.layer_index,
            "last_node": batch.last_node,
        }
    tensors |= {"labels": batch.labels, "valid": batch.valid, "positions": batch.positions}
    return {"ids": list(batch.ids), **{name: tensor.clone() for name, tensor in tensors.items()}}


def assert_same(ours: Iterable[Any], theirs: Iterable[Any]) -> None:
    """Batches (or their contents) equal to the bit, and at least one."""
    one, other = ([batch if isinstance(batch, dict) else content(batch) for batch in batches] for batches in (ours, theirs))
    assert len(one) == len(other) > 0
    for a, b in zip(one, other, strict=True):
        assert a["ids"] == b["ids"]
        for name in a.keys() - {"ids"}:
            assert a[name].dtype == b[name].dtype, name
            assert torch.equal(a[name], b[name]), name


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


def drop_drops(make: Make) -> None:
    """tail="drop" gives whole batches without padding, no record twice, and loses less than one global batch."""
    loader = make(tail="drop")
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
    """A state of 4 ranks goes on with 2 at the same global batch size."""
    four = [make(batch_size=batch_size // 4, rank=rank, world_size=4) for rank in range(4)]
    for loader in four:
        for step, _ in enumerate(loader):
            if step == 1:
                break
    expected = [batch.ids for batch in make(batch_size=batch_size)][2:]
    two = [make(batch_size=batch_size // 2, rank=rank, world_size=2) for rank in range(2)]
    for loader in two:
        loader.load_state_dict(four[0].state_dict())
    assert [[one for batch in step for one in batch.ids] for step in zip(*two, strict=True)] == expected


def refuses_foreign_states(make: Make, other: dp.Dataset) -> None:
    """Law 6: a state of another order is refused in one sentence with both values, and nothing changes."""
    loader = make()
    list(loader)
    before = loader.state_dict()
    changes: list[tuple[dict[str, Any], str]] = [
        ({"seed": 5}, "seed 5"),
        ({"batch_size": 3}, "global_batch_size 3"),
        ({"window_bytes": 4096}, "window_bytes 4096"),
        ({"lanes": 2}, "lanes 2"),
        ({"tail": "drop"}, "tail 'drop'"),
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
