"""The parts of benchmarks/gpu_day.py that measure: versions, tests, limits, loaders, training, waits for the GPU.

Loaders and training deliver float32, as training takes it, decoded on the device; GB/s count the bytes as stored, which are those
that cross the bus. The page cache is warm: an epoch that does not count has read every file.
"""

from __future__ import annotations

import gc
import os
import platform
import re
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import dali_pipeline as dp
from benchmarks.gpu_sets import GRAPHS, SEQUENCES, opened
from benchmarks.gpu_work import Deadline, Report, Setup, reason, run_grid
from benchmarks.limits import copy
from benchmarks.training import sampled
from dali_pipeline.container import allowed_cores, allowed_memory
from dali_pipeline.machine import driver_version
from dali_pipeline.versions import check_loaders
from training.build import build_model, make_loader
from training.config import MODELS, ModelName, TrainConfig
from training.processes import Processes
from training.step import Stepper

ROOT = Path(__file__).parent.parent
CEILING, TOGETHER = "ceiling", "with the loader"
PINNED, PAGEABLE = "host to device, pinned", "host to device, pageable"
WARM_STEPS = 10
READ_BYTES = 8 << 20  # in one call


def versions(setup: Setup, deadline: Deadline, report: Report) -> None:
    """Part: versions and machine; then the loaders' own graphs built and run once, compared with what was written."""
    memory, _ = allowed_memory()
    report.facts(
        python=platform.python_version(),
        torch=torch.__version__,
        torch_cuda=torch.version.cuda,
        numpy=np.__version__,
        driver=driver_version() or _asked_of_smi("driver_version"),
        cores=allowed_cores(),
        memory_gib=round(memory / 2**30),
        dali_use_vmm=os.environ.get("DALI_USE_VMM"),
    )
    if setup.device != "cpu":
        gpu = torch.cuda.get_device_properties(0)
        report.facts(
            gpu=gpu.name, gpu_memory_gib=round(gpu.total_memory / 2**30), compute_capability=f"{gpu.major}.{gpu.minor}"
        )
    try:
        import torch_geometric

        report.facts(pyg=torch_geometric.__version__)
    except Exception as error:  # the loaders of sequences do without
        report.facts(pyg=reason(error))
    import nvidia.dali

    report.facts(dali=nvidia.dali.__version__)
    report.facts(loaders=check_loaders())


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
    files = sorted(str(path) for path in ROOT.glob("tests/test_*.py") if re.search(r"^@pytest\.mark\.gpu", path.read_text(), re.M))
    options = ["-m", "gpu", "-o", "addopts=", "-p", "no:cacheprovider", "--continue-on-collection-errors", "-q", "-rfE"]
    command = [sys.executable, "-m", "pytest", *options, *(["--collect-only"] if setup.quick else []), *files]
    try:
        done = subprocess.run(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=deadline.left_seconds
        )
    except subprocess.TimeoutExpired as late:
        output = late.stdout.decode(errors="replace") if isinstance(late.stdout, bytes) else late.stdout or ""
        report.facts(output=output.splitlines()[-30:])
        raise RuntimeError(f"pytest was not over within {late.timeout:.0f} s") from None
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    failing = [line for line in lines if line.startswith(("FAILED ", "ERROR "))]
    summary = lines[-1].strip("= ") if lines else "pytest printed nothing"
    report.facts(summary=summary, failing=failing, output=lines[-60:] if done.returncode else [])
    if done.returncode:
        raise RuntimeError(f"pytest ended with {done.returncode}: {summary}")


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


class Loading(NamedTuple):
    """One combination of the loaders' part; the engine is empty for graphs."""

    name: str
    engine: str
    batch_size: int
    workers: int

    @property
    def labels(self) -> tuple[str, str]:
        """Scenario and measured."""
        loader = f"{self.engine} engine" if self.engine else "GraphLoader"
        return f"{self.name}, batch {self.batch_size}", f"{loader}, workers={self.workers}"


def loading_grid(*, quick: bool) -> list[Loading]:
    """Return all combinations: every set and engine at one batch size and number of workers before the next of these."""
    ways = [(name, engine) for name in SEQUENCES for engine in ("dali", "torch")] + [(name, "") for name in GRAPHS]
    workers, batch_sizes = ((1, 2), (8,)) if quick else ((1, 4, 8, 2), (32, 256))
    return [Loading(*way, size, count) for size in batch_sizes for count in workers for way in ways]


