"""Records that cannot be read, or hold NaN, while a loader runs: named and raised, or made padding and counted."""

from __future__ import annotations

import errno
import logging
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dali_pipeline as dp
from dali_pipeline.loaders.loader import Loader
from tests.helpers.records import SCHEMA, make_records, write

LOADERS: dict[str, Callable[..., Loader[Any]]] = {
    "torch": lambda data, **options: dp.SequenceLoader(data, engine="torch", **options),
    "dali": lambda data, **options: dp.SequenceLoader(data, engine="dali", **options),
    "graphs": dp.GraphLoader,
}
FIELDS = {"torch": "sequence", "dali": "sequence", "graphs": "x"}


@pytest.fixture(params=LOADERS)
def loads(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def flip(data: dp.Dataset, loads: str, shard: int, record: dp.Record) -> None:
    """One bit of a record's values."""
    path = data.shard_path("train", "graphs" if loads == "graphs" else "sequences", shard)
    content = bytearray(path.read_bytes())
    values = record.graphs.x if loads == "graphs" else record.sequence
    content[content.index(values.tobytes())] ^= 1
    path.write_bytes(content)


def delivered(ranks: list[Loader[Any]]) -> Counter[str]:
    """Ids of valid rows over all ranks; every rank has delivered whole, equal batches."""
    found: Counter[str] = Counter()
    for loader in ranks:
        batches = list(loader)
        assert len(batches) == len(loader)
        for batch in batches:
            assert len(batch) == loader.batch_size
            found.update(one for one, valid in zip(batch.ids, batch.valid.tolist(), strict=True) if valid)
    return found


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 2])
def test_damaged_records_become_padding(
    tmp_path: Path, loads: str, world_size: int, num_workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    records = make_records(60)
    data = write(tmp_path / "set", records, shares="100/0/0")
    sizes = data.table("train", "graphs" if loads == "graphs" else "sequences").records
    flip(data, loads, 2, records[sum(sizes[:2])])  # blocks are longer than these shards, so all of it is lost
    lost = {record.id for record in records[sum(sizes[:2]) : sum(sizes[:3])]}
    options = {"batch_size": 4, "on_error": "skip", "num_workers": num_workers, "window_bytes": 6000}
    ranks = [LOADERS[loads](data, rank=rank, world_size=world_size, **options) for rank in range(world_size)]
    caplog.set_level(logging.WARNING, "dali_pipeline")
    assert delivered(ranks) == Counter(record.id for record in records if record.id not in lost)
    told = [words for loader in ranks for words in loader.left_out]
    assert len(told) == len(lost) > 0
    for one in lost:
        assert sum(f"-00002.safetensors, {FIELDS[loads]}: " in words and f"{one!r}" in words for words in told) == 1
    assert sum("left out:" in line for line in caplog.messages) == sum(min(10, len(loader.left_out)) for loader in ranks)
    assert any("in all" in line for line in caplog.messages) == any(len(loader.left_out) > 10 for loader in ranks)
    digest = sum((loader.digest for loader in ranks), dp.EpochDigest())
    words = f"{60 - len(lost)} of 60 records, {len(lost)} left out as damaged or not finite"
    assert ranks[0].check_digest(digest) == words
    assert delivered(ranks) == Counter(record.id for record in records if record.id not in lost)  # and in the next epoch


def test_the_others_are_delivered_as_ever(tmp_path: Path, loads: str) -> None:
    """A padding row repeats a sound record of its batch; no sound row is another than without the damage."""
    records = make_records(40)
    data = write(tmp_path / "set", records, shares="100/0/0")
    sound = [list(batch.ids) for batch in LOADERS[loads](data, batch_size=8)]
    flip(data, loads, 0, records[0])
    for batch, ids in zip(LOADERS[loads](data, batch_size=8, on_error="skip"), sound, strict=True):
        for one, valid, was in zip(batch.ids, batch.valid.tolist(), ids, strict=True):
            assert one == was if valid else one in ids


@pytest.mark.parametrize(("number", "skips"), [(errno.EIO, True), (errno.ESTALE, False), (errno.EMFILE, False)])
def test_only_what_the_disk_has_lost_is_left_out(
    tmp_path: Path, loads: str, number: int, skips: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file system that does not answer just now is no damage: records are not lost for it."""
    data = write(tmp_path / "set", make_records(40), shares="100/0/0")
    path = data.shard_path("train", "graphs" if loads == "graphs" else "sequences", 0)
    whole = os.open

    def refuses(name: Any, *arguments: Any, **named: Any) -> int:
        if Path(name) == path:
            raise OSError(number, os.strerror(number), str(name))
        return whole(name, *arguments, **named)

    loader = LOADERS[loads](data, batch_size=8, on_error="skip", num_workers=0)
    monkeypatch.setattr(os, "open", refuses)
    if skips:
        assert delivered([loader])
        assert len(loader.left_out) == data.table("train", "graphs" if loads == "graphs" else "sequences").records[0]
    else:
        with pytest.raises(dp.PipelineError, match="cannot be opened") as error:
            list(loader)
        assert not isinstance(error.value, dp.FormatError)


@pytest.mark.parametrize("gone", ["truncated", "deleted", "header", "offsets"])
def test_a_shard_lost_while_the_epoch_runs(tmp_path: Path, loads: str, gone: str) -> None:
    records = make_records(200)
    data = write(tmp_path / "set", records, shares="100/0/0")
    kind: Any = "graphs" if loads == "graphs" else "sequences"
    sizes = data.table("train", kind).records
    path = data.shard_path("train", kind, len(sizes) - 1)
    whole = path.read_bytes()

    def damage() -> None:
        if gone == "deleted":
            path.unlink()
        elif gone == "truncated":
            path.write_bytes(whole[: len(whole) // 2])
        else:
            at = 20 if gone == "header" else len(whole) - 300
            path.write_bytes(whole[:at] + bytes(255 - byte for byte in whole[at : at + 200]) + whole[at + 200 :])

    options = {"batch_size": 4, "shuffle": False, "num_workers": 0, "window_bytes": 4000}
    loader = LOADERS[loads](data, **options)
    with pytest.raises(dp.FormatError, match=rf"{kind}-{len(sizes) - 1:05d}\.safetensors"):
        for step, _ in enumerate(loader):
            if step == 1:
                damage()
    path.write_bytes(whole)
    loader = LOADERS[loads](data, on_error="skip", **options)
    found: Counter[str] = Counter()
    for step, batch in enumerate(loader):
        if step == 1:
            damage()
        found.update(one for one, valid in zip(batch.ids, batch.valid.tolist(), strict=True) if valid)
    assert found == Counter(record.id for record in records[: -sizes[-1]])
    assert len(loader.left_out) == sizes[-1]


def test_where_nothing_can_be_read_it_is_said(tmp_path: Path, loads: str) -> None:
    data = write(tmp_path / "set", make_records(30), shares="100/0/0")
    for path in (data.folder / "train").iterdir():
        path.write_bytes(b"")
    with pytest.raises(dp.FormatError, match=r"has 0 bytes; expected"):
        list(LOADERS[loads](data, on_error="skip", batch_size=4))


@pytest.mark.parametrize("strange", [np.nan, np.inf])
def test_nan_is_kept_raised_or_skipped(tmp_path: Path, loads: str, strange: float) -> None:
    records = make_records(40)
    for number in (3, 21):
        values = records[number].graphs.x if loads == "graphs" else records[number].sequence
        values[len(values) // 2, 1] = strange
    with dp.ShardWriter(tmp_path / "set", SCHEMA, split=dp.SplitRule.parse("100/0/0"), shard_bytes=2000) as writer:
        for record in records:
            writer.write(record)
    data = dp.open_dataset(tmp_path / "set")
    make = LOADERS[loads]
    assert len(delivered([make(data, batch_size=4)])) == 40
    with pytest.raises(
        dp.DataError, match=rf"safetensors, {FIELDS[loads]}: record 'record-(3|21)' holds NaN or infinite values"
    ):
        list(make(data, batch_size=4, on_nan="raise", on_error="skip"))
    loader = make(data, batch_size=4, on_nan="skip")
    assert delivered([loader]) == Counter(record.id for record in records if record.id not in ("record-3", "record-21"))
    assert len(loader.left_out) == 2
    for wrong in ({"on_nan": "ignore"}, {"on_error": "ignore"}):
        with pytest.raises(dp.UsageError, match=r"is 'ignore'; expected '(raise|keep)' or"):
            make(data, **wrong)


def test_nan_in_edge_features_is_found(tmp_path: Path) -> None:
    records = make_records(20)
    chosen = next(record for record in records[5:] if len(record.graphs.edge_attr))
    chosen.graphs.edge_attr[-1] = np.nan
    data = write(tmp_path / "set", records, shares="100/0/0")
    with pytest.raises(dp.DataError, match=rf"edge_attr: record '{chosen.id}' holds"):
        list(dp.GraphLoader(data, batch_size=4, on_nan="raise"))
    assert len(delivered([dp.GraphLoader(data, batch_size=4, on_nan="skip")])) == 19


def test_a_resume_leaves_out_the_same(tmp_path: Path, loads: str) -> None:
    records = make_records(80)
    data = write(tmp_path / "set", records, shares="100/0/0")
    flip(data, loads, 1, records[data.table("train", "graphs" if loads == "graphs" else "sequences").records[0]])
    options = {"batch_size": 4, "on_error": "skip"}
    whole = [(batch.ids, batch.valid.tolist()) for batch in LOADERS[loads](data, **options)]
    for stop in (1, 7, 13):
        loader = LOADERS[loads](data, **options)
        for step, _ in enumerate(loader, 1):
            if step == stop:
                break
        fresh = LOADERS[loads](data, **options)
        fresh.load_state_dict(loader.state_dict())
        assert [(batch.ids, batch.valid.tolist()) for batch in fresh] == whole[stop:]


def test_a_loss_that_is_none_of_damage_is_never_explained_by_it(tmp_path: Path, loads: str) -> None:
    loader = LOADERS[loads](write(tmp_path / "set", make_records(40), shares="100/0/0"), batch_size=4, on_error="skip")
    for _ in loader:
        break
    with pytest.raises(dp.DataError, match=r"delivered 4 records; expected 40"):
        loader.check_digest(loader.digest)


def test_an_order_by_length_is_none_of_what_can_be_read(data: dp.Dataset) -> None:
    with pytest.raises(dp.UsageError, match="the order would depend on what can be read"):
        dp.SequenceLoader(data, bucket_by_length=True, on_error="skip")


def test_a_fold_of_a_set_without_validation(tmp_path: Path) -> None:
    fold = write(tmp_path / "set", make_records(40), shares="100/0/0").folds(4)[0]
    assert len(delivered([dp.SequenceLoader(fold, "val", batch_size=4)])) == 10
