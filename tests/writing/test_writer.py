from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

import dali_pipeline as dp
from dali_pipeline.format.encoding import decode, encode
from dali_pipeline.loaders.loader import Loader
from dali_pipeline.storage.whole import replacing, write_whole
from dali_pipeline.tools.verify import verify
from dali_pipeline.writing import moments as moments_module
from dali_pipeline.writing.filler import Contents, ShardFiller
from dali_pipeline.writing.journal import JOURNAL_NAME
from dali_pipeline.writing.moments import Moments
from dali_pipeline.writing.openshard import Stack
from tests.helpers.records import FEATURES, SCHEMA, make_records, write


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def write_with_commits(root: Path, records: list[dp.Record], stop_before: int | None = None) -> None:
    """Commits every 40 records; dies before record `stop_before`."""
    with dp.ShardWriter(root, SCHEMA, shard_bytes=2048, fingerprint="same") as writer:
        for number in range(writer.cursor, len(records)):
            if number == stop_before:
                raise KeyboardInterrupt
            writer.write(records[number])
            if (number + 1) % 40 == 0:
                writer.commit(number + 1)


def test_a_data_set_says_what_it_holds(data: dp.Dataset, records: dict[str, dp.Record]) -> None:
    assert sum(data.num_records(split, "sequences") for split in ("train", "val", "test")) == len(records)
    for kind in ("sequences", "graphs"):
        table = data.table("train", kind)
        assert len(table) > 5
        assert sum(table.labels.values()) == sum(table.records) == data.num_records("train", kind)
    assert data.table("train", "sequences").rows["step"] == (2, 8)
    assert data.table("train", "graphs").rows["graph"] == (3, 3)
    assert data.num_classes == 2
    assert sum(data.label_counts("train").values()) == data.num_records("train", "graphs")


def test_statistics_are_those_of_the_training_split(data: dp.Dataset, records: dict[str, dp.Record]) -> None:
    train = [record for record in records.values() if dp.SplitRule().of(str(record.group)) == "train"]
    rows = np.concatenate([record.sequence for record in train]).astype(np.float64)
    assert data.manifest.statistics is not None
    assert np.allclose(data.manifest.statistics.mean, rows.mean(axis=0), atol=1e-12)
    assert np.allclose(data.manifest.statistics.std, rows.std(axis=0), atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-10), ("float32", 1e-5), ("float16", 1e-5), ("bfloat16", 1e-5)])
def test_moments_are_those_of_all_rows_however_they_are_cut(
    monkeypatch: pytest.MonkeyPatch, dtype: str, tolerance: float
) -> None:
    monkeypatch.setattr(moments_module, "CHUNK_BYTES", 4 * 4 * 50)
    narrow = dtype == "bfloat16"
    rows = np.random.default_rng(0).normal(1e3, 1, size=(1000, 4)).astype(np.float32 if narrow else dtype)
    rows[:, 1] = 0.1  # constant
    rows[::7, 2] = [np.nan, np.inf, -np.inf] * 47 + [np.nan] * 2
    moments, other = Moments(), Moments()
    stored = encode(rows, "bfloat16", None)[0] if narrow else rows
    rows = decode(stored, "bfloat16", None) if narrow else rows
    for part in np.array_split(stored[:600], 7):
        moments.update(part, bfloat16=narrow)
    other.update(stored[600:], bfloat16=narrow)
    moments.extend(other)
    found = moments.statistics()
    assert found is not None
    finite = np.ma.masked_invalid(rows.astype(np.float64))
    assert np.allclose(found.mean, finite.mean(axis=0), rtol=tolerance)
    assert np.allclose(found.std, finite.std(axis=0), rtol=tolerance, atol=1e-9)
    assert Moments().statistics() is None


@pytest.mark.parametrize("features", [1, 9, 600])
def test_moments_are_the_same_bits_on_every_processor(features: int) -> None:
    script = f"""
import numpy as np
from dali_pipeline.writing.moments import Moments
moments = Moments()
moments.update(np.random.default_rng(0).random((3001, {features}), np.float32))
print(moments.count.tolist(), moments.mean.tolist(), moments.squares.tolist())
"""
    found = {
        subprocess.run(
            [sys.executable, "-c", script], env={**os.environ, "OPENBLAS_CORETYPE": kind}, capture_output=True, check=True
        ).stdout
        for kind in ("Prescott", "Haswell")  # how BLAS takes this processor to be
    }
    assert len(found) == 1
    assert b"] [0." in found.pop()


