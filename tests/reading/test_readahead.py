"""Reading ahead: what comes next is asked for in time, all of it, nothing else, and damage is left for the gather."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dali_pipeline as dp
from dali_pipeline.format import shard
from dali_pipeline.sampling.order import Order
from dali_pipeline.sampling.plan import EpochPlan
from dali_pipeline.storage import reads
from dali_pipeline.storage.files import Recent

WIDTH = 2048


@pytest.fixture
def wide(tmp_path: Path) -> dp.Dataset:
    """600 records of [4, 2048] float16, 16 KiB each: about 10 MB in shards of 2 MiB."""
    schema = dp.Schema(sequence=dp.Field(dtype="float16", shape=(WIDTH,)), step_axis="layer")
    with dp.ShardWriter(tmp_path / "set", schema, split=dp.SplitRule.parse("100/0/0"), shard_bytes=2 << 20) as writer:
        for number in range(600):
            writer.write({"id": number, "label": number % 2, "sequence": np.full((4, WIDTH), number, np.float16)})
    return dp.open_dataset(tmp_path / "set")


def until(true: Callable[[], bool]) -> bool:
    end = time.monotonic() + 10
    while not true() and time.monotonic() < end:
        time.sleep(0.01)
    return true()


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("num_partitions", [1, 2, 3])
def test_the_groups_of_all_partitions_are_all_records(num_partitions: int, shuffle: bool) -> None:
    sizes = [40, 7, 100, 1, 60, 33, 33]
    for window in (1, 50_000, 200_000, 10**9):
        options: Any = {
            "global_batch_size": 12,
            "window_bytes": window,
            "num_partitions": num_partitions,
            "drop_last": False,
            "shuffle": shuffle,
        }
        order = Order(digest="0" * 32, split="train", seed=0, **options)
        plan = EpochPlan(order, 3, sizes, [size * 1000 for size in sizes])
        seen: list[int] = []
        for partition in range(num_partitions):
            group = 0
            while runs := plan.runs(partition, group):
                seen += [position for start, count in runs for position in range(start, start + count)]
                group += 1
        assert sorted(seen) == list(range(sum(sizes)))
        for step in range(
            plan.num_steps if window >= 200_000 else 0
        ):  # what a batch needs lies in the group that it has come to, or the one before
            near: set[int] = set()
            for partition, group in plan.groups(step):
                for one in range(max(0, group - 1), group + 2):
                    near |= {at for start, count in plan.runs(partition, one) for at in range(start, start + count)}
            assert set(plan.batch(step).positions.tolist()) <= near
        ranks = [{partition for partition, _ in plan.groups(0, rank, 3)} for rank in range(3)]
        assert set().union(*ranks) == set(range(num_partitions))
        assert num_partitions != 3 or ranks == [{0}, {1}, {2}]


@pytest.mark.parametrize("engine", ["torch", "dali"])
def test_blocks_are_read_and_hashed_before_they_are_asked_for(wide: dp.Dataset, engine: Any) -> None:
    loader = dp.SequenceLoader(wide, batch_size=8, engine=engine, num_workers=0)
    batches = iter(loader)
    next(batches)
    next(batches)
    index = loader._source._index
    arrays = [index._shard(number).array("sequence") for number in range(len(wide.table("train", "sequences")))]
    firsts = [int(index._block_ends[number]) + array.first_block for number, array in enumerate(arrays)]
    spans = [slice(first, first - (-array.nbytes >> 20)) for first, array in zip(firsts, arrays, strict=True)]
    assert sum(span.stop - span.start for span in spans) > 9
    assert until(lambda: all(index._sound[span].all() for span in spans))
    del batches


def slowly(loader: dp.SequenceLoader) -> int:
    """Return the number of batches, taken so slowly that all is read ahead, which stops with the epoch."""
    count = 0
    for _ in loader:
        time.sleep(0.003)
        count += 1
    return count


def test_layers_alone_are_asked_for(wide: dp.Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    for layers, rows in ((slice(1, 3), 2), ([3], 1), (None, 4)):
        loader = dp.SequenceLoader(wide, batch_size=8, engine="torch", layers=layers, window="gather")
        list(loader)  # every block is known
        asked: list[tuple[int, int]] = []
        monkeypatch.setattr(shard, "prefetch", lambda _, offset, nbytes, asked=asked: asked.append((offset, nbytes)) or True)
        assert slowly(loader) == 75
        assert sum(nbytes for _, nbytes in asked) == 600 * rows * WIDTH * 2
        monkeypatch.undo()


def test_damage_is_named_by_the_gather(wide: dp.Dataset) -> None:
    path = wide.shard_path("train", "sequences", 4)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    loader = dp.SequenceLoader(wide, batch_size=8, engine="torch", shuffle=False)
    delivered = 0
    with pytest.raises(dp.FormatError, match=r"sequences-00004\.safetensors, sequence: .* damaged"):
        for _ in loader:
            delivered += 1
            time.sleep(0.002)
    assert delivered >= sum(wide.table("train", "sequences").records[:4]) // 8


def test_a_system_that_cannot_tell_is_asked_all_the_same(wide: dp.Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(reads, "_CACHESTAT", 100_000)  # no such call
    monkeypatch.setattr(os, "posix_fadvise", lambda *arguments: asked.append(arguments))
    loader = dp.SequenceLoader(wide, batch_size=8, engine="torch", window="gather")
    list(loader)
    asked.clear()
    assert slowly(loader) == 75
    assert sum(nbytes for _, _, nbytes, _ in asked) == 600 * 4 * WIDTH * 2
    assert max(nbytes for _, _, nbytes, _ in asked) <= 128 << 10
    monkeypatch.delattr(os, "posix_fadvise")
    assert len(list(loader)) == 75


def test_a_lock_held_elsewhere_while_the_process_forks_is_free_in_the_child() -> None:
    kept: Recent[str, int] = Recent(10)
    with kept._lock:  # as a reading thread may
        child = os.fork()
        if not child:
            kept.put("a", 1)
            os._exit(kept.get("a") != 1)
    end = time.monotonic() + 10
    while not (done := os.waitpid(child, os.WNOHANG))[0] and time.monotonic() < end:
        time.sleep(0.01)
    if not done[0]:
        os.kill(child, signal.SIGKILL)
    assert done[0]
    assert os.waitstatus_to_exitcode(done[1]) == 0


def test_later_epochs_look_at_few_runs_until_one_is_not_there(wide: dp.Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = dp.SequenceLoader(wide, batch_size=8, engine="torch", window="gather")
    list(loader)  # every block is known
    asked: list[tuple[int, int]] = []
    there = True

    def brought(_: int, offset: int, nbytes: int) -> bool:
        asked.append((offset, nbytes))
        return not there

    monkeypatch.setattr(shard, "prefetch", brought)
    list(loader)
    asked.clear()
    list(loader)
    assert 0 < sum(nbytes for _, nbytes in asked) <= 600 * 4 * WIDTH * 2 // 8
    there = False
    asked.clear()
    batches = iter(loader)
    next(batches)
    next(batches)
    assert until(lambda: loader._source.cold)
    next(batches)
    assert until(lambda: sum(nbytes for _, nbytes in asked) == 600 * 4 * WIDTH * 2)
