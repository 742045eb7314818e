"""Object stores: the same batches as from a folder, whatever the store does; a cache that is bounded, shared and checked."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pytest

import dali_pipeline as dp
from dali_pipeline.dataset.dataset import Dataset
from dali_pipeline.errors import PipelineError
from dali_pipeline.ingest.upload import upload
from dali_pipeline.reading.readahead import ReadAhead
from dali_pipeline.storage import cache as cache_module
from dali_pipeline.storage import stores
from dali_pipeline.storage.cache import FIRST_STAMP, locked_slots, map_slots
from dali_pipeline.storage.cachedfile import CachedFile, RemotePath
from dali_pipeline.storage.files import Files
from dali_pipeline.tools.verify import verify
from tests.helpers.batches import fingerprint
from tests.helpers.stores import Proxy, s3

WIDTH = 1024
WINDOW = 2 << 20
ROOM = 24 << 20
KEY = "AKIDSECRET"


@pytest.fixture(scope="module")
def server() -> Iterator[Proxy]:
    with s3() as proxy:
        variables = {
            "AWS_ENDPOINT_URL": proxy.url, "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": "hush",
        }  # fmt: skip
        with pytest.MonkeyPatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            boto3.client("s3").create_bucket(Bucket="bucket")
            yield proxy


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """400 records of [33, 1024] float16, 66 KiB each, 27 MB in shards of 8 MiB, by layer."""
    from dali_pipeline.format.layout import ByLayer

    layout = ByLayer.of(33, 2 * WIDTH)
    schema = dp.Schema(sequence=dp.Field(dtype="float16", shape=(WIDTH,), by_layer=layout), step_axis="layer")
    rng = np.random.default_rng(0)
    root = tmp_path_factory.mktemp("local") / "set"
    with dp.ShardWriter(root, schema, split=dp.SplitRule.parse("100/0/0"), shard_bytes=8 << 20) as writer:
        for number in range(400):
            writer.write(
                {"id": number, "label": number % 2, "sequence": rng.random((33, WIDTH), np.float32).astype(np.float16)}
            )
    return dp.open_dataset(root)


@pytest.fixture(scope="module")
def url(server: Proxy, local: Dataset) -> str:
    upload(local.folder, "s3://bucket/set")
    return "s3://bucket/set"


@pytest.fixture(autouse=True)
def calm(server: Proxy, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(stores, "FIRST_WAIT_SECONDS", 0.001)
    monkeypatch.setattr(cache_module, "WAIT_SECONDS", 5.0)
    server.seen.clear()
    yield
    server.fault = lambda request: None


def epoch(data: Dataset, **options: Any) -> list[tuple[list[str], float]]:
    loader = dp.SequenceLoader(data, batch_size=16, window_bytes=WINDOW, engine="torch", num_workers=0, **options)
    found = [(batch.ids, float(batch.sequences.double().sum())) for _ in range(2) for batch in loader]
    loader.check_digest(loader.digest)
    return found


def on_disk(folder: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())


def asked_bytes(server: Proxy) -> int:
    spans = [request.span.removeprefix("bytes=").split("-") for request in server.seen if request.span.startswith("bytes=")]
    return sum(int(end) - int(begin) + 1 for begin, end in spans)


def test_batches_are_those_of_a_folder_and_nothing_is_fetched_twice(
    server: Proxy, local: Dataset, url: str, tmp_path: Path
) -> None:
    data = dp.open_dataset(url, cache_dir=tmp_path, cache_bytes=10**9)
    assert data.digest == local.digest
    assert epoch(data) == epoch(local)  # two epochs
    spans = [(request.path, request.span) for request in server.seen]
    assert len(spans) == len(set(spans)) > 5
    assert asked_bytes(server) < 1.05 * local.nbytes
    server.seen.clear()
    assert epoch(dp.open_dataset(url, cache_dir=tmp_path, cache_bytes=10**9)) == epoch(local)
    assert not server.seen, "another run takes what is there"


def test_a_small_cache_stays_small(server: Proxy, local: Dataset, url: str, tmp_path: Path) -> None:
    data = dp.open_dataset(url, cache_dir=tmp_path, cache_bytes=ROOM)
    loader = dp.SequenceLoader(data, batch_size=16, window_bytes=WINDOW, engine="torch", num_workers=0)
    largest = 0
    for _ in loader:
        assert isinstance(data.root, RemotePath)
        largest = max(largest, on_disk(tmp_path), data.root.cache.used)
    assert loader.check_digest(loader.digest).endswith("each once")
    assert local.nbytes > ROOM >= largest > ROOM // 2
    with pytest.raises(dp.UsageError, match="cache_bytes is 1048576; a window of 2097152 bytes needs"):
        epoch(dp.open_dataset(url, cache_dir=tmp_path / "b", cache_bytes=1 << 20))


def test_layers_fetch_their_blocks_alone(server: Proxy, local: Dataset, url: str, tmp_path: Path) -> None:
    data = dp.open_dataset(url, cache_dir=tmp_path, cache_bytes=10**9)
    assert epoch(data, layers=[8]) == epoch(local, layers=[8])
    assert asked_bytes(server) < local.nbytes / 3  # blocks hold four layers of so few records


@pytest.mark.parametrize(
    ("window", "nbytes", "groups"), [(32 << 20, 10**9, 6), (2 << 20, 10**9, 64), (2 << 20, ROOM, 6), (8 << 20, 32 << 20, 2)]
)
def test_reading_is_ahead_of_what_is_gathered(url: str, tmp_path: Path, window: int, nbytes: int, groups: int) -> None:
    """A window and 64 MiB in groups of half a window, of a small cache a quarter; two groups at least."""
    data = dp.open_dataset(url, cache_dir=tmp_path, cache_bytes=nbytes)
    loader = dp.SequenceLoader(data, batch_size=16, window_bytes=window, engine="torch", num_workers=0)
    assert ReadAhead(loader._source, loader.plan(0), dp.World())._groups == groups


def test_reading_ahead_leaves_a_block_to_who_has_it_in_hand(server: Proxy, url: str, tmp_path: Path) -> None:
    data = dp.open_dataset(url, cache_dir=tmp_path, cache_bytes=10**9)
    shard = data.table("train", "sequences").open(data.shard_path("train", "sequences", 0), 0, Files(2))
    file, pieces = shard.opened(), list(shard.pieces("sequence"))[:3]
    stamps = file.stamps
    assert isinstance(file, CachedFile)
    assert stamps is not None
    server.seen.clear()
    with locked_slots(Path(file.path), pieces[1].slot, 1):
        assert file.prefetch(pieces, wait=False)
        assert [stamps[piece.slot - 1] >= FIRST_STAMP for piece in pieces] == [True, False, True]
    assert len(server.seen) == 2
    assert file.prefetch(pieces)
    assert not file.prefetch(pieces)
    assert len(server.seen) == 3


@pytest.mark.parametrize("fault", ["500", "cut", "spoil"])
def test_faults_are_asked_again(server: Proxy, local: Dataset, url: str, tmp_path: Path, fault: str) -> None:
    server.fault = lambda request: fault if request.number % 4 == 1 else None
    assert epoch(dp.open_dataset(url, cache_dir=tmp_path, cache_bytes=10**9)) == epoch(local)
    assert len(server.seen) > 8


def test_what_stays_damaged_is_named_and_not_kept(server: Proxy, url: str, tmp_path: Path) -> None:
    server.fault = lambda request: "spoil" if "00001.safetensors" in request.path else None
    with pytest.raises(dp.FormatError, match=r"s3://bucket/set/train/sequences-00001.safetensors.*(digest|damaged)") as caught:
        epoch(dp.open_dataset(url, cache_dir=tmp_path, cache_bytes=10**9))
    assert KEY not in str(caught.value)


def test_a_cache_spoilt_on_its_disk_is_mended(local: Dataset, url: str, tmp_path: Path) -> None:
    assert epoch(dp.open_dataset(url, cache_dir=tmp_path, cache_bytes=10**9)) == epoch(local)
    for path in tmp_path.glob("??/*"):
        slots = map_slots(path)
        with path.open("r+b") as file:
            for slot in slots:
                file.seek(int(slot["begin"]) + int(slot["nbytes"]) // 2)
                file.write(b"spoilt")
    assert epoch(dp.open_dataset(url, cache_dir=tmp_path, cache_bytes=10**9)) == epoch(local)


def _read(url: str, folder: Path, nbytes: int, answers: Any) -> None:
    stores.FIRST_WAIT_SECONDS = 0.001
    answers.put(epoch(dp.open_dataset(url, cache_dir=folder, cache_bytes=nbytes)))
    answers.close()
    answers.join_thread()
    os._exit(0)


@pytest.mark.parametrize("nbytes", [10**9, 2 * ROOM // 3 * 2])
def test_processes_share_a_cache(server: Proxy, local: Dataset, url: str, tmp_path: Path, nbytes: int) -> None:
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    children = [context.Process(target=_read, args=(url, tmp_path, nbytes, answers)) for _ in range(2)]
    for child in children:
        child.start()
    expected = epoch(local)
    assert [answers.get(timeout=60) for _ in children] == [expected, expected]
    for child in children:
        child.join()
    if nbytes == 10**9:
        spans = [(request.path, request.span) for request in server.seen]
        assert asked_bytes(server) < 1.1 * local.nbytes, sorted(spans)


@pytest.mark.slow
def test_a_killed_run_leaves_a_cache_that_serves(server: Proxy, local: Dataset, url: str, tmp_path: Path) -> None:
    code = """
