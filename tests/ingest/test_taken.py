"""What convert takes of a source, keeps of it, and names where it leaves it: splits, types, layers, fields, files."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch_geometric.data import Data

import dali_pipeline as dp
from dali_pipeline.cli import app as cli
from dali_pipeline.format.layers import to_positions
from dali_pipeline.ingest import convert as convert_module
from dali_pipeline.ingest.config import ConvertConfig
from dali_pipeline.ingest.readers.tensors import Tensor, TorchFile
from dali_pipeline.tools.verify import verify
from tests.helpers.records import SCHEMA, make_records, write

ALL = dp.SplitRule.parse("100/0/0")


def convert(src: Path, dst: Path, **options: Any) -> dp.Dataset:
    return convert_module.convert(src, dst, ConvertConfig(num_workers=1, **options))


def homes(data: dp.Dataset, kind: Any = "sequences") -> dict[str, str]:
    """The split of each record."""
    return {one.decode(): split for split in data.splits for one in data.select(split, kind).texts("ids")}


def sequences(data: dp.Dataset) -> dict[str, torch.Tensor]:
    """Each record's own steps."""
    found: dict[str, torch.Tensor] = {}
    for split in data.splits:
        for batch in dp.SequenceLoader(data, split, engine="torch", batch_size=4):
            rows = zip(batch.ids, batch.sequences, batch.lengths.tolist(), strict=True)
            found |= {name: sequence[:length] for name, sequence, length in rows}
    return found


def write_table(path: Path, count: int, first: int = 0, **more: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    columns: dict[str, Any] = {
        "id": [f"r{first + row}" for row in range(count)],
        "sequence": [[[float(first + row), 1.0]] * 3 for row in range(count)],
        "label": [row % 2 for row in range(count)],
    }
    pq.write_table(pa.table(columns | more), path)


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("train-00000.parquet", "test-00000.parquet"),
        ("train/data-0.parquet", "test/data-0.parquet"),
        ("training_1.parquet", "x_TEST_y.parquet"),
        ("a/b/train.parquet", "c/test/part.parquet"),
    ],
)
def test_splits_in_names_are_kept_and_said(tmp_path: Path, train: str, test: str, caplog: pytest.LogCaptureFixture) -> None:
    write_table(tmp_path / "src" / train, 200)
    write_table(tmp_path / "src" / test, 60, 200)
    data = convert(tmp_path / "src", tmp_path / "dst")
    found = homes(data)
    assert {name for name, split in found.items() if split == "test"} == {f"r{row}" for row in range(200, 260)}
    dealt = sum(split == "val" for split in found.values())  # 15 of 85 of the training records
    assert 15 < dealt < 60
    assert "the splits in the files' names are kept: train (1 files), test (1 files); val is dealt out of train" in caplog.text
    anew = homes(convert(tmp_path / "src", tmp_path / "anew", split=dp.SplitRule()))
    assert {split for name, split in anew.items() if int(name[1:]) >= 200} == {"train", "val", "test"}


@pytest.mark.parametrize(
    ("words", "splits"),
    [
        (("train", "dev", "eval"), ("train", "val", "test")),
        (("train", "eval"), ("train", "val")),
        (("train", "validation", "test"), ("train", "val", "test")),
        (("training", "valid"), ("train", "val")),
    ],
)
def test_words_of_splits(tmp_path: Path, words: tuple[str, ...], splits: tuple[str, ...]) -> None:
    for number, word in enumerate(words):
        write_table(tmp_path / "src" / f"{word}.parquet", 10, 10 * number)
    found = homes(convert(tmp_path / "src", tmp_path / "dst"))
    assert [found[f"r{10 * number}"] for number in range(len(words))] == list(splits)
    assert all(found[f"r{10 * number + row}"] == split for number, split in enumerate(splits) for row in range(10))


