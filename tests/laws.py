"""The laws of docs/laws.md, one function each: both loaders, both engines and every worker count go through them.

Each takes a Case: a factory of loaders of the same data, and what the laws must know of them. A law that would hold for an
empty loader is no law, so each checks that something was delivered. tests/test_laws.py runs every law on every kind of loader.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import dali_pipeline as dp
from dali_pipeline.ingest.config import ConvertConfig
from dali_pipeline.ingest.convert import convert
from dali_pipeline.loaders import graphs as graphs_module
from dali_pipeline.loaders import sequences as sequences_module
from dali_pipeline.loaders.loader import Loader
from dali_pipeline.reading import readahead as readahead_module
from dali_pipeline.reading import superbatch as superbatch_module
from dali_pipeline.runtime.memory import Buffers
from dali_pipeline.storage import files as files_module
from dali_pipeline.storage.openfile import OpenFile
from dali_pipeline.types import Kind
from tests.helpers.batches import assert_same, content
from tests.helpers.folders import make_folder
from tests.helpers.records import SCHEMA, make_records, write
from tests.hostile.foreign import build

Make = Callable[..., Loader[Any]]
Rows = tuple[list[str], list[bool]]  # a batch's ids, and which of them are valid
REFUSALS: Sequence[tuple[dict[str, Any], str]] = (
    ({"seed": 5}, "seed 5"),
    ({"batch_size": 3}, "global_batch_size 3"),
    ({"window_bytes": 4096}, "window_bytes 4096"),
    ({"num_partitions": 2}, "partitions 2"),
    ({"drop_last": True}, "drop_last True"),
    ({"split": "val"}, "split 'val'"),
    ({"shuffle": False}, "shuffle False"),
)


@dataclass(frozen=True)
class Ran:
    """What all ranks delivered in two epochs: rows[epoch][rank][step]; told: `len()` before the first, and behind each."""

    ranks: list[Loader[Any]]
    rows: list[list[list[Rows]]]
    told: list[list[int]]
    digests: list[list[dp.EpochDigest]]

    def valid(self, epoch: int) -> list[str]:
        """The ids of all valid rows of an epoch, over all ranks."""
        every = (row for rank in self.rows[epoch] for ids, valid in rank for row in zip(ids, valid, strict=True))
        return [one for one, is_valid in every if is_valid]


@dataclass(frozen=True, eq=False, kw_only=True)
class Case:
    """A kind of loader that the laws are held against.

    make: Makes a loader with these options; `data` is another data set than the usual one.
    folder: An empty folder, for data sets that a law damages or converts.
    other: A data set with other contents. short_and_long: two, the second four times as long.
    worlds: Options, and the numbers of processes that are tried with them.
    partitions: Numbers of nodes, each with a partition of its own.
    changes: Options that the order of records must not depend on.
    steps: Where an epoch of so many steps is stopped.
    refusals: Options whose states must be refused, and words of the refusal; None where those of other kinds hold for it.
    stays: Options of loaders whose batches are held.
    parts: For draws, the source of a record by its id, and the number of records in each source.
    pieces: The data are pieces of shards, which two nodes may share.
    rows: Single steps are delivered, which have names of id and step, and no more than there are in a batch.
    """

    make: Make
    kind: Kind
    folder: Path
    other: dp.Dataset
    short_and_long: tuple[dp.Dataset, dp.Dataset] | None = None
    worlds: Sequence[tuple[dict[str, Any], Iterable[int]]] = (({}, (1, 2)),)
    partitions: Sequence[int] = (2, 4)
    changes: Sequence[dict[str, Any]] = ()
    steps: Callable[[int], Iterable[int]] = lambda count: (1, 2, count - 1, count)
    refusals: Sequence[tuple[dict[str, Any], str]] = REFUSALS
    stays: Sequence[dict[str, Any]] = ({},)
    parts: tuple[Callable[[str], str], Mapping[str, int]] | None = None
    pieces: bool = False
    budget: bool = False
    rows: bool = False
    processes: bool = False
    _ran: dict[str, Ran] = field(default_factory=dict)

    def ran(self, world_size: int, **options: Any) -> Ran:
        """Two epochs of all ranks, remembered: several laws look at them."""
        key = f"{world_size} {options}"
        if key not in self._ran:
            ranks = [self.make(rank=rank, world_size=world_size, **options) for rank in range(world_size)]
            found = Ran(ranks, [], [[len(loader) for loader in ranks]], [])
            for _ in range(2):
                found.rows.append([[(names(batch), batch.valid.tolist()) for batch in loader] for loader in ranks])
                found.told.append([len(loader) for loader in ranks])
                found.digests.append([loader.digest for loader in ranks])
            self._ran[key] = found
        return self._ran[key]

    def every_world(self) -> Iterator[Ran]:
        for options, world_sizes in self.worlds:
            for world_size in world_sizes:
                yield self.ran(world_size, **options)


def names(batch: Any) -> list[str]:
    """The id of every row of a batch; of single steps, with the step."""
    if isinstance(batch, dp.StepBatch):
        return [f"{record_id}/{step}" for record_id, step in zip(batch.ids, batch.steps.tolist(), strict=True)]
    return list(batch.ids)


def places(batch: Any) -> torch.Tensor:
    """The position of every row's record."""
    positions: torch.Tensor = batch.record_positions if isinstance(batch, dp.StepBatch) else batch.positions
    return positions


