from __future__ import annotations

import dataclasses
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dali_pipeline as dp
from dali_pipeline.cli.app import app, run
from dali_pipeline.format.manifest import ShardTable
from dali_pipeline.storage.files import Files
from dali_pipeline.tools.verify import verify
from dali_pipeline.types import Kind
from tests.helpers.records import make_records, write, write_shard

ARRAYS = {
    "sequences": ("labels", "ids", "ids.offsets", "groups", "groups.offsets", "sequence", "sequence.offsets"),
    "graphs": ("labels", "ids", "groups", "graphs.offsets", "x", "x.offsets", "edge_index", "edge_index.offsets", "edge_attr"),
}
Change = Callable[[dict[str, Any]], None]


@pytest.fixture
def copied(data: dp.Dataset, tmp_path: Path) -> dp.Dataset:
    """A data set that may be damaged."""
    shutil.copytree(data.folder, tmp_path / "set")
    return dp.open_dataset(tmp_path / "set")


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["dali_pipeline", *map(str, arguments)])
    return run(app, "dali_pipeline")


def forge(data: dp.Dataset, kind: Kind, change: Change, split: str = "train", shard: int = 1) -> Path:
    """A shard with other content whose hashes are right, named by a manifest whose digest is right."""
    table, path = data.table(split, kind), data.shard_path(split, kind, shard)
    opened = table.open(path, shard, Files())
    arrays = {name: opened.read(name) for name in opened.arrays if name != "padding"}
    records = opened.records
    change(arrays)
    info = write_shard(path, kind, records, arrays)
    forged = dataclasses.replace(
        table,
        bytes=[*table.bytes[:shard], info.bytes, *table.bytes[shard + 1 :]],
        blocks=[*table.blocks[:shard], info.blocks, *table.blocks[shard + 1 :]],
        digests=table.digests[: 32 * shard] + info.digest + table.digests[32 * shard + 32 :],
    )
    replace_table(data, split, kind, forged)
    return Path(path)


def replace_table(data: dp.Dataset, split: str, kind: Kind, table: ShardTable) -> None:
    splits = {name: dict(tables) for name, tables in data.manifest.splits.items()}
    splits[split][kind] = table
    dataclasses.replace(data.manifest, splits=splits).save(data.folder)


def setting(name: str, value: Callable[[Any], Any]) -> Change:
    def change(arrays: dict[str, Any]) -> None:
        arrays[name] = value(arrays[name])

    return change


def at(index: Any, value: Any) -> Callable[[Any], Any]:
    def change(array: Any) -> Any:
        array[index] = value
        return array

    return change