def loaders(setup: Setup, deadline: Deadline, report: Report) -> None:
    """Part: loaders alone, into the device."""
    least_seconds = 0.05 if setup.quick else 0.6
    read: set[str] = set()

    def measure(loading: Loading) -> None:
        data = opened(setup, loading.name)
        options = {"batch_size": loading.batch_size, "workers": loading.workers, "device": setup.device, "tail": "drop"}
        loader: Any = (
            dp.SequenceLoader(data, engine=loading.engine, **options) if loading.engine else dp.GraphLoader(data, **options)  # type: ignore[arg-type]
        )
        for _ in islice(loader, None if loading.name not in read else WARM_STEPS):
            pass
        read.add(loading.name)
        rates = epoch_rates(loader, least_seconds, deadline)
        gigabytes = [rate * float(loader.selection.record_bytes) / 1e9 for rate in rates]
        report.add(*loading.labels, "GB/s", gigabytes, cache="warm")
        report.add(*loading.labels, "records/s", rates, cache="warm")

    run_grid(loading_grid(quick=setup.quick), measure, lambda loading: loading.labels, setup, deadline, report)


def epoch_rates(loader: Any, least_seconds: float, deadline: Deadline) -> list[float]:
    """Return records per second of each epoch behind its first batch, of as many epochs as take `least_seconds`.

    The first batch pays for the start of an epoch, which a set of a few gigabytes would show far too often. Waits for the device
    at the end of an epoch alone. An epoch ends early at the deadline.
    """
    rates: list[float] = []
    spent = 0.0
    while spent < least_seconds and not (rates and deadline.passed):
        batches = iter(loader)
        next(batches)
        wait(loader.device)
        records, begun = 0, time.perf_counter()
        for batch in batches:
            records += len(batch)
            if deadline.passed:
                break
        wait(loader.device)
        spent += time.perf_counter() - begun
        rates.append(records / (time.perf_counter() - begun))
        del batches
    return rates


def wait(device: torch.device) -> None:
    """Wait for all that was asked of the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Training(NamedTuple):
    """One combination of the training part."""

    model: ModelName
    batch_size: int
    precision: str
    compiled: bool

    @property
    def scenario(self) -> str:
        """In words."""
        return f"{self.model}, batch {self.batch_size}, {self.precision}{', compiled' if self.compiled else ''}"


def training_grid(*, quick: bool) -> list[Training]:
    """Return all combinations: every detector in each setting before the next one; compiled ones last, as they take long."""
    settings = [(32, "fp32"), (256, "bf16"), (32, "bf16"), (256, "fp32")]
    if quick:
        return [Training(model, 8, "fp32", False) for model in MODELS] + [Training("lstm", 8, "bf16", False)]
    return [Training(model, *setting, compiled) for compiled in (False, True) for setting in settings for model in MODELS]


def training(setup: Setup, deadline: Deadline, report: Report) -> None:
    """Part: each detector's ceiling, which is one batch again and again, and training with the loader."""
    seconds = 0.1 if setup.quick else 1.2

    def measure(combination: Training) -> None:
        scenario, on_gpu = combination.scenario, setup.device != "cpu"
        if on_gpu:
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        loader, step = made_step(setup, combination)
        batches = endless(loader)
        for batch in islice(batches, WARM_STEPS):  # of several shapes; the first ones compile, and choose kernels
            step(batch)
        wait(loader.device)
        report.add(scenario, CEILING, "records/s", [ceiling(loader, step, batch, seconds / 3) for _ in range(3)])
        timer, begun = step_timer(loader.device), time.perf_counter()
        with sampled(loader) as use:
            for batch in timer(batches):
                step(batch)
                if time.perf_counter() - begun > seconds or deadline.passed:
                    break
            wait(loader.device)
            passed = time.perf_counter() - begun
        report.add(scenario, TOGETHER, "records/s", [timer.records / passed], cache="warm", beside=CEILING)
        report.add(scenario, "host waits for data", "%", [100 * timer.wait_share], cache="warm")
        gap = gap_share(timer, loader.device)
        if gap is not None:
            report.add(scenario, "device idle between steps", "%", [100 * gap], cache="warm")
        if use:
            report.add(scenario, "device busy, by its driver", "%", [float(one) for one in use], cache="warm")
        if on_gpu:
            report.add(scenario, "peak memory of the device", "MB", [torch.cuda.max_memory_allocated() / 1e6])

    def name(combination: Training) -> tuple[str, str]:
        return combination.scenario, TOGETHER

    run_grid(training_grid(quick=setup.quick), measure, name, setup, deadline, report)


