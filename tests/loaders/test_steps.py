"""Single steps: unit="step" delivers the rows of records, each once, with what belongs to them."""

from __future__ import annotations

import pickle
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dali_pipeline as dp
from dali_pipeline.reading.steps import StepIndex
from tests.helpers.batches import assert_same, content
from tests.loaders.test_resident import written

LAYERED = dp.Field(dtype="float16", shape=(4, 3), axes=("layer", "feature"))


@pytest.fixture(scope="module")
def ragged(tmp_path_factory: pytest.TempPathFactory) -> dp.Dataset:
    return written(tmp_path_factory.mktemp("steps") / "ragged", count=400)


@pytest.fixture(scope="module")
def layered(tmp_path_factory: pytest.TempPathFactory) -> dp.Dataset:
    return written(tmp_path_factory.mktemp("steps") / "layered", count=300, sequence=LAYERED)


def loader(data: dp.Dataset, **options: Any) -> Any:
    return dp.SequenceLoader(data, **{"unit": "step", "batch_size": 16, "window_bytes": 30_000, **options})


def rows_of(one: Any) -> list[tuple[int, int]]:
    """(record, step) of every valid row of an epoch, in order."""
    return [
        (record, step)
        for batch in one
        for record, step, valid in zip(batch.record_positions.tolist(), batch.steps.tolist(), batch.valid.tolist(), strict=True)
        if valid
    ]


def records_of(data: dp.Dataset) -> list[dp.Record]:
    return [data.record("train", number) for number in range(data.num_records("train", "sequences"))]


def all_rows(data: dp.Dataset) -> list[tuple[int, int]]:
    lengths = [len(record.sequence) for record in records_of(data)]
    return [(number, step) for number, length in enumerate(lengths) for step in range(length)]