def test_a_sound_set_exits_0_with_one_line(
    copied: dp.Dataset, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for more in ((), ("--quick",)):
        assert call(monkeypatch, "verify", copied.root, *more) == 0
        out, err = capsys.readouterr()
        assert out.startswith("sound: 600 records")
        assert out.count("\n") == 1
        assert err == ""


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in ARRAYS.items() for name in names])
def test_a_flipped_bit_is_named(
    copied: dp.Dataset, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: Kind, name: str
) -> None:
    path = copied.shard_path("train", kind, 0)
    layout = copied.table("train", kind).open(path, 0, Files()).array(name)
    content = bytearray(path.read_bytes())
    content[layout.begin + layout.nbytes // 2] ^= 4
    path.write_bytes(content)
    assert call(monkeypatch, "verify", copied.root) == 1
    out, err = capsys.readouterr()
    *damages, summary = out.splitlines()
    assert f"{path}, {name}: " in damages[0]
    assert all(str(path) in line for line in damages)
    assert summary.startswith(f"{len(damages)} damages")
    assert err == ""
    values = name in ("sequence", "x", "edge_index", "edge_attr")
    assert call(monkeypatch, "verify", copied.root, "--quick") == (0 if values else 1)  # it reads no values


def test_arrays_that_nobody_reads_are_checked_too(tmp_path: Path) -> None:
    schema = dp.Schema(sequence=dp.Field(dtype="float16"))
    with dp.ShardWriter(tmp_path / "set", schema, split=dp.SplitRule.parse("100/0/0")) as writer:
        writer.write({"id": "a", "label": 0, "sequence": [1.0, 2.0, 3.0]})
    data = dp.open_dataset(tmp_path / "set")
    path = data.shard_path("train", "sequences", 0)
    layout = data.table("train", "sequences").open(path, 0, Files()).array("padding")
    content = bytearray(path.read_bytes())
    content[layout.begin] ^= 1
    path.write_bytes(content)
    (line,) = verify(data.folder).damages
    assert line.startswith(f"{path}, padding: 1 blocks are damaged")


@pytest.mark.parametrize("place", [0, 5, 20, 300])
def test_a_damaged_header_is_named_and_the_rest_still_checked(copied: dp.Dataset, place: int) -> None:
    path, other = copied.shard_path("train", "sequences", 0), copied.shard_path("val", "graphs", 0)
    for each, where in ((path, place), (other, -1)):
        content = bytearray(each.read_bytes())
        content[where] ^= 1
        each.write_bytes(content)
    damages = verify(copied.folder).damages
    assert sum(str(path) in line for line in damages) == 1
    assert sum(str(other) in line for line in damages) == 1


def test_missing_cut_and_strange_files_are_named(copied: dp.Dataset) -> None:
    gone, cut = copied.shard_path("train", "graphs", 2), copied.shard_path("test", "sequences", 0)
    gone.unlink()
    cut.write_bytes(cut.read_bytes()[:-1])
    strange = copied.folder / "val" / "sequences-00999.safetensors"
    strange.write_bytes(b"?")
    damages = "\n".join(verify(copied.folder).damages)
    assert f"{gone} cannot be opened" in damages
    assert f"{cut} has " in damages
    assert f"{strange}: the manifest does not name this file" in damages


# hashes and digests are right in all of these
FORGED: dict[str, tuple[Kind, Change, str]] = {
    "a NaN and an infinity": (
        "sequences",
        setting("sequence", at((slice(1, 3), 0), [np.nan, np.inf])),
        r", sequence: 1 NaN and 1 infinite values; by layer 1: 1, 2: 1$",
    ),
    "NaN in a node": ("graphs", setting("x", at((0, 1), np.nan)), r", x: 1 NaN and 0 infinite values; by layer 0: 1$"),
    "an infinite weight": (
        "graphs",
        setting("edge_attr", at(-1, np.inf)),
        r", edge_attr: 0 NaN and 1 infinite values; by layer \d",
    ),
    "a negative label": ("sequences", setting("labels", at(0, -1)), r", labels: \d+, the least -1; expected \d+ of 0 or more"),
    "another label": (
        "sequences",
        setting("labels", lambda labels: labels + 1),
        r"train/sequences, labels: .* in the manifest",
    ),
    "offsets that go backward": (
        "sequences",
        setting("sequence.offsets", at(1, 10**6)),
        r", sequence.offsets: \d+ that do not rise from 0",
    ),
    "offsets past the end": ("graphs", setting("x.offsets", at(-1, 10**6)), r", x.offsets: end at 1000000 of \d+ rows"),
    "offsets from 1": ("graphs", setting("graphs.offsets", at(0, 1)), r", graphs.offsets: \d+ that do not rise from 0"),
    "an empty record": ("sequences", setting("sequence.offsets", at(1, 0)), r", sequence.offsets: row 0 is empty"),
    "a missing weight": (
        "graphs",
        setting("edge_attr", lambda values: values[:-1].copy()),
        r", edge_attr: \d+ rows for \d+ edges",
    ),
    "an edge beyond": (
        "graphs",
        setting("edge_index", at((0, 0), 200)),
        r", edge_index: 1 edges leave their graph, the first in graph",
    ),
    "another dtype": (
        "sequences",
        setting("sequence", lambda values: values.astype(np.float32)),
        r", sequence: float32 .*; expected float16 in rows of \(8,\)",
    ),
    "another width": (
        "graphs",
        setting("x", lambda values: np.ascontiguousarray(values[:, :3])),
        r"x: float16 .*; expected float16 in rows",
    ),
    "a missing array": ("graphs", lambda arrays: arrays.pop("edge_attr"), r"has no array 'edge_attr'"),
    "ids that are no text": ("sequences", setting("ids", at(0, 0xFF)), r", ids: record 0 is not UTF-8"),
}


@pytest.mark.parametrize("name", FORGED)
def test_what_no_hash_can_show_is_found(copied: dp.Dataset, name: str) -> None:
    kind, change, words = FORGED[name]
    path = forge(copied, kind, change)
    damages = verify(copied.folder).damages
    assert any(re.search(words, line) for line in damages), damages
    assert all("\n" not in line for line in damages)
    assert all(str(path) in line or "manifest.json" in line or " as graphs" in line for line in damages)


def test_ids_given_twice_and_leaking_groups_are_named(tmp_path: Path) -> None:
    one, other = (
        write(tmp_path / name, make_records(40, seed=seed), shares=shares)
        for seed, (name, shares) in enumerate([("one", "100/0/0"), ("other", "0/0/100")])
    )
    shutil.copytree(other.folder / "test", one.folder / "test", dirs_exist_ok=True)
    splits = {**one.manifest.splits, "test": other.manifest.splits["test"]}
    dataclasses.replace(one.manifest, splits=splits).save(one.folder)
    damages = "\n".join(verify(one.folder).damages)
    assert "is given to 2 sequences records" in damages
    assert "is given to 2 graphs records" in damages
    assert "20 groups are in train and in test, the first 'group-" in damages


def test_halves_that_disagree_are_named(copied: dp.Dataset) -> None:
    def swap(arrays: dict[str, Any]) -> None:
        labels = arrays["labels"]
        one, zero = int(np.argmax(labels == 1)), int(np.argmax(labels == 0))
        labels[[one, zero]] = labels[[zero, one]]  # the manifest's counts stay right

    path = forge(copied, "sequences", swap)
    (line,) = verify(copied.folder).damages
    assert line.startswith(f"{path}, labels: 2 records have another label as graphs, the first 'record-")


def test_no_data_set_exits_2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for root in (tmp_path, tmp_path / "missing"):
        assert call(monkeypatch, "verify", root) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_an_edited_manifest_exits_2(
    copied: dp.Dataset, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = copied.folder / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b'"train"', b'"trein"'))
    assert call(monkeypatch, "verify", copied.folder) == 2
    assert "does not have the digest" in capsys.readouterr().err


