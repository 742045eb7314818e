from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dali_pipeline as dp
from dali_pipeline.cli.app import app, run
from dali_pipeline.tools.buffer import replay_buffer, sample_buffer
from dali_pipeline.tools.shufflequality import (
    METHODS,
    Measured,
    Quality,
    displacement,
    full_displacement,
    full_same_shard_share,
    measure,
    same_shard_share,
)
from dali_pipeline.tools.stepquality import describe_step_shuffle
from tests.loaders.test_resident import written

SHARDS = np.full(512, 64)


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["dali_pipeline", *map(str, arguments)])
    return run(app, "dali_pipeline")


def of(quality: Quality, method: str) -> Measured:
    return next(one for one in quality.methods if one.method == method)


def test_measures_by_hand() -> None:
    assert same_shard_share(np.array([[0, 1, 0], [2, 2, 2]])) == pytest.approx(4 / 6)
    assert displacement(np.arange(4), np.array([3, 1, 2, 0]), 4) == pytest.approx(6 / 16)
    assert displacement(np.arange(9), np.arange(9), 9) == 0
    assert full_same_shard_share(np.array([2, 2])) == pytest.approx(1 / 3)
    assert full_displacement(2) == pytest.approx(1 / 4)


def test_buffer_against_a_loop() -> None:
    """Replayed, each record once and none before it entered; and both ways have the mean of a plain loop at every place."""
    total, capacity, size = 40, 7, 8
    firsts = np.arange(0, total, size)
    rng = np.random.default_rng(0)
    loops, replays, samples = [], [], []
    for _ in range(4000):
        inside, out = list(range(capacity)), []
        for entering in range(capacity, total):
            at = int(rng.integers(capacity))
            out.append(inside[at])
            inside[at] = entering
        loops.append([*out, *rng.permutation(inside).tolist()])
        order = replay_buffer(total, capacity, rng)
        assert sorted(order) == list(range(total))
        assert (order < np.arange(total) + capacity).all()
        replays.append(order)
        samples.append(sample_buffer(total, capacity, firsts, size, rng).reshape(-1))
    for found in (replays, samples):
        assert all(len(set(row)) == size for row in np.reshape(found, (-1, size)))
        assert np.abs(np.mean(found, axis=0) - np.mean(loops, axis=0)).max() < 0.8
        assert np.abs(np.std(found, axis=0) - np.std(loops, axis=0)).max() < 0.8


@settings(deadline=None, max_examples=40)
@given(
    shards=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 300)), min_size=1, max_size=20),
    share=st.sampled_from([0.001, 0.05, 0.3, 2.0]),
    batch_size=st.integers(2, 9),
)
def test_measures_within_range(shards: list[tuple[int, int]], share: float, batch_size: int) -> None:
    records, nbytes = np.array([n for n, _ in shards]), np.array([n * size for n, size in shards])
    if batch_size > records.sum():
        with pytest.raises(dp.DataError):
            measure(records, nbytes, window_bytes=1, batch_size=batch_size)
        return
    quality = measure(records, nbytes, window_bytes=max(1, int(share * nbytes.sum())), batch_size=batch_size, epochs=2)
    assert [one.method for one in quality.methods] == list(METHODS)
    for one in quality.methods:
        assert all(0 <= value <= 1 for value in one.same_shard)
        assert all(0 <= value < 1 for value in one.displacement)


@pytest.mark.parametrize("record_bytes", [4 << 20, 33 * 1024 * 2])
@pytest.mark.parametrize("share", [0.01, 0.05, 0.20])
def test_closer_than_both_buffers(record_bytes: int, share: float) -> None:
    """Compare pairs and displacement at equal memory, for shards of 256 and of 4 MiB."""
    quality = measure(SHARDS, SHARDS * record_bytes, window_bytes=int(share * SHARDS.sum() * record_bytes), epochs=12)
    assert quality.behind() == []
    ours = of(quality, "dali_pipeline").distances(quality)
    for rival in ("buffer, file order", "buffer, shuffled shards"):
        pairs, moved = of(quality, rival).distances(quality)
        assert ours[0] < pairs
        assert ours[1] < moved
    full = of(quality, "full permutation")
    assert np.mean(full.same_shard) == pytest.approx(quality.full_same_shard, rel=0.05)
    assert np.mean(full.displacement) == pytest.approx(1 / 3, abs=0.003)


