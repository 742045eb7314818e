"""The resident window: the batches of the gather, from the memory of the device."""

from __future__ import annotations

import itertools
import os
import pickle
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

import dali_pipeline as dp
from dali_pipeline.loaders import sequences as sequences_module
from dali_pipeline.loaders.resident import ResidentWindow
from dali_pipeline.reading import residency as residency_module
from dali_pipeline.reading.residency import SLOTS, Residency
from dali_pipeline.reading.superbatch import SequenceGatherer
from dali_pipeline.reading.window import WindowFiller
from dali_pipeline.storage.direct import read_past_cache
from tests.helpers.batches import assert_resumes, assert_same

FIELDS = {
    "step.token": dp.Field(dtype="int32", pad=-1),
    "step.probability": dp.Field(dtype="bfloat16"),
    "record.score": dp.Field(dtype="float32", shape=(2,)),
    "record.prompt": dp.Field(dtype="text"),
}


def written(
    root: Path, *, count: int = 600, dtype: str = "float16", longest: int = 9, uniform: bool = False, **schema: Any
) -> dp.Dataset:
    """A set of `count` records of 64 shards or so; values are whole numbers, which every type holds."""
    rng = np.random.default_rng(0)
    field = schema.pop("sequence", dp.Field(dtype=dtype, shape=(8,)))
    made = dp.Schema(sequence=field, fields=FIELDS, **{"step_axis": "token", **schema})
    with dp.ShardWriter(root, made, split=dp.SplitRule.parse("100/0/0"), shard_bytes=4096) as writer:
        for number in range(count):
            steps = longest if uniform else int(rng.integers(1, longest + 1))
            fields = {
                "step.token": rng.integers(0, 99, steps).astype(np.int32),
                "step.probability": rng.integers(0, 9, steps).astype(np.float32),
                "record.score": rng.random(2).astype(np.float32),
                "record.prompt": f"why {number}?",
            }
            values = rng.integers(0, 50, (steps, *field.shape)).astype("float32" if dtype == "bfloat16" else dtype)
            writer.write({"id": number, "label": number % 3, "sequence": values, "fields": fields})
    return dp.open_dataset(root)


def both(data: dp.Dataset, **options: Any) -> tuple[dp.SequenceLoader, dp.SequenceLoader]:
    options = {"batch_size": 4, "window_bytes": 60_000, **options}
    return dp.SequenceLoader(data, window="resident", **options), dp.SequenceLoader(data, window="gather", **options)


def check(resident: dp.SequenceLoader, gathered: dp.SequenceLoader, epochs: int = 2) -> None:
    for _ in range(epochs):
        batches = list(resident)
        assert len(batches) == len(gathered) > 0
        for ours, theirs in zip(batches, gathered, strict=True):
            assert_same([ours], [theirs])
        assert resident.digest == gathered.digest
        assert resident.left_out == gathered.left_out


@pytest.fixture(scope="module")
def ragged(tmp_path_factory: pytest.TempPathFactory) -> dp.Dataset:
    return written(tmp_path_factory.mktemp("resident") / "ragged")


@pytest.mark.parametrize("engine", ["torch", "dali"])
@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64", "uint16"])
def test_the_window_delivers_what_the_gather_does(tmp_path: Path, dtype: str, uniform: bool, engine: Any) -> None:
    data = written(tmp_path / "set", dtype=dtype, uniform=uniform, count=300)
    check(*both(data, engine=engine))
    check(
        *both(data, engine=engine, normalize=dtype != "uint16", steps=[0] if not uniform else [4, 1, -1], dtype=torch.bfloat16),
        1,
    )


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("layers", [None, [2], [3, 0]])
@pytest.mark.parametrize("uniform", [False, True])
def test_layers_of_a_step(tmp_path: Path, uniform: bool, layers: Any, packed: bool) -> None:
    field = dp.Field(dtype="float16", shape=(4, 3), axes=("layer", "feature"))
    data = written(tmp_path / "set", uniform=uniform, sequence=field, count=300)
    check(*both(data, engine="torch", layers=layers, packed=packed, normalize=True), 1)