import os, sys, dali_pipeline as dp
data = dp.open_dataset(sys.argv[1], cache_dir=sys.argv[2], cache_bytes=int(sys.argv[3]))
loader = dp.SequenceLoader(data, batch_size=16, window_bytes=2 << 20, engine="torch", num_workers=0)
for step, batch in enumerate(loader):
    if step == 3: os.kill(os.getpid(), 9)  # while reads ahead are under way
"""
    server.delay = 0.02
    try:
        done = subprocess.run([sys.executable, "-c", code, url, str(tmp_path), str(ROOM)], check=False)
    finally:
        server.delay = 0.0
    assert done.returncode == -9
    assert epoch(dp.open_dataset(url, cache_dir=tmp_path, cache_bytes=ROOM)) == epoch(local)
    assert on_disk(tmp_path) <= ROOM


def test_a_url_is_verified_and_a_half_upload_is_no_data_set(
    server: Proxy, local: Dataset, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = verify(url)
    assert report.damages == []
    assert report.records == 400
    monkeypatch.setattr(stores.Store, "put", _fails_at(stores.Store.put, 2))
    with pytest.raises(RuntimeError):
        upload(local.folder, "s3://bucket/half")
    monkeypatch.undo()
    with pytest.raises(dp.FormatError, match=r"s3://bucket/half has no manifest.json.*half uploaded"):
        dp.open_dataset("s3://bucket/half", cache_dir=local.folder.parent / "cache")
    client = boto3.client("s3")
    upload(local.folder, "s3://bucket/half")
    assert verify("s3://bucket/half", quick=True).damages == []
    key = "half/train/sequences-00000.safetensors"
    body = bytearray(client.get_object(Bucket="bucket", Key=key)["Body"].read())
    body[len(body) // 2] ^= 1
    client.put_object(Bucket="bucket", Key=key, Body=bytes(body))
    client.put_object(Bucket="bucket", Key="half/train/stranger.safetensors", Body=b"")
    damages = verify("s3://bucket/half").damages
    assert len(damages) == 2
    assert "s3://bucket/half/train/sequences-00000.safetensors, sequence" in damages[0]
    assert "stranger" in damages[1]
    client.delete_object(Bucket="bucket", Key=key)
    with pytest.raises(dp.FormatError, match=r"sequences-00000.safetensors is not there; the manifest names it"):
        epoch(dp.open_dataset("s3://bucket/half", cache_dir=local.folder.parent / "other"))


def _fails_at(put: Any, number: int) -> Any:
    count = iter(range(100))

    def fails(self: Any, source: Path, key: str) -> None:
        if next(count) >= number:
            raise RuntimeError
        put(self, source, key)

    return fails


def test_what_is_wrong_is_one_sentence_without_secrets(
    server: Proxy, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def said(url: str) -> str:
        with pytest.raises(PipelineError) as caught:
            dp.open_dataset(url, cache_dir=tmp_path)
        text = str(caught.value)
        assert not {"hush", KEY, "sig=", "user:pw"} & set(text.replace("?", " ").replace("@", " ").split())
        assert "hush" not in text
        assert "\n" not in text
        return text

    assert "no such bucket" in said("s3://nobody/set")
    assert "http://127.0.0.1:1/set" in said("http://user:pw@127.0.0.1:1/set?sig=hush")
    assert "no kind of URL" in said("nothing://bucket/set")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    assert "no credentials" in said(url)


def test_a_full_disk_is_said(local: Dataset, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, data: Any, at: int) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(dp.DataError, match=r"the disk of the cache .* is full"):
        epoch(dp.open_dataset(url, cache_dir=tmp_path))


@pytest.mark.parametrize(
    "options", [pytest.param({"num_workers": 2}, marks=pytest.mark.slow), {"num_workers": 0, "max_nodes": 60}]
)
def test_graphs_come_from_a_url_too(server: Proxy, data: Dataset, tmp_path: Path, options: dict[str, Any]) -> None:
    """Worker processes, which fork, connect anew."""
    upload(data.folder, "s3://bucket/graphs")
    far = dp.open_dataset("s3://bucket/graphs", cache_dir=tmp_path / "cache", cache_bytes=1 << 30)
    ours, theirs = (dp.GraphLoader(one, batch_size=16, window_bytes=6000, **options) for one in (far, data))
    for _ in range(2):
        assert fingerprint(ours) == fingerprint(theirs)
