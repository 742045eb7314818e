"""Small data sets that the tests share, and one thread a test process, so that two fit on two cores."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from pretended_gpu import Log, pretended_gpu
from pretended_gpu.dali import dali_on_the_cpu

import dali_pipeline as dp
from dali_pipeline.format.shard import ShardInfo
from dali_pipeline.format.shardfile import ShardFile
from dali_pipeline.runtime.numpyversion import check_numpy
from dali_pipeline.types import Array, Kind
from dali_pipeline.writing.openshard import STREAMED

torch.set_num_threads(1)
# all but AMX: virtual machines that tell of it and end a process with "illegal instruction" are about
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_FP16")

# a shell's background jobs ignore Ctrl-C, and pass that on: a test's script begins with this
HEARS_CTRL_C = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
FEATURES, NODE_FEATURES, LAYERS = 8, 4, 3
SCHEMA = dp.Schema(
    sequence=dp.Field(dtype="float16", shape=(FEATURES,)),
    x=dp.Field(dtype="float16", shape=(NODE_FEATURES,)),
    edge_attr=dp.Field(dtype="float16"),
)


def pytest_configure() -> None:
    """Refuse NumPy 1 before any test fails of it."""
    try:
        check_numpy()
    except dp.UsageError as error:
        pytest.exit(str(error), returncode=2)


def make_records(count: int, *, ragged: bool = True, seed: int = 0, classes: int = 2) -> list[dp.Record]:
    """Records of both kinds, some graphs without edges; the label shows in the first feature, so it can be learned."""
    rng = np.random.default_rng(seed)
    records = []
    for number in range(count):
        label = int(rng.integers(classes))
        steps = int(rng.integers(2, 9)) if ragged else 5
        nodes = rng.integers(1, 6, size=LAYERS) if ragged else np.full(LAYERS, 4)
        edges = rng.integers(0, 7, size=LAYERS)
        sequence = rng.normal(size=(steps, FEATURES))
        sequence[:, 0] += 3 * label
        x = rng.normal(size=(nodes.sum(), NODE_FEATURES))
        x[:, 0] += 3 * label
        records.append(
            dp.Record(
                id=f"record-{number}",
                group=f"group-{number // 2}",
                label=label,
                sequence=sequence.astype(np.float16),
                graphs=dp.Graphs(
                    x=x.astype(np.float16),
                    edge_index=np.concatenate(
                        [rng.integers(0, n, size=(2, e)) for n, e in zip(nodes, edges, strict=True)], axis=1
                    ),
                    edge_attr=rng.random(edges.sum()).astype(np.float16),
                    node_counts=nodes,
                    edge_counts=edges,
                ),
            )
        )
    return records


def write_shard(path: Path, kind: Kind, records: int, arrays: Mapping[str, Array]) -> ShardInfo:
    """A shard of these arrays, whatever they are."""
    name = STREAMED[kind]
    rest = {other: array for other, array in arrays.items() if other != name}
    rows = arrays[name]
    file = ShardFile(path, kind, name, rows.dtype.name, rows.shape[1:], expected_bytes=rows.nbytes)
    file.append(rows)
    return file.close(records, rest)


def write(root: Path, records: list[dp.Record], *, shard_bytes: int = 2048, shares: str = "70/15/15") -> dp.Dataset:
    with dp.ShardWriter(root, SCHEMA, shard_bytes=shard_bytes, split=dp.SplitRule.parse(shares)) as writer:
        for record in records:
            writer.write(record)
    return dp.open_dataset(root)


@pytest.fixture(scope="session")
def records() -> dict[str, dp.Record]:
    return {record.id: record for record in make_records(300)}


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory, records: dict[str, dp.Record]) -> dp.Dataset:
    """300 records of 2 to 8 steps and 3 graphs, in many small shards."""
    return write(tmp_path_factory.mktemp("data") / "set", list(records.values()))


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., dp.Dataset]:
    """Writes a data set of `count` records."""

    def make_dataset(count: int, **options: object) -> dp.Dataset:
        writing = {key: options.pop(key) for key in ("shard_bytes", "shares") if key in options}
        return write(tmp_path / f"set-{count}", make_records(count, **options), **writing)  # type: ignore[arg-type]

    return make_dataset


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--pretended-gpu", action="store_true", help="run the tests marked gpu on a pretended one")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available() and not item.config.getoption("--pretended-gpu"):
        pytest.skip("needs a GPU, or --pretended-gpu")


@pytest.fixture
def gpu_log(request: pytest.FixtureRequest) -> Log:
    """What the pretended GPU was asked for; a test that counts is skipped on a real one."""
    if not request.config.getoption("--pretended-gpu"):
        pytest.skip("counts what a pretended GPU is asked for")
    log: Log = request.getfixturevalue("pretend")
    return log


@pytest.fixture(autouse=True)
def pretend(request: pytest.FixtureRequest) -> Iterator[Log | None]:
    """A pretended GPU for tests marked gpu, where it is asked for."""
    if not (request.config.getoption("--pretended-gpu") and request.node.get_closest_marker("gpu")):
        yield None
        return
    with pretended_gpu() as log, dali_on_the_cpu():
        yield log