def digest_of(names: Sequence[str], *, rows: bool) -> dp.EpochDigest:
    """The digest of these names of records, or of rows."""
    if not rows:
        return dp.EpochDigest.of(names)
    ids, _, steps = zip(*(name.rpartition("/") for name in names), strict=True)
    return dp.EpochDigest.of(ids, [int(step) for step in steps])


# ------------------------------------------------------------------ the laws


def law_01_every_record_once(case: Case) -> None:
    """Every record exactly once per epoch over all ranks; padding is marked, and beside it nothing is lost."""
    for ran in case.every_world():
        for epoch in range(2):
            seen = Counter(ran.valid(epoch))
            if case.parts:
                assert sum(seen.values()) == ran.ranks[0].num_records > 0
                continue
            assert len(seen) == ran.ranks[0].num_records > 0
            assert set(seen.values()) == {1}
        if case.budget:
            rows = [row for epoch in ran.rows for rank in epoch for row in rank]
            assert all(all(valid) or (len(ids) == 1 and not any(valid)) for ids, valid in rows)
    if case.parts:
        _each_source_once_a_pass(case, *case.parts)
    elif case.budget:
        for world_size, num_partitions in ((1, 1), (4, 1), (4, 2), (1, 2)):
            _a_budget_drops_what_a_rank_would_lack(case, world_size, num_partitions)
    else:
        if not case.rows:
            _a_huge_batch_is_what_there_is(case.make)
        _drop_drops(case.make)


def law_02_equal_steps(case: Case) -> None:
    """Every rank takes the same number of steps, as many as `len` says, and of equal batches unless a budget fills them."""
    for ran in case.every_world():
        for epoch in range(2):
            (steps,) = {len(rank) for rank in ran.rows[epoch]}
            assert steps > 0
            assert set(ran.told[epoch + 1]) == {steps}
            if not (case.budget and epoch):  # how many the next epoch has, a budget tells when it has begun
                assert set(ran.told[epoch]) == {steps}
            if not case.budget:
                sizes = {len(ids) for rank in ran.rows[epoch] for ids, _ in rank}
                assert sizes == {ran.ranks[0].batch_size}