@pytest.mark.parametrize("window", ["resident", "gather"])
@pytest.mark.parametrize("engine", ["torch", "dali"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64", "uint16", "int8"])
def test_every_row_is_what_its_record_says(tmp_path: Path, dtype: str, engine: Any, window: Any) -> None:
    data = written(tmp_path / "set", dtype=dtype, count=120)
    records = records_of(data)
    one = loader(data, engine=engine, window=window)
    assert one.window == window
    count = 0
    for batch in one:
        assert batch.values.shape == (16, 8)
        assert batch.values.dtype == torch.float32
        assert len(batch) == 16
        for row, (position, step) in enumerate(zip(batch.record_positions.tolist(), batch.steps.tolist(), strict=True)):
            record = records[position]
            assert batch.ids[row] == record.id
            assert batch.labels[row] == record.label
            assert batch.fields["token"][row] == record.fields["step.token"][step]
            assert batch.fields["probability"][row] == float(record.fields["step.probability"][step])
            assert np.array_equal(batch.fields["score"][row].numpy(), record.fields["record.score"])
            assert batch.fields["prompt"][row] == record.fields["record.prompt"]
            assert np.array_equal(batch.values[row].numpy(), np.asarray(record.sequence[step], np.float32))
            count += 1
    assert count >= one.num_records > 300


@pytest.mark.parametrize("engine", ["torch", "dali"])
@pytest.mark.parametrize("layers", [None, [2], [3, 0], slice(1, 3)])
def test_layers_of_a_step(layered: dp.Dataset, layers: Any, engine: Any) -> None:
    one, gathered = (loader(layered, layers=layers, engine=engine, window=window) for window in ("resident", "gather"))
    assert_same(one, [content(batch) for batch in gathered])
    chosen = list(range(4))[layers] if isinstance(layers, slice) else layers or list(range(4))
    batch = next(iter(one))
    assert batch.values.shape == ((16, 3) if len(chosen) == 1 else (16, len(chosen), 3))
    for row, (position, step) in enumerate(zip(batch.record_positions.tolist(), batch.steps.tolist(), strict=True)):
        expected = layered.record("train", position).sequence[step][chosen].astype(np.float32)
        assert np.array_equal(batch.values[row].numpy(), expected.squeeze(0) if len(chosen) == 1 else expected)


def test_rows_of_a_stack_of_layers(tmp_path: Path) -> None:
    """[L, H] sets: the steps are the layers, and one of them is one row per record."""
    schema = dp.Schema(sequence=dp.Field(dtype="float16", shape=(8,)), step_axis="layer", layers=tuple(range(10, 15)))
    with dp.ShardWriter(tmp_path / "set", schema, split=dp.SplitRule.parse("100/0/0"), shard_bytes=2048) as writer:
        for number in range(60):
            writer.write({"id": number, "label": 0, "sequence": np.full((5, 8), number) + np.arange(5)[:, None] / 8})
    data = dp.open_dataset(tmp_path / "set")
    one = loader(data, layers=[12, 14])
    assert one.num_records == 120
    assert sorted(rows_of(one)) == [(number, step) for number in range(60) for step in (2, 4)]
    batch = next(iter(one))
    assert torch.equal(batch.values[:, 0], batch.record_positions + batch.steps / 8)


@pytest.mark.parametrize("window", ["resident", "gather"])
def test_normalized_rows_are_those_of_whole_records(layered: dp.Dataset, ragged: dp.Dataset, window: Any) -> None:
    for data in (layered, ragged):
        whole = {
            number: sequence
            for batch in dp.SequenceLoader(data, normalize=True)
            for number, sequence in zip(batch.positions.tolist(), batch.sequences, strict=True)
        }
        for batch in loader(data, normalize=True, window=window):
            for row, (position, step) in enumerate(zip(batch.record_positions.tolist(), batch.steps.tolist(), strict=True)):
                assert torch.equal(batch.values[row], whole[position][step])


def test_scales_by_step(tmp_path: Path) -> None:
    """int8 with a scale for every step: each row takes the scale of its step."""
    scales = tuple((step + 1) / 64 for step in range(5))
    field = dp.Field(dtype="int8", shape=(8,), scale=tuple((scale,) * 8 for scale in scales))
    with dp.ShardWriter(
        tmp_path / "set", dp.Schema(sequence=field, step_axis="token"), split=dp.SplitRule.parse("100/0/0"), shard_bytes=2048
    ) as writer:
        for number in range(80):
            writer.write({"id": number, "label": 0, "sequence": np.outer(scales, np.arange(8)).astype(np.float32)})
    data = dp.open_dataset(tmp_path / "set")
    for engine in ("torch", "dali"):
        for window in ("resident", "gather"):
            for batch in loader(data, engine=engine, window=window):
                expected = torch.tensor(scales)[batch.steps][:, None] * torch.arange(8)
                assert torch.equal(batch.values, expected)


@pytest.mark.parametrize(("world_size", "num_partitions"), [(1, 1), (2, 2), (4, 4), (4, 1), (2, 4)])
def test_every_row_comes_once_over_all_ranks(ragged: dp.Dataset, world_size: int, num_partitions: int) -> None:
    options = {"batch_size": 16 // world_size, "num_partitions": num_partitions}
    ranks = [loader(ragged, rank=rank, world_size=world_size, **options) for rank in range(world_size)]
    expected = all_rows(ragged)
    assert {len(one) for one in ranks} == {len(loader(ragged, num_partitions=num_partitions))}
    delivered = [row for one in ranks for row in rows_of(one)]
    assert sorted(delivered) == expected
    assert len(expected) == ranks[0].num_records
    digest = sum((one.digest for one in ranks), dp.EpochDigest())
    assert ranks[0].check_digest(digest) == f"{len(expected):,} of {len(expected):,} steps of records, each once"
    assert delivered != expected


def test_rows_of_one_record_are_far_apart(ragged: dp.Dataset) -> None:
    """Whoever shuffles records, and cuts them into rows, finds a record's rows side by side."""
    order = rows_of(loader(ragged, window_bytes=10**7))
    neighbours = sum(first[0] == second[0] for first, second in pairwise(order))
    assert neighbours < len(order) / 50


@pytest.mark.parametrize("window", ["resident", "gather"])
def test_masked_steps_are_left_out(tmp_path: Path, window: Any) -> None:
    fields = {"step.loss_mask": dp.Field(dtype="bool")}
    schema = dp.Schema(sequence=dp.Field(dtype="float16", shape=(8,)), step_axis="token", fields=fields)
    rng = np.random.default_rng(0)
    kept = []
    with dp.ShardWriter(tmp_path / "set", schema, split=dp.SplitRule.parse("100/0/0"), shard_bytes=1024) as writer:
        for number in range(200):  # in order, as the share of the split is 100
            mask = rng.random(int(rng.integers(1, 9))) < 0.4 if not 50 < number < 120 else np.zeros(4, bool)
            kept += [(str(number), step) for step in np.flatnonzero(mask)]
            writer.write({"id": number, "label": 0, "sequence": rng.random((len(mask), 8)), "fields": {"step.loss_mask": mask}})
    data = dp.open_dataset(tmp_path / "set")
    one = loader(data, mask="loss_mask", window=window, window_bytes=8000)
    delivered = [
        (one_id, step)
        for batch in one
        for one_id, step, valid in zip(batch.ids, batch.steps.tolist(), batch.valid.tolist(), strict=True)
        if valid
    ]
    assert sorted(delivered) == sorted(kept)
    assert one.num_records == len(kept) > 100
    assert one.check_digest(one.digest).endswith("each once")


@pytest.mark.parametrize("steps", [[0], [-1], slice(1, None, 2), slice(0, 1)])
def test_chosen_steps_of_records_of_any_length(tmp_path: Path, steps: Any) -> None:
    uniform = steps == slice(1, None, 2)
    data = written(tmp_path / "set", uniform=uniform, count=100)
    expected = []
    for number, record in enumerate(records_of(data)):
        count = len(record.sequence)
        expected += [
            (number, step) for step in (range(count)[steps] if isinstance(steps, slice) else [step % count for step in steps])
        ]
    assert sorted(rows_of(loader(data, steps=steps))) == expected


@pytest.mark.parametrize("steps", [None, slice(1, None, 2)])
@pytest.mark.parametrize("mask", [None, "step.loss_mask"])
@pytest.mark.parametrize("uniform", [True, False])
def test_runs_are_looked_up_as_steps_one_by_one_are(tmp_path: Path, steps: Any, mask: str | None, uniform: bool) -> None:
    schema = dp.Schema(
        sequence=dp.Field(dtype="float16", shape=(2,)), step_axis="token", fields={"step.loss_mask": dp.Field(dtype="bool")}
    )
    rng = np.random.default_rng(0)
    with dp.ShardWriter(tmp_path / "set", schema, split=dp.SplitRule.parse("100/0/0"), shard_bytes=512) as writer:
        for number in range(150):
            count = 6 if uniform else int(rng.integers(2, 9))
            kept = rng.random(count) < 0.3
            fields = {"step.loss_mask": kept}
            writer.write({"id": number, "label": 0, "sequence": np.zeros((count, 2)), "fields": fields})
    data = dp.open_dataset(tmp_path / "set")
    index = StepIndex(loader(data).selection, data.schema, steps, mask)
    ends = np.cumsum(index.counts)
    runs = []
    for end, count in zip(ends.tolist(), index.counts.tolist(), strict=True):
        begins = rng.integers(end - count, end, 2).tolist() if count else []
        runs += [(begin, int(rng.integers(1, end - begin + 1))) for begin in begins]
    records, counts, numbers = index.find_runs(runs)
    positions = np.concatenate([np.arange(begin, begin + count) for begin, count in runs])
    expected_records, expected_steps = index.find(positions)
    assert np.repeat(records, counts).tolist() == expected_records.tolist()
    assert numbers.tolist() == expected_steps.tolist()
    assert numbers.dtype == np.int64
    assert counts.min() > 0


def test_folds_and_mixes(ragged: dp.Dataset, tmp_path: Path) -> None:
    fold = loader(ragged.folds(4, seed=1)[0])
    assert len(list(fold)) > 50
    assert fold.check_digest(fold.digest).endswith("each once")
    other = written(tmp_path / "other", count=200)
    both = loader(dp.mix([ragged, other], weights=[0.5, 0.5]))
    assert both.window == "gather"
    batches = list(both)
    sources = np.concatenate([batch.record_positions.numpy()[batch.valid.numpy()] >= 400 for batch in batches])
    assert abs(sources.mean() - 0.5) < 0.01
    for batch in batches[:3]:
        for row, (position, step) in enumerate(zip(batch.record_positions.tolist(), batch.steps.tolist(), strict=True)):
            record = ragged.record("train", position) if position < 400 else other.record("train", position - 400)
            assert np.array_equal(batch.values[row].numpy(), record.sequence[step].astype(np.float32))
    assert both.check_digest(both.digest).startswith(f"{both.num_records:,} draws of ")


@pytest.mark.parametrize(("name", "dtype"), [("token", torch.int64), ("probability", torch.float32)])
@pytest.mark.parametrize("fields", [None, [], ["token"]])
def test_a_step_field_as_labels(ragged: dp.Dataset, name: str, dtype: torch.dtype, fields: Any) -> None:
    records = records_of(ragged)
    for batch in loader(ragged, labels=name, fields=fields, dtype=torch.float16):
        expected = [
            records[position].fields[name][step]
            for position, step in zip(batch.record_positions.tolist(), batch.steps.tolist(), strict=True)
        ]
        assert batch.labels.dtype == dtype
        assert torch.equal(batch.labels, torch.tensor(np.array(expected)).to(dtype))
        others = {"token", "probability", "score", "prompt"} if fields is None else set(fields)
        assert set(batch.fields) == others - {name}


def test_damage_is_named_or_left_out_row_by_row(tmp_path: Path) -> None:
    data = written(tmp_path / "set", count=200)
    path = data.shard_path("train", "sequences", 5)
    damaged = bytearray(path.read_bytes())
    damaged[damaged.index(b"why ") - 600] ^= 1
    path.write_bytes(damaged)
    data = dp.open_dataset(tmp_path / "set")
    for window in ("resident", "gather"):
        with pytest.raises(dp.FormatError, match=r"sequences-00005\.safetensors"):
            list(loader(data, window=window))
    skipping, gathered = (loader(data, window=window, on_error="skip") for window in ("resident", "gather"))
    assert_same(skipping, [content(batch) for batch in gathered])
    assert skipping.left_out == gathered.left_out != []
    assert f"{len(skipping.left_out)} left out as damaged" in skipping.check_digest(skipping.digest)


def test_ids_of_a_batch_that_travels(ragged: dp.Dataset) -> None:
    batch = next(iter(loader(ragged)))
    copy = pickle.loads(pickle.dumps(batch))
    assert copy.ids == batch.ids
    assert torch.equal(copy.values, batch.values)
    moved = batch.to("cpu")
    assert moved.values is batch.values
    assert moved.ids == batch.ids


def test_bad_input_is_refused_in_one_sentence(ragged: dp.Dataset, tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"mask": "score"}, "mask is 'score'; expected a step field of one number per step: probability, token"),
        ({"mask": 3}, "mask is 3; expected the name of a step field"),
        ({"mask": "token", "unit": "record"}, "mask leaves out single steps, so it goes with unit='step' only"),
        ({"labels": "score"}, "labels is 'score'; expected a step field: probability, token"),
        ({"labels": "token", "unit": "record"}, "labels are those of single steps, so it goes with unit='step' only"),
        ({"unit": "row"}, "unit is 'row'; expected 'record' or 'step'"),
        ({"max_steps": 64}, "it does not go with max_steps"),
        ({"bucket_by_length": True}, "it does not go with bucket_by_length=True"),
        ({"packed": True}, "it does not go with packed=True"),
        ({"class_balanced": True}, "it does not go with class_balanced=True"),
        ({"group_weights": {"a": 1.0}}, "it does not go with group_weights"),
        ({"batch_size": 10**5}, r"takes 100000 rows, and split 'train' has .* to deliver; expected a smaller batch_size"),
        ({"fields": ["nothing"]}, "fields has 'nothing'; expected some of probability, token"),
        ({"layers": [1]}, "has no axis named layer"),
        ({"steps": [7]}, r"layers \[7\] asked of a record with"),
    ]
    for options, words in cases:
        with pytest.raises(dp.PipelineError, match=words) as refused:
            loader(ragged, **options)
        assert "\n" not in str(refused.value)
    schema = dp.Schema(
        sequence=dp.Field(dtype="float16", shape=(8,)), step_axis="token", fields={"step.keep": dp.Field(dtype="int32")}
    )
    with dp.ShardWriter(tmp_path / "set", schema, split=dp.SplitRule.parse("100/0/0")) as writer:
        for number in range(9):
            writer.write(
                {"id": number, "label": 0, "sequence": np.ones((3, 8)), "fields": {"step.keep": np.zeros(3, np.int32)}}
            )
    with pytest.raises(dp.DataError, match=r"all records of split 'train' of .* have no step whose 'keep' is not zero"):
        loader(dp.open_dataset(tmp_path / "set"), mask="keep")
    assert len(loader(dp.open_dataset(tmp_path / "set"), split="val")) == 0
