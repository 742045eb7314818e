"""A data set of ours as the source of another: encoded, cut and dealt anew, its values as they were or rounded as asked."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dali_pipeline as dp
from dali_pipeline.ingest.config import ConvertConfig
from dali_pipeline.ingest.convert import convert
from dali_pipeline.ingest.layouts.recipe import Recipe
from dali_pipeline.tools.verify import verify
from tests.helpers.records import SCHEMA, make_records, write


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def sequences(data: dp.Dataset) -> dict[str, np.ndarray[Any, Any]]:
    found: dict[str, np.ndarray[Any, Any]] = {}
    for split in data.splits:
        for batch in dp.SequenceLoader(data, split, batch_size=8, engine="torch"):
            rows = zip(batch.ids, batch.sequences.numpy(), batch.lengths.tolist(), strict=True)
            found |= {f"{split}/{one}": sequence[:length] for one, sequence, length in rows}
    return found


def graphs(data: dp.Dataset) -> dict[str, Any]:
    found = {}
    for split in data.splits:
        for batch in dp.GraphLoader(data, split, batch_size=1):
            found[f"{split}/{batch.ids[0]}"] = [
                batch.graphs[name].numpy() for name in ("x", "edge_index", "edge_attr", "batch", "ptr")
            ]
    return found


@pytest.mark.parametrize("ragged", [True, False])
def test_as_it_is_but_for_the_shards(tmp_path: Path, ragged: bool) -> None:
    data = write(tmp_path / "set", make_records(120, ragged=ragged))
    one = convert(data.folder, tmp_path / "one", ConvertConfig(shard_bytes=5000, num_workers=1))
    two = convert(data.folder, tmp_path / "two", ConvertConfig(shard_bytes=5000, num_workers=2))
    assert contents(one.folder) == contents(two.folder)
    assert one.schema == data.schema
    assert {split: one.num_records(split, "graphs") for split in one.splits} == {
        split: data.num_records(split, "graphs") for split in data.splits
    }
    assert len(one.table("train", "sequences")) < len(data.table("train", "sequences"))
    for ours, theirs in ((sequences(one), sequences(data)), (graphs(one), graphs(data))):
        assert ours.keys() == theirs.keys()
        for name, values in ours.items():
            for a, b in zip(values, theirs[name], strict=True):
                assert np.array_equal(a, b)
    assert verify(one.folder).damages == []


@pytest.mark.parametrize("ragged", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_int8_and_bfloat16_by_field(tmp_path: Path, ragged: bool) -> None:
    data = write(tmp_path / "set", make_records(120, ragged=ragged))
    one = convert(data.folder, tmp_path / "one", ConvertConfig(dtype="sequence=int8,x=bfloat16", num_workers=1))
    two = convert(data.folder, tmp_path / "two", ConvertConfig(dtype="sequence=int8,x=bfloat16", num_workers=2))
    assert contents(one.folder) == contents(two.folder)
    field = one.schema.sequence
    assert field is not None
    assert field.scales is not None
    assert len(field.scales) == (1 if ragged else 5)
    assert one.schema.x == dp.Field(dtype="bfloat16", shape=(4,))
    assert one.schema.edge_attr == SCHEMA.edge_attr
    before, steps = sequences(data), np.array(field.scales)
    for name, values in sequences(one).items():
        assert (np.abs(values - before[name]) <= 0.5001 * steps).all()
        assert np.abs(values - before[name]).max() > 0
    exact = graphs(data)
    for name, (x, *rest) in graphs(one).items():
        assert np.allclose(x, exact[name][0], rtol=2**-8)
        assert all(np.array_equal(a, b) for a, b in zip(rest, exact[name][1:], strict=True))
    assert verify(one.folder).damages == []
    back = convert(one.folder, tmp_path / "back", ConvertConfig(dtype="float32"))
    assert all(np.array_equal(values, sequences(one)[name]) for name, values in sequences(back).items())


def test_layers_are_chosen_before_the_scale(tmp_path: Path) -> None:
    data = write(tmp_path / "set", make_records(60, ragged=False))
    one = convert(data.folder, tmp_path / "one", ConvertConfig(dtype="int8", layers=[1, 2], num_workers=1))
    field, before = one.schema.sequence, sequences(data)
    assert field is not None
    assert len(field.scales or ()) == 2
    for name, values in sequences(one).items():
        assert (np.abs(values - before[name][1:3]) <= 0.5001 * np.array(field.scales)).all()


def test_what_int8_cannot_hold_is_named(tmp_path: Path) -> None:
    records = make_records(20)
    records[5].sequence[1, 1] = np.nan
    data = write(tmp_path / "set", records)
    with pytest.raises(dp.FormatError, match=r"sequences-.*\.safetensors, sequence holds NaN or infinite values"):
        convert(data.folder, tmp_path / "one", ConvertConfig(dtype="int8"))
    assert not (tmp_path / "one").exists()
    for wrong in ("float64", "x=int8", "labels=int8", "sequence", "sequence=int4", "sequence=int8,"):
        with pytest.raises(dp.UsageError, match="int8 for sequences alone"):
            ConvertConfig(dtype=wrong)


def test_a_damaged_shard_is_no_source(tmp_path: Path) -> None:
    data = write(tmp_path / "set", make_records(40))
    path = data.shard_path("train", "graphs", 1)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(dp.FormatError, match=r"graphs-00001\.safetensors"):
        convert(data.folder, tmp_path / "one")
    assert not (tmp_path / "one").exists()


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "float64"])
def test_scales_of_any_stored_type(tmp_path: Path, dtype: str) -> None:
    rng = np.random.default_rng(0)
    rows = [rng.integers(-128 if dtype[0] != "u" else 1, 11, (4, 3)).astype(dtype) for _ in range(20)]
    rows[0][:] = -128 if dtype == "int8" else 10
    with dp.ShardWriter(tmp_path / "set", dp.Schema(sequence=dp.Field(dtype=dtype, shape=(3,)))) as writer:
        for number, sequence in enumerate(rows):
            writer.write({"id": number, "label": 0, "sequence": sequence})
    one = convert(tmp_path / "set", tmp_path / "one", ConvertConfig(dtype="int8"))
    assert one.schema.sequence is not None
    scale = np.array(one.schema.sequence.scales)
    assert (scale <= 1.02 * np.abs(np.stack(rows).astype(np.float64)).max(axis=0) / 127).all()
    for name, values in sequences(one).items():
        assert (np.abs(values - rows[int(name.split("/")[1])]) <= 0.5001 * scale).all()


def test_a_set_made_anew_at_the_same_place_is_read_anew(tmp_path: Path) -> None:
    for seed in (0, 1):
        data = write(tmp_path / "set", make_records(30, seed=seed))
        one = convert(data.folder, tmp_path / f"one-{seed}")
        assert sequences(one).keys() == sequences(data).keys()
        shutil.rmtree(data.folder)


def test_new_labels_from_a_table(tmp_path: Path) -> None:
    """What a judge says of a data set's records: fields, splits and groups stay, labels are new, in both halves."""
    schema = dp.Schema(
        sequence=dp.Field(dtype="float32", shape=(2,)),
        x=dp.Field(dtype="float32", shape=(2,)),
        fields={"record.answer": dp.Field(dtype="text")},
        label=dp.Label(kind="none"),
    )
    with dp.ShardWriter(tmp_path / "set", schema, source={"labels": "30 answers"}) as writer:
        for number in range(30):
            graphs = dp.Graphs(
                x=np.full((1, 2), number, np.float32),
                edge_index=np.zeros((2, 0), int),
                edge_attr=None,
                node_counts=np.array([1]),
                edge_counts=np.array([0]),
            )
            rows = np.full((2, 2), number, np.float32)
            record = {"id": f"a{number}", "group": f"g{number // 3}", "sequence": rows, "graphs": graphs}
            writer.write({**record, "fields": {"record.answer": f"text {number}"}})
    (tmp_path / "judged.csv").write_text("id,score\n" + "".join(f"a{row},{row / 30}\n" for row in reversed(range(30))))
    reference = f"{tmp_path}/judged.csv:id:score"
    before = dp.open_dataset(tmp_path / "set")

    def relabelled(name: str, labels_from: str = reference, **options: Any) -> dp.Dataset:
        config = ConvertConfig(recipe=Recipe(labels_from=labels_from, **options))
        return convert(tmp_path / "set", tmp_path / name, config)

    data = relabelled("judged", label_threshold=0.5)
    values = relabelled("values")
    assert data.manifest.source["labels"] == "label 1, the positive class, is below 0.5, and 0 is the rest"
    assert "labels" not in values.manifest.source
    assert (data.schema.labels.kind, values.schema.labels.kind) == ("class", "value")
    for split in before.splits:
        assert data.num_records(split, "sequences") == before.num_records(split, "sequences")
        for row in range(before.num_records(split, "sequences")):
            old, new, value = before.record(split, row), data.record(split, row), values.record(split, row)
            number = int(old.id[1:])
            assert (new.id, new.group, new.fields["answer"]) == (old.id, old.group, old.fields["answer"])
            assert np.array_equal(new.sequence, old.sequence)
            assert new.label == int(number < 15)
            assert float(value.label) == pytest.approx(number / 30)
        for batch in dp.GraphLoader(data, split=split, batch_size=30, shuffle=False, num_workers=0):
            expected = [int(int(name[1:]) < 15) for name in batch.ids]
            assert batch.labels.tolist() == expected
    assert verify(tmp_path / "judged").damages == []
    # another table is other input
    (tmp_path / "judged.csv").write_text((tmp_path / "judged.csv").read_text().replace("a3,", "a33,"))
    with pytest.raises(dp.UsageError, match="other"):
        relabelled("judged", label_threshold=0.5)
    with pytest.raises(dp.FormatError, match=r"record 'a3' has no label in .*judged\.csv"):
        relabelled("third")
    with pytest.raises(dp.UsageError, match=r"has no ids; expected --labels-from judged\.csv:ID:LABEL for a data set"):
        relabelled("third", f"{tmp_path}/judged.csv::score")
    with pytest.raises(dp.UsageError, match="are not for it, but --labels-from FILE:ID:LABEL is"):
        relabelled("third", sequence="x")
    assert not (tmp_path / "third").exists()
