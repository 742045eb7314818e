"""Encodings: bfloat16 rounds as torch does, int8 to within half a step of its scale; DALI decodes to the bit as torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

import dali_pipeline as dp
from dali_pipeline.format.encoding import all_finite, decode, encode, scale_for
from dali_pipeline.format.manifest import FeatureStatistics
from dali_pipeline.loaders.decoding import Decoding, sequence_graph
from dali_pipeline.tools.verify import verify
from tests.helpers.encoded import FEATURES, assert_same_but_for_ties, greatest, made, rows_of


def test_bfloat16_rounds_as_torch_does() -> None:
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 2**32, (4000, 4), np.uint32).view(np.float32)
    with np.errstate(invalid="ignore"):
        kept = np.abs(rows) < 3.38e38
    rows = np.where(kept | ~np.isfinite(rows), rows, 1)  # none that rounds to infinity
    stored, lost = encode(rows, "bfloat16", None)
    assert not lost
    expected = torch.from_numpy(rows).to(torch.bfloat16)
    assert torch.equal(torch.isnan(expected), torch.from_numpy(np.isnan(decode(stored, "bfloat16", None))))
    ours = torch.from_numpy(stored.view(np.int16)).view(torch.bfloat16)
    assert torch.equal(ours[~expected.isnan()], expected[~expected.isnan()])
    assert encode(np.array([[3.4e38]], np.float32), "bfloat16", None)[1]
    assert encode(np.array([[1e300]]), "bfloat16", None)[1]


@pytest.mark.parametrize("by_step", [True, False])
def test_int8_is_within_half_a_step_of_its_scale(by_step: bool) -> None:
    rows = rows_of(50, ragged=False)
    scale = scale_for(greatest(rows, by_step=by_step))
    for sequence in rows:
        stored, lost = encode(sequence, "int8", scale)
        assert not lost
        assert stored.dtype == np.int8
        step = np.array(scale, np.float32)
        assert (np.abs(decode(stored, "int8", scale) - sequence) <= 0.5001 * step).all()
    assert scale_for(np.array([[0.0, 1.27, 100.0]])) == ((1.0, 0.01, 0.788),)


def test_what_a_scale_cannot_hold_is_refused(tmp_path: Path) -> None:
    rows = rows_of(3, ragged=False)
    field = dp.Field.scaled(greatest(rows, by_step=True))
    for wrong, words in (
        (rows[0] * 1000, "int8 with its scale cannot"),
        (np.where(np.arange(FEATURES) == 2, np.nan, rows[0]), "int8 with its scale cannot"),
        (rows[0][:3], "has 3 steps; expected 5, one for each row of the scale"),
    ):
        with pytest.raises(dp.DataError, match=words):
            made(tmp_path / "set", [wrong], field)
    for sizes in ([[1.0, -1.0]], [[np.inf, 1.0]], 3.0, np.zeros((0, 2))):
        with pytest.raises(dp.UsageError, match="greatest has the shape"):
            dp.Field.scaled(sizes)
    sound: dict[str, Any] = {"dtype": "int8", "shape": (2,), "scale": ((1.0, 1.0),)}
    cases: dict[str, Any]
    for cases in (
        sound | {"dtype": "int16"},
        sound | {"scale": ((1.0,),)},
        sound | {"scale": ()},
        sound | {"scale": ((0, 1),)},
    ):
        with pytest.raises(dp.UsageError, match="a scale for"):
            dp.Field(**cases)
    with pytest.raises(dp.UsageError, match="for `sequence` alone"):
        dp.Schema(x=dp.Field.scaled([[1.0]]))


def test_which_values_are_finite() -> None:
    for dtype in ("float16", "bfloat16", "float32", "float64"):
        for strange in (np.nan, np.inf, -np.inf, -np.nan):
            rows = np.full((3, 2), -1.5)
            assert all_finite(encode(rows, dtype, None)[0], dtype)
            rows[1, 1] = strange
            assert not all_finite(encode(rows, dtype, None)[0], dtype)
    assert all_finite(np.full(3, 127, np.int8), "int8")


@pytest.mark.parametrize("engine", ["torch", "dali"])
@pytest.mark.parametrize("layers", [None, slice(1, 4), [-1, 0]])
@pytest.mark.parametrize("kind", ["bfloat16", "int8 by step", "int8"])
def test_encoded_sets_are_delivered_as_numbers(tmp_path: Path, kind: str, layers: Any, engine: Any) -> None:
    rows = rows_of(40, ragged=kind != "int8 by step" and layers is None)
    scaled = kind.startswith("int8")
    field = dp.Field.scaled(greatest(rows, by_step="step" in kind)) if scaled else dp.Field(dtype=kind, shape=(FEATURES,))
    data = made(tmp_path / "set", rows, field)
    chosen = slice(None) if layers is None else layers
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        seen = 0
        for batch in dp.SequenceLoader(data, batch_size=7, layers=layers, engine=engine, dtype=dtype):
            stored = [encode(rows[int(one)], field.dtype, field.scales)[0] for one in batch.ids]
            expected = [torch.from_numpy(decode(one, field.dtype, field.scales)[chosen]) for one in stored]
            assert torch.equal(batch.sequences, pad_sequence(expected, batch_first=True).to(dtype))
            seen += int(batch.valid.sum())
        assert seen == 40
    assert data.manifest.statistics is not None
    every = np.concatenate([decode(encode(one, field.dtype, field.scales)[0], field.dtype, field.scales) for one in rows])
    assert np.allclose(data.manifest.statistics.mean, every.mean(axis=0), rtol=1e-4, atol=1e-5)
    assert np.allclose(data.manifest.statistics.std, every.std(axis=0), rtol=1e-4)
    assert verify(data.folder).damages == []


@pytest.mark.parametrize("engine", ["torch", "dali"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64", "int8"])
def test_normalized_over_the_training_split(tmp_path: Path, dtype: str, engine: Any) -> None:
    rows = [np.concatenate([one, np.full((len(one), 1), 7, np.float32)], axis=1) for one in rows_of(40, ragged=True)]
    shape = (FEATURES + 1,)
    field = dp.Field.scaled(greatest(rows, by_step=False)) if dtype == "int8" else dp.Field(dtype=dtype, shape=shape)
    data = made(tmp_path / "set", rows, field)
    batches = list(dp.SequenceLoader(data, batch_size=8, normalize=True, engine=engine))
    steps = torch.cat(
        [one[:length] for batch in batches for one, length in zip(batch.sequences, batch.lengths.tolist(), strict=True)]
    ).double()
    assert (steps.mean(dim=0).abs() < 1e-2).all()
    assert ((steps.std(dim=0, correction=0)[:-1] - 1).abs() < 1e-2).all()
    assert (steps[:, -1].abs() < 1e-2).all()  # a feature that never varies
    for batch in batches:
        for one, length in zip(batch.sequences, batch.lengths.tolist(), strict=True):
            assert (one[length:] == 0).all()
    assert min(int(batch.lengths.min()) for batch in batches) < max(int(batch.lengths.max()) for batch in batches)


def test_a_set_without_statistics_is_not_normalized(tmp_path: Path) -> None:
    rows = rows_of(4, ragged=False)
    field = dp.Field(dtype="float32", shape=(FEATURES,))
    data = made(tmp_path / "set", rows, field)
    with pytest.raises(dp.DataError, match="has no feature statistics"):
        dp.SequenceLoader(dp.mix([data], weights=[1.0]), normalize=True)
    with pytest.raises(dp.UsageError, match="normalize is 1"):
        dp.SequenceLoader(data, normalize=1)  # type: ignore[arg-type]


@pytest.mark.parametrize("delivered", [torch.float16, torch.float32])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", ["float16", "float32", "int8", "int8 by step", "uint8"])
def test_dali_decodes_to_the_bit_as_torch_does(dtype: str, normalize: bool, delivered: torch.dtype) -> None:
    """The graph that a GPU runs, on the CPU."""
    rows = rows_of(6, ragged=dtype != "int8 by step")
    if dtype == "uint8":
        rows = [one.clip(0, 200).round() for one in rows]
    scaled = dtype.startswith("int8")
    field = dp.Field.scaled(greatest(rows, by_step="step" in dtype)) if scaled else dp.Field(dtype=dtype, shape=(FEATURES,))
    stored = [encode(one, field.dtype, field.scales)[0] for one in rows]
    rng = np.random.default_rng(1)
    statistics = FeatureStatistics(mean=tuple(rng.normal(size=FEATURES)), std=tuple(rng.random(FEATURES)))
    decoding = Decoding.of(field, None, statistics if normalize else None, delivered, torch.device("cpu"))
    assert decoding.in_dali
    ragged = len({len(one) for one in rows}) > 1
    feed: Any = stored if ragged else np.stack(stored).reshape(2, 3, -1, FEATURES)  # two batches
    options = {"batch_size": 6, "num_threads": 1, "device_id": None, "prefetch_queue_depth": 1}
    pipeline = sequence_graph(lambda: feed, decoding=decoding, pads=ragged, **options)
    pipeline.build()
    ours = torch.utils.dlpack.from_dlpack(pipeline.run()[0].as_tensor())
    ours = ours if ragged else ours.flatten(0, 1)
    lengths = np.array([len(one) for one in stored])
    padded = pad_sequence([torch.from_numpy(one) for one in stored], batch_first=True)
    expected = decoding.run(padded, lengths)
    exact = replace(decoding, dtype=torch.float32).run(padded, lengths)
    assert_same_but_for_ties(expected, ours, exact)
    assert ours.dtype == delivered


def giving(values: np.ndarray[Any, Any]) -> Callable[[], np.ndarray[Any, Any]]:
    def feed() -> np.ndarray[Any, Any]:
        return values

    return feed


def test_dalis_cast_differs_in_ties_alone() -> None:
    """Every tie between two neighbouring float16 numbers, and what lies a float32 step beside it."""
    bits = np.arange(0x0400, 0x7BFF, dtype=np.uint16)  # normal numbers, all with a neighbour
    low, high = bits.view(np.float16).astype(np.float32), (bits + np.uint16(1)).view(np.float16).astype(np.float32)
    ties = (low + high) / 2  # exact
    for values, all_equal in ((ties, False), (np.nextafter(ties, low), True), (np.nextafter(ties, high), True), (-ties, False)):
        decoding = Decoding.of(dp.Field(dtype="float32", shape=(1,)), None, None, torch.float16, torch.device("cpu"))
        options = {"batch_size": 1, "num_threads": 1, "device_id": None, "prefetch_queue_depth": 1}
        feed = values[None, :, None]
        pipeline = sequence_graph(giving(feed), decoding=decoding, pads=False, **options)
        pipeline.build()
        found = torch.utils.dlpack.from_dlpack(pipeline.run()[0].as_tensor()).clone()
        exact = torch.from_numpy(feed)
        assert torch.equal(found, exact.half()) == all_equal
        assert_same_but_for_ties(exact.half(), found, exact)
