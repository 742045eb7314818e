"""Parts of benchmarks/gpu_day.py that examine the machine: versions, the tests that need a GPU, limits."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu_work import Deadline, Report, Setup, run_grid
from benchmarks.limits import copy
from dali_pipeline.cli.versions import check_fit, check_loaders, check_training, written_records
from dali_pipeline.loaders.dali import dali_cuda, import_dali
from dali_pipeline.runtime.container import allowed_cores, allowed_memory
from dali_pipeline.runtime.machine import driver_version

ROOT = Path(__file__).parent.parent
PINNED, PAGEABLE = "host to device, pinned", "host to device, pageable"
READ_BYTES = 8 << 20  # in one call


def versions(setup: Setup, deadline: Deadline, report: Report) -> None:
    """Part: versions and machine; then every engine on the device, compared with what was written, and a step of training."""
    report.facts(
        python=platform.python_version(),
        torch=torch.__version__,
        torch_cuda=torch.version.cuda,
        numpy=np.__version__,
        driver=driver_version() or _asked_of_smi("driver_version"),
        cores=allowed_cores(),
        memory_gib=round(allowed_memory()[0] / 2**30),
    )
    with written_records() as (data, values):
        steps: dict[str, Callable[[], object]] = {
            "gpu": lambda: report.facts(**_gpu()) if setup.device != "cpu" else None,
            "dali": lambda: report.facts(dali=import_dali().__version__, dali_cuda=dali_cuda()),
            "pyg": lambda: report.facts(pyg=import_module("torch_geometric").__version__),
            "fit": check_fit,
            "loaders": lambda: report.facts(loaders=check_loaders(data, values)),
            "training": lambda: report.facts(training=check_training(data)),
        }
        for name, step in steps.items():
            try:
                step()
            except Exception as error:  # the rest is told all the same
                report.failed("versions", name, error)


def _gpu() -> dict[str, Any]:
    gpu = torch.cuda.get_device_properties(0)
    memory_gib = round(gpu.total_memory / 2**30)
    return {"gpu": gpu.name, "gpu_memory_gib": memory_gib, "compute_capability": f"{gpu.major}.{gpu.minor}"}


def _asked_of_smi(what: str) -> str | None:
    command = ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.split("\n")[0] or None
    except (OSError, subprocess.SubprocessError):
        return None


def tests(setup: Setup, deadline: Deadline, report: Report) -> None:
    """Part: `pytest -m gpu` on the files that have such tests, as the others may need packages that are not here.

    Raises:
        RuntimeError: If a test failed, or none ran.
    """
    files = sorted(
        str(path) for path in ROOT.glob("tests/test_*.py") if re.search(r"^@pytest\.mark\.gpu", path.read_text(), re.M)
    )
    options = ["-m", "gpu", "-o", "addopts=", "-p", "no:cacheprovider", "--continue-on-collection-errors", "-rfE"]
    command = [sys.executable, "-m", "pytest", *options, *(["--collect-only", "-q"] if setup.quick else ["-v"]), *files]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}  # so that what is stopped has told how far it came
    late = code = None
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=deadline.left_seconds,
        )
        output, code = done.stdout, done.returncode
    except subprocess.TimeoutExpired as error:
        output, late = error.stdout or b"", error.timeout
    lines = [line for line in output.decode(errors="replace").splitlines() if line.strip()]
    last = lines[-1].strip("= ") if lines else "nothing was printed"
    summary = last if late is None else f"stopped after {late:.0f} s, in {last}"
    failing = [line for line in lines if re.search(r"^(FAILED|ERROR) " if late is None else r" (FAILED|ERROR) +\[", line)]
    report.facts(summary=summary, failing=failing, output=[] if code == 0 else lines[-60:])
    if code != 0:
        raise RuntimeError("; ".join([f"pytest: {summary}", *failing]))


def limits(setup: Setup, deadline: Deadline, report: Report) -> None:
    """Part: copies from pinned and from pageable memory to the device; the page cache read by 1, 2, 4 and 8 threads."""
    megabytes, seconds = (8, 0.02) if setup.quick else (256, 0.5)
    values = torch.from_numpy(np.random.default_rng(0).integers(0, 256, megabytes << 20, np.uint8))
    target = torch.empty_like(values, device=setup.device)
    path = setup.folder / "values"
    path.write_bytes(values.numpy().data)

    def pinned() -> Callable[[], int]:
        return partial(copy, values.pin_memory() if setup.device != "cpu" else values, target, 1)

    ways: dict[str, Callable[[], Callable[[], int]]] = {
        PINNED: pinned,
        PAGEABLE: lambda: partial(copy, values, target, 1),
        **{f"page cache, {threads} threads": partial(_reader, path, threads) for threads in (1, 2, 4, 8)},
    }

    def measure(name: str) -> None:
        way, rates = ways[name](), []
        way()
        for _ in range(3):
            nbytes, begun = 0, time.perf_counter()
            while time.perf_counter() - begun < seconds:
                nbytes += way()
            rates.append(nbytes / (time.perf_counter() - begun) / 1e9)
        report.add("this machine", name, "GB/s", rates, cache="warm" if name.startswith("page cache") else "")

    run_grid(list(ways), measure, lambda name: ("this machine", name), setup, deadline, report)
    path.unlink()


def _reader(path: Path, threads: int) -> Callable[[], int]:
    """Return a function that reads a file once, an equal part in each thread, and returns its bytes."""
    nbytes = path.stat().st_size
    buffers = [bytearray(READ_BYTES) for _ in range(threads)]

    def read_part(number: int) -> None:
        offset, end = nbytes * number // threads, nbytes * (number + 1) // threads
        fd = os.open(path, os.O_RDONLY)
        while offset < end:
            offset += os.preadv(fd, [memoryview(buffers[number])[: end - offset]], offset)
        os.close(fd)

    def read() -> int:
        readers = [threading.Thread(target=read_part, args=(number,)) for number in range(threads)]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
        return nbytes

    return read
