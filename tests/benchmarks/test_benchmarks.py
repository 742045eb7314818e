"""Peers of the benchmarks: every one has its row, and none counts that brings other records than were written."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pytest
import torch

import dali_pipeline as dp
from benchmarks import graphs, harness, link, peers, peers_graphs, peers_torch, plot, tables
from benchmarks.peer import Batch, Epochs, Way, checked
from benchmarks.sequences import through_dali
from dali_pipeline.loaders.decoding import sequence_graph
from dali_pipeline.storage.stores import GoneError, Store
from tests.helpers.stores import s3

COUNT, BATCH = 300, 32  # more than the deques hold
PLAIN = [peers_torch.PtFiles, peers_torch.MemoryMap, peers_torch.MemoryMapBatches]
WAYS = list(peers_graphs.PEERS.values())


@pytest.fixture
def sequences(tmp_path: Path) -> peers_torch.Records:
    values = np.random.default_rng(0).standard_normal((COUNT, 3, 4), np.float32).astype(np.float16)
    peers_torch.write_values(tmp_path, values)
    return peers_torch.Records(tmp_path)


def ids(epochs: Epochs) -> list[int]:
    return [int(one) for batch in epochs() for one in batch["id"]]


@pytest.mark.parametrize("way", PLAIN)
def test_sequences_once_an_epoch_in_new_order(sequences: peers_torch.Records, tmp_path: Path, way: type[Way]) -> None:
    check_way(way(), sequences, tmp_path / "peer")


@pytest.mark.parametrize(("way", "weighted"), [*((way, True) for way in WAYS), (WAYS[1], False)])
def test_graphs_once_an_epoch_in_new_order(tmp_path: Path, way: type[Way], weighted: bool) -> None:
    check_way(way(), graphs.made(tmp_path / "arrays", COUNT, 2, 6, 3, 9, weighted=weighted), tmp_path / "peer")


def check_way(way: Way, records: Any, folder: Path) -> None:
    folder.mkdir()
    way.write(folder, records)
    epochs = checked(way, records, folder, BATCH, 0)
    one, other = ids(epochs), ids(epochs)
    assert sorted(one) == sorted(other) == list(range(COUNT))
    assert one != other != sorted(other)


@pytest.mark.parametrize(("device", "number"), [("cpu", None), ("cuda:1", 1), ("cuda", 0)])
def test_the_limit_through_dali_is_that_of_the_loaders_device(
    monkeypatch: pytest.MonkeyPatch, device: str, number: int | None
) -> None:
    asked: list[Any] = []

    def on_the_cpu(feed: Any, *, device_id: int | None, **options: Any) -> Any:
        asked.append(device_id)
        return sequence_graph(feed, device_id=None, **options)

    monkeypatch.setattr("benchmarks.sequences.sequence_graph", on_the_cpu)
    values = np.ones((8, 3, 4), np.float16)
    assert through_dali(values, 16, 4, torch.device(device)) == 16
    assert asked == [number]


class Altered(peers_torch.MemoryMap):
    """A peer whose batches are tampered with."""

    def __init__(self, alter: Callable[[dict[str, Any]], Batch | None]) -> None:
        self._alter = alter

    def loader(self, folder: Path, batch_size: int, num_workers: int) -> Epochs:
        epochs = super().loader(folder, batch_size, num_workers)
        return lambda: (altered for batch in epochs() if (altered := self._alter(dict(batch))) is not None)


@pytest.mark.parametrize(
    ("alter", "message"),
    [
        (lambda batch: batch if len(batch["id"]) == BATCH else None, "of 300 records 12 did not come, 0 came more than once"),
        (lambda batch: batch | {"id": batch["id"] * 0}, "came with other values"),
        (lambda batch: batch | {"sequence": batch["sequence"] * 0}, "came with other values"),
        (lambda batch: batch | {"sequence": batch["sequence"].float()}, "came as torch.float32"),
        (lambda batch: batch | {"label": 1 - batch["label"]}, "came with other labels"),
    ],
)
def test_what_a_peer_gets_wrong_is_found(sequences: Any, tmp_path: Path, alter: Any, message: str) -> None:
    way = Altered(alter)
    (tmp_path / "peer").mkdir()
    way.write(tmp_path / "peer", sequences)
    with pytest.raises((ValueError, TypeError), match=message):
        checked(way, sequences, tmp_path / "peer", BATCH, 0)


def test_every_peer_has_its_rows(sequences: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(peers, "READY", tmp_path / "none")  # so ours, which has torch and no other library
    ours, limit = "ours", "limit"
    with peers.running(
        "sequences", [".pt IterableDataset", "LitData"], tmp_path, tmp_path, batch_size=BATCH, seconds=0
    ) as found:
        ways = {limit: lambda: 2.0, ours: lambda: 1.0} | {peer.label: peer.sample for peer in found if not peer.why}
        rates = harness.alternately(ways, 2)
        results = harness.Results("peers", ["torch"])
        peers.report(results, "tiny", rates, found, lambda _: limit, [ours])
        found[0]._process.kill()
        assert math.isnan(found[0].sample())
        assert str(found[0].why).startswith("it ended with -9")
    assert not [peer for peer in found if peer._process.poll() is None]
    assert results.path == harness.results_path("peers")
    rows = harness.rows_of("peers")
    pt = found[0].label
    assert pt.startswith(".pt IterableDataset 2.")
    trials = [f".pt IterableDataset, trial, workers={num_workers}" for num_workers in (0, 2, 4)]
    assert [(row["measured"], row["reference"]) for row in rows] == [
        (limit, ""),
        (ours, limit),
        (pt, limit),
        *((trial, "") for trial in trials),
        (ours, pt),
        ("LitData", ""),
    ]
    for row in rows[:-1]:
        assert 0 < float(row["lowest"]) <= float(row["lower_quartile"]) <= float(row["median"])
        assert float(row["median"]) <= float(row["upper_quartile"]) <= float(row["highest"])
        assert row["cache"] == ("" if row["measured"] == limit else "warm")
        assert int(row["repeats"]) == 2
        assert not row["reference"] or float(row["ratio"]) >= 0
        assert all(row[name] for name in ("machine", "versions", "command", "date"))
    assert rows[-1]["why"] == "ModuleNotFoundError: No module named 'litdata'"
    assert not rows[-1]["median"]


def test_rows_name_no_folder_of_a_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    given = ["--records", "3", "--folder", "/scratch/one", "--folder=/scratch/two", "/home/me/data/set", "data/set"]
    monkeypatch.setattr("sys.argv", ["benchmarks/some.py", *given])
    results = harness.Results("some", ["torch"])
    results.add("one", "way", "records/s", [1.0, 2.0, 3.0, 4.0, 10.0], cache="cold")
    results.missing("one", "other", "OSError: no '/home/me/lib/x.so', see https://some.where/a/b")
    one, other = harness.rows_of("some")
    assert one["command"] == "python -m benchmarks.some --records 3 set data/set"
    assert (one["median"], one["lower_quartile"], one["upper_quartile"], one["cache"]) == ("3", "2", "4", "cold")
    assert other["why"] == "OSError: no 'x.so', see https://some.where/a/b"
    assert harness.rows_of("none") == []
    # of several files the newest
    (tmp_path / "some_other-machine_2020-01-01.csv").write_text("scenario\nold\n")
    assert harness.results_path("some") == results.path
    (tmp_path / "some_other-machine_2999-01-01.csv").write_text("scenario\nnew\n")
    assert harness.rows_of("some") == [{"scenario": "new"}]


def test_tables_come_from_the_newest_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    results = harness.Results("sequences", ["torch"])
    for name, values in (("gather", [100_000.0]), ("torch engine, float16, workers=0", [41_000.0, 43_000.0, 57_000.0])):
        results.add(
            "long", name, "records/s", values, "" if name == "gather" else "gather", [1e5] if name != "gather" else None
        )
    results.add("long", "torch engine, float16, workers=2", "records/s", [9_000.0], "gather", [1e5])
    results.add("long", "Other 1.0, workers=2", "records/s", [77_000.0], "gather", [1e5])  # where we lose
    results.add("long", "Other, trial, workers=4", "records/s", [5.0])
    results.missing("long", "Third", "ModuleNotFoundError")
    before = "# Title\n<!-- speed: sequences, long -->\nold\n<!-- end -->\nbetween\n"
    before += "<!-- speed: graphs, other -->\nkept\n<!-- end -->\n"
    page = tmp_path / "results.md"
    page.write_text(before)
    tables.update_tables(page)
    text = page.read_text()
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[:2] for line in lines[1:]] == [
        ["| numpy copies rows that lie in memory: the limit", "100,000 (100,000 to 100,000)"],
        ["| Other 1.0, workers=2", "77,000 (77,000 to 77,000)"],
        ["| **torch engine, float16, workers=0**", "43,000 (42,000 to 50,000)"],
        ["| Third", "cannot run: ModuleNotFoundError"],
    ]
    assert results.path.name in lines[0]
    assert "old" not in text
    assert text.endswith("between\n<!-- speed: graphs, other -->\nkept\n<!-- end -->\n")
    tables.update_tables(page)
    assert page.read_text() == text
    page.write_text(before.replace("long", "none"))
    with pytest.raises(dp.UsageError, match="no scenario 'none'"):
        tables.update_tables(page)


def test_pictures_and_tables_come_from_the_files_that_are_there(tmp_path: Path) -> None:
    plot.main(tmp_path)
    for name in ("speed.png", "growth.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    page = Path(plot.__file__).parent.parent / plot.RESULTS
    assert page.read_text().count("<!-- speed: ") == 4
    (tmp_path / "results.md").write_text(page.read_text())
    tables.update_tables(tmp_path / "results.md")
    assert (tmp_path / "results.md").read_text() == page.read_text(), "`make plots` was run since the results changed"


def test_the_link_answers_as_s3_does_and_no_faster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = np.random.default_rng(0).bytes(300_000)
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "object").write_bytes(body)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "key")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")

    def asked(url: str) -> list[object]:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        store = Store("s3://bucket/set")
        with pytest.raises(GoneError) as caught:
            store.read("none")
        ranges = [(0, 1), (0, 300_000), (299_999, 300_000), (7, 200_000)]
        return [
            store.read("object"),
            store.size("object"),
            str(caught.value),
            *(store.read("object", *span) for span in ranges),
        ]

    with s3() as moto:
        monkeypatch.setenv("AWS_ENDPOINT_URL", moto.url)
        client = boto3.client("s3")
        client.create_bucket(Bucket="bucket")
        client.put_object(Bucket="bucket", Key="set/object", Body=body)
        theirs = asked(moto.url)
    server = link.Server(tmp_path, bytes_per_second=20e6, delay=0.01)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    begun = time.monotonic()
    ours = asked(f"http://127.0.0.1:{server.server_address[1]}")
    passed = time.monotonic() - begun
    server.shutdown()
    server.server_close()
    assert ours == theirs
    assert ours[0] == ours[4] == body
    assert passed > 800_000 / 20e6 + 7 * 0.01