def test_a_group_is_never_torn_apart_and_both_kinds_agree(data: dp.Dataset, records: dict[str, dp.Record]) -> None:
    homes: dict[str, set[str]] = {}
    for split in ("train", "val", "test"):
        loaders: list[Loader[Any]] = [dp.SequenceLoader(data, split, engine="torch"), dp.GraphLoader(data, split)]
        for loader in loaders:
            for batch in loader:
                for one in batch.ids:
                    homes.setdefault(str(records[one].group), set()).add(split)
    assert len(homes) == 150
    assert all(len(splits) == 1 for splits in homes.values())


def test_shares_are_met_about(make: Callable[..., dp.Dataset]) -> None:
    data = make(400, shares="50/25/25")
    counts = [data.num_records(split, "graphs") for split in ("train", "val", "test")]
    assert sum(counts) == 400
    assert abs(counts[0] - 200) < 50
    everything = make(40, shares="100/0/0")
    assert [everything.num_records(split, "graphs") for split in ("train", "val", "test")] == [40, 0, 0]


@pytest.mark.parametrize("stop", [1, 39, 41, 95, 119])
def test_interrupted_and_gone_on_gives_the_same_bytes(tmp_path: Path, stop: int) -> None:
    records = make_records(120)
    write_with_commits(tmp_path / "whole", records)
    for at in (stop, stop + 30 if stop < 90 else None):
        if at is not None:
            with pytest.raises(KeyboardInterrupt):
                write_with_commits(tmp_path / "torn", records, stop_before=at)
            with pytest.raises(dp.FormatError, match="has no manifest"):
                dp.open_dataset(tmp_path / "torn") if (tmp_path / "torn").exists() else dp.open_dataset(tmp_path)
    write_with_commits(tmp_path / "torn", records)
    assert files(tmp_path / "torn") == files(tmp_path / "whole")


def test_killed_without_a_chance_to_clean_up(tmp_path: Path) -> None:
    """A folder as SIGKILL leaves it: shards behind the last commit, temporary files, no manifest."""
    records = make_records(120)
    write_with_commits(tmp_path / "whole", records)
    root = tmp_path / "torn"
    writer = dp.ShardWriter(root, SCHEMA, shard_bytes=2048, fingerprint="same")
    for record in records[:60]:
        writer.write(record)
        if record is records[39]:
            writer.commit(40)
    (root / "train" / "graphs-00099.safetensors.tmp").write_bytes(b"half")
    (root / "train" / "graphs-00098.safetensors").write_bytes(b"of an earlier attempt")
    (root / "journal.json.tmp").write_bytes(b"half")
    del writer
    write_with_commits(root, records)
    assert files(root) == files(tmp_path / "whole")


def test_two_writers_never_share_a_folder(tmp_path: Path) -> None:
    (record,) = make_records(1)
    with dp.ShardWriter(tmp_path / "set", SCHEMA) as writer:
        with pytest.raises(dp.UsageError, match="is being written by another process"):
            dp.ShardWriter(tmp_path / "set", SCHEMA)
        writer.write(record)
    assert (
        sum(
            sum(table.records)
            for tables in dp.open_dataset(tmp_path / "set").manifest.splits.values()
            for table in tables.values()
        )
        == 2
    )
    with pytest.raises(dp.UsageError, match="is closed"):
        writer.write(record)


def test_files_written_by_several_at_once_are_whole(tmp_path: Path) -> None:
    """Each by one of them, and no temporary name is left, not even by one that fails or was killed."""
    path = tmp_path / "metrics.json"
    (tmp_path / "metrics.json.tmp").write_bytes(b"of a killed process" * 1000)

    def write_often(number: int) -> None:
        for length in range(1, 200, 7):
            write_whole(path, bytes([number]) * length * 100)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write_often, range(8)))
    content = path.read_bytes()
    assert set(content) == {content[0]}
    assert len(content) % 100 == 0
    with pytest.raises(ZeroDivisionError), replacing(path) as file:
        file.write(b"half")
        _ = 1 / 0
    assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


def test_what_was_committed_stays_whatever_the_cursor(tmp_path: Path) -> None:
    records = make_records(20)
    with pytest.raises(KeyboardInterrupt), dp.ShardWriter(tmp_path / "set", SCHEMA, fingerprint="same") as writer:
        for record in records:
            writer.write(record)
        writer.commit(0)
        raise KeyboardInterrupt
    with dp.ShardWriter(tmp_path / "set", SCHEMA, fingerprint="same"):
        pass
    data = dp.open_dataset(tmp_path / "set")
    assert sum(data.num_records(split, "graphs") for split in data.splits) == 20


