"""Input that must be refused by file and reason, while good data stay as they were."""

from __future__ import annotations

import errno
import gzip
import os
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import dali_pipeline as dp
from dali_pipeline.ingest.config import ConvertConfig
from dali_pipeline.ingest.convert import convert
from tests.hostile.foreign import CASES, FORMATS, build


def contents(root: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("form", "wrong"), CASES)
def test_a_bad_file_is_refused_by_name_and_nothing_is_left(tmp_path: Path, form: str, wrong: str) -> None:
    bad, words, ran = build(tmp_path / "src", form, wrong)
    before = contents(tmp_path)
    with pytest.raises(dp.PipelineError, match=words) as found:
        convert(tmp_path / "src", tmp_path / "dst", ConvertConfig(num_workers=1))
    assert str(bad) in str(found.value)
    assert "\n" not in str(found.value)
    assert not ran.exists()
    assert not (tmp_path / "dst").exists()
    assert contents(tmp_path) == before


@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize(("form", "wrong"), [case for case in CASES if not {"id", "name"} & set(case[1].split())])
def test_skip_bad_leaves_the_file_out_and_says_so(tmp_path: Path, form: str, wrong: str, num_workers: int) -> None:
    bad, words, ran = build(tmp_path / "src", form, wrong)
    data = convert(tmp_path / "src", tmp_path / "dst", ConvertConfig(num_workers=num_workers, skip_bad=True))
    good = tmp_path / "good"
    FORMATS[form].write(good / FORMATS[form].good, FORMATS[form].content(0))
    alone = convert(good, tmp_path / "alone")
    ((name, reason),) = data.manifest.source["left_out"].items()
    assert name == bad.relative_to(tmp_path / "src").as_posix()
    assert reason.startswith(name)  # no path of this machine is in the manifest
    assert re.search(words, reason)
    shards = {
        path.relative_to(data.folder): content for path, content in contents(data.folder).items() if path.suffix != ".json"
    }
    assert shards == {
        path.relative_to(alone.folder): content for path, content in contents(alone.folder).items() if path.suffix != ".json"
    }
    assert not ran.exists()


def test_files_without_permission_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    form = FORMATS["pt"]
    form.write(tmp_path / "src" / form.good, form.content(0))
    bad = tmp_path / "src" / form.bad
    form.write(bad, form.content(8))
    whole = os.open

    def refuses(path: Any, *arguments: Any, **named: Any) -> int:
        if Path(path) == bad:  # as root, no permission is ever missing
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return whole(path, *arguments, **named)

    monkeypatch.setattr(os, "open", refuses)
    with pytest.raises(dp.FormatError, match=r"batch_1.pt cannot be opened \(Permission denied\)"):
        convert(tmp_path / "src", tmp_path / "dst", ConvertConfig(num_workers=1))
    assert not (tmp_path / "dst").exists()


@pytest.mark.parametrize("after", [0, 1, 5])
def test_a_full_disk_is_said_and_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    form = FORMATS["gnn"]
    for first, name in ((0, form.good), (8, form.bad)):
        form.write(tmp_path / "src" / name, form.content(first))
    before = contents(tmp_path)
    whole, calls = os.pwrite, 0

    def fills(fd: int, data: Any, at: int) -> int:
        nonlocal calls
        calls += 1
        if calls > after:
            raise OSError(errno.ENOSPC, "No space left on device")
        return whole(fd, data, at)

    with monkeypatch.context() as full:
        full.setattr(os, "pwrite", fills)
        with pytest.raises(dp.PipelineError, match=r"could not be written \(No space left on device\)"):
            convert(tmp_path / "src", tmp_path / "dst", ConvertConfig(num_workers=1))
    assert contents(tmp_path) == before
    assert not (tmp_path / "dst").exists()
    assert convert(tmp_path / "src", tmp_path / "dst").num_records("train", "graphs")


def test_a_flipped_bit_in_a_gz_is_found(tmp_path: Path) -> None:
    form = FORMATS["gz"]
    form.write(tmp_path / "src" / form.good, form.content(0))
    path = tmp_path / "src" / form.bad
    with gzip.open(path, "wb", compresslevel=0) as file:
        pickle.dump(form.content(8), file)
    data = bytearray(path.read_bytes())
    data[data.index(np.asarray(form.content(8)[0]["hidden_states"][0]).tobytes()[:8]) + 3] ^= 1
    for content in (bytes(data), path.read_bytes()[:-8]):
        path.write_bytes(content)
        with pytest.raises(dp.FormatError, match=r"b\.pkl\.gz cannot be read"):
            convert(tmp_path / "src", tmp_path / "dst")


def test_offsets_that_lie_never_leave_the_memory(tmp_path: Path) -> None:
    table = pa.table({"label": [0, 1, 0], "sequence": [[1.0], [2.0, 3.0], [4.0]]})
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    content = (tmp_path / "a.arrow").read_bytes()
    offsets = np.array([0, 1, 3, 4], np.int32).tobytes()
    assert content.count(offsets) == 1
    for wrong in ([-(2**30), 1, 3, 4], [0, 3, 1, 4], [0, 1, 3, 2**30]):
        (tmp_path / "a.arrow").write_bytes(content.replace(offsets, np.array(wrong, np.int32).tobytes()))
        with pytest.raises(dp.FormatError, match=r"a\.arrow cannot be read as arrow"):
            convert(tmp_path, tmp_path / "dst")


def test_folders_named_as_files_and_links_that_lead_nowhere(tmp_path: Path) -> None:
    form = FORMATS["npz"]
    (tmp_path / "src" / "d.npz").mkdir(parents=True)
    form.write(tmp_path / "src" / "d.npz" / "a.npz", form.content(0))
    assert len(convert(tmp_path / "src", tmp_path / "dst").manifest.splits) == 3
    (tmp_path / "src" / "b.npz").symlink_to(tmp_path / "nowhere")
    with pytest.raises(dp.FormatError, match=r"b\.npz cannot be opened"):
        convert(tmp_path / "src", tmp_path / "other")
    data = convert(tmp_path / "src", tmp_path / "other", ConvertConfig(skip_bad=True))
    assert list(data.manifest.source["left_out"]) == ["b.npz"]
