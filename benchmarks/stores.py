"""Measure how much of a link to an object store a loader uses: `python -m benchmarks.stores`, two minutes, 1 GB of disk.

Records `[33, 1024]` float16 through s3fs, as a user has them, from a server that speaks S3's GetObject over loopback: 20 ms
before the first byte of every answer, and 100 MB/s for all of them together (benchmarks/link.py, a process of its own). The
reference is that link in the same run: the same objects in ranges of 4 MiB by a plain HTTP client, 16 connections, which keeps
nothing and checks nothing. Ours is the data set's bytes by the seconds of an epoch; bytes fetched twice, or that no record
needs, count for nothing. First epochs begin with an empty cache; with `layers=` the bytes are those of the chosen layers.
"""

from __future__ import annotations

import http.client
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import psutil
import torch
import typer

import dali_pipeline as dp
from benchmarks.harness import Results, alternately, seconds, shards
from dali_pipeline.cli.app import new_app, run
from dali_pipeline.format.layout import ByLayer

SHAPE, CHOSEN = (33, 1024), slice(12, 20)
CONNECTIONS, RANGE_BYTES, CACHE_BYTES = 16, 4 << 20, 4 << 30
ROOT = Path(__file__).parent.parent
LINK = "the link, a plain client"
FIRST, OPENED, SECOND = "first epoch", "opening the set and its first epoch", "second epoch, all of it in the cache"
FOLDER = "second epoch, from a folder"
app = new_app()


