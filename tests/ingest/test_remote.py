"""`convert` of raw files in a store: the bytes of a local conversion, two files a worker on the disk, errors in words."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from safetensors.numpy import save_file

import dali_pipeline as dp
from dali_pipeline.cli.app import app, run
from dali_pipeline.ingest import remote, sources
from dali_pipeline.ingest.config import ConvertConfig
from dali_pipeline.ingest.convert import convert, convert_to
from dali_pipeline.ingest.layouts.recipe import Recipe
from dali_pipeline.storage import stores
from tests.helpers.folders import make_folder

URL = "memory://raw/src"


@pytest.fixture(autouse=True)
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(stores, "FIRST_WAIT_SECONDS", 0.001)
    files = fsspec.filesystem("memory")
    yield files
    if files.exists("raw"):
        files.rm("raw", recursive=True)


def put(memory: Any, src: Path) -> None:
    for path in src.rglob("*"):
        if path.is_file():
            memory.pipe_file(f"raw/src/{path.relative_to(src).as_posix()}", path.read_bytes())


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def downloads(tmp_path: Path) -> list[Path]:
    found = (tmp_path / "home" / "dali_pipeline" / "downloads").rglob("*")
    return [path for path in found if path.is_file() and path.name != "lock"]


def npz_folder(root: Path, files: int = 7) -> Path:
    root.mkdir()
    for number in range(files):
        values = np.random.default_rng(number).random((6, 3, 4)).astype(np.float16)
        np.savez(root / f"part_{number}.npz", sequences=values, labels=np.arange(6) % 2)
    return root


def test_the_same_bytes_and_two_files_a_worker(tmp_path: Path, memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process: fsspec's memory is not seen by others."""
    src = npz_folder(tmp_path / "src")
    put(memory, src)
    monkeypatch.setattr(sources, "CHUNK_BYTES", 3 * (src / "part_0.npz").stat().st_size)
    removed = remote._remove

    def counting(path: Path, process: int) -> None:
        own = [each for each in downloads(tmp_path) if f"/{process}/" in str(each)]  # of this process
        (tmp_path / f"had-{len(own)}").touch()  # a file, for a worker tells nothing else
        removed(path, process)

    monkeypatch.setattr(remote, "_remove", counting)
    config = ConvertConfig(num_workers=1, shard_bytes=1 << 10)
    data = convert_to(URL, str(tmp_path / "theirs"), config)
    convert(src, tmp_path / "ours", config)
    assert content(tmp_path / "theirs") == content(tmp_path / "ours")
    assert data.num_records("train", "sequences") > 0
    assert {path.name for path in tmp_path.glob("had-*")} <= {"had-1", "had-2"}  # a worker may be quicker than its next file
    assert downloads(tmp_path) == []


def test_folders_of_both_halves_and_files_left_out(tmp_path: Path, memory: Any) -> None:
    src = make_folder(tmp_path / "src")
    (src / "gnn" / "batch_1.pt").write_bytes(b"no zip")
    put(memory, src)
    with pytest.raises(dp.FormatError, match=rf"^{URL}/gnn/batch_1.pt cannot be read") as caught:
        convert_to(URL, str(tmp_path / "none"), ConvertConfig(num_workers=1))
    assert "home" not in str(caught.value)
    assert not (tmp_path / "none" / "manifest.json").exists()
    for where, dst in ((URL, "theirs"), (str(src), "ours")):
        convert_to(where, str(tmp_path / dst), ConvertConfig(num_workers=1, skip_bad=True, dtype="sequence=int8"))
    assert content(tmp_path / "theirs") == content(tmp_path / "ours")
    assert dp.open_dataset(tmp_path / "theirs").manifest.source["left_out"]