def test_a_folder_that_was_there_stays_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mine"), dp.ShardWriter(tmp_path, SCHEMA):
        raise ValueError("mine")
    assert tmp_path.exists()
    assert list(tmp_path.iterdir()) == []


def test_the_caller_may_use_its_buffer_again(tmp_path: Path) -> None:
    schema = dp.Schema(sequence=dp.Field(dtype="float32", shape=(2,)))
    buffer = np.zeros((3, 2), np.float32)
    with dp.ShardWriter(tmp_path / "set", schema, split=dp.SplitRule.parse("100/0/0")) as writer:
        for number in range(3):
            buffer[:] = number
            writer.write({"id": str(number), "label": 0, "sequence": buffer})
    (batch,) = dp.SequenceLoader(dp.open_dataset(tmp_path / "set"), batch_size=3, shuffle=False, engine="torch")
    assert batch.sequences[:, 0, 0].tolist() == [0, 1, 2]


def test_a_refused_record_leaves_nothing_of_itself(tmp_path: Path) -> None:
    good, bad = make_records(2)
    bad.graphs.edge_index[:] = 99
    with dp.ShardWriter(tmp_path / "set", SCHEMA, split=dp.SplitRule.parse("100/0/0")) as writer:
        writer.write(good)
        with pytest.raises(dp.DataError, match="leaves the graph's"):
            writer.write(bad)
    data = dp.open_dataset(tmp_path / "set")
    assert (data.num_records("train", "sequences"), data.num_records("train", "graphs")) == (1, 1)


def test_values_that_are_not_finite_do_not_spoil_the_statistics(tmp_path: Path) -> None:
    rows = np.array([[1.0, np.nan, np.inf], [3.0, np.nan, 5.0]], np.float32)
    with dp.ShardWriter(
        tmp_path / "set", dp.Schema(sequence=dp.Field(dtype="float32", shape=(3,))), split=dp.SplitRule.parse("100/0/0")
    ) as writer:
        writer.write({"id": "a", "label": 0, "sequence": rows})
    statistics = dp.open_dataset(tmp_path / "set").manifest.statistics
    assert statistics is not None
    assert (statistics.mean, statistics.std) == ((2.0, 0.0, 5.0), (1.0, 0.0, 0.0))
    (batch,) = dp.SequenceLoader(dp.open_dataset(tmp_path / "set"), batch_size=1, engine="torch")
    assert np.array_equal(batch.sequences[0].numpy(), rows, equal_nan=True)


def test_an_error_before_the_first_commit_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mine"), dp.ShardWriter(tmp_path / "set", SCHEMA, shard_bytes=100) as writer:
        for record in make_records(20):
            writer.write(record)
        raise ValueError("mine")
    assert not (tmp_path / "set").exists()


def test_foreign_folders_are_left_alone(tmp_path: Path) -> None:
    precious = tmp_path / "train" / "photo.jpg"
    precious.parent.mkdir()
    precious.write_bytes(b"precious")
    with pytest.raises(dp.UsageError, match="not empty"):
        dp.ShardWriter(tmp_path, SCHEMA)
    assert files(tmp_path) == {"train/photo.jpg": b"precious"}


