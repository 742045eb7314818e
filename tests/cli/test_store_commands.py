"""`convert`, `verify` and `inspect` against a real S3 API: end to end, interrupted, and refused in one sentence."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest

import dali_pipeline as dp
from dali_pipeline.cli.app import app, run
from dali_pipeline.ingest import upload as upload_module
from dali_pipeline.storage import stores
from tests.helpers.batches import fingerprint
from tests.helpers.folders import make_folder
from tests.helpers.stores import Proxy, s3

KEY, SECRET = "AKIDSECRET", "hush"
SET, RAW = "s3://bucket/set", "s3://bucket/raw"
OPTIONS = ["--num-workers", "1", "--shard-size", "2KiB", "--split", "60/20/20"]


@pytest.fixture(scope="module")
def server() -> Iterator[Proxy]:
    with s3() as proxy:
        yield proxy


@pytest.fixture(autouse=True)
def _environment(server: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, value in {
        "AWS_ENDPOINT_URL": server.url, "AWS_DEFAULT_REGION": "us-east-1", "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_EC2_METADATA_DISABLED": "true", "XDG_CACHE_HOME": str(tmp_path / "home"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none"), "AWS_CONFIG_FILE": str(tmp_path / "none"),
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(stores, "FIRST_WAIT_SECONDS", 0.001)
    yield
    server.refuses = False


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["dali_pipeline", *map(str, arguments)])
    return run(app, "dali_pipeline")


def keys(prefix: str) -> list[str]:
    found = boto3.client("s3").list_objects_v2(Bucket="bucket", Prefix=prefix).get("Contents", [])
    return [one["Key"].removeprefix(prefix) for one in found]


def test_convert_from_and_to_a_store(
    server: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    client = boto3.client("s3")
    client.create_bucket(Bucket="bucket")
    src = make_folder(tmp_path / "src")
    for path in (each for each in src.rglob("*") if each.is_file()):
        client.upload_file(str(path), "bucket", f"raw/{path.relative_to(src).as_posix()}")
    assert call(monkeypatch, "convert", src, tmp_path / "local", *OPTIONS) == 0
    local = dp.open_dataset(tmp_path / "local")

    monkeypatch.setattr(upload_module, "UPLOADS_IN_FLIGHT", 1)  # so that it is known what was sent
    put: Any = stores.Store.put
    order: list[str] = []

    def stopped(self: Any, source: Path, key: str) -> None:
        if len(order) == 3:
            raise KeyboardInterrupt
        put(self, source, key)
        order.append(key)

    with monkeypatch.context() as patch:
        patch.setattr(stores.Store, "put", stopped)
        assert call(monkeypatch, "convert", src, SET, *OPTIONS) == 130
    _, err = capsys.readouterr()
    assert "the same command goes on" in err
    assert sorted(keys("set/")) == sorted(order)
    assert len(order) == 3
    with pytest.raises(dp.FormatError, match=r"s3://bucket/set has no manifest.json.*half uploaded"):
        dp.open_dataset(SET)
    assert call(monkeypatch, "verify", SET) == 2
    capsys.readouterr()

    before = list(order)

    def noted(self: Any, source: Path, key: str) -> None:
        put(self, source, key)
        order.append(key)

    monkeypatch.setattr(stores.Store, "put", noted)
    assert call(monkeypatch, "convert", src, SET, *OPTIONS) == 0
    assert order[-1] == "manifest.json"
    assert not set(before) & set(order[3:]), "what was there is not sent again"
    assert sorted(keys("set/")) == sorted(path.relative_to(local.folder).as_posix() for path in local.folder.rglob("*.*"))
    far = dp.open_dataset(SET, cache_dir=tmp_path / "cache", cache_bytes=64 << 20)
    assert far.digest == local.digest
    ours, theirs = (
        dp.SequenceLoader(one, batch_size=4, window_bytes=4096, engine="torch", num_workers=0) for one in (far, local)
    )
    assert fingerprint(ours) == fingerprint(theirs)
    assert call(monkeypatch, "verify", SET) == 0
    assert "sound" in capsys.readouterr().out

    assert call(monkeypatch, "convert", RAW, "s3://bucket/other", *OPTIONS) == 0
    assert dp.open_dataset("s3://bucket/other").digest == local.digest
    before_change = stores.Store(RAW).listed()
    nbytes, _ = before_change["gnn/batch_0.pt"]
    client.put_object(Bucket="bucket", Key="raw/gnn/batch_0.pt", Body=bytes(nbytes))  # as large, and within the second
    changed = {name for name, told in stores.Store(RAW).listed().items() if before_change[name] != told}
    assert changed == {"gnn/batch_0.pt"}
    assert not list((tmp_path / "home" / "dali_pipeline" / "uploads").glob("*"))


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("refused", "access was refused; check the credentials"),
        ("none", "no credentials were found"),
        ("unreachable", "cannot be reached or read"),
    ],
)
def test_a_store_that_does_not_do_is_one_sentence(
    server: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], how: str, words: str
) -> None:
    src = make_folder(tmp_path / "src")
    if how == "none":
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    elif how == "unreachable":
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    server.refuses = how == "refused"
    for arguments in (
        ["convert", src, SET],
        ["convert", RAW, tmp_path / "dst"],
        ["verify", SET],
        ["inspect", SET, "--cache-dir", tmp_path / "cache"],
    ):
        assert call(monkeypatch, *arguments) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1), err
        assert "s3://bucket/" in err
        assert words in err
        assert not [secret for secret in (KEY, SECRET) if secret in err]
    assert not (tmp_path / "dst").exists()
    assert not list((tmp_path / "home").rglob("*.safetensors")), "nothing was converted for a store that refuses"