def test_inspect_says_what_is_there(
    data: dp.Dataset, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert call(monkeypatch, "inspect", data.root, "--json", "--plot", tmp_path / "out.png") == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert err == ""
    records = make_records(300)
    assert sum(found["splits"][split]["graphs"] for split in data.splits) == 300
    assert sum(sum(counts.values()) for counts in found["labels"].values()) == 300
    steps = [len(record.sequence) for record in records]
    distribution = found["distributions"]["steps"]
    assert (distribution["least"], distribution["greatest"]) == (min(steps), max(steps))
    assert distribution["median"] == np.median(steps)
    counts, _ = np.histogram(steps, distribution["edges"])
    assert distribution["counts"] == counts.tolist()
    edges = np.concatenate([record.graphs.edge_counts for record in records])
    assert sum(found["distributions"]["edges a graph"]["counts"]) == len(edges)
    assert found["distributions"]["edges a graph"]["mean"] == pytest.approx(edges.mean())
    by_id = {record.id: record for record in records}
    for one in found["sample"]["sequences"]:
        assert one["first_row"] == by_id[one["id"]].sequence[0, :6].astype(float).tolist()
    for one in found["sample"]["graphs"]:
        assert one["nodes"] == by_id[one["id"]].graphs.node_counts.sum()
        assert one["edges"] == by_id[one["id"]].graphs.edge_counts.sum()
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    assert call(monkeypatch, "inspect", data.root) == 0
    out, _ = capsys.readouterr()
    for words in ("sequences and graphs", "train", "steps", "nodes a graph", "label"):
        assert words in out


def test_inspect_of_one_kind_and_of_no_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    schema = dp.Schema(sequence=dp.Field(dtype="int16"))
    with dp.ShardWriter(tmp_path / "set", schema, split=dp.SplitRule.parse("0/0/100")) as writer:
        writer.write({"id": "[one]", "label": 3, "sequence": np.arange(5)})
    assert call(monkeypatch, "inspect", tmp_path / "set", "--plot", tmp_path / "out.png") == 0
    assert "'[one]': label 3, 5 steps" in capsys.readouterr().out
    assert verify(tmp_path / "set").damages == []
    assert call(monkeypatch, "inspect", tmp_path) == 2


def test_inspect_of_a_kind_without_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    schema = dp.Schema(sequence=dp.Field(dtype="float16"), x=dp.Field(dtype="float16", shape=(2,)))
    with dp.ShardWriter(tmp_path / "[red]set", schema) as writer:
        writer.write({"id": "a", "label": 0, "sequence": [1.0]})
    assert call(monkeypatch, "inspect", tmp_path / "[red]set", "--plot", tmp_path / "out.png") == 0
    assert call(monkeypatch, "inspect", tmp_path / "[red]set", "--plot", tmp_path / "missing" / "out.png") == 2
    assert call(monkeypatch, "inspect", tmp_path / "[red]set", "--plot", tmp_path / "out") == 2
    assert call(monkeypatch, "inspect", tmp_path / "[red]set", "--plot", tmp_path / "out.xyz") == 2


def test_a_forgery_that_changes_nothing_gives_the_same_bytes(copied: dp.Dataset) -> None:
    """The forgeries above are what they claim: nothing but the content is wrong."""
    before = {path: path.read_bytes() for path in copied.folder.rglob("*.*")}
    for kind in copied.schema.kinds:
        forge(copied, kind, lambda arrays: None)
    assert {path: path.read_bytes() for path in copied.folder.rglob("*.*")} == before
