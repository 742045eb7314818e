"""Small data sets that the tests share, and one thread a test process, so that two fit on two cores."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import dali_pipeline as dp
from dali_pipeline.runtime.numpyversion import check_numpy
from tests.helpers.records import make_records, write
from tests.pretended_gpu import Log, pretended_gpu
from tests.pretended_gpu.dali import dali_on_the_cpu

torch.set_num_threads(1)
# all but AMX: virtual machines that tell of it and end a process with "illegal instruction" are about
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_FP16")


def pytest_configure() -> None:
    """Refuse NumPy 1 before any test fails of it."""
    try:
        check_numpy()
    except dp.UsageError as error:
        pytest.exit(str(error), returncode=2)


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
