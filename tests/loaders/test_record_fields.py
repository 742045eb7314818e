"""Fields per step and record, axes with names, and labels of every kind: from the writer through both loaders and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dali_pipeline as dp
from dali_pipeline.ingest.config import ConvertConfig
from dali_pipeline.ingest.convert import convert
from dali_pipeline.tools.describe import describe, print_description
from dali_pipeline.tools.verify import verify
from dali_pipeline.types import BLOCK_BYTES

ALL = dp.SplitRule.parse("100/0/0")
FIELDS = {
    "step.token_ids": dp.Field(dtype="int32", pad=-1),
    "step.loss_mask": dp.Field(dtype="bool"),
    "step.entropy": dp.Field(dtype="bfloat16", shape=(2,)),
    "record.score": dp.Field(dtype="float32"),
    "record.embedding": dp.Field(dtype="float16", shape=(3,)),
    "record.prompt": dp.Field(dtype="text"),
    "record.length": dp.Field(dtype="uint16"),
}


def bfloat16(values: Any) -> Any:
    return torch.tensor(np.asarray(values, np.float32)).to(torch.bfloat16).float().numpy()


def make_record(number: int, *, layered: bool, graphs: bool = False) -> dict[str, Any]:
    rng = np.random.default_rng(number)
    steps = 1 + number % 7
    shape = (steps, 5, 3) if layered else (steps, 4)
    record: dict[str, Any] = {
        "id": f"r{number}",
        "label": number % 2,
        "sequence": rng.normal(size=shape).astype(np.float16),
        "fields": {
            "step.token_ids": rng.integers(0, 1000, steps),
            "step.loss_mask": rng.integers(0, 2, steps).astype(bool),
            "step.entropy": bfloat16(rng.normal(size=(steps, 2))),
            "record.score": np.float32(rng.normal()),
            "record.embedding": rng.normal(size=3).astype(np.float16),
            "record.prompt": f"Wie heißt Nr. {number}? " * (number % 3),
            "record.length": steps,
        },
    }
    if graphs:
        record["graphs"] = dp.Graphs(
            x=rng.normal(size=(4, 2)),
            edge_index=np.array([[0, 1, 2], [1, 2, 3]]),
            edge_attr=None,
            node_counts=np.array([4]),
            edge_counts=np.array([3]),
        )
    return record


def written(root: Path, *, layered: bool, graphs: bool = False, count: int = 60, **options: Any) -> dp.Dataset:
    shape, axes = ((5, 3), ("layer", "feature")) if layered else ((4,), ("feature",))
    schema = dp.Schema(
        sequence=dp.Field(dtype="float16", shape=shape, axes=axes),
        x=dp.Field(dtype="float32", shape=(2,)) if graphs else None,
        fields=FIELDS,
        step_axis="token",
        **options,
    )
    with dp.ShardWriter(root, schema, split=ALL, shard_bytes=4000) as writer:
        for number in range(count):
            writer.write(make_record(number, layered=layered, graphs=graphs))
    return dp.open_dataset(root)


@pytest.fixture(scope="module", params=[False, True], ids=["rows", "layered"])
def layered(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture(scope="module")
def data(layered: bool, tmp_path_factory: pytest.TempPathFactory) -> dp.Dataset:
    numbers: dict[str, Any] = {"layers": (0, 4, 8, 12, 16)} if layered else {}
    return written(tmp_path_factory.mktemp("set") / "set", layered=layered, **numbers)


@pytest.mark.parametrize("options", [{"engine": "dali"}, {"engine": "torch"}, {"engine": "torch", "num_workers": 2}])
@pytest.mark.parametrize("batch_size", [1, 7])
def test_batches_hold_every_field_of_their_records(
    data: dp.Dataset, layered: bool, options: dict[str, Any], batch_size: int
) -> None:
    seen = 0
    for batch in dp.SequenceLoader(data, batch_size=batch_size, **options):
        longest = int(batch.lengths.max())
        assert batch.fields["token_ids"].shape == (batch_size, longest)
        assert batch.fields["entropy"].shape == (batch_size, longest, 2)
        types = {name: field.dtype for name, field in batch.fields.items() if isinstance(field, torch.Tensor)}
        assert types == {
            "token_ids": torch.int64,
            "loss_mask": torch.bool,
            "entropy": torch.float32,
            "score": torch.float32,
            "embedding": torch.float32,
            "length": torch.int64,
        }
        for row, name in enumerate(batch.ids):
            record, length = make_record(int(name[1:]), layered=layered), int(batch.lengths[row])
            np.testing.assert_array_equal(batch.sequences[row, :length].numpy(), record["sequence"].astype(np.float32))
            assert not batch.sequences[row, length:].any()
            fields = record["fields"]
            for field in ("token_ids", "loss_mask", "entropy"):
                np.testing.assert_array_equal(batch.fields[field][row, :length].numpy(), fields[f"step.{field}"])
            assert (batch.fields["token_ids"][row, length:] == -1).all()
            assert not batch.fields["loss_mask"][row, length:].any()
            np.testing.assert_array_equal(batch.fields["embedding"][row].numpy(), fields["record.embedding"].astype(np.float32))
            assert float(batch.fields["score"][row]) == float(fields["record.score"])
            assert batch.fields["prompt"][row] == fields["record.prompt"]
            assert int(batch.fields["length"][row]) == length
        seen += int(batch.valid.sum())
    assert seen == 60


def test_only_the_fields_asked_for_come(data: dp.Dataset) -> None:
    batch = next(iter(dp.SequenceLoader(data, fields=["token_ids", "prompt"])))
    assert set(batch.fields) == {"token_ids", "prompt"}
    assert next(iter(dp.SequenceLoader(data, fields=[]))).fields == {}
    with pytest.raises(dp.UsageError, match="fields has 'colour'; expected some of entropy, loss_mask, token_ids"):
        dp.SequenceLoader(data, fields=["colour"])
    with pytest.raises(dp.UsageError, match="fields are 'token_ids'; expected a list of names"):
        dp.SequenceLoader(data, fields="token_ids")


def test_batches_move_with_their_fields(data: dp.Dataset) -> None:
    batch = next(iter(dp.SequenceLoader(data, batch_size=4)))
    moved = batch.to("meta")
    assert moved.fields["token_ids"].is_meta
    assert moved.fields["prompt"] == batch.fields["prompt"]
    assert moved.sequences.shape == batch.sequences.shape


def test_a_record_comes_back_and_can_be_written_again(data: dp.Dataset, layered: bool, tmp_path: Path) -> None:
    with dp.ShardWriter(tmp_path / "again", data.schema, split=ALL) as writer:
        for position in range(data.num_records("train", "sequences")):
            record = data.record("train", position)
            expected = make_record(int(record.id[1:]), layered=layered)
            np.testing.assert_array_equal(record.sequence, expected["sequence"])
            assert set(record.fields) == set(FIELDS)
            for name, value in expected["fields"].items():
                np.testing.assert_array_equal(record.fields[name], value)
                assert record.fields[name.partition(".")[2]] is record.fields[name]
            writer.write(record)
    again = dp.open_dataset(tmp_path / "again")
    assert again.schema == data.schema
    assert verify(tmp_path / "again").damages == []
    assert verify(data.folder).damages == []


def test_converting_a_set_anew_keeps_everything(data: dp.Dataset, layered: bool, tmp_path: Path) -> None:
    again = convert(data.folder, tmp_path / "again", ConvertConfig(num_workers=1, shard_bytes=1000))
    assert again.schema == data.schema
    for position in range(0, 60, 7):
        record = again.record("train", position)
        expected = make_record(int(record.id[1:]), layered=layered)
        np.testing.assert_array_equal(record.sequence, expected["sequence"])
        for name, value in expected["fields"].items():
            np.testing.assert_array_equal(record.fields[name], value)
    assert verify(tmp_path / "again").damages == []


def test_folds_subsets_and_mixes_have_fields(data: dp.Dataset) -> None:
    for part in (data.folds(3)[1], data.subset("train", range(5, 25)), dp.mix([data])):
        loader = dp.SequenceLoader(part, batch_size=4, engine="torch")
        for batch in loader:
            assert [f"{int(length)}" for length in batch.fields["length"]] == [f"{int(length)}" for length in batch.lengths]


def test_steps_choose_steps_of_fields_too(tmp_path: Path, layered: bool) -> None:
    data = written(tmp_path / "set", layered=layered)
    with pytest.raises(dp.DataError, match=r"layers \[2\] asked of a record with 1"):
        dp.SequenceLoader(data, steps=[2])
    for chosen, length in ((slice(0, 2), 2), ([0], 1), ([-1, 0], 2)):
        long = data.subset("train", [n for n in range(60) if len(data.record("train", n).sequence) > 1])
        for batch in dp.SequenceLoader(long, steps=chosen, batch_size=5, engine="torch"):
            for row, name in enumerate(batch.ids):
                record = make_record(int(name[1:]), layered=layered)
                rows = record["sequence"][chosen]
                assert int(batch.lengths[row]) == len(rows) == length
                np.testing.assert_array_equal(batch.sequences[row].numpy(), rows.astype(np.float32))
                np.testing.assert_array_equal(
                    batch.fields["token_ids"][row].numpy(), record["fields"]["step.token_ids"][chosen]
                )


@pytest.mark.parametrize("engine", ["dali", "torch"])
@pytest.mark.parametrize(
    ("layers", "numbers"), [([4, 16], [1, 4]), ([-1], [4]), (slice(4, 13), [1, 2, 3]), ([16, 0], [4, 0]), (None, range(5))]
)
def test_layers_are_chosen_by_their_numbers(tmp_path: Path, engine: Any, layers: Any, numbers: Any) -> None:
    data = written(tmp_path / "set", layered=True, layers=(0, 4, 8, 12, 16))
    assert data.layer_numbers("sequences") == [0, 4, 8, 12, 16]
    for batch in dp.SequenceLoader(data, layers=layers, batch_size=8, engine=engine):
        for row, name in enumerate(batch.ids):
            expected = make_record(int(name[1:]), layered=True)["sequence"][:, list(numbers)].astype(np.float32)
            np.testing.assert_array_equal(batch.sequences[row, : len(expected)].numpy(), expected)
    with pytest.raises(dp.DataError, match=r"layers .5. asked of records with the layers 0, 4, 8, 12, 16"):
        dp.SequenceLoader(data, layers=[5])


def test_layers_and_statistics_go_together(tmp_path: Path) -> None:
    data = written(tmp_path / "set", layered=True)
    whole = torch.cat([batch.sequences[row, : batch.lengths[row]] for batch in dp.SequenceLoader(data, normalize=True)
                       for row in range(len(batch)) if batch.valid[row]])  # fmt: skip
    torch.testing.assert_close(whole.mean(dim=0), torch.zeros(5, 3), atol=1e-3, rtol=0)
    torch.testing.assert_close(whole.std(dim=0, unbiased=False), torch.ones(5, 3), atol=1e-3, rtol=0)
    normal = {name: rows for batch in dp.SequenceLoader(data, normalize=True, batch_size=4, shuffle=False)
              for name, rows in zip(batch.ids, batch.sequences, strict=True)}  # fmt: skip
    for batch in dp.SequenceLoader(data, normalize=True, layers=[3, 1], batch_size=4, shuffle=False):
        for name, rows in zip(batch.ids, batch.sequences, strict=True):
            torch.testing.assert_close(rows, normal[name][:, [3, 1]])


def test_a_set_without_a_layer_axis_refuses_layers(tmp_path: Path) -> None:
    data = written(tmp_path / "set", layered=False)
    with pytest.raises(dp.UsageError, match=r"has no axis named layer: its steps are named 'token'; expected steps="):
        dp.SequenceLoader(data, layers=[0])
    layer_steps = dp.Schema(sequence=dp.Field(dtype="float16", shape=(2,)), step_axis="layer", layers=(8, 16, 24))
    with dp.ShardWriter(tmp_path / "layers", layer_steps, split=ALL) as writer:
        for number in range(9):
            writer.write({"id": number, "label": 0, "sequence": np.full((3, 2), number) + np.arange(3)[:, None] * 100})
    by_layer = dp.open_dataset(tmp_path / "layers")
    for batch in dp.SequenceLoader(by_layer, layers=[24, 8], batch_size=3):
        assert batch.sequences[:, :, 0].tolist() == [[200 + int(name), int(name)] for name in batch.ids]
    with pytest.raises(dp.UsageError, match="layers and steps both choose steps"):
        dp.SequenceLoader(by_layer, layers=[8], steps=[0])


def test_graphs_have_record_fields(tmp_path: Path) -> None:
    data = written(tmp_path / "set", layered=False, graphs=True)
    cases: list[dict[str, Any]] = [{}, {"num_workers": 2}, {"max_nodes": 30}]
    for options in cases:
        seen = 0
        for batch in dp.GraphLoader(data, batch_size=6, **options):
            assert set(batch.fields) == {"score", "embedding", "prompt", "length"}
            for row, name in enumerate(batch.ids):
                fields = make_record(int(name[1:]), layered=False)["fields"]
                assert float(batch.fields["score"][row]) == float(fields["record.score"])
                assert batch.fields["prompt"][row] == fields["record.prompt"]
            seen += int(batch.valid.sum())
        assert seen == 60
    assert set(next(iter(dp.GraphLoader(data, fields=["score"]))).fields) == {"score"}
    assert verify(data.folder).damages == []


LABELS: dict[str, tuple[dp.Label, Any]] = {
    "multilabel": (dp.Label(kind="multilabel", shape=(3,)), lambda number: [number % 2, 1, number % 3 == 0]),
    "value": (dp.Label(kind="value"), lambda number: number / 7),
    "values": (dp.Label(kind="value", shape=(2, 2)), lambda number: np.full((2, 2), number / 3)),
    "none": (dp.Label(kind="none"), lambda _: None),
    "named": (dp.Label(class_names=("cat", "dog")), lambda number: "dog" if number % 3 else "cat"),
}


@pytest.mark.parametrize("kind", LABELS)
def test_labels_of_every_kind(tmp_path: Path, kind: str) -> None:
    label, of = LABELS[kind]
    schema = dp.Schema(sequence=dp.Field(dtype="float32", shape=(2,)), x=dp.Field(dtype="float32", shape=(2,)), label=label)
    with dp.ShardWriter(tmp_path / "set", schema, split=ALL, shard_bytes=500) as writer:
        for number in range(30):
            made = make_record(number, layered=False, graphs=True)
            writer.write({"id": number, "label": of(number), "sequence": np.ones((2, 2)), "graphs": made["graphs"]})
    data = dp.open_dataset(tmp_path / "set")
    again = convert(data.folder, tmp_path / "again", ConvertConfig(num_workers=1))
    for one in (data, again, data.folds(2)[0], data.subset("train", range(20))):
        assert one.schema.labels == label
        for loader in (dp.SequenceLoader(one, batch_size=4), dp.GraphLoader(one, batch_size=4)):
            for batch in loader:
                assert (batch.labels is None) == (kind == "none")
                expected = [of(int(name)) for name in batch.ids]
                if kind == "named":
                    assert batch.labels.tolist() == [("cat", "dog").index(name) for name in expected]
                elif kind != "none":
                    dtype = torch.bool if kind == "multilabel" else torch.float32
                    assert torch.equal(batch.labels, torch.tensor(np.array(expected), dtype=dtype))
                    if isinstance(batch, dp.GraphBatch):
                        assert torch.equal(batch.graphs.y, batch.labels)
    assert verify(tmp_path / "set").damages == []
    assert verify(tmp_path / "again").damages == []
    assert data.record("train", 0).label is None if kind == "none" else data.record("train", 0).label is not None
    if kind != "named":
        with pytest.raises(dp.DataError, match=r"class_balanced needs one class per record; the labels of .* are of kind"):
            dp.SequenceLoader(data, class_balanced=True)
        if kind != "multilabel":
            with pytest.raises(dp.DataError, match="expected classes, which have a number"):
                data.num_classes  # noqa: B018
        assert data.label_counts("train") == ({0: 15, 1: 30, 2: 10} if kind == "multilabel" else {})
    else:
        assert data.label_counts("train") == {0: 10, 1: 20}


@pytest.mark.parametrize(
    ("label", "value", "words"),
    [
        (dp.Label(), 1.5, "has the label 1.5; expected a whole number of 0 or more"),
        (dp.Label(), None, "has the label None; expected a whole number"),
        (dp.Label(class_names=("a", "b")), 2, "has the label 2; expected one below 2, as class_names"),
        (dp.Label(class_names=("a", "b")), "c", "has the label 'c'; expected a whole number"),
        (dp.Label(kind="none"), 1, "has the label 1, and this data set none; expected None"),
        (dp.Label(kind="value"), float("nan"), "has the label nan; expected finite numbers that float32 can hold"),
        (dp.Label(kind="value"), 1e60, "expected finite numbers that float32 can hold"),
        (dp.Label(kind="value"), None, r"has no label; expected value of shape \(\)"),
        (dp.Label(kind="value", shape=(2,)), [1.0], r"the label has shape \(1,\); expected \(2,\)"),
        (dp.Label(kind="multilabel", shape=(2,)), [0, 2], r"has the label \[0, 2\]; expected 2 of 0 or 1"),
    ],
)
def test_labels_that_do_not_fit_are_named(tmp_path: Path, label: dp.Label, value: Any, words: str) -> None:
    schema = dp.Schema(sequence=dp.Field(dtype="float32", shape=(2,)), label=label)
    writer = dp.ShardWriter(tmp_path / "set", schema)
    with pytest.raises(dp.DataError, match=f"record 'odd'.*{words}"):
        writer.write({"id": "odd", "label": value, "sequence": np.ones((1, 2))})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"step.token_ids": None}, "has no step.token_ids; expected 3 rows as in the schema"),
        ({"step.token_ids": np.arange(4)}, r"step.token_ids has shape \(4,\); expected 3 rows, one per step"),
        ({"step.loss_mask": np.array([0, 1, 2])}, "step.loss_mask holds int64 values that bool cannot"),
        ({"record.prompt": 7}, "record.prompt is 7; expected a text that UTF-8 can hold"),
        ({"record.embedding": np.ones(4)}, r"record.embedding has rows of shape \(4,\); expected \(3,\)"),
        ({"record.length": -1}, "record.length holds int64 values that uint16 cannot"),
        (
            {"step.colour": np.ones(3)},
            "has the unknown field 'step.colour'; expected step.entropy, step.loss_mask, step.token_ids",
        ),
    ],
)
def test_fields_that_do_not_fit_are_named(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    data = written(tmp_path / "set", layered=False, count=1)
    record = make_record(2, layered=False)
    record["fields"] |= change
    writer = dp.ShardWriter(tmp_path / "other", data.schema)
    with pytest.raises(dp.DataError, match=f"record 'r2'.*{words}"):
        writer.write(record)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"fields": {"step.a": dp.Field(dtype="int8"), "record.a": dp.Field(dtype="int8")}}, "'step.a' at two levels"),
        ({"fields": {"step.a b": dp.Field(dtype="int8")}}, "expected step. and a name that Python takes as one"),
        ({"fields": {"step.a": dp.Field(dtype="text")}}, "'step.a' as text; expected text of records alone"),
        ({"fields": {"colour.a": dp.Field(dtype="int8")}}, "expected step., record., node., edge. or graph."),
        ({"step_axis": "no name"}, "step_axis is 'no name'; expected the name of the sequence's steps"),
        ({"step_axis": "feature"}, "step_axis is 'feature', which is an axis of a row too"),
        ({"layers": (1, 1)}, "expected each number once"),
        ({"layers": "many"}, "expected the number of each layer"),
        ({"label": 3}, "label is 3; expected a Label"),
    ],
)
def test_schemas_that_make_no_sense(options: dict[str, Any], words: str) -> None:
    with pytest.raises(dp.UsageError, match=words):
        dp.Schema(sequence=dp.Field(dtype="float32", shape=(2,), axes=("feature",)), **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"axes": ("a",), "shape": (2, 2)}, "for rows with 2 axes; expected one name for each"),
        ({"axes": ("a", "a"), "shape": (2, 2)}, "all different"),
        ({"axes": "ab", "shape": (2, 2)}, "expected names such as"),
        ({"pad": 1.5}, "pad is 1.5 for int8; expected a value of that type"),
        ({"pad": "x"}, "pad is 'x'; expected a finite number"),
        ({"pad": float("-inf"), "dtype": "float32"}, "pad is -inf; expected a finite number"),
        ({"pad": 1e9, "dtype": "float16"}, "for float16; expected a value of that type"),
        ({"pad": 1e300, "dtype": "bfloat16"}, "for bfloat16; expected a value of that type"),
        ({"pad": 300}, "pad is 300 for int8; expected a value of that type"),
        ({"dtype": "text", "shape": (2,)}, "one text per record"),
    ],
)
def test_further_fields_that_make_no_sense(options: dict[str, Any], words: str) -> None:
    with pytest.raises(dp.UsageError, match=words):
        dp.Field(**{"dtype": "int8", **options})


def test_a_newer_manifest_is_refused_by_the_key_it_adds(tmp_path: Path) -> None:
    import msgspec
    import xxhash

    data = written(tmp_path / "set", layered=False, count=3)
    path = data.folder / "manifest.json"
    for where in ("manifest", "schema"):
        content = msgspec.json.decode(path.read_bytes())
        (content if where == "manifest" else content["schema"])["colour"] = 1
        content["digest"] = ""
        content["digest"] = xxhash.xxh3_128_hexdigest(msgspec.json.encode(content, order="sorted"))
        path.write_bytes(msgspec.json.encode(content, order="sorted") + b"\n")
        name = "colour" if where == "manifest" else "schema.colour"
        with pytest.raises(dp.FormatError, match=f"has the key '{name}', which this release does not know"):
            dp.open_dataset(data.folder)
        path.unlink()
        data = written(tmp_path / f"set-{where}", layered=False, count=3)
        path = data.folder / "manifest.json"


def test_one_layer_costs_its_own_bytes_in_a_first_epoch(tmp_path: Path) -> None:
    """33 layers of 64 tokens x 4096: a layer is a 33rd of a record, and less than 0.06 of the blocks are read for it."""
    schema = dp.Schema(sequence=dp.Field(dtype="float16", shape=(33, 4096), axes=("layer", "feature")), step_axis="token")
    rows = np.zeros((64, 33, 4096), np.float16)
    with dp.ShardWriter(tmp_path / "set", schema, split=ALL) as writer:
        for number in range(3):
            rows[:, 17] = number + 1
            writer.write({"id": number, "label": 0, "sequence": rows})
    data = dp.open_dataset(tmp_path / "set")
    loader = dp.SequenceLoader(data, layers=[17], batch_size=1, engine="torch", num_workers=0)
    for batch in loader:
        assert batch.sequences.shape == (1, 64, 1, 4096)
        assert (batch.sequences == int(batch.ids[0]) + 1).all()
    blocks_read = int(np.asarray(loader._source._index._sound).sum())
    assert blocks_read * BLOCK_BYTES < 0.06 * data.nbytes


def test_inspect_tells_fields_axes_layers_and_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written(tmp_path / "set", layered=True, layers=(0, 4, 8, 12, 16))
    print_description(describe(dp.open_dataset(tmp_path / "set")))
    said = capsys.readouterr().out
    assert "step.token_ids: int32 () a row" in said
    assert "record.prompt: text () a row" in said
    assert "axes of a sequence: token, layer, feature" in said
    assert "layers of the sequences: 0, 4, 8, 12, 16" in said
    schema = dp.Schema(sequence=dp.Field(dtype="float32", shape=(2,)), label=dp.Label(kind="value"))
    with dp.ShardWriter(tmp_path / "values", schema, split=ALL) as writer:
        for number in range(10):
            writer.write({"id": number, "label": number / 4, "sequence": np.ones((2, 2))})
    report = describe(dp.open_dataset(tmp_path / "values"))
    assert report["values"]["train"]["greatest"] == 2.25
    print_description(report)
    said = capsys.readouterr().out
    assert "label: value" in said
    assert "0 to 2.25, median 1.12" in said


def batches_of(data: dp.Dataset, **options: Any) -> list[dp.SequenceBatch]:
    return list(dp.SequenceLoader(data, **{"window_bytes": 3000, "seed": 1, **options}))


@pytest.mark.parametrize("engine", ["dali", "torch"])
@pytest.mark.parametrize("count_padding", [True, False])
def test_batches_are_filled_up_to_a_number_of_steps(data: dp.Dataset, layered: bool, engine: Any, count_padding: bool) -> None:
    limit = 20
    batches = batches_of(data, max_steps=limit, count_padding=count_padding, engine=engine)
    names = [name for batch in batches for name in batch.ids]
    assert sorted(names) == sorted(f"r{number}" for number in range(60))
    in_order = [name for batch in batches_of(data, batch_size=1) for name in batch.ids]
    assert names == in_order  # the order is that of any other batches

    def cost(lengths: list[int]) -> int:
        return max(lengths) * len(lengths) if count_padding else sum(lengths)

    for batch, following in zip(batches, [*batches[1:], None], strict=True):
        lengths = batch.lengths.tolist()
        assert cost(lengths) <= limit
        if following is not None:  # no more would have fitted
            assert cost([*lengths, int(following.lengths[0])]) > limit
        for row, name in enumerate(batch.ids):
            expected = make_record(int(name[1:]), layered=layered)
            np.testing.assert_array_equal(batch.sequences[row, : lengths[row]].numpy(), expected["sequence"].astype(np.float32))
            np.testing.assert_array_equal(
                batch.fields["token_ids"][row, : lengths[row]].numpy(), expected["fields"]["step.token_ids"]
            )


def test_a_longer_record_comes_alone_and_options_that_do_not_go_together(data: dp.Dataset) -> None:
    batches = batches_of(data, max_steps=3)
    assert sum(int(batch.valid.sum()) for batch in batches) == 60
    assert all(len(batch) == 1 for batch in batches if int(batch.lengths.max()) > 3)
    loader = dp.SequenceLoader(data, max_steps=20)
    assert len(loader) == len(list(loader))
    with pytest.raises(dp.UsageError, match="max_steps needs the size of every record; expected on_error='raise'"):
        dp.SequenceLoader(data, max_steps=20, on_error="skip")
    with pytest.raises(dp.UsageError, match="max_steps and bucket_by_length exclude each other"):
        dp.SequenceLoader(data, max_steps=20, bucket_by_length=True)
    with pytest.raises(dp.UsageError, match="max_steps is 0"):
        dp.SequenceLoader(data, max_steps=0)
    with pytest.raises(dp.UsageError, match="have no number of records"):
        loader.num_valid(0)


@pytest.mark.parametrize("options", [{"engine": "dali"}, {"engine": "torch"}, {"engine": "torch", "max_steps": 25}])
@pytest.mark.parametrize("normalize", [False, True])
def test_packed_batches_hold_the_rows_of_padded_ones(data: dp.Dataset, options: dict[str, Any], normalize: bool) -> None:
    padded = batches_of(data, batch_size=7, normalize=normalize, **options)
    packed = batches_of(data, batch_size=7, normalize=normalize, packed=True, **options)
    for one, other in zip(padded, packed, strict=True):
        assert one.ids == other.ids
        assert other.cu_seqlens is not None
        assert other.cu_seqlens.dtype == torch.int32
        assert torch.diff(other.cu_seqlens).tolist() == one.lengths.tolist()
        rows = [one.sequences[row, :length] for row, length in enumerate(one.lengths.tolist())]
        assert torch.equal(torch.cat(rows), other.sequences)
        for name in ("token_ids", "loss_mask", "entropy"):
            steps = [one.fields[name][row, :length] for row, length in enumerate(one.lengths.tolist())]
            assert torch.equal(torch.cat(steps), other.fields[name])
        assert torch.equal(one.fields["score"], other.fields["score"])
        assert other.to("meta").cu_seqlens.is_meta  # type: ignore[union-attr]


def test_packed_layers_are_those_asked_for(tmp_path: Path) -> None:
    data = written(tmp_path / "set", layered=True)
    for batch in dp.SequenceLoader(data, layers=[3, 0], packed=True, batch_size=6, on_nan="raise"):
        expected = [make_record(int(name[1:]), layered=True)["sequence"][:, [3, 0]] for name in batch.ids]
        np.testing.assert_array_equal(batch.sequences.numpy(), np.concatenate(expected).astype(np.float32))


def test_nodes_have_statistics_with_their_number(tmp_path: Path) -> None:
    data = written(tmp_path / "set", layered=False, graphs=True)
    nodes = np.concatenate([make_record(n, layered=False, graphs=True)["graphs"].x for n in range(60)]).astype(np.float32)
    statistics = data.manifest.node_statistics
    assert statistics is not None
    np.testing.assert_allclose(statistics.mean, nodes.mean(axis=0), atol=1e-5)
    np.testing.assert_allclose(statistics.std, nodes.std(axis=0), rtol=1e-4)
    assert statistics.count == (240, 240)
    assert data.manifest.statistics is not None
    assert set(data.manifest.statistics.count) == {sum(1 + n % 7 for n in range(60))}


@pytest.mark.parametrize(
    ("dtype", "pad"), [("bfloat16", 1.5), ("float16", -2), ("bool", True), ("uint32", 7), ("float64", 0.1)]
)
def test_padding_has_the_value_asked_for(tmp_path: Path, dtype: str, pad: Any) -> None:
    fields = {"step.a": dp.Field(dtype=dtype, shape=(2,), pad=pad), "step.long": dp.Field(dtype=dtype, shape=(40,), pad=pad)}
    schema = dp.Schema(sequence=dp.Field(dtype="float32", shape=(1,)), fields=fields)
    with dp.ShardWriter(tmp_path / "set", schema, split=ALL) as writer:
        for number in range(4):
            rows = {"step.a": np.zeros((number + 1, 2)), "step.long": np.zeros((number + 1, 40))}
            writer.write({"id": number, "label": 0, "sequence": np.ones((number + 1, 1)), "fields": rows})
    for batch in dp.SequenceLoader(dp.open_dataset(tmp_path / "set"), batch_size=4, on_nan="raise"):
        for row, length in enumerate(batch.lengths.tolist()):
            for name in ("a", "long"):
                assert not batch.fields[name][row, :length].any()
                assert (batch.fields[name][row, length:] == torch.tensor(pad, dtype=batch.fields[name].dtype)).all()


def test_layers_with_numbers_are_as_many_in_every_record(tmp_path: Path) -> None:
    schema = dp.Schema(sequence=dp.Field(dtype="float32", shape=(1,)), step_axis="layer", layers=(1, 2, 3))
    writer = dp.ShardWriter(tmp_path / "set", schema, split=ALL)
    with pytest.raises(dp.DataError, match="record 'r4', sequence has 4 steps; expected 3, as layers has 3 numbers"):
        writer.write({"id": "r4", "label": 0, "sequence": np.ones((4, 1))})


def test_layers_mean_the_same_in_graphs(tmp_path: Path) -> None:
    field = dp.Field(dtype="float32", shape=(3, 1), axes=("layer", "feature"))
    schema = dp.Schema(
        sequence=field,
        x=dp.Field(dtype="float32", shape=(1,)),
        step_axis="token",
        layers=(1, 2, 4),
        fields={"node.masked": dp.Field(dtype="bool")},
    )
    with dp.ShardWriter(tmp_path / "set", schema, split=ALL) as writer:
        for number in range(6):
            graphs = dp.Graphs(
                x=np.array([[1.0], [2.0], [4.0]]),
                edge_index=np.zeros((2, 0), np.int64),
                edge_attr=None,
                node_counts=np.ones(3, np.int64),
                edge_counts=np.zeros(3, np.int64),
                fields={"node.masked": np.array([True, False, True])},
            )
            rows = np.tile(np.array([1.0, 2.0, 4.0])[:, None], (2, 1, 1))
            writer.write({"id": number, "label": 0, "sequence": rows, "graphs": graphs})
    data = dp.open_dataset(tmp_path / "set")
    for layer in (1, 2, 4):
        assert all((batch.sequences == layer).all() for batch in dp.SequenceLoader(data, layers=[layer], batch_size=2))
        for batch in dp.GraphLoader(data, layers=[layer], batch_size=2):
            assert (batch.graphs.x == layer).all()
            assert batch.graphs.masked.dtype == torch.bool
            assert (batch.graphs.masked == (layer != 2)).all()
    assert dp.mix([data]).manifest.node_statistics is None


def test_what_convert_cannot_do_with_axes_is_said(tmp_path: Path) -> None:
    tokens = written(tmp_path / "tokens", layered=False, count=5)
    with pytest.raises(dp.UsageError, match="has no axis named layer: its steps are named 'token'; leave --layers out"):
        convert(tokens.folder, tmp_path / "a", ConvertConfig(num_workers=1, layers=[0]))
    layers = written(tmp_path / "layers", layered=True, count=5)
    with pytest.raises(dp.UsageError, match="its layers lie apart already; leave --by-layer out"):
        convert(layers.folder, tmp_path / "b", ConvertConfig(num_workers=1, by_layer=True))
    narrow = convert(layers.folder, tmp_path / "c", ConvertConfig(num_workers=1, dtype="record.score=bfloat16", layers=[1, 3]))
    assert narrow.schema.record_fields["record.score"].dtype == "bfloat16"
    assert narrow.schema.sequence is not None
    assert narrow.schema.sequence.shape == (2, 3)
    expected = make_record(int(narrow.record("train", 0).id[1:]), layered=True)["sequence"][:, [1, 3]]
    np.testing.assert_array_equal(narrow.record("train", 0).sequence, expected)