def test_one_word_alone_tells_no_splits_and_two_in_a_name_are_refused(tmp_path: Path) -> None:
    for number in range(4):
        write_table(tmp_path / "one" / f"train-{number}.parquet", 25, 25 * number)
    assert set(homes(convert(tmp_path / "one", tmp_path / "dst")).values()) == {"train", "val", "test"}
    write_table(tmp_path / "two" / "train" / "latest_test.parquet", 5)
    write_table(tmp_path / "two" / "test" / "b.parquet", 5, 5)
    with pytest.raises(dp.UsageError, match=r"^train/latest_test.parquet names test and train; rename it, .* --split$"):
        convert(tmp_path / "two", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_groups_that_the_owner_tore_are_counted_said_and_sound(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_table(tmp_path / "src" / "train.parquet", 20, group=[f"g{row // 2}" for row in range(20)])
    write_table(tmp_path / "src" / "test.parquet", 10, 20, group=[f"g{row // 2 + 8}" for row in range(10)])
    write_table(tmp_path / "src" / "val.parquet", 2, 30, group=["v", "v"])
    data = convert(tmp_path / "src", tmp_path / "dst")
    assert data.manifest.source["torn"] == 2
    assert "2 groups are in several of the splits that are kept" in caplog.text
    assert [data.num_records(split, "sequences") for split in ("train", "val", "test")] == [20, 2, 10]
    assert verify(data.folder).damages == []
    again = convert(data.folder, tmp_path / "again", dtype="float32")
    assert homes(again) == homes(data)
    assert verify(again.folder).damages == []


@pytest.mark.parametrize("options", [{}, {"dtype": "float32"}, {"shard_bytes": 900}])
def test_a_set_of_ours_keeps_its_splits_and_groups(tmp_path: Path, options: dict[str, Any]) -> None:
    split = dp.SplitRule.parse("50/30/20", seed=1)
    with dp.ShardWriter(tmp_path / "set", SCHEMA, shard_bytes=2048, split=split) as writer:
        for record in make_records(120):
            writer.write(record)
    data = dp.open_dataset(tmp_path / "set")
    one = convert(data.folder, tmp_path / "one", **options)
    for kind in ("sequences", "graphs"):
        assert homes(one, kind) == homes(data, kind)
        assert one.select("train", kind).texts("groups") == data.select("train", kind).texts("groups")
    anew = convert(data.folder, tmp_path / "anew", split=dp.SplitRule(seed=2))
    assert homes(anew) != homes(data)


@pytest.mark.parametrize("ragged", [True, False])
def test_a_set_of_ours_keeps_its_types_and_layout(tmp_path: Path, ragged: bool) -> None:
    data = write(tmp_path / "set", make_records(60, ragged=ragged))
    layout = {} if ragged else {"by_layer": True}
    one = convert(data.folder, tmp_path / "one", dtype="sequence=int8,x=bfloat16,edge_attr=bfloat16", **layout)
    two = convert(one.folder, tmp_path / "two", shard_bytes=1500)
    assert two.schema == one.schema
    for name, values in sequences(two).items():
        assert torch.equal(values, sequences(one)[name])
    for split in one.splits:
        pairs = zip(*(dp.GraphLoader(each, split, shuffle=False) for each in (one, two)), strict=True)
        assert all(torch.equal(ours.graphs.x, theirs.graphs.x) for ours, theirs in pairs)
    if not ragged:
        some = convert(one.folder, tmp_path / "some", layers=[2, 1])
        assert some.schema.sequence is not None
        assert one.schema.sequence is not None
        assert some.schema.sequence.scales == tuple(one.schema.sequence.scales[at] for at in (2, 1))  # type: ignore[index]
        for name, values in sequences(some).items():
            assert torch.equal(values, sequences(one)[name][[2, 1]])
        assert convert(one.folder, tmp_path / "rows", by_layer=False).schema.sequence.layout is None  # type: ignore[union-attr]


def test_bfloat16_stays_and_the_space_is_that_of_what_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "src" / "lstm_solo"
    folder.mkdir(parents=True)
    values = torch.randn(40, 6, 512).bfloat16()
    for number, sequences_ in enumerate((values, list(values))):
        content = {"sequences": sequences_, "labels": [0, 1] * 20, "question_ids": [f"{number}-{row}" for row in range(40)]}
        torch.save(content, folder / f"batch_{number}.pt")
    asked: list[int] = []
    monkeypatch.setattr(convert_module, "check_space", lambda needed, _: asked.append(needed))
    data = convert(tmp_path / "src", tmp_path / "dst", split=ALL)
    assert data.schema.sequence == dp.Field(dtype="bfloat16", shape=(512,))
    for name, row in sequences(data).items():
        assert torch.equal(row.bfloat16(), values[int(name.split("-")[1])])
    wide = convert(tmp_path / "src", tmp_path / "wide", split=ALL, dtype="float32")
    for needed, made in zip(asked, (data, wide), strict=True):
        assert made.nbytes == pytest.approx(needed, rel=0.05)
    mixed = {"sequences": torch.randn(4, 6, 512), "labels": [0] * 4, "question_ids": list("abcd")}
    torch.save(mixed, folder / "batch_2.pt")
    with pytest.raises(dp.DataError, match=r"batch_2.pt: record 'a': sequence is float32, and bfloat16 in the first file"):
        convert(tmp_path / "src", tmp_path / "other")


def test_graphs_of_bfloat16_stay(tmp_path: Path) -> None:
    (tmp_path / "src" / "gnn").mkdir(parents=True)
    x, edges = torch.randn(3, 4).bfloat16(), torch.tensor([[0, 1], [1, 2]])
    graphs = [[Data(x=x, edge_index=edges, edge_attr=torch.ones(2).bfloat16()), Data(x=x, edge_index=edges[:, :0])]] * 2
    torch.save({"graphs": graphs, "labels": [0, 1], "question_ids": ["a", "b"]}, tmp_path / "src" / "gnn" / "batch_0.pt")
    schema = convert(tmp_path / "src", tmp_path / "dst").schema
    assert schema.x == dp.Field(dtype="bfloat16", shape=(4,))
    assert schema.edge_attr == dp.Field(dtype="bfloat16")


def write_traces(path: Path, states: int, layers: int = 3, **more: Any) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    traces = [
        {
            "question_id": f"q{row}",
            "label": row % 2,
            "hidden_states": [np.full((4, 2), state, np.float16) for state in range(layers + 1 - states, layers + 1)],
            "attentions": [rng.random((2, 4, 4)).astype(np.float32) for _ in range(layers)],
            **more,
        }
        for row in range(6)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(traces))
    return traces


@pytest.mark.parametrize("states", [4, 3])
def test_a_layers_number_means_the_same_in_both_halves(tmp_path: Path, states: int) -> None:
    write_traces(tmp_path / "src" / "a.pkl", states)
    whole = convert(tmp_path / "src", tmp_path / "whole", split=ALL)
    assert whole.layer_numbers("sequences") == list(range(4 - states, 4))
    assert whole.layer_numbers("graphs") == [1, 2, 3]
    kept = convert(tmp_path / "src", tmp_path / "kept", split=ALL, layers=[1, 3])
    assert (kept.manifest.source["layers"], kept.manifest.source["graph_layers"]) == ([1, 3], [1, 3])
    again = convert(whole.folder, tmp_path / "again", layers=slice(2, 4))
    assert again.layer_numbers("graphs") == [2, 3]
    for data, layers, numbers in (
        (whole, [2], [2]),
        (kept, [3], [3]),
        (again, [2], [2]),
        (again, slice(3, None), [3]),
        (whole, [-1], [3]),
    ):
        for batch in dp.SequenceLoader(data, layers=layers, engine="torch"):
            assert batch.sequences[0, :, 0].tolist() == numbers
        for graphs in dp.GraphLoader(data, batch_size=6, layers=layers):
            assert graphs.graphs.x[graphs.last_node, 0].tolist() == numbers * 6
    with pytest.raises(dp.DataError, match=r"^layers \[2\] asked of records with the layers 1, 3 in split 'train' of "):
        dp.SequenceLoader(kept, layers=[2])


def test_layers_without_numbers_count_from_0_and_steps_of_one_more_than_graphs_are_layers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for folder, key, content in (
        ("lstm_solo", "sequences", torch.arange(4.0).repeat(6, 1)[..., None]),
        (
            "gnn",
            "graphs",
            [[Data(x=torch.full((2, 1), float(layer)), edge_index=torch.zeros(2, 1).long()) for layer in (1, 2, 3)]] * 6,
        ),
    ):
        (tmp_path / "src" / folder).mkdir(parents=True)
        half = {key: content, "labels": [0, 1] * 3, "question_ids": list("abcdef")}
        torch.save(half, tmp_path / "src" / folder / "batch_0.pt")
    data = convert(tmp_path / "src", tmp_path / "dst", split=ALL, layers=[2])
    assert "records have 4 steps and 3 graphs: taken as layers 0 to 3, and 1 to 3" in caplog.text
    (batch,), (graphs,) = dp.SequenceLoader(data, engine="torch"), dp.GraphLoader(data, batch_size=8)
    assert set(batch.sequences.flatten().tolist()) == {2.0} == set(graphs.graphs.x.flatten().tolist())


@pytest.mark.parametrize(
    ("layers", "found"),
    [
        (None, [0, 1, 2]),
        ([12], [1]),
        ([-1, 8], [2, 0]),
        (slice(8, 16), [0, 1]),
        (slice(9, None), [1, 2]),
        (slice(-2, None), [1, 2]),
        (slice(None, -1), [0, 1]),
        (slice(None, None, 2), [0, 2]),
        (slice(None, None, -1), [2, 1, 0]),
    ],
)
def test_numbers_of_layers_become_positions(layers: Any, found: list[int]) -> None:
    assert to_positions(layers, [8, 12, 16]) == found


@pytest.mark.parametrize("layers", [[9], [-4], slice(17, 20), [], slice(9, 11)])
def test_layers_that_are_not_there(layers: Any) -> None:
    with pytest.raises(dp.DataError, match=r"^layers .* asked of records with the layers 8, 12, 16$"):
        to_positions(layers, [8, 12, 16])


def graph(**more: Any) -> Data:
    return Data(x=torch.randn(3, 2), **more)


EDGES = torch.tensor([[0, 1, 2], [1, 2, 0]])


@pytest.mark.parametrize(
    ("attributes", "edge_attr", "left"),
    [
        ({"edge_index": EDGES, "edge_weight": torch.tensor([0.5, 1.5, 2.5])}, [0.5, 1.5, 2.5], []),
        ({"edge_index": EDGES, "edge_weight": torch.tensor([[0.5], [1.5], [2.5]])}, [0.5, 1.5, 2.5], []),
        ({"edge_index": EDGES, "edge_attr": torch.ones(3), "edge_weight": torch.zeros(3)}, [1.0, 1.0, 1.0], ["edge_weight"]),
        ({"adj": torch.tensor([[0, 0.5, 0], [0, 0, 1.5], [2.5, 0, 0]])}, [0.5, 1.5, 2.5], []),
        ({"adj": torch.tensor([[[0, 1, 0], [0, 0, 1], [1, 0, 0]]])}, None, []),
        ({"edge_index": EDGES, "adj": torch.eye(3)}, None, ["adj"]),
        ({"edge_index": EDGES, "pos": torch.ones(3, 3), "edge_type": torch.ones(3)}, None, ["edge_type", "pos"]),
    ],
)
def test_what_a_graph_says_is_taken_or_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, attributes: dict[str, Any], edge_attr: Any, left: list[str]
) -> None:
    (tmp_path / "gnn").mkdir()
    torch.save([graph(y=row % 2, **attributes) for row in range(4)], tmp_path / "gnn" / "batch_0.pt")
    torch.save([graph(y=row % 2, **attributes) for row in range(4)], tmp_path / "gnn" / "batch_1.pt")
    data = convert(tmp_path, tmp_path / "dst", split=ALL)
    for batch in dp.GraphLoader(data, batch_size=1):
        assert batch.graphs.edge_index.tolist() == EDGES.tolist()
        assert (None if edge_attr is None else batch.graphs.edge_attr.tolist()) == edge_attr
    named = [f"not taken: {name}, in gnn/batch_0.pt, gnn/batch_1.pt" for name in left]
    assert [record.getMessage() for record in caplog.records] == named


PADDED = np.arange(1, 25, dtype=np.float32).reshape(3, 4, 2)
MASK = np.array([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]])