def test_finished_and_other_work_is_not_overwritten(tmp_path: Path) -> None:
    records = make_records(50)
    root = tmp_path / "set"
    with pytest.raises(KeyboardInterrupt):
        write_with_commits(root, records, stop_before=45)
    with pytest.raises(dp.UsageError, match="other input or settings"):
        dp.ShardWriter(root, SCHEMA, fingerprint="other")
    write_with_commits(root, records)
    before = files(root)
    assert JOURNAL_NAME not in before
    with pytest.raises(dp.UsageError, match="finished data set already"):
        dp.ShardWriter(root, SCHEMA, fingerprint="same")
    assert files(root) == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"label": -1}, "label -1"),
        ({"label": 0.5}, "label 0.5"),
        ({"label": float("nan")}, "label nan"),
        ({"label": "yes"}, "label 'yes'"),
        ({"label": None}, "label None"),
        ({"label": 2**63}, "label 9223372036854775808"),
        ({"id": "\ud800"}, "id that UTF-8 cannot hold"),
        ({"sequence": np.zeros((2, 3))}, r"record-0', sequence has rows of shape \(3,\)"),
        ({"sequence": None, "graphs": None}, "neither of the schema's kinds"),
        ({"label": np.ma.masked}, "label masked"),
        ({"label": np.ma.array(1, mask=True)}, r"label masked_array\(data=--, mask=True"),
    ],
)
def test_bad_records_are_refused_by_name(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    (record,) = make_records(1)
    bad = {"id": record.id, "label": record.label, "sequence": record.sequence, "graphs": record.graphs} | change
    with pytest.raises(dp.DataError, match=words), dp.ShardWriter(tmp_path / "set", SCHEMA) as writer:
        writer.write(bad)
    assert not (tmp_path / "set").exists()


def masked(array: Any, hidden: int) -> Any:
    """The array with its first `hidden` values masked."""
    mask = np.zeros(np.shape(array), bool)
    mask.reshape(-1)[:hidden] = True
    return np.ma.array(array, mask=mask)


@pytest.mark.parametrize("hidden", [0, 2])
@pytest.mark.parametrize("name", ["sequence", "rows", "x", "edge_index", "edge_attr", "node_counts", "edge_counts", "node.pos"])
def test_masked_values_are_refused_and_never_what_lies_beneath(tmp_path: Path, name: str, hidden: int) -> None:
    """A mask that hides nothing is none."""
    graphs = dp.Graphs(
        x=np.ones((4, 4), np.float16),
        edge_index=np.array([[0, 1], [1, 0]]),
        edge_attr=np.ones(2, np.float16),
        node_counts=np.array([2, 2]),
        edge_counts=np.array([1, 1]),
        fields={"node.pos": np.ones((4, 3), np.float32)},
    )
    sequence: Any = np.ones((3, FEATURES), np.float16)
    if name == "sequence":
        sequence = masked(sequence, hidden)
    elif name == "rows":
        sequence = [masked(sequence[0], hidden), sequence[1]]
    elif name == "node.pos":
        graphs = replace(graphs, fields={name: masked(graphs.fields[name], hidden)})
    else:
        graphs = replace(graphs, **{name: masked(getattr(graphs, name), hidden)})
    schema = replace(SCHEMA, fields={"node.pos": dp.Field(dtype="float32", shape=(3,))})
    said = f"record 'a'.*{'sequence' if name == 'rows' else name} has 2 masked values"
    with (
        pytest.raises(dp.DataError, match=said) if hidden else nullcontext(),
        dp.ShardWriter(tmp_path / "set", schema) as writer,
    ):
        writer.write({"id": "a", "label": 0, "sequence": sequence, "graphs": graphs})
    assert (tmp_path / "set").exists() == (not hidden)


@pytest.mark.parametrize("label", [1, True, 1.0, np.int32(1), np.float16(1), np.ma.array(1)])
def test_whole_labels_of_any_type_are_taken(tmp_path: Path, label: Any) -> None:
    (record,) = make_records(1)
    with dp.ShardWriter(tmp_path / "set", SCHEMA) as writer:
        writer.write({"id": "a", "label": label, "sequence": record.sequence})
    data = dp.open_dataset(tmp_path / "set")
    assert [data.label_counts(split) for split in ("train", "val", "test") if data.label_counts(split)] == [{1: 1}]


def test_an_id_given_twice_is_refused(tmp_path: Path) -> None:
    records = make_records(30)
    with (
        pytest.raises(dp.DataError, match="'record-7' is given to 2 sequences"),
        dp.ShardWriter(tmp_path / "set", SCHEMA, shard_bytes=500) as writer,
    ):
        for record in [*records, records[7]]:
            writer.write(record)
    assert not (tmp_path / "set").exists()


def test_no_records_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(dp.DataError, match="no records"), dp.ShardWriter(tmp_path / "set", SCHEMA):
        pass
    assert not (tmp_path / "set").exists()


def test_a_record_larger_than_a_shard_has_its_own(tmp_path: Path) -> None:
    data = write(tmp_path / "set", make_records(20), shard_bytes=1)
    assert data.table("train", "sequences").records == [1] * data.num_records("train", "sequences")


def test_a_data_set_may_be_moved(data: dp.Dataset, tmp_path: Path) -> None:
    shutil.copytree(data.folder, tmp_path / "moved")
    moved = dp.open_dataset(tmp_path / "moved")
    assert moved.digest == data.digest
    assert str(data.root) not in (tmp_path / "moved" / "manifest.json").read_text()
    assert len(list(dp.SequenceLoader(moved, engine="torch"))) > 0


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda text: text[: len(text) // 2], "not a dali_pipeline manifest"),
        (lambda text: "", "not a dali_pipeline manifest"),
        (lambda text: "[]", "not a dali_pipeline manifest"),
        (lambda text: "{}", "not a dali_pipeline manifest"),
        (lambda text: text.replace('"version":2', '"version":3'), "version 3; expected"),
        (lambda text: text.replace('"records":[', '"records":[5,'), "does not have the digest"),
        (lambda text: text.replace("float16", "float17"), "float17"),
        (lambda text: text.replace("{", '{"extra":1,', 1), "has the key 'extra', which this release does not know"),
        (lambda text: text.replace(",", ", ", 1), "does not have the digest"),
        (lambda text: text.encode("utf-8").replace(b"train", b"tra\xffn", 1).decode("latin-1"), "digest|manifest"),
    ],
)
def test_damaged_manifests_are_refused(data: dp.Dataset, tmp_path: Path, damage: Any, words: str) -> None:
    text = (data.folder / "manifest.json").read_text()
    assert damage(text) != text
    (tmp_path / "manifest.json").write_text(damage(text))
    with pytest.raises(dp.FormatError, match=words):
        dp.open_dataset(tmp_path)