def test_the_window_is_larger_than_its_memory(ragged: dp.Dataset) -> None:
    """The set is many windows, the memory one and a half of one."""
    loader, _ = both(ragged)
    residency = Residency.of(loader.plan(0), 0, 1)
    assert residency is not None
    assert len(residency.groups) > 3 * SLOTS
    assert not residency.whole
    assert residency.num_slots == SLOTS
    list(loader)
    (memory,) = loader._memories._unused
    # the schedule counts whole shards per run of so small sets, so groups are much smaller than half a window
    assert memory.values.nbytes < 1.6 * 60_000
    address = memory.values.data_ptr()
    list(loader)
    assert [again.values.data_ptr() for again in loader._memories._unused] == [address]


def test_a_set_that_fits_is_read_once(ragged: dp.Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[object] = []
    begin = WindowFiller._begin

    def counted(self: Any) -> Any:
        reads.append(self)
        return begin(self)

    monkeypatch.setattr(WindowFiller, "_begin", counted)
    loader, gathered = both(ragged, window_bytes=10**7, num_partitions=2)
    check(loader, gathered, 1)
    assert reads
    reads.clear()
    check(loader, gathered, 3)
    assert not reads


@pytest.mark.parametrize("options", [{"shuffle": False}, {"bucket_by_length": True}, {"rank": 1, "world_size": 3}])
def test_a_set_that_fits_is_served_in_any_order(ragged: dp.Dataset, options: dict[str, Any]) -> None:
    check(*both(ragged, window_bytes=10**7, **options))


@pytest.mark.parametrize("options", [{"engine": "torch"}, {"engine": "dali"}, {"engine": "torch", "num_partitions": 2}])
def test_what_memory_cannot_keep_is_read_past_the_page_cache(
    ragged: dp.Dataset, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """To the same batches; what memory can keep is read through the cache, so that later epochs find it there."""
    sizes: list[int] = []

    def counted(files: Any, offsets: Any, addresses: Any, nbytes: Any) -> Any:
        sizes.extend(nbytes.tolist())
        return read_past_cache(files, offsets, addresses, nbytes)

    monkeypatch.setattr("dali_pipeline.storage.direct.LEAST_BYTES", 1)
    monkeypatch.setattr("dali_pipeline.reading.gather.read_past_cache", counted)
    check(*both(ragged, **options), 1)
    assert not sizes
    total = sum(ragged.table("train", "sequences").nbytes)
    for available, past in ((total // 2, True), (2 * total, False)):
        monkeypatch.setattr(
            "dali_pipeline.loaders.loader.allowed_memory", lambda available=available: (2 * available, available)
        )
        resident, gathered = both(ragged, num_workers=2, **options)
        check(resident, gathered, 2)
        assert bool(sizes) == past
        sizes.clear()


@pytest.mark.parametrize("window_bytes", [60_000, 10**7])
def test_two_iterators_at_once_and_one_that_is_left(ragged: dp.Dataset, window_bytes: int) -> None:
    loader, gathered = both(ragged, window_bytes=window_bytes)
    expected = [list(gathered) for _ in range(3)]
    first, second = iter(loader), iter(loader)
    for ours, theirs in zip(expected[0], expected[1], strict=True):
        assert_same([next(first)], [ours])
        assert_same([next(second)], [theirs])
    for number, batch in enumerate(loader):
        assert_same([batch], [expected[2][number]])
        if number == 20:
            break
    loader.set_epoch(2)
    for ours, theirs in zip(loader, expected[2], strict=True):
        assert_same([ours], [theirs])


@pytest.fixture
def damaged(tmp_path: Path) -> dp.Dataset:
    data = written(tmp_path / "set")
    path = data.shard_path("train", "sequences", 5)
    content = bytearray(path.read_bytes())
    at = content.index(b"why ")  # texts lie behind the sequences
    content[at - 600] ^= 1
    path.write_bytes(content)
    return dp.open_dataset(tmp_path / "set")


@pytest.mark.parametrize("engine", ["torch", "dali"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_damage_is_named_or_left_out_as_by_the_gather(damaged: dp.Dataset, engine: Any, num_workers: int) -> None:
    loader, gathered = both(damaged, engine=engine, num_workers=num_workers)
    delivered: list[int] = []
    messages = []
    for one in (loader, gathered):
        count = 0
        with pytest.raises(dp.FormatError) as caught:
            for _ in one:
                count += 1
        delivered.append(count)
        messages.append(str(caught.value))
    assert delivered[0] == delivered[1]
    assert messages[0] == messages[1]
    assert "sequences-00005.safetensors" in messages[0]
    skipping, gathered = both(damaged, engine=engine, num_workers=num_workers, on_error="skip")
    check(skipping, gathered)
    assert skipping.left_out


def test_nan_is_named(tmp_path: Path) -> None:
    schema = dp.Schema(sequence=dp.Field(dtype="float16", shape=(8,)))
    with dp.ShardWriter(tmp_path / "set", schema, split=dp.SplitRule.parse("100/0/0"), shard_bytes=4096) as writer:
        for number in range(300):
            writer.write({"id": number, "label": 0, "sequence": np.full((3, 8), np.nan if number == 77 else 1.0)})
    data = dp.open_dataset(tmp_path / "set")
    loader, gathered = both(data, on_nan="skip", engine="torch")
    check(loader, gathered, 1)
    assert len(loader.left_out) == 1
    with pytest.raises(dp.DataError, match="record '77' holds NaN"):
        list(both(data, on_nan="raise", engine="torch")[0])


BUDGETS: list[dict[str, Any]] = [{}, {"count_padding": False}, {"packed": True}, {"steps": [0, 2]}]


@pytest.mark.parametrize("engine", ["torch", "dali"])
@pytest.mark.parametrize("options", BUDGETS)
def test_a_budget_from_a_window_that_moves(
    tmp_path: Path, ragged: dp.Dataset, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], engine: Any
) -> None:
    data = written(tmp_path / "set", uniform=True) if "steps" in options else ragged
    options = {"engine": engine, "max_steps": 16 if data is ragged else 8, **options}
    loader, gathered = both(data, **options)
    residency = loader._residency(loader.plan(0))
    assert residency is not None
    assert len(residency.groups) > 3 * SLOTS
    epochs = [list(gathered), list(gathered)]
    monkeypatch.setattr(SequenceGatherer, "gather_packed", None)  # every batch is served by the window
    for expected in epochs:
        assert_same(list(loader), expected)
    assert_resumes(loader, both(data, **options)[0], epochs[0])


def counted(patch: pytest.MonkeyPatch, gatherer: Any) -> list[int]:
    """Let every gather of packed batches add a 1 to the list that is returned."""
    calls: list[int] = []
    gather = gatherer.gather_packed

    def gathers(*arguments: Any) -> Any:
        calls.append(1)
        return gather(*arguments)

    patch.setattr(gatherer, "gather_packed", gathers)
    return calls


def test_a_budget_of_more_than_a_window_is_gathered(ragged: dp.Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch of 2,000 steps needs more groups than there are slots; one of 300 steps does so at times."""
    for max_steps, least in ((300, 0), (2000, 2)):
        loader, gathered = both(ragged, max_steps=max_steps, engine="torch", window_bytes=20_000)
        expected = list(gathered)
        with monkeypatch.context() as patch:
            calls = counted(patch, SequenceGatherer)
            assert_same(list(loader), expected)
        assert least <= len(calls) <= len(expected)


@pytest.mark.parametrize(("window_bytes", "max_steps"), [(2000, 25), (4500, 130), (6000, 60)])
def test_slow_reads_do_not_meet_in_a_slot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window_bytes: int, max_steps: int
) -> None:
    """Batches of several groups are gathered, so that whole groups are passed while pieces are read."""
    rng = np.random.default_rng(0)
    schema = dp.Schema(sequence=dp.Field(dtype="float32", shape=(8,)))
    with dp.ShardWriter(tmp_path / "set", schema, split=dp.SplitRule.parse("100/0/0"), shard_bytes=2048) as writer:
        for number in range(400):
            steps = 25 if rng.random() < 0.08 else 1
            writer.write({"id": number, "label": 0, "sequence": np.full((steps, 8), number, np.float32)})
    loader, gathered = both(dp.open_dataset(tmp_path / "set"), max_steps=max_steps, window_bytes=window_bytes, engine="torch")
    read, turn = ResidentWindow._read, itertools.count()

    def slow(*arguments: Any) -> Any:
        if next(turn) % 2:
            time.sleep(0.01)
        return read(*arguments)

    monkeypatch.setattr(ResidentWindow, "_read", slow)
    for _ in range(2):
        assert_same(list(loader), list(gathered))


def test_a_budget_over_ranks_and_partitions_from_a_split_that_fits(ragged: dp.Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    for options in ({"num_partitions": 2}, {"rank": 1, "world_size": 2}, {"shuffle": False}):
        loader, gathered = both(ragged, max_steps=40, window_bytes=10**7, **options)
        expected = list(gathered)
        with monkeypatch.context() as patch:
            patch.setattr(SequenceGatherer, "gather_packed", None)
            assert_same(list(loader), expected)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"shuffle": False}, "with shuffle=False needs a split that fits in the window"),
        ({"max_steps": 50, "num_partitions": 2}, "with a budget over several partitions or processes needs a split that fits"),
        ({"bucket_by_length": True}, "with bucket_by_length needs a split that fits"),
        ({"class_balanced": True}, "does not go with class_balanced, group_weights"),
        ({"batch_size": 400}, "batches of 400 need more at once; expected a smaller batch_size"),
        ({"rank": 0, "world_size": 2}, "needs whole partitions for each of 2 processes"),
    ],
)
def test_what_a_window_cannot_do_is_refused_and_gathered_by_default(
    ragged: dp.Dataset, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(dp.UsageError, match=words):
        both(ragged, **options)
    options = {"batch_size": 4, "window_bytes": 60_000, **options}
    assert dp.SequenceLoader(ragged, **options).window == "gather"


def test_the_default(ragged: dp.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert dp.SequenceLoader(ragged).window == "resident"
    assert dp.SequenceLoader(ragged, window="gather").window == "gather"
    wide = written(tmp_path / "wide", uniform=True, count=20, sequence=dp.Field(dtype="float16", shape=(2048,)))
    assert dp.SequenceLoader(wide, batch_size=4).window == "resident"  # 36 KB a record, and all fit
    assert dp.SequenceLoader(wide, batch_size=1, window_bytes=100_000, engine="torch").window == "gather"
    assert dp.SequenceLoader(wide, batch_size=1, window_bytes=100_000, window="resident").window == "resident"
    monkeypatch.setattr("dali_pipeline.loaders.loader.allowed_memory", lambda: (10**6, 600_000))  # of 720 KB
    for engine in ("torch", "dali"):
        moving = dp.SequenceLoader(wide, batch_size=1, window_bytes=100_000, engine=engine)
        assert moving.window == "resident"
        assert moving._source.past_cache
        # a window of the whole split would not fit either
        assert dp.SequenceLoader(wide, batch_size=1, window_bytes=10**9, engine=engine).window == "gather"
    few = dp.SequenceLoader(wide, batch_size=1, window_bytes=100_000, steps=[0, 3], engine="torch")
    assert few.window == "gather"  # two of nine steps stay in memory
    for local in ("4", "2", "1"):  # of four ranks, which share one partition
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
        shared = dp.SequenceLoader(wide, batch_size=1, window_bytes=100_000, engine="torch", rank=0, world_size=4)
        assert shared.window == "gather"
        assert shared._fits_memory() == (local != "4")
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    monkeypatch.setattr("dali_pipeline.loaders.loader.allowed_memory", lambda: (10**6, 900_000))
    assert dp.SequenceLoader(wide, batch_size=1, window_bytes=100_000, engine="torch").window == "gather"
    with pytest.raises(dp.UsageError, match=r"window is 'disk'; expected"):
        dp.SequenceLoader(ragged, window="disk")  # type: ignore[arg-type]


def test_partitions_over_ranks(ragged: dp.Dataset) -> None:
    """Each rank holds the windows of its own partitions; together they deliver what one process does."""
    options: dict[str, Any] = {"num_partitions": 4, "window_bytes": 60_000, "engine": "torch"}
    alone = dp.SequenceLoader(ragged, batch_size=8, **options, window="resident")
    ranks = [
        dp.SequenceLoader(ragged, batch_size=4, **options, rank=rank, world_size=2, window="resident") for rank in range(2)
    ]
    whole = [(list(batch.ids), batch.valid.tolist()) for batch in alone]
    parts = [[(list(batch.ids), batch.valid.tolist()) for batch in loader] for loader in ranks]
    assert len(whole) > 20
    assert whole == [(a[0] + b[0], a[1] + b[1]) for a, b in zip(*parts, strict=True)]


def test_a_file_that_is_cut_while_it_is_read(tmp_path: Path) -> None:
    """The same sentence as from the gather, after the same batches, and nothing else."""
    messages, counts = [], []
    for window in ("resident", "gather"):
        data = written(tmp_path / window)
        loader = dp.SequenceLoader(data, batch_size=4, window_bytes=60_000, engine="torch", num_workers=0, window=window)
        batches, count = iter(loader), 1
        next(batches)
        for path in sorted((data.folder / "train").glob("sequences-*"))[::2]:
            os.truncate(path, 6000)
        with pytest.raises(dp.FormatError) as caught:
            for _ in batches:
                count += 1
        messages.append(str(caught.value).replace(str(data.folder), ""))
        counts.append(count)
    assert "sequences-" in messages[0]
    assert counts[0] > 1


def test_memory_beside_batches_is_one_and_a_half_windows(tmp_path: Path) -> None:
    """Law 8, from arithmetic: what the tables and rows of a long set take does not depend on the set's length."""
    sizes = []
    for count in (600, 2400):
        data = written(tmp_path / str(count), count=count, uniform=True)
        loader = dp.SequenceLoader(data, batch_size=4, window_bytes=60_000, engine="torch", window="resident")
        residency = Residency.of(loader.plan(0), 0, 1)
        assert residency is not None
        memory = loader._window_memory(residency)
        sizes.append(memory.values.nbytes)
        assert memory.values.nbytes <= 1.5 * 60_000 + 9 * 16 * 8
    assert sizes[1] < 1.5 * sizes[0]


@pytest.mark.parametrize("engine", ["torch", "dali"])
@pytest.mark.parametrize("piece", [0, 1])
def test_damage_in_any_piece_of_a_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int, engine: Any) -> None:
    """Groups of several pieces, as usual windows have."""
    monkeypatch.setattr(residency_module, "PIECE_BYTES", 1000)
    data = written(tmp_path / "set", uniform=True)
    residency = Residency.of(both(data)[0].plan(0), 0, 1)
    assert residency is not None
    pieces = list(residency.pieces(residency.groups[0], data.select("train", "sequences").record_bytes))
    assert len(pieces) > 2
    _, number, row = data.select("train", "sequences").at(pieces[piece].runs[0][0])
    path = data.shard_path("train", "sequences", number)
    with safe_open(path, "np") as file:
        values = file.get_slice("sequence")[9 * row : 9 * row + 9].tobytes()
    content = bytearray(path.read_bytes())
    content[content.index(values)] ^= 1
    path.write_bytes(content)
    data = dp.open_dataset(tmp_path / "set")
    for loader in both(data, engine=engine, num_workers=0):
        with pytest.raises(dp.FormatError, match="are damaged"):
            list(loader)
    check(*both(data, engine=engine, on_error="skip"))


def test_memory_of_an_epoch_that_fits_is_not_that_of_one_that_does_not(tmp_path: Path) -> None:
    """Whether all groups of an epoch fit at once depends on how its line is cut."""
    schema = dp.Schema(sequence=dp.Field(dtype="float16", shape=(16,)))
    with dp.ShardWriter(tmp_path / "set", schema, split=dp.SplitRule.parse("100/0/0"), shard_bytes=700_000) as writer:
        for number in range(6000):
            writer.write({"id": number, "label": 0, "sequence": np.full((50, 16), number % 100)})
    data = dp.open_dataset(tmp_path / "set")
    total = int(data.select("train", "sequences").nbytes.sum())
    loader, gathered = both(data, window_bytes=int(total / 1.49), batch_size=1, engine="torch")
    whole = [loader._residency(loader.plan(epoch)) for epoch in range(30)]
    kinds = [residency is not None and residency.whole for residency in whole]
    change = next(epoch for epoch in range(29) if kinds[epoch] and not kinds[epoch + 1])
    for one in (loader, gathered):  # only the end of the first of them, so that it does not stay in memory
        one.load_state_dict({**one.state_dict(), "epoch": change, "step": 5990})
    assert len(list(loader)) == len(list(gathered)) == 10
    for number, (ours, theirs) in enumerate(zip(loader, gathered, strict=True)):
        if number % 50 == 0:
            assert_same([ours], [theirs])
    assert loader.digest == gathered.digest


def test_a_pickled_loader_has_no_window(ragged: dp.Dataset) -> None:
    loader, gathered = both(ragged, window_bytes=10**7)
    list(loader)
    assert len(pickle.dumps(loader)) < 10_000
    again = pickle.loads(pickle.dumps(loader))
    again.set_epoch(0)
    check(again, gathered, 1)


def test_groups_of_more_steps_than_there_is_room_for(
    ragged: dp.Dataset, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Runs are cut by the average size of a shard's records, so some groups hold more than others."""
    monkeypatch.setattr(sequences_module, "RAGGED_ROOM", 0.0)
    check(*both(ragged, engine="torch"), 1)
    assert "with more rows than the resident window has room for" in caplog.text
