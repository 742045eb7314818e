"""The benchmarks, run small: every row is there and complete, and our loaders stand far above `.pt` files.

Speed is measured here, so it is not part of the default run: `pytest -m throughput`, some minutes, where nothing else runs.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import get_args

import pytest

from benchmarks import convert, graphs, harness, layers, limits, scale, scaling, sequences, stores, training
from benchmarks.harness import Row
from dali_pipeline.loaders.sequences import Engine
from training.config import ModelName

pytestmark = [pytest.mark.throughput, pytest.mark.timeout(600)]
Rows = dict[tuple[str, str], list[Row]]
PT = ".pt IterableDataset"
LEAST = 3.0  # to 1: over `.pt` files in worker processes; for graphs over `.pt` files at their best
# over stacked `.pt` files at their best, in the caller's own thread: there a file is one copy from the page cache (docs/log.md)
LEAST_ALONE = 1.1
LONG, SHORT = "[33, 1024] float16, batch 32", "[30, 64] float16, batch 256"


@pytest.fixture(autouse=True)
def _apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "results")
    for module in (sequences, graphs):
        monkeypatch.setattr(module, "PEERS", {PT: module.PEERS[PT]})
    monkeypatch.setattr(graphs, "IN_MEMORY", PT)


def complete(theme: str, repeats: int) -> Rows:
    """The rows by scenario and what was measured; each with all that a row tells, or why it is missing."""
    rows = harness.rows_of(theme)
    assert rows
    found: Rows = {}
    for row in rows:
        found.setdefault((row["scenario"], row["measured"]), []).append(row)
        assert all(row[name] for name in ("machine", "versions", "command", "date")), row
        assert not [
            value
            for value in row.values()
            if value.startswith("/") or tempfile.gettempdir() in value or str(Path.home()) in value
        ]
        if row["why"]:
            assert (row["median"], row["why"]) == ("", "no GPU")
            continue
        figures = [float(row[name]) for name in ("lowest", "lower_quartile", "median", "upper_quartile", "highest")]
        assert figures[0] >= 0
        assert figures == sorted(figures)
        assert row["cache"] in ("warm", "cold", "")
        assert not row["reference"] or float(row["ratio"]) >= 0
        assert int(row["repeats"]) == repeats or "trial" in row["measured"] or row["unit"] == "MB"
    return found


def median(rows: Rows, scenario: str, measured: str) -> float:
    return float(rows[scenario, measured][0]["median"])


def over_pt(rows: Rows, scenario: str) -> dict[str, float]:
    """Our ratios to `.pt` files at their best number of workers."""
    ours = (each for (where, _), several in rows.items() for each in several if where == scenario)
    return {row["measured"]: float(row["ratio"]) for row in ours if row["reference"].startswith(PT)}


def test_sequences(tmp_path: Path) -> None:
    sequences.main(repeats=3, records=2000, seconds=0.3, peers=True, folder=tmp_path)
    rows = complete("sequences", 3)
    for engine in get_args(Engine):
        ours = [f"{engine} engine, {dtype}, workers={count}" for dtype in ("float16", "float32") for count in (0, 2, 4)]
        assert {(LONG, name) for name in ours} | {(SHORT, f"{engine} engine, float16")} <= rows.keys()
        best = max(median(rows, LONG, name) for name in ours[:3])
        for num_workers in (2, 4):
            assert best / median(rows, LONG, f"{PT}, trial, workers={num_workers}") >= LEAST
    assert {(LONG, "gather"), (LONG, "gather and cast"), (LONG, "DALI, a constant batch"), (SHORT, "gather")} <= rows.keys()
    ratios = over_pt(rows, LONG)
    assert len(ratios) == 2
    assert max(ratios.values()) >= LEAST_ALONE, ratios


def test_graphs(tmp_path: Path) -> None:
    graphs.main(repeats=3, records=400, seconds=0.3, peers=True, folder=tmp_path)
    rows = complete("graphs", 3)
    for scenario in ("traces, 16 a batch", "molecules, 256 a batch"):
        assert {(scenario, f"GraphLoader, workers={num_workers}") for num_workers in ("auto", 0, 2)} <= rows.keys()
        assert over_pt(rows, scenario)["GraphLoader, workers=auto"] >= LEAST


def test_workers_and_sizes(tmp_path: Path) -> None:
    scaling.main(repeats=2, megabytes=16, seconds=0.05, folder=tmp_path)
    rows = complete("scaling", 2)
    for kind in scaling.KINDS:
        for how, units in (("shuffled", ["warm", "cold"]), ("in order", ["warm"]), ("memory", ["warm"])):
            for num_workers in scaling.WORKERS:
                assert [row["cache"] for row in rows[f"{kind}, {how}", f"workers={num_workers}"]] == units
    sizes = {scenario for scenario, measured in rows if measured == "torch engine"}
    assert len(sizes) == len(scaling.SHAPES)
    assert all((scenario, "dali engine") in rows and (scenario, "gather") in rows for scenario in sizes)


def test_bytes_of_layers(tmp_path: Path) -> None:
    layers.main(repeats=2, megabytes=32, folder=tmp_path)
    rows = complete("layers", 2)
    for scenario, least in (("sequences, record by record", 0.5), ("sequences, layer by layer", 0.1)):
        whole = median(rows, scenario, "all layers, second epoch, read")
        assert whole == pytest.approx(32 * 2**20 / 1e6, rel=0.1)
        assert median(rows, scenario, "1 of 32 layers, second epoch, read") < least * whole
    assert ("graphs", "1 of 8 layers, second epoch, read") in rows


def test_the_others(tmp_path: Path) -> None:
    limits.main(repeats=2, megabytes=32, seconds=0.05, folder=tmp_path)
    assert {("this machine", "memory copy, 1 thread"), ("this machine", "sequential read")} <= complete("limits", 2).keys()
    scale.main(repeats=2, gigabytes="0.05,0.1", most_shards=100, folder=tmp_path)
    rows = complete("scale", 2)
    for engine in get_args(Engine):
        assert {("100 shards", f"{engine} engine, first batch, {state}") for state in ("warm", "cold")} <= rows.keys()
        for size in ("0.05", "0.1"):
            assert float(rows[f"an epoch of {size} GB", f"{engine} engine, memory above imports"][0]["ratio"]) < 1
        assert ("0.1 GB, cold", f"{engine} engine, second epoch") in rows
    stores.main(repeats=2, megabytes=20, window=4, rate=50.0, delay=0.01, folder=tmp_path)
    rows = complete("stores", 2)
    for measured in (stores.LINK, stores.FIRST, stores.OPENED, stores.SECOND):
        assert median(rows, "50 MB/s, 10 ms a request", measured) > 0
    assert median(rows, "50 MB/s, 10 ms a request", stores.LINK) < 50 < median(rows, "50 MB/s, 10 ms a request", stores.SECOND)
    training.main(repeats=2, megabytes=4, seconds=0.05, folder=tmp_path)
    rows = complete("training", 2)
    for name in get_args(ModelName):
        for measured in ("one batch again and again", "with the loader", "time waiting for data", "GPU utilisation"):
            assert (name, measured) in rows
    convert.main(gigabytes=0.03, memory_gigabytes=0, repeats=2, folder=tmp_path)
    converted = {(row["scenario"], row["measured"]) for row in harness.rows_of("convert") if float(row["median"]) > 0}
    assert {("verify", "cold"), ("verify", "warm")} <= converted
    assert {"stacked .pt", ".npz", "graphs .pt", "edges of a trace"} <= {scenario for scenario, _ in converted}