def test_what_is_no_data_set_is_said(tmp_path: Path, data: dp.Dataset) -> None:
    with pytest.raises(dp.FormatError, match="not a folder"):
        dp.open_dataset(tmp_path / "missing")
    with pytest.raises(dp.FormatError, match="has no manifest"):
        dp.open_dataset(tmp_path)
    with pytest.raises(dp.UsageError, match="is no kind of URL that fsspec knows"):
        dp.open_dataset("nonsense://bucket/set", cache_dir=tmp_path / "cache")
    with pytest.raises(dp.UsageError, match=r"unknown split 'dev'; .* has train, val, test"):
        data.table("dev", "graphs")


def test_the_manifest_is_columns_of_json(data: dp.Dataset) -> None:
    manifest = json.loads((data.folder / "manifest.json").read_text())
    table = manifest["splits"]["train"]["graphs"]
    assert len(table["records"]) == len(table["bytes"]) == len(table["digests"]) // 32


@pytest.mark.parametrize("text", ["70/15", "70/15/16", "-10/55/55", "a/b/c", ""])
def test_senseless_splits_are_refused(text: str) -> None:
    with pytest.raises(dp.UsageError, match="such as 70/15/15"):
        dp.SplitRule.parse(text)


def test_a_manifest_from_before_the_sum_of_ids_still_opens(tmp_path: Path) -> None:
    """Then the sum is read from the ids themselves, and `verify` has nothing to hold it against."""
    data = write(tmp_path / "set", make_records(60))
    path = tmp_path / "set" / "manifest.json"
    found = json.loads(path.read_bytes())
    assert all(
        len(table.pop("ids")) == 16 for kinds in found["splits"].values() for table in kinds.values() if table["records"]
    )
    for kinds in found["splits"].values():
        for table in kinds.values():
            table.pop("ids", None)
    text = json.dumps({**found, "digest": ""}, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    digest = xxhash.xxh3_128_hexdigest(text)
    path.write_bytes(text.replace(b'"digest":""', f'"digest":"{digest}"'.encode(), 1) + b"\n")
    older = dp.open_dataset(tmp_path / "set")
    assert older.digest == digest != data.digest
    assert verify(tmp_path / "set").damages == []
    for loader in (dp.GraphLoader(older), dp.SequenceLoader(older, engine="torch")):
        list(loader)
        assert loader.check_digest(loader.digest).endswith("each once")


@pytest.mark.parametrize("stored", ["float16", "float32"])
def test_stacked_records_are_written_as_one_by_one(tmp_path: Path, stored: str) -> None:
    """Into the same shards, byte by byte, cast or not, wherever a shard is full; and refused alike."""
    values = np.random.default_rng(0).normal(size=(50, 4, 3)).astype(np.float16)
    names = [f"r{at}" for at in range(50)]
    schema = dp.Schema(sequence=dp.Field(dtype=stored, shape=(3,)))
    fillers = [ShardFiller(tmp_path / name, schema, 100, dp.SplitRule(), Contents()) for name in ("one", "stack")]
    for begin, end in ((0, 1), (1, 30), (30, 50)):
        chosen = slice(begin, end)
        labels = [at % 3 for at in range(begin, end)]
        fillers[1].write(Stack(names[chosen], names[chosen], labels, values[chosen]))
        for at in range(begin, end):
            fillers[0].write(dp.Record(id=names[at], label=at % 3, sequence=values[at]))
    for filler in fillers:
        filler.flush()
    assert fillers[0].contents == fillers[1].contents
    paths = [path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.safetensors")]
    assert len(paths) > 10
    assert all((tmp_path / "one" / path).read_bytes() == (tmp_path / "stack" / path).read_bytes() for path in paths)
    with pytest.raises(dp.DataError, match="record 'r0', sequence has rows of shape"):
        fillers[1].write(Stack(names[:2], names[:2], [0, 0], np.zeros((2, 4, 5), np.float16)))