def step_timer(device: torch.device) -> Any:
    """Return a `StepTimer` of the device. The one place that knows of a StepTimer without `device` and `gap_share`."""
    timer: Any = dp.StepTimer
    try:
        return timer(device=device)
    except TypeError:
        return timer()


def gap_share(timer: Any, device: torch.device) -> float | None:
    """Return the device's idle share, which on a CPU is the share of waiting; None where this StepTimer cannot tell."""
    known: float | None = getattr(timer, "gap_share", timer.wait_share if device.type == "cpu" else None)
    return known


def made_step(setup: Setup, combination: Training) -> tuple[Any, Callable[[Any], torch.Tensor]]:
    """Return a loader of the detector's set, and a function that takes one step of training on a batch without waiting."""
    data = opened(setup, "[33, 1024] float16" if combination.model == "lstm" else "traces")
    config = TrainConfig(
        batch_size=combination.batch_size,
        precision=combination.precision,  # type: ignore[arg-type]
        compile=combination.compiled,
    )
    loader = make_loader(combination.model, data, config, "train", setup.device)
    model = build_model(combination.model, data.schema, data.num_classes, config).to(loader.device).train()
    stepper = Stepper(model, config, 10**9, loader.device, Processes(dp.World.detect()))  # of a schedule that never ends
    noise_key = 0 if combination.model == "gvae_lstm" else None
    return loader, lambda batch: stepper.step(batch, 0, len(batch), noise_key)


def ceiling(loader: Any, step: Callable[[Any], object], batch: Any, seconds: float) -> float:
    """Return records per second of steps on one batch. Waits for the device once, behind the last step."""

    def spent(steps: int) -> float:
        begun = time.perf_counter()
        for _ in range(steps):
            step(batch)
        wait(loader.device)
        return time.perf_counter() - begun

    steps = max(3, round(seconds / (spent(3) / 3)))
    return steps * len(batch) / spent(steps)


def endless(loader: Any) -> Iterator[Any]:
    """Yield the batches of one epoch after the other."""
    while True:
        yield from loader


def waits(setup: Setup, deadline: Deadline, report: Report) -> None:
    """Part: in one step of each detector, how often the host waits for the device, and where: in the loader and in the step."""

    def measure(model: ModelName) -> None:
        loader, step = made_step(setup, Training(model, 8 if setup.quick else 32, "fp32", False))
        batches = endless(loader)
        for batch in islice(batches, 3):
            step(batch)
        wait(loader.device)
        with counted_waits(setup.device) as in_loader:
            batch = next(batches)
        with counted_waits(setup.device) as in_step:
            step(batch)
        for name, places in (("loader", in_loader), ("step", in_step)):
            report.add(model, f"waits for the device in one {name}", "waits", [float(places.total())])
            report.facts(**{f"{model}, {name}": dict(places.most_common())})

    run_grid(MODELS, measure, lambda model: (model, "waits for the device"), setup, deadline, report)


@contextmanager
def counted_waits(device: str) -> Iterator[Counter[str]]:
    """Count synchronising calls of the block by the line of this project that caused them; none on a CPU."""
    places: Counter[str] = Counter()

    def note(message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: object) -> None:
        if "synchronizing" not in str(message).lower() or "prototype" in str(message).lower():
            return
        stack = [frame for frame in traceback.extract_stack() if Path(frame.filename).is_relative_to(ROOT)]
        own = [frame for frame in stack if Path(frame.filename) != Path(__file__)]
        place = f"{Path(own[-1].filename).relative_to(ROOT)}:{own[-1].lineno}" if own else f"{Path(filename).name}:{lineno}"
        places[place] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        if device != "cpu":
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield places
        finally:
            if device != "cpu":
                torch.cuda.set_sync_debug_mode("default")