def test_sampled_is_close_to_exhaustive() -> None:
    every = measure(SHARDS, SHARDS << 22, window_bytes=1 << 30)
    some = measure(SHARDS, SHARDS << 22, window_bytes=1 << 30, sampled_records=1 << 13)
    assert some.batches < every.batches == every.all_batches
    for method in METHODS:
        assert np.mean(of(some, method).displacement) == pytest.approx(np.mean(of(every, method).displacement), abs=0.01)
        assert np.mean(of(some, method).same_shard) == pytest.approx(np.mean(of(every, method).same_shard), rel=0.15, abs=5e-4)


def test_command(data: dp.Dataset, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "out.png"
    arguments = ["inspect", data.root, "--shuffle", "--window", "4KiB,1MiB", "--batch-size", 8]
    assert call(monkeypatch, *arguments, "--json", "--plot", out) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["window_bytes"] for one in found["shuffle"]["graphs"]] == [4096, 1 << 20]
    assert found["shuffle"]["sequences"][1]["methods"]["dali_pipeline"]["displacement"][0] == pytest.approx(1 / 3, abs=0.1)
    assert out.read_bytes().startswith(b"\x89PNG")
    assert call(monkeypatch, *arguments) == 0
    text = capsys.readouterr().out
    assert "full permutation, exactly" in text
    assert "\x1b" not in text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--window", "0"], "size is '0'"),
        (["--split", "dev"], "unknown split 'dev'"),
        (["--batch-size", "1"], "expected at least 2"),
        (["--batch-size", "5000"], "a whole batch is needed"),
    ],
)
def test_errors_are_one_sentence(
    data: dp.Dataset, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: list[str], words: str
) -> None:
    assert call(monkeypatch, "inspect", data.root, "--shuffle", *options) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert words in err
    assert err.count("\n") == 1


def test_behind_names_what_is_farther() -> None:
    def methods(ours: tuple[float, ...], moved: tuple[float, ...]) -> tuple[Measured, ...]:
        rival = Measured(method="buffer, file order", same_shard=(0.3, 0.31), displacement=(0.2, 0.21), points=())
        return rival, Measured(method="dali_pipeline", same_shard=ours, displacement=moved, points=())

    quality = measure(SHARDS[:4], SHARDS[:4], window_bytes=1)
    for ours, moved, expected in (
        ((0.1, 0.11), (0.33, 0.33), []),
        ((0.5, 0.51), (0.33, 0.33), ["same-shard pairs"]),
        ((0.5, 0.51), (0.01, 0.01), ["same-shard pairs", "displacement"]),
        ((0.25, 0.37), (0.33, 0.33), []),  # farther by chance alone
    ):
        flat = replace(quality, full_same_shard=0.0, methods=methods(ours, moved))
        assert flat.behind() == expected


def test_single_steps_beside_a_full_permutation(tmp_path: Path) -> None:
    """A window of the whole split is a full permutation; whole records are side by side, which the report shows."""
    data = written(tmp_path / "set", count=800)
    report, measured = describe_step_shuffle(data, "train", [10**7, 20_000], 64)
    lengths = [len(data.record("train", number).sequence) for number in range(800)]
    exact = sum(length * (length - 1) for length in lengths) / (sum(lengths) * (sum(lengths) - 1))
    assert report["steps"] == sum(lengths)
    assert report["full_same_record"] == pytest.approx(exact)
    whole, small = measured
    assert np.mean(whole.single_steps) == pytest.approx(exact, rel=0.3)
    assert exact < np.mean(small.single_steps) < np.mean(small.whole_records)
    assert np.mean(small.whole_records) > 20 * exact
    with pytest.raises(dp.DataError, match=r"split 'train' has \d+ steps, and a whole batch is needed"):
        describe_step_shuffle(data, "train", [], 10**6)


def test_inspect_prints_single_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written(tmp_path / "set", count=60)
    assert call(monkeypatch, "inspect", tmp_path / "set", "--shuffle", "--unit", "step", "--window", "1MiB") == 0
    printed = capsys.readouterr().out
    assert "single steps (unit='step')" in printed
    assert "full permutation, exactly" in printed
    for flags in (["--unit", "step"], ["--shuffle", "--unit", "token"]):
        assert call(monkeypatch, "inspect", tmp_path / "set", *flags) == 2
        assert "--unit" in capsys.readouterr().err
