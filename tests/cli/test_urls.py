"""Data sets named by URL at the command line: every command says what it says of the folder."""

from __future__ import annotations

import csv
import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

import dali_pipeline as dp
import predict as predict_module
import train as train_module
from benchmarks import link
from dali_pipeline.cli.app import app, run
from dali_pipeline.ingest.upload import upload
from tests.helpers.batches import fingerprint
from tests.helpers.records import make_records, write

URL = "memory://commands/set"


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dp.Dataset]:
    data = write(tmp_path_factory.mktemp("urls") / "set", make_records(120))
    upload(data.folder, URL)
    yield data
    fsspec.filesystem("memory").rm("commands", recursive=True)


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test fills the user's own cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))


def call(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    return run({"train.py": train_module.app, "predict.py": predict_module.app}.get(name, app), name)


def both(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], local: dp.Dataset, cache: Path, *arguments: str
) -> list[Any]:
    """What a command prints as JSON, of the folder and of the URL."""
    found = []
    for where in ([str(local.root)], [URL, "--cache-dir", str(cache), "--cache-bytes", "64MiB"]):
        code = call(monkeypatch, "dali_pipeline", arguments[0], *where, *arguments[1:])
        out, err = capsys.readouterr()
        assert code in (0, 1), err
        found.append(json.loads(out))
    assert [one.pop("root") for one in found] == [str(local.root), URL]
    assert any(cache.iterdir()), "the cache that was named is used"
    return found


def test_inspect(
    local: dp.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ours, theirs = both(monkeypatch, capsys, local, tmp_path / "cache", "inspect", "--json", "--plot", str(tmp_path / "a.png"))
    assert ours == theirs
    ours, theirs = both(monkeypatch, capsys, local, tmp_path / "cache", "inspect", "--json", "--shuffle", "--window", "8KiB")
    assert ours == theirs
    assert ours["shuffle"]


def test_doctor(local: dp.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["doctor", "--json", "--seconds", "0.01", "--engine", "torch", "--device", "cpu"]
    ours, theirs = both(monkeypatch, capsys, local, tmp_path / "cache", *options)
    assert list(ours["stages"]) == ["disk", "page cache", "gather", "decode"]
    assert list(theirs["stages"]) == ["store", "gather", "decode"]
    assert theirs["stages"]["store"]["records_per_second"] > 0
    assert not theirs["stages"]["store"]["counted"], "the cache holds all of it"


def test_train_and_predict(
    local: dp.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def rows(path: Path) -> list[dict[str, str]]:
        with path.open() as file:
            return sorted(csv.DictReader(file), key=lambda row: row["id"])

    cache = ["--cache-dir", str(tmp_path / "cache"), "--cache-bytes", "64MiB"]
    options = ["--model", "lstm", "--epochs", "1", "--batch-size", "8", "--device", "cpu", "--num-workers", "0"]
    losses, scores = [], []
    for name, where in (("folder", [str(local.root)]), ("url", [URL, *cache])):
        output = tmp_path / name
        assert call(monkeypatch, "train.py", "--data", *where, "--output-dir", output, *options) == 0, capsys.readouterr().err
        losses.append((output / "history.csv").read_text().splitlines()[1].split(",")[:4])
        checkpoint = ["--checkpoint", output / "lstm-best.pt", "--output", output / "scores.csv", "--device", "cpu"]
        assert call(monkeypatch, "predict.py", "--data", *where, *checkpoint) == 0, capsys.readouterr().err
        scores.append(rows(output / "scores.csv"))
    assert losses[0] == losses[1]
    assert scores[0] == scores[1]
    assert len(scores[0]) == 120


def test_a_cache_that_cannot_be_is_one_sentence(
    local: dp.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    for options, words in (
        (["--cache-dir", str(tmp_path / "file")], "cannot be a cache"),
        (["--cache-bytes", "much"], "size is 'much'"),
    ):
        assert call(monkeypatch, "dali_pipeline", "inspect", URL, *options) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert words in err


def test_over_plain_http(local: dp.Dataset, tmp_path: Path) -> None:
    server = link.Server(local.folder.parent, bytes_per_second=1e9, delay=0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://user:secret@127.0.0.1:{server.server_address[1]}/any/{local.root.name}"
        data = dp.open_dataset(url, cache_dir=tmp_path / "cache", cache_bytes=64 << 20)
        assert fingerprint(dp.SequenceLoader(data)) == fingerprint(dp.SequenceLoader(local))
        assert fingerprint(dp.GraphLoader(data)) == fingerprint(dp.GraphLoader(local))
        assert "secret" not in str(data.root)
        with pytest.raises(dp.FormatError, match=r"nowhere has no manifest\.json") as error:
            dp.open_dataset(f"{url}/nowhere", cache_dir=tmp_path / "cache")
        assert "secret" not in str(error.value)
    finally:
        server.shutdown()
        server.server_close()