@pytest.mark.parametrize("form", ["npz", "pt", "parquet"])
@pytest.mark.parametrize(
    "padding", [{"lengths": [2, 4, 1]}, {"attention_mask": MASK}, {"mask": MASK > 0}, {"seq_lens": [2, 4, 1], "mask": MASK}]
)
def test_padding_is_no_step(tmp_path: Path, form: str, padding: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    src = tmp_path / "src"
    src.mkdir()
    if form == "npz":
        np.savez(src / "a.npz", sequences=PADDED, labels=[0, 1, 0], ids=list("abc"), **padding)
    elif form == "pt":
        (src / "lstm_solo").mkdir()
        tensors = {name: torch.as_tensor(np.asarray(value)) for name, value in padding.items()}
        content = {"sequences": torch.from_numpy(PADDED), "labels": [0, 1, 0], "question_ids": list("abc"), **tensors}
        torch.save(content, src / "lstm_solo" / "batch_0.pt")
    else:
        columns = {name: np.asarray(value).tolist() for name, value in padding.items()}
        pq.write_table(
            pa.table({"id": list("abc"), "label": [0, 1, 0], "sequence": PADDED.tolist(), **columns}), src / "a.parquet"
        )
    found = sequences(convert(src, tmp_path / "dst", split=ALL))
    for name, row, length in zip("abc", PADDED, (2, 4, 1), strict=True):
        assert found[name].tolist() == row[:length].tolist()
    assert caplog.records == []


def test_steps_that_a_mask_leaves_out_on_the_left(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", sequences=PADDED, labels=[0, 1, 0], ids=list("abc"), mask=MASK[:, ::-1])
    found = sequences(convert(tmp_path / "a.npz", tmp_path / "dst", split=ALL))
    assert found["a"].tolist() == PADDED[0, 2:].tolist()


@pytest.mark.parametrize(
    ("padding", "words"),
    [
        ({"lengths": [2, 5, 1]}, "record 1 has a length of 5 and 4 steps"),
        ({"lengths": [2, 4]}, "lengths has 2 entries for 3 records"),
        ({"lengths": [2, 4, 1.5]}, "lengths are float64 .*expected whole numbers"),
        ({"mask": MASK[:, :3]}, "record 0 has a mask of 3 and 4 steps"),
        ({"lengths": [2, 3, 1], "mask": MASK}, "record 1 has a length of 3 and a mask of 4 steps; expected one"),
        ({"lengths": [2, 4, 0]}, "record 'a-2', sequence has shape .*at least one row"),
    ],
)
def test_lengths_and_masks_that_do_not_fit_are_named(tmp_path: Path, padding: dict[str, Any], words: str) -> None:
    np.savez(tmp_path / "a.npz", sequences=PADDED, labels=[0, 1, 0], **padding)
    with pytest.raises(dp.PipelineError, match=rf"a\.npz: {words}"):
        convert(tmp_path / "a.npz", tmp_path / "dst", split=ALL)


def test_everything_else_in_a_file_is_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(7):
        np.savez(tmp_path / f"{number}.npz", sequences=PADDED, labels=[0, 1, 0], scores=np.ones(3), weights=np.ones(3))
    convert(tmp_path, tmp_path / "dst")
    names = ", ".join(f"{number}.npz" for number in range(5))
    assert [record.getMessage() for record in caplog.records] == [
        f"not taken: {name}, in {names} and 2 more files" for name in ("scores", "weights")
    ]
    caplog.clear()
    write_traces(tmp_path / "traces" / "a.pkl", 3, prompt="Q", logprobs=[0.5])
    convert(tmp_path / "traces", tmp_path / "other")
    assert [record.getMessage() for record in caplog.records] == [
        "not taken: logprobs, in a.pkl",
        "not taken: prompt, in a.pkl",
    ]
    caplog.clear()
    write_table(tmp_path / "table" / "a.parquet", 4, score=[0.5] * 4, y=[1] * 4)
    convert(tmp_path / "table", tmp_path / "third")
    assert [record.getMessage() for record in caplog.records] == [
        "not taken: score, in a.parquet",
        "not taken: y, in a.parquet",
    ]


def test_links_are_followed_and_each_target_is_taken_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_table(tmp_path / "elsewhere" / "deep" / "b.parquet", 12, 12)
    write_table(tmp_path / "src" / "a.parquet", 12)
    (tmp_path / "src" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "src" / "again").symlink_to(tmp_path / "elsewhere" / "deep")
    (tmp_path / "elsewhere" / "loop").symlink_to(tmp_path / "src")
    (tmp_path / "src" / "c.parquet").symlink_to("a.parquet")
    data = convert(tmp_path / "src", tmp_path / "dst", split=ALL)
    assert sorted(homes(data)) == sorted(f"r{row}" for row in range(24))
    assert "not taken: c.parquet; expected" in caplog.text


def test_files_beside_that_are_not_taken_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "src" / "lstm_solo"
    folder.mkdir(parents=True)
    content = {"sequences": torch.zeros(4, 2, 3), "labels": [0, 1, 0, 1], "question_ids": list("abcd")}
    for name in ("batch_0.pt", "chunk_1.pt", "batch_2.PT", "batch_3.pt.bak"):
        torch.save(content, folder / name)
    (tmp_path / "src" / "batch_9.pt").write_bytes(b"x")
    (tmp_path / "src" / ".hidden").write_bytes(b"x")
    convert(tmp_path / "src", tmp_path / "dst")
    (message,) = [record.getMessage() for record in caplog.records]
    for name in ("lstm_solo/chunk_1.pt", "lstm_solo/batch_2.PT", "lstm_solo/batch_3.pt.bak", "batch_9.pt"):
        assert name in message
    assert "hidden" not in message
    assert "batch_0" not in message


def test_hugging_face_folders_have_no_strangers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_table(tmp_path / "src" / "train" / "data.parquet", 12)
    for name in ("dataset_dict.json", "train/state.json", "train/dataset_info.json", "train/cache-12.arrow"):
        (tmp_path / "src" / name).write_bytes(b"{}")
    convert(tmp_path / "src", tmp_path / "dst")
    assert caplog.records == []


@pytest.mark.parametrize(
    "dims",
    [(1, 0, 2), (1, 2, 0), (0, 2, 1), *(pytest.param(one, marks=pytest.mark.slow) for one in ((2, 1, 0), (2, 0, 1)))],
)
def test_any_strides_read_each_byte_about_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dims: tuple[int, ...]) -> None:
    """`torch.stack(layers).permute(1, 0, 2)` as it is saved, and every other order of axes; time is counted in bytes read."""
    folder = tmp_path / "src" / "lstm_solo"
    folder.mkdir(parents=True)
    sizes = [0, 0, 0]
    for axis, size in zip(dims, (600, 5, 300), strict=True):
        sizes[axis] = size
    whole = torch.randn(*sizes).half()
    values = whole.permute(*dims)
    content = {"sequences": values, "labels": [0, 1] * 300, "question_ids": [f"q{row}" for row in range(600)]}
    torch.save(content, folder / "batch_0.pt")
    torch.save({**content, "sequences": list(values), "question_ids": [f"p{row}" for row in range(600)]}, folder / "batch_1.pt")
    read: list[int] = []
    real = TorchFile.read

    def counted(self: TorchFile, at: int, nbytes: int) -> bytes:
        read.append(nbytes)
        return real(self, at, nbytes)

    monkeypatch.setattr(TorchFile, "read", counted)
    found = sequences(convert(tmp_path / "src", tmp_path / "dst", split=ALL))
    for name, row in found.items():
        assert torch.equal(row.half(), values[int(name[1:])])
    assert sum(read) < 2 * 3 * values.nbytes + 600 * 5 * 300 * 2 * 2  # schema, space and values; a read of close rows is dense


@pytest.mark.parametrize("compressed", [False, True])
def test_arrays_in_fortran_order(tmp_path: Path, compressed: bool) -> None:
    values = np.asfortranarray(np.random.default_rng(0).normal(size=(9, 4, 3)).astype(np.float32))
    save = np.savez_compressed if compressed else np.savez
    save(tmp_path / "a.npz", sequences=values, labels=[0] * 9)
    found = sequences(convert(tmp_path / "a.npz", tmp_path / "dst", split=ALL))
    assert all(np.array_equal(row.numpy(), values[int(name.split("-")[1])]) for name, row in found.items())


def test_a_part_of_a_large_storage_is_read_alone(tmp_path: Path) -> None:
    big = torch.arange(4_000_000, dtype=torch.int32).reshape(1000, 4000)
    torch.save({"column": big[:, 7:9], "every": big[::500, ::1000]}, tmp_path / "a.pt")
    file = TorchFile(tmp_path / "a.pt")
    for name, expected in (("column", big[:, 7:9]), ("every", big[::500, ::1000])):
        tensor = file.tensor(file.content[name])
        assert isinstance(tensor, Tensor)
        assert np.array_equal(tensor.read(), expected.numpy())


@pytest.mark.parametrize("skip_bad", [False, True])
def test_a_record_without_steps_is_named_or_left_out_with_int8(tmp_path: Path, skip_bad: bool) -> None:
    for number, last in enumerate((3, 0, 4)):
        values = np.ones((3 + last, 2), np.float32)
        np.savez(tmp_path / f"{number}.npz", values=values, offsets=[0, 3, 3 + last], labels=[0, 1])
    if skip_bad:
        data = convert(tmp_path, tmp_path / "dst", dtype="int8", skip_bad=True, split=ALL)
        assert sorted(homes(data)) == ["0-0", "0-1", "2-0", "2-1"]
        assert list(data.manifest.source["left_out"]) == ["1.npz"]
        return
    with pytest.raises(dp.DataError, match=r"1\.npz: record '1-1', sequence has shape \(0, 2\); expected at least one row"):
        convert(tmp_path, tmp_path / "dst", dtype="int8")


def test_rows_of_two_widths_are_named_with_int8(tmp_path: Path) -> None:
    for number in range(2):
        np.savez(tmp_path / f"{number}.npz", sequences=np.ones((2, 3, 4 + number), np.float32), labels=[0, 1])
    with pytest.raises(dp.DataError, match=r"rows of shape \(4,\) in one file and \(5,\) in another"):
        convert(tmp_path, tmp_path / "dst", dtype="int8")


@pytest.mark.parametrize("large", [1e154, 1.7e308, np.inf, np.nan, 1e39])
def test_values_beyond_float32_are_left_out_of_the_statistics(tmp_path: Path, large: float) -> None:
    rows = np.array([[1.0, 2.0], [3.0, -large], [5.0, 4.0]])
    with dp.ShardWriter(tmp_path / "set", dp.Schema(sequence=dp.Field(dtype="float64", shape=(2,))), split=ALL) as writer:
        for number in range(3):
            writer.write({"id": number, "label": 0, "sequence": rows})
    statistics = dp.open_dataset(tmp_path / "set").manifest.statistics
    assert statistics is not None
    assert statistics.mean == pytest.approx((3.0, 3.0))
    assert statistics.std == pytest.approx((np.std([1, 3, 5]), 1.0))
    assert verify(tmp_path / "set").damages == [] or not np.isfinite(large)


def test_what_int8_costs_is_said_by_feature(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = np.random.default_rng(0).normal(size=(200, 3, 4)).astype(np.float32)
    np.savez(tmp_path / "fine.npz", sequences=values, labels=[0, 1] * 100)
    values[7, 1, 2] = 5000
    np.savez(tmp_path / "outlier.npz", sequences=values, labels=[0, 1] * 100)
    for name in ("fine", "outlier"):
        command = ["convert", str(tmp_path / f"{name}.npz"), str(tmp_path / name), "--dtype", "int8", "--split", "100/0/0"]
        assert cli.app(command, standalone_mode=False) in (None, 0)
        out = capsys.readouterr().out
        assert re.search(r"int8 moves a feature by 0\.\d+% of its usual spread at the median", out)  # 3 / 127 / sqrt(12): 0.7 %
        assert ("and feature 2 most, by 100%" in out) == (name == "outlier")
        assert ("1 of 4 lose more than 10%, as with outliers: clip them, or store float16" in out) == (name == "outlier")


def test_cli_says_it_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_table(tmp_path / "src" / "train.parquet", 40, score=[0.0] * 40)
    write_table(tmp_path / "src" / "test.parquet", 20, 40, score=[0.0] * 20)
    (tmp_path / "src" / "notes.txt").write_text("x")
    assert cli.app(["convert", str(tmp_path / "src"), str(tmp_path / "dst")], standalone_mode=False) in (None, 0)
    assert "20 test" in capsys.readouterr().out
    assert cli.app(["convert", str(tmp_path / "src"), str(tmp_path / "a"), "--split-seed", "3"], standalone_mode=False) in (
        None,
        0,
    )
    assert "20 test" not in capsys.readouterr().out
    assert (tmp_path / "a").exists()
