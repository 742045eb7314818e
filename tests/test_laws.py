"""The laws, whatever the data, world, window, engine and workers: both loaders against one plain reading of the same order."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dali_pipeline as dp
from tests.helpers.records import make_records, write


def make(data: dp.Dataset, kind: str, num_workers: int, **options: Any) -> Any:
    if kind == "graphs":
        return dp.GraphLoader(data, num_workers=min(num_workers, 1) if num_workers < 3 else "auto", **options)
    return dp.SequenceLoader(data, engine="dali" if kind == "dali" else "torch", num_workers=num_workers, **options)


def rows(batches: list[Any]) -> list[tuple[list[str], list[bool]]]:
    return [(batch.ids, batch.valid.tolist()) for batch in batches]


@pytest.mark.parametrize("kind", ["dali", "torch", "graphs"])
@settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    count=st.integers(1, 60),
    shard_bytes=st.sampled_from([1, 300, 1500, 1 << 20]),
    world_size=st.integers(1, 16),
    batch_size=st.integers(1, 5),
    window_bytes=st.sampled_from([1, 500, 3000, 1 << 28]),
    num_workers=st.sampled_from([0, 1, 3]),
    num_partitions=st.integers(1, 2),
    seed=st.integers(0, 2**64 - 1),
    epoch=st.integers(0, 10**6),
    drop_last=st.booleans(),
    shuffle=st.booleans(),
    data_seed=st.integers(0, 3),
    stop=st.integers(0, 30),
)
def test_any_world_delivers_one_order(
    kind: str, count: int, shard_bytes: int, world_size: int, batch_size: int, window_bytes: int, num_workers: int,
    num_partitions: int, seed: int, epoch: int, drop_last: bool, shuffle: bool, data_seed: int, stop: int,
) -> None:  # fmt: skip
    """Laws 1, 2, 3, 5, 6 and 12: every rank's rows are its share of one global order, which is a function of the data alone."""
    with tempfile.TemporaryDirectory() as folder:
        data = write(Path(folder) / "set", make_records(count, seed=data_seed), shard_bytes=shard_bytes, shares="100/0/0")
        num_partitions = min(num_partitions, len(data.table("train", "graphs")), len(data.table("train", "sequences")))
        batch_size *= num_partitions
        order: dict[str, Any] = {
            "window_bytes": window_bytes,
            "num_partitions": num_partitions,
            "seed": seed,
            "drop_last": drop_last,
            "shuffle": shuffle,
        }
        size = batch_size * world_size
        if drop_last and count < 2 * size:
            drop_last = order["drop_last"] = False
        reference = make(data, "graphs" if kind == "graphs" else "torch", 0, batch_size=size, **order)
        reference.set_epoch(epoch)
        alone = rows(list(reference))
        ranks = [
            make(data, kind, num_workers, batch_size=batch_size, rank=rank, world_size=world_size, **order)
            for rank in range(min(world_size, 4))
        ]
        seen: Counter[str] = Counter()
        only: list[str] = []  # real rows of an epoch's only batch, where it needs fewer rows than asked for
        for rank, loader in enumerate(ranks):
            loader.set_epoch(epoch)
            own = rows(list(loader))
            assert len(own) == len(loader) == len(alone) > 0
            mine = slice(rank * batch_size, (rank + 1) * batch_size)
            if loader.batch_size == batch_size and reference.batch_size == size:
                assert own == [(ids[mine], valid[mine]) for ids, valid in alone]
            else:
                only += [one for ids, valid in own for one, real in zip(ids, valid, strict=True) if real]
            stop = min(stop, len(own))
            fresh = make(data, kind, num_workers, batch_size=batch_size, rank=rank, world_size=world_size, **order)
            fresh.load_state_dict(json.loads(json.dumps({**loader.state_dict(), "epoch": epoch, "step": stop})))
            assert rows(list(fresh)) == own[stop:]
        for ids, valid in alone:
            seen.update(one for one, real in zip(ids, valid, strict=True) if real)
        assert set(seen.values()) == {1}
        assert only == list(seen)[: len(only)]
        assert len(only) == len(seen) or not only or len(ranks) < world_size
        if not drop_last:
            assert sorted(seen) == sorted(record.id for record in make_records(count))
        assert reference.check_digest(reference.digest)


@pytest.mark.parametrize("kind", ["dali", "torch", "graphs"])
def test_fewer_shards_than_ranks(tmp_path: Path, kind: str) -> None:
    """Two shards, five records, sixteen ranks: eleven of them take padding alone, marked, and equal steps."""
    data = write(tmp_path / "set", make_records(5), shard_bytes=700, shares="100/0/0")
    assert len(data.table("train", "sequences")) < 16
    ranks = [make(data, kind, 0, batch_size=1, rank=rank, world_size=16) for rank in range(16)]
    batches = [list(loader) for loader in ranks]
    assert {len(own) for own in batches} == {1}
    assert sorted(own[0].ids[0] for own in batches if own[0].valid[0]) == [f"record-{at}" for at in range(5)]
    assert sum(bool(own[0].valid[0]) for own in batches) == 5
    assert ranks[0].check_digest(sum((loader.digest for loader in ranks), dp.EpochDigest())) == "5 of 5 records, each once"