def law_03_one_order(case: Case) -> None:
    """The order is a function of its arguments: no worker, engine, world or random state of the process changes it."""
    make = case.make
    expected = [content(batch) for batch in make()]
    for change in case.changes:
        random.seed(1)
        torch.manual_seed(1)
        np.random.seed(1)  # noqa: NPY002, the one that is global
        assert_same(make(**change), expected)
    if case.budget:
        alone = [batch["ids"] for batch in expected]
        for world_size in (2, 3):
            steps = zip(*(make(rank=rank, world_size=world_size) for rank in range(world_size)), strict=True)
            assert [names(batch) for step in steps for batch in step if batch.valid.all()] == alone
    else:
        alone = [names(batch) for batch in make(batch_size=16)]
        for world_size in (2, 4):
            ranks = [make(batch_size=16 // world_size, rank=rank, world_size=world_size) for rank in range(world_size)]
            assert [[one for batch in step for one in names(batch)] for step in zip(*ranks, strict=True)] == alone
    _epochs_differ_and_repeat(make)


def law_04_disjoint_partitions(case: Case) -> None:
    """A global batch takes an equal share of each partition; a node opens its own shards and no other, in every epoch."""
    for nodes in case.partitions:
        options = {"num_partitions": nodes} if case.budget else {"num_partitions": nodes, "batch_size": 8}
        owners: dict[int, int] = {}
        met: list[set[str]] = []
        for rank in range(nodes):
            loader = case.make(rank=rank, world_size=nodes, num_workers=0, **options)
            with _opened() as opened:
                positions = _positions(loader)
            met.append(opened)
            fresh = case.make(rank=rank, world_size=nodes, num_workers=0, **options)
            fresh.set_epoch(5)
            with _opened() as opened:
                later = _positions(fresh)
            if not (case.budget or case.parts):  # a budget packs all partitions from the index; draws differ by epoch
                assert opened == met[-1]
            assert later == positions or case.parts
            assert {owners.setdefault(position, rank) for position in positions | later} == {rank}
        assert all(met)
        if case.budget:
            continue
        if not case.pieces:
            assert sum(map(len, met)) == len(set().union(*met))
        for batch in case.make(num_workers=0, **options):
            if batch.valid.all():
                shares = Counter(owners.get(position, -1) for position in places(batch).tolist())
                unknown = shares.pop(-1, 0)  # draws of other epochs
                assert unknown == 0 or case.parts
                assert unknown or set(shares.values()) == {8 // nodes}


def law_05_exact_resume(case: Case) -> None:
    """A state taken at any step, through JSON, gives the rest of the epoch and the next one to the bit."""
    _resumes_exactly(case.make, case.steps(len(case.make())))
    if case.budget:
        _resumes_exactly(lambda **options: case.make(num_partitions=2, **options), (3,))


def law_06_states(case: Case) -> None:
    """The state counts batches delivered, is small, and is refused in one sentence where it does not fit."""
    loader = case.make()
    for step, _ in enumerate(loader, 1):
        state = loader.state_dict()
        assert (state["epoch"], state["step"]) == (0, step)
    assert step > 3
    assert loader.state_dict()["epoch"] == 1
    assert all(isinstance(one, bool | int | str | None) for one in _leaves(state))  # coordinates, and no data
    if not case.budget:  # whose cursors must fit the step
        loader.load_state_dict({**loader.state_dict(), "epoch": 10**9, "step": len(loader)})
        assert len(json.dumps(loader.state_dict())) < 1024
        assert next(iter(loader), None) is None  # an empty rest, without a look at the data
        assert loader.state_dict()["epoch"] == 10**9 + 1
    _refuses_foreign_states(case)


def law_07_seeds_are_sequences(case: Case) -> None:
    """Seeds and epochs of one sum, or with their words exchanged, are other orders."""
    orders = []
    for seed, epoch in ((0, 3), (1, 2), (2, 1), (3, 0), (1 << 32, 2), ((1 << 32) - 1, 3)):
        loader = case.make(seed=seed)
        loader.set_epoch(epoch)
        orders.append(tuple(one for batch in loader for one in names(batch)))
    assert orders[0]
    assert len(set(orders)) == len(orders)


def law_08_bounded_memory(case: Case) -> None:
    """What is gathered and not yet let go does not grow with the data: most at a time is a small part of an epoch.

    Bytes of the host's memory are measured by `benchmarks/scale.py`; here pieces of memory are counted, on small superbatches.
    """
    with pytest.MonkeyPatch.context() as patch:
        for module in (superbatch_module, sequences_module, graphs_module):
            patch.setattr(module, "SUPERBATCH_BYTES", 2048)
        patch.setattr(readahead_module, "GATHERED_BYTES", 8192)
        assert case.short_and_long is not None
        peaks, totals = zip(*(_held(case, data) for data in case.short_and_long), strict=True)
    assert totals[1] > 3 * totals[0] > 0
    assert peaks[1] < 1.5 * peaks[0] + 4096
    assert peaks[1] < totals[1] / 4


def law_09_nothing_unpickled(case: Case) -> None:
    """Code in a foreign file does not run; a conversion, and an epoch of what it wrote, look up no name of any pickle."""
    forms = ("gnn",) if case.kind == "graphs" else ("pt", "pkl", "gz")
    for form in forms:
        _, words, ran = build(case.folder / form, form, "runs code")
        with pytest.raises(dp.PipelineError, match=words):
            convert(case.folder / form, case.folder / "refused", ConvertConfig(num_workers=1))
        assert not ran.exists()
    src = make_folder(case.folder / "src")
    with _looked_up() as names:
        data = convert(src, case.folder / "set", ConvertConfig(num_workers=1, split=dp.SplitRule.parse("100/0/0")))
        loader = case.make(data=data)
        assert names == []
        assert sum(len(batch) for batch in loader) > 18
    ours = [name for name in names if name.split(".")[0] in {"dali_pipeline", "numpy"}]
    assert names == (ours if case.processes else [])  # what our own worker processes answer


def law_10_whole_shards(case: Case) -> None:
    """A flipped bit, a cut shard and a missing one are named by file before anything of it is delivered."""
    data = write(case.folder / "sound", make_records(60), shares="100/0/0")
    sound = [content(batch) for batch in case.make(data=data)]
    name = data.shard_path("train", case.kind, 1).relative_to(data.folder)
    shard = (data.folder / name).read_bytes()
    header = 8 + int.from_bytes(shard[:8], "little")
    for place in (9, header + 1, (header + len(shard)) // 2, len(shard) - 3, None):
        broken = shard[:-1] if place is None else shard[:place] + bytes([shard[place] ^ 4]) + shard[place + 1 :]
        _names_the_shard(case, data, name, broken, sound)
    _names_the_shard(case, data, name, None, sound)
    interrupted = case.folder / "interrupted"
    with pytest.raises(KeyError), dp.ShardWriter(interrupted, SCHEMA, shard_bytes=700) as writer:
        for record in make_records(40):
            writer.write(record)
        raise KeyError
    with pytest.raises(dp.PipelineError):
        dp.open_dataset(interrupted)
    for path in interrupted.rglob("*.safetensors"):
        assert load_file(path)  # whole, whoever was to come behind it


def law_11_batches_stay(case: Case) -> None:
    """A batch handed out is never written to again."""
    for options in case.stays:
        batches, copies = [], []
        for batch in case.make(**options):
            batches.append(batch)
            copies.append(content(batch))
        assert_same(batches, copies)


def law_12_digest_of_an_epoch(case: Case) -> None:
    """The digest is that of the ids in delivered batches: all of them merged say so, and anything less or more is refused."""
    what = "steps of records" if case.rows else "records"
    for ran in case.every_world():
        for epoch in range(2):
            digest = sum(ran.digests[epoch], dp.EpochDigest())
            assert digest == digest_of(ran.valid(epoch), rows=case.rows) or case.parts
            words = ran.ranks[-1].check_digest(digest)
            records = ran.ranks[0].num_records
            if case.parts:
                assert words.startswith(f"{records:,} draws of {len(set(ran.valid(epoch))):,} {what}, ")
            else:
                assert words == f"{records:,} of {records:,} {what}, each once"
        if len(ran.ranks) > 1 and not case.parts:
            with pytest.raises(dp.DataError, match=r"delivered .* expected"):
                ran.ranks[0].check_digest(ran.digests[1][0])
            with pytest.raises(dp.DataError, match="delivered"):
                ran.ranks[0].check_digest(digest + ran.digests[1][0])
    if not case.parts:
        _digest_of_a_part(case)


def law_13_another_world(case: Case) -> None:
    """A state of 8 ranks goes on with 4, and that of 4 with 1, at the same global batch size."""
    if case.budget:
        for num_partitions in (1, 2):
            _a_budget_goes_on_with_another_world(case.make, num_partitions)
        return
    size = 16
    expected = [names(batch) for batch in case.make(batch_size=size)]
    for before, after in ((8, 4), (4, 1)):
        stopped = [case.make(batch_size=size // before, rank=rank, world_size=before) for rank in range(before)]
        for loader in stopped:
            for step, _ in enumerate(loader):
                if step == 1:
                    break
        states = [loader.state_dict() for loader in stopped]
        assert all(state == states[0] for state in states)
        ranks = [case.make(batch_size=size // after, rank=rank, world_size=after) for rank in range(after)]
        for loader in ranks:
            loader.load_state_dict(states[0])
        assert [[one for batch in step for one in names(batch)] for step in zip(*ranks, strict=True)] == expected[2:]


LAWS: dict[str, Callable[[Case], None]] = {
    name.removeprefix("law_"): function for name, function in sorted(globals().items()) if name.startswith("law_")
}


# ------------------------------------------------------------------ what a loop may do, which no law speaks of


def iterators_are_independent(case: Case) -> None:
    """Two iterators at once are two epochs, each whole; the state speaks for the one begun last."""
    expected = case.make()
    epochs = [[names(batch) for batch in expected] for _ in range(2)]
    loader = case.make()
    one, other = iter(loader), iter(loader)
    seen: list[list[list[str]]] = [[], []]
    for _ in range(min(map(len, epochs))):
        for batches, ids in zip((one, other), seen, strict=True):
            ids.append(names(next(batches)))
    for batches, ids in zip((one, other), seen, strict=True):
        ids += [names(batch) for batch in batches]
    assert seen == epochs
    assert loader.state_dict()["epoch"] in (1, 2)
    loader = case.make()
    unused = iter(loader)
    iter(loader)
    loader.set_epoch(1)  # behind iter(), as Lightning's order of calls has it
    assert loader.state_dict()["epoch"] == 1
    assert [names(batch) for batch in loader] == epochs[1]
    loader.load_state_dict(case.make().state_dict())
    assert [names(batch) for batch in unused] == epochs[0]  # begun now, so it goes on where the state stood
    assert [names(batch) for batch in loader] == epochs[1]


def loops_end_as_told(case: Case) -> None:
    """A break, an exception, an iterator dropped, `set_epoch` during a loop, and `next` beyond the end: what comes then."""
    whole = case.make()
    epochs = [[names(batch) for batch in whole] for _ in range(4)]
    loader = case.make()
    with pytest.raises(KeyError):
        for _ in loader:
            raise KeyError
    assert [names(batch) for batch in loader] == epochs[1]  # the next epoch, nothing of the old one
    dropped = iter(loader)
    next(dropped)
    del dropped
    assert [names(batch) for batch in loader] == epochs[3]
    loader.set_epoch(0)
    running = iter(loader)
    begun = [names(next(running))]
    loader.set_epoch(3)  # speaks of the next `for`; what runs goes on
    assert begun + [names(batch) for batch in running] == epochs[0]
    assert next(running, None) is None
    assert next(running, None) is None
    assert [names(batch) for batch in loader] == epochs[3]


LOOPS: tuple[Callable[[Case], None], ...] = (iterators_are_independent, loops_end_as_told)


# ------------------------------------------------------------------ what the laws are made of


def _a_huge_batch_is_what_there_is(make: Make) -> None:
    """A batch size far above the records costs no more rows than these, and a state goes on with another world."""
    ranks = [make(batch_size=300_000, rank=rank, world_size=2) for rank in range(2)]
    records = ranks[0].num_records
    assert [loader.batch_size for loader in ranks] == [-(-records // 2)] * 2
    for epoch in range(2):
        batches = [next(iter(loader)) for loader in ranks]
        assert [len(loader) for loader in ranks] == [1, 1]
        assert [len(names(batch)) for batch in batches] == [-(-records // 2)] * 2
        seen = [one for batch in batches for one, valid in zip(names(batch), batch.valid.tolist(), strict=True) if valid]
        alone = make(batch_size=600_000)
        alone.set_epoch(epoch)
        (whole,) = alone
        assert names(whole) == seen
        assert len(seen) == len(set(seen)) == records == ranks[0].num_valid(0)
    alone.load_state_dict(ranks[0].state_dict())
    assert list(alone) == []
    for size in (records, records - 1):
        assert len(names(next(iter(make(batch_size=size))))) == size


def _drop_drops(make: Make) -> None:
    """drop_last=True gives whole batches without padding, no record twice, and loses less than one global batch."""
    loader = make(drop_last=True)
    batches = list(loader)
    ids = [one for batch in batches for one in names(batch)]
    assert len(batches) == len(loader) > 0
    assert all(bool(batch.valid.all()) for batch in batches)
    assert len(ids) == len(set(ids)) > loader.num_records - loader.batch_size


def _a_budget_drops_what_a_rank_would_lack(case: Case, world_size: int, num_partitions: int) -> None:
    """drop_last=True ends before the first step in which a rank would have padding."""
    pad, drop = (
        [
            case.make(rank=rank, world_size=world_size, num_partitions=num_partitions, drop_last=drop_last)
            for rank in range(world_size)
        ]
        for drop_last in (False, True)
    )
    padded, dropped = ([list(loader) for loader in ranks] for ranks in (pad, drop))
    whole = [all(bool(batch.valid.all()) for batch in step) for step in zip(*padded, strict=True)]
    expected = list(zip(*padded, strict=True))[: whole.index(False) if False in whole else None]
    assert [[names(batch) for batch in step] for step in zip(*dropped, strict=True)] == [
        [names(one) for one in step] for step in expected
    ]
    assert {len(loader) for loader in drop} == {len(expected)}
    assert drop[0].check_digest(sum((loader.digest for loader in drop), dp.EpochDigest())).endswith("the rest dropped")


def _each_source_once_a_pass(case: Case, part_of: Callable[[str], str], sizes: Mapping[str, int]) -> None:
    """Each source is drawn without replacement within its own pass, over the borders of epochs too."""
    loader = case.make()
    batches = [batch for _ in range(3) for batch in loader]
    drawn = [one for batch in batches for one, valid in zip(names(batch), batch.valid.tolist(), strict=True) if valid]
    for part, size in sizes.items():
        own = [one for one in drawn if part_of(one) == part]
        assert len(own) > size
        for at in range(0, len(own), size):
            assert len(set(own[at : at + size])) == len(own[at : at + size])


def _epochs_differ_and_repeat(make: Make) -> None:
    """A new `for` is the next epoch, in another order; `set_epoch` gives an epoch again; another seed is another order."""
    loader = make()
    first, second = ([content(batch) for batch in loader] for _ in range(2))
    assert [batch["ids"] for batch in first] != [batch["ids"] for batch in second]
    loader.set_epoch(0)
    assert_same(loader, first)
    assert_same(loader, second)
    assert [names(batch) for batch in make(seed=1)] != [batch["ids"] for batch in first]
    for _ in make():
        break
    broken = make()
    for _ in broken:
        break
    assert_same(broken, second)


def _resumes_exactly(make: Make, steps: Iterable[int]) -> None:
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


def _refuses_foreign_states(case: Case) -> None:
    """A state of another order is refused in one sentence with both values, and nothing changes."""
    loader = case.make()
    list(loader)
    before = loader.state_dict()
    for change, words in (*case.refusals, ({"data": case.other}, "data set digest")):
        with pytest.raises(dp.StateError, match=words) as refused:
            loader.load_state_dict(case.make(**change).state_dict())
        assert "\n" not in str(refused.value)
    for state in ({}, {**before, "epoch": -1}, {**before, "step": 10**6}, {**before, "order": 3}, {**before, "kind": "words"}):
        with pytest.raises(dp.StateError):
            loader.load_state_dict(state)
    with pytest.raises(dp.StateError, match="of version 1, and this release reads version 3"):
        loader.load_state_dict({**before, "version": 1})
    assert loader.state_dict() == before


def _digest_of_a_part(case: Case) -> None:
    """Check the digest of an epoch that was interrupted and resumed, and of one whose rest is dropped."""
    make = case.make
    loader, batches = make(), iter(make())
    for _ in loader:
        break
    first, state = loader.digest, loader.state_dict()
    assert first == digest_of(names(next(batches)), rows=case.rows)
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
        dropped.check_digest(dropped.digest + (dropped.digest if case.budget else first))


def _a_budget_goes_on_with_another_world(make: Make, num_partitions: int) -> None:
    """What is left at the stop comes once, in the batches that one process would have made of it."""
    ranks = [make(rank=rank, world_size=4, num_partitions=num_partitions) for rank in range(4)]
    iterators = [iter(loader) for loader in ranks]
    before = [[next(each) for each in iterators] for _ in range(2)]
    states = [loader.state_dict() for loader in ranks]
    assert all(state == states[0] for state in states)
    others = [make(rank=rank, world_size=2, num_partitions=num_partitions) for rank in range(2)]
    for loader in others:
        loader.load_state_dict(json.loads(json.dumps(states[0])))
    after = [batch for step in zip(*others, strict=True) for batch in step if batch.valid.all()]
    ours = {tuple(names(batch)) for step in before for batch in step} | {tuple(names(batch)) for batch in after}
    assert ours == {tuple(names(batch)) for batch in make(num_partitions=num_partitions) if batch.valid.all()}


def _names_the_shard(case: Case, data: dp.Dataset, name: Path, broken: bytes | None, sound: list[dict[str, Any]]) -> None:
    """A copy of `data` whose shard is `broken`, or missing: the epoch ends in one sentence, behind sound batches alone."""
    copy = case.folder / "broken"
    shutil.copytree(data.folder, copy)
    (copy / name).unlink()
    if broken is not None:
        (copy / name).write_bytes(broken)
    delivered: list[Any] = []
    with pytest.raises(dp.PipelineError, match=name.name) as found:
        for batch in case.make(data=dp.open_dataset(copy)):
            delivered.append(content(batch))  # noqa: PERF401, what came before the error counts
    assert "\n" not in str(found.value)
    assert len(delivered) < len(sound)
    if delivered:
        assert_same(delivered, sound[: len(delivered)])
    shutil.rmtree(copy)


def _positions(loader: Loader[Any]) -> set[int]:
    return {one for batch in loader for one in places(batch)[batch.valid].tolist()}


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _leaves(one)
    else:
        yield value


def _held(case: Case, data: dp.Dataset) -> tuple[int, int]:
    """The most bytes of gathered values that were alive at a time in an epoch of `data`, and all together."""
    alive = peak = total = 0
    take = Buffers.take

    def let_go(nbytes: int) -> None:
        nonlocal alive
        alive -= nbytes

    def counted(self: Buffers, nbytes: int, phase: int = 0) -> Any:
        nonlocal alive, peak, total
        piece = take(self, nbytes, phase)
        weakref.finalize(piece, let_go, nbytes)
        alive, total = alive + nbytes, total + nbytes
        peak = max(peak, alive)
        return piece

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Buffers, "take", counted)
        assert sum(int(batch.valid.sum()) for batch in case.make(data=data, batch_size=8)) > 100
    return peak, total


@contextmanager
def _opened() -> Iterator[set[str]]:
    """Paths of the shards that are opened meanwhile."""
    paths: set[str] = set()

    class Noted(OpenFile):
        def __init__(self, path: Path) -> None:
            if Path(path).name.startswith(("sequences-", "graphs-")):  # not the files of others that shards refer to
                paths.add(str(path))
            super().__init__(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files_module, "OpenFile", Noted)
        yield paths


_WATCHED: list[list[str]] = []  # where names go that an unpickler of this process looks up
_HOOKED: list[bool] = []


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if _WATCHED and event == "pickle.find_class":
        _WATCHED[-1].append(f"{arguments[0]}.{arguments[1]}")


@contextmanager
def _looked_up() -> Iterator[list[str]]:
    """Names that unpicklers look up meanwhile, in any thread of this process; those of our own that look up nothing apart."""
    if not _HOOKED:
        sys.addaudithook(_note)  # for good: Python takes none away
        _HOOKED.append(True)
    _WATCHED.append([])
    try:
        yield _WATCHED[-1]
    finally:
        _WATCHED.pop()
