"""One long record among short ones: what is gathered at once is sized with its padding."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

import dali_pipeline as dp
from dali_pipeline.reading import superbatch as superbatches
from dali_pipeline.reading.source import BatchSource
from dali_pipeline.reading.superbatch import cuts
from dali_pipeline.runtime import ahead, memory
from dali_pipeline.runtime.memory import Buffers

FEATURES, LONG, BATCH = 8, 4000, 4
LIMIT = 64 << 10
ROW_BYTES = 2 * FEATURES


def written(root: Path, lengths: list[int], dtype: str = "float16") -> tuple[dp.Dataset, dict[str, np.ndarray[Any, Any]]]:
    rng = np.random.default_rng(0)
    rows = {str(n): rng.integers(-50, 50, (length, FEATURES)).astype("float32") for n, length in enumerate(lengths)}
    schema = dp.Schema(sequence=dp.Field(dtype=dtype, shape=(FEATURES,)), step_axis="layer")
    with dp.ShardWriter(root, schema, split=dp.SplitRule.parse("100/0/0"), shard_bytes=32 << 10) as writer:
        for name, sequence in rows.items():
            writer.write({"id": name, "label": 0, "sequence": sequence})
    return dp.open_dataset(root), rows


def tail() -> list[int]:
    """240 records of 2 to 9 steps, one of 4,000 and some of 400."""
    lengths: list[int] = np.random.default_rng(1).integers(2, 10, 240).tolist()
    lengths[7], lengths[90], lengths[91], lengths[200] = LONG, 400, 400, 400
    return lengths


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of each piece of memory that is gathered into."""
    sizes: list[int] = []
    allocate = BatchSource._allocate

    def seen(self: BatchSource, name: str, rows: int, field: dp.Field, *others: Any) -> Any:
        sizes.append(rows * field.row_bytes)
        return allocate(self, name, rows, field, *others)

    monkeypatch.setattr(BatchSource, "_allocate", seen)
    monkeypatch.setattr(superbatches, "SUPERBATCH_BYTES", LIMIT)
    return sizes


@pytest.mark.parametrize("bucket_by_length", [False, True])
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("engine", ["torch", "dali"])
def test_a_long_record_is_gathered_without_its_padding(
    tmp_path: Path, taken: list[int], engine: Any, num_workers: int, bucket_by_length: bool
) -> None:
    data, rows = written(tmp_path / "set", tail())
    options: dict[str, Any] = {"engine": engine, "num_workers": num_workers, "bucket_by_length": bucket_by_length}
    options["window"] = "gather"
    loader = dp.SequenceLoader(data, batch_size=BATCH, **options)
    seen: set[str] = set()
    for batch in loader:
        expected = pad_sequence([torch.from_numpy(rows[one]) for one in batch.ids], batch_first=True)
        assert torch.equal(batch.sequences, expected)
        seen |= set(batch.ids)
    assert seen == set(rows)
    most_stored = (LONG + 3 * 400) * ROW_BYTES  # of one batch
    assert LONG * ROW_BYTES * 0.9 < max(taken) <= max(LIMIT, most_stored)
    assert sum(taken) < 3 * sum(len(each) for each in rows.values()) * ROW_BYTES  # neither padded elsewhere
    assert loader.check_digest(loader.digest)


@pytest.mark.parametrize("engine", ["torch", "dali"])
def test_a_large_batch_without_padding_goes_alone(tmp_path: Path, taken: list[int], engine: Any) -> None:
    data, rows = written(tmp_path / "set", [1500] * 12 + [3] * 60)
    loader = dp.SequenceLoader(data, batch_size=BATCH, engine=engine, shuffle=False, dtype=torch.float16, window="gather")
    for batch in loader:
        expected = pad_sequence([torch.from_numpy(rows[one]).half() for one in batch.ids], batch_first=True)
        assert torch.equal(batch.sequences, expected)
    assert max(taken) == BATCH * 1500 * ROW_BYTES
    assert taken.count(max(taken)) == 3