def made(folder: Path, megabytes: int, shard_bytes: int, *, by_layer: bool) -> dp.Dataset:
    """Write a data set of `megabytes` MB whose values repeat, which does not affect the loader."""
    field = dp.Field(dtype="float16", shape=SHAPE[1:])
    if by_layer:
        field = replace(field, by_layer=ByLayer.of(SHAPE[0], 2 * SHAPE[1]))
    values = np.random.default_rng(0).standard_normal((256, *SHAPE), np.float32).astype(np.float16)
    with dp.ShardWriter(
        folder, dp.Schema(sequence=field), split=dp.SplitRule.parse("100/0/0"), shard_bytes=shard_bytes
    ) as writer:
        for number in range(megabytes * 10**6 // values[0].nbytes):
            writer.write({"id": number, "label": number % 2, "sequence": values[number % len(values)]})
    return dp.open_dataset(folder)


@contextmanager
def serving(folder: Path, rate: float, delay: float) -> Iterator[psutil.Process]:
    """Serve a folder for the time of the block, and set the environment of S3 clients to the server."""
    command = [sys.executable, "-m", "benchmarks.link", str(folder), str(rate), str(delay)]
    names = {"AWS_ACCESS_KEY_ID": "none", "AWS_SECRET_ACCESS_KEY": "none", "AWS_DEFAULT_REGION": "us-east-1"}
    before = dict(os.environ)
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        os.environ |= names | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{int(process.stdout.readline())}"}
        try:
            yield psutil.Process(process.pid)
        finally:
            process.stdin.close()
            os.environ.clear()
            os.environ.update(before)


def plain(data: dp.Dataset) -> float:
    """Return the MB/s of the link: read every shard in ranges, several in flight, into reused memory."""
    address = os.environ["AWS_ENDPOINT_URL"].removeprefix("http://")
    ranges = [
        (f"/bucket/{data.folder.name}/{path.relative_to(data.folder).as_posix()}", begin, min(begin + RANGE_BYTES, nbytes))
        for path in shards(data)
        for nbytes in [path.stat().st_size]
        for begin in range(0, nbytes, RANGE_BYTES)
    ]
    left = iter(ranges)

    def fetch(_: int) -> None:
        connection, buffer = http.client.HTTPConnection(address), memoryview(bytearray(RANGE_BYTES))
        for path, begin, end in left:  # shared by the threads: a list's iterator is safe
            connection.request("GET", path, headers={"Range": f"bytes={begin}-{end - 1}"})
            answer, done = connection.getresponse(), 0
            while got := answer.readinto(buffer[done : end - begin]):
                done += got
            if (answer.status, done) != (206, end - begin):
                raise RuntimeError(f"{path}: {done} bytes of {end - begin} came, with status {answer.status}")
        connection.close()

    with ThreadPoolExecutor(CONNECTIONS) as pool:
        spent = seconds(lambda: list(pool.map(fetch, range(CONNECTIONS))))
    return sum(end - begin for _, begin, end in ranges) / 1e6 / spent


class Ours:
    """Epochs of a data set behind the link. cores: processor seconds per second of each first epoch, by process."""

    def __init__(self, data: dp.Dataset, cache: Path, window: int, server: psutil.Process) -> None:
        self.data, self._cache, self._window, self._server = data, cache, window, server
        self._loader: Any = None
        self.opened: list[float] = []
        self.cores: dict[str, list[float]] = {"loader": [], "server": []}

    def first(self, layers: slice | None = None) -> float:
        """Return the MB/s of a first epoch with an empty cache; only of the chosen layers, if any."""
        shutil.rmtree(self._cache, ignore_errors=True)
        begun = time.perf_counter()
        data = dp.open_dataset(f"s3://bucket/{self.data.root.name}", cache_dir=self._cache, cache_bytes=CACHE_BYTES)
        self._loader = self._make(data, layers)
        opening, before = time.perf_counter() - begun, self._spent()
        measured = self._rate(layers)
        spent = self._megabytes(layers) / measured
        self.opened.append(self._megabytes(layers) / (opening + spent))
        for who, earlier, later in zip(self.cores, before, self._spent(), strict=True):
            self.cores[who].append((later - earlier) / spent)
        return measured

    def second(self) -> float:
        """Return the MB/s of the epoch after the first one."""
        return self._rate(None)

    def folder(self) -> float:
        """Return the MB/s of a second epoch of the local data set."""
        self._loader = self._make(self.data, None)
        self._rate(None)
        return self._rate(None)

    def _make(self, data: dp.Dataset, layers: slice | None) -> dp.SequenceLoader:
        make = partial(dp.SequenceLoader, engine="torch", device="cpu", dtype=torch.float16)
        return make(data, batch_size=32, window_bytes=self._window, layers=layers)

    def _rate(self, layers: slice | None) -> float:
        spent = seconds(lambda: sum(len(batch) for batch in self._loader))
        self._loader.check_digest(self._loader.digest)
        return self._megabytes(layers) / spent

    def _megabytes(self, layers: slice | None) -> float:
        if layers is None:
            return self.data.nbytes / 1e6
        steps = len(range(SHAPE[0])[layers])
        return self.data.num_records("train", "sequences") * steps * SHAPE[1] * 2 / 1e6

    def _spent(self) -> tuple[float, float]:
        times = psutil.Process().cpu_times(), self._server.cpu_times()
        return times[0].user + times[0].system, times[1].user + times[1].system


@app.command()
def main(
    repeats: Annotated[int, typer.Option(min=1, help="Number of repetitions of each measurement.")] = 5,
    megabytes: Annotated[int, typer.Option(help="Size of each data set, in MB.")] = 300,
    window: Annotated[int, typer.Option(help="Shuffle window in MiB; about a tenth of the data set.")] = 32,
    rate: Annotated[float, typer.Option(help="Bandwidth of the link, in MB/s.")] = 100.0,
    delay: Annotated[float, typer.Option(help="Latency in seconds: time until the first byte of an answer.")] = 0.02,
    folder: Annotated[
        Path | None,
        typer.Option(help="Folder for the temporary data sets. [default: the system's temporary folder]", show_default=False),
    ] = None,
) -> None:
    """Measure all in turn; write results/stores_<machine>_<date>.csv."""
    results = Results("stores", ["torch", "numpy", "fsspec", "s3fs", "aiohttp"])
    with tempfile.TemporaryDirectory(dir=folder) as scratch, serving(Path(scratch), rate, delay) as server:
        where, shard_bytes = Path(scratch), max(1 << 20, min(64 << 20, megabytes * 10**6 // 4))
        whole = Ours(made(where / "set", megabytes, shard_bytes, by_layer=False), where / "cache", window << 20, server)
        layers = Ours(made(where / "layers", megabytes, shard_bytes, by_layer=True), where / "other", window << 20, server)
        ways: dict[str, Callable[[], float]] = {
            LINK: partial(plain, whole.data), FIRST: whole.first, SECOND: whole.second, FOLDER: whole.folder,
        }  # fmt: skip
        some = f"first epoch of layers {CHOSEN.start} to {CHOSEN.stop - 1}, stored layer by layer"
        rates = alternately(ways | {some: partial(layers.first, CHOSEN)}, repeats)
    scenario = f"{rate:g} MB/s, {delay * 1000:g} ms a request"
    rates[OPENED] = whole.opened[1:]
    for name in (LINK, FIRST, OPENED, some, SECOND, FOLDER):
        against = None if name in (LINK, FOLDER) else rates[LINK]
        results.add(scenario, name, "MB/s", rates[name], LINK if against else "", against)
    for who, values in whole.cores.items():
        results.add(scenario, f"{FIRST}, processor of the {who}", "cores", values[1:])


if __name__ == "__main__":
    sys.exit(run(app, "benchmarks.stores"))