def test_a_file_that_changes_meanwhile_is_named(tmp_path: Path, memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    put(memory, npz_folder(tmp_path / "src"))
    get, calls = remote.Remote._get, []

    def changing(self: Any, name: str) -> Any:
        calls.append(name)
        if len(calls) == 9:  # of the second pass
            memory.pipe_file(f"raw/src/{name}", memory.cat_file(f"raw/src/{name}"))  # the same bytes at another time
        return get(self, name)

    monkeypatch.setattr(remote.Remote, "_get", changing)
    with pytest.raises(dp.FormatError, match=rf"{URL}/part_\d.npz changed while it was converted; convert again"):
        convert_to(URL, str(tmp_path / "dst"), ConvertConfig(num_workers=1))
    assert not (tmp_path / "dst" / "manifest.json").exists()


def test_a_file_that_is_gone_meanwhile_is_named(tmp_path: Path, memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    put(memory, npz_folder(tmp_path / "src"))
    listed = stores.Store.listed

    def then_gone(self: Any) -> Any:
        found = listed(self)
        memory.rm("raw/src/part_3.npz")
        return found

    monkeypatch.setattr(stores.Store, "listed", then_gone)
    with pytest.raises(dp.FormatError, match=rf"{URL}/part_3.npz is gone since it was listed"):
        convert_to(URL, str(tmp_path / "dst"), ConvertConfig(num_workers=1))


def test_a_disk_that_fills_is_said(tmp_path: Path, memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    put(memory, npz_folder(tmp_path / "src"))
    real: Any = Path.open

    def full(self: Path, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        return real(Path("/dev/full") if mode == "wb" and "downloads" in self.parts else self, mode, *arguments, **options)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(dp.DataError, match=r"downloads/\w+ cannot take part_0.npz \(No space left on device\); free"):
        convert_to(URL, str(tmp_path / "dst"), ConvertConfig(num_workers=1))
    assert downloads(tmp_path) == []


def test_an_interrupted_run_goes_on(tmp_path: Path, memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    src = npz_folder(tmp_path / "src")
    put(memory, src)
    monkeypatch.setattr(sources, "CHUNK_BYTES", 1)
    config, get, opened = ConvertConfig(num_workers=1, shard_bytes=1 << 10), remote.Remote._get, []

    def counted(self: Any, name: str) -> Any:
        opened.append(name)
        if len(opened) == 12:
            raise KeyboardInterrupt
        return get(self, name)

    monkeypatch.setattr(remote.Remote, "_get", counted)
    with pytest.raises(KeyboardInterrupt):
        convert_to(URL, str(tmp_path / "theirs"), config)
    assert downloads(tmp_path) == []
    convert_to(URL, str(tmp_path / "theirs"), config)
    assert len(opened) == 12 + 12, "names of 7, the schema's, and values of 4: 3 were final"
    convert(src, tmp_path / "ours", config)
    assert content(tmp_path / "theirs") == content(tmp_path / "ours")


def test_what_cannot_be_converted_is_one_sentence(
    tmp_path: Path, memory: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def said() -> str:
        monkeypatch.setattr(sys, "argv", ["dali_pipeline", "convert", URL, str(tmp_path / "dst")])
        assert run(app, "dali_pipeline") == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert "home" not in err
        return err

    assert f"{URL} holds no objects" in said()
    memory.pipe_file("raw/src/notes.txt", b"x")
    assert f"{URL} holds no lstm_solo" in said()
    memory.pipe_file("raw/src/manifest.json", b"{}")
    assert f"{URL} is a data set, not raw files" in said()
    memory.rm("raw/src/manifest.json")
    for name in ("/raw/src/../../up.npz", "/raw/src/a//b.npz"):
        memory.store[name] = memory.store["/raw/src/notes.txt"]
        assert "which no file can have" in said()
        del memory.store[name]


def test_layouts_and_keys_in_a_store(tmp_path: Path, memory: Any, caplog: pytest.LogCaptureFixture) -> None:
    """What is recognised, and what flags name, is fetched file by file: the same bytes as from a folder."""
    src = tmp_path / "src"
    src.mkdir()
    for number in range(5):
        states = np.random.default_rng(number).random((2 + number, 3, 4)).astype(np.float32)
        save_file({"hidden_states": states, "token_ids": np.arange(2 + number)}, src / f"hs_{number}.safetensors")
    put(memory, src)
    there = convert_to(URL, str(tmp_path / "there"), ConvertConfig(num_workers=1))
    here = convert(src, tmp_path / "here", ConvertConfig(num_workers=1))
    assert there.digest != ""
    assert [here.table(split, "sequences").digests for split in here.splits] == [
        there.table(split, "sequences").digests for split in there.splits
    ]
    for path in src.iterdir():
        path.unlink()
    memory.rm("raw", recursive=True)
    for number in range(5):
        np.savez(src / f"w_{number}.npz", X=np.full((2, 6), number, np.float32), y=number % 2)
    put(memory, src)
    keys = Recipe(sequence="X", label="y", axes=("channel", "time"))
    data = convert_to(URL, str(tmp_path / "keys"), ConvertConfig(num_workers=1, recipe=keys))
    assert (
        data.num_records("train", "sequences") + data.num_records("val", "sequences") + data.num_records("test", "sequences")
        == 5
    )
    assert data.record("train", 0).sequence.shape == (6, 2)
    with pytest.raises(dp.UsageError, match=rf"{URL} has no key and no file called 'Z'"):
        convert_to(URL, str(tmp_path / "none"), ConvertConfig(num_workers=1, recipe=Recipe(sequence="Z")))
    memory.rm("raw", recursive=True)
    np.save(src / "x.npy", np.ones((4, 2, 3)))
    np.save(src / "y.npy", np.arange(4) % 2)
    put(memory, src)
    memory.rm("raw/src/w_0.npz")
    with pytest.raises(dp.FormatError, match=r"x\.npy is read with y\.npy; expected files that are here: copy them first"):
        convert_to(URL, str(tmp_path / "two"), ConvertConfig(num_workers=1, recipe=Recipe(sequence="x", label="y")))
    assert downloads(tmp_path) == []