@pytest.mark.parametrize(("dtype", "delivered"), [("bfloat16", torch.float32), ("uint16", torch.float64), ("float16", None)])
@pytest.mark.parametrize("options", [{}, {"normalize": True}, {"layers": slice(1, None, 2)}, {"layers": [-1, 0]}])
def test_engines_agree_on_long_tails(tmp_path: Path, taken: list[int], dtype: str, delivered: Any, options: Any) -> None:
    """Also with every batch short enough for one superbatch."""
    lengths = tail()
    rng = np.random.default_rng(0)
    schema = dp.Schema(sequence=dp.Field(dtype=dtype, shape=(FEATURES,)), step_axis="layer")
    with dp.ShardWriter(tmp_path / "set", schema, split=dp.SplitRule.parse("100/0/0")) as writer:
        for number, length in enumerate(lengths):
            values = rng.integers(0, 90, (length, FEATURES)).astype("float32" if dtype == "bfloat16" else dtype)
            writer.write({"id": number, "label": 0, "sequence": values})
    data = dp.open_dataset(tmp_path / "set")
    options = {"batch_size": BATCH, "dtype": delivered or torch.float16, **options}
    ways = [list(dp.SequenceLoader(data, engine=engine, **options)) for engine in ("torch", "dali")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(superbatches, "SUPERBATCH_BYTES", 1 << 30)
        ways.append(list(dp.SequenceLoader(data, engine="torch", **options)))
    for ours, theirs, whole in zip(*ways, strict=True):
        assert ours.ids == theirs.ids == whole.ids
        assert torch.equal(ours.sequences, whole.sequences)
        assert torch.equal(theirs.sequences, whole.sequences)
        assert torch.equal(ours.lengths, whole.lengths)


@pytest.mark.parametrize("engine", ["torch", "dali"])
def test_resumes_before_and_behind_a_long_record(tmp_path: Path, taken: list[int], engine: Any) -> None:
    data, _ = written(tmp_path / "set", tail())
    make = partial(dp.SequenceLoader, data, batch_size=BATCH, engine=engine)
    whole = [batch.ids for batch in make()]
    long = next(step for step, ids in enumerate(whole) if "7" in ids)
    for step in (long, long + 1):
        first, second = make(), make()
        for _ in zip(range(step), first, strict=False):
            pass
        second.load_state_dict(first.state_dict() if step else second.state_dict())
        assert [batch.ids for batch in second] == whole[first.state_dict()["step"] :]


@pytest.mark.parametrize("engine", ["torch", "dali"])
def test_a_damaged_long_record_is_left_out(tmp_path: Path, taken: list[int], engine: Any) -> None:
    data, rows = written(tmp_path / "set", tail())
    path = next(
        path
        for number in range(len(data.table("train", "sequences")))
        if rows["7"].astype("float16").tobytes() in (path := data.shard_path("train", "sequences", number)).read_bytes()
    )
    content = bytearray(path.read_bytes())
    content[content.index(rows["7"].astype("float16").tobytes()) + 9] ^= 1
    path.write_bytes(content)
    loader = dp.SequenceLoader(data, batch_size=BATCH, engine=engine, on_error="skip")
    seen = {one for batch in loader for one, valid in zip(batch.ids, batch.valid.tolist(), strict=True) if valid}
    assert "7" not in seen
    assert len(loader.left_out) == len(rows) - len(seen) > 0
    with pytest.raises(dp.FormatError, match="damaged"):
        list(dp.SequenceLoader(data, batch_size=BATCH, engine=engine))


def test_cuts() -> None:
    longest = np.array([1, 2, 3, 50, 1, 1, 9, 9])
    assert list(cuts(longest, 10, alike=False)) == [(0, 3), (3, 4), (4, 6), (6, 7), (7, 8)]
    assert list(cuts(longest, 10, alike=True)) == [(0, 3), (3, 4), (4, 6), (6, 7), (7, 8)]
    assert list(cuts(np.array([1, 1, 1, 4]), 8, alike=True)) == [(0, 3), (3, 4)]
    assert list(cuts(np.array([1, 1, 1, 4]), 8, alike=False)) == [(0, 4)]


def test_results_ahead_take_no_more_than_they_may(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "AHEAD_BYTES", 100)
    sizes = [10, 10, 60, 60, 250, 10, 10, 99, 99, 5]
    begun: list[int] = []

    def work(item: int) -> int:
        begun.append(item)
        return item

    results = ahead.map_ahead(work, range(len(sizes)), 3, lambda item: sizes[item])
    for number, result in enumerate(results):
        assert result == number
        time.sleep(0.01)  # what is ahead is done by now
        held = [sizes[item] for item in begun if item > number]
        assert sum(held) <= 100 or len(held) == 1
    assert number == len(sizes) - 1


def test_huge_pieces_are_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_KEPT_BYTES", 20 << 20)
    buffers = Buffers()
    held = [buffers.take(nbytes << 20) for nbytes in (3, 40, 5, 11)]
    assert sum(map(len, buffers._pieces)) <= 20 << 20
    assert [len(each) >> 20 for each in held] == [3, 40, 5, 11]
    for _ in range(3):  # the same memory again and again
        before = buffers.take(4 << 20).ctypes.data
        assert buffers.take(4 << 20).ctypes.data == before
