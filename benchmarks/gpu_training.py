"""Parts of benchmarks/gpu_day.py that train: ceilings, training with the loader, waits of the host for the device."""

from __future__ import annotations

import gc
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import torch

import dali_pipeline as dp
from benchmarks.gpu_loaders import WARM_STEPS, read
from benchmarks.gpu_work import Deadline, Report, Setup, run_grid
from benchmarks.training import sampled
from dali_pipeline.tools.stages import wait_for
from training.build import make_loader
from training.config import MODELS, ModelName, TrainConfig
from training.processes import Processes
from training.step import Stepper, trial
from training.target import find_target

CEILING, TOGETHER = "ceiling", "with the loader"
QUICK_STEPS = 2  # not counted
COMPILE_SECONDS = 30.0  # that compiling may take
ROOT = Path(__file__).parent.parent
OWN_FOLDERS = {ROOT / name for name in ("dali_pipeline", "models", "training")}


class Training(NamedTuple):
    """One combination of the training part."""

    model: ModelName
    batch_size: int
    precision: str
    compiled: bool

    @property
    def scenario(self) -> str:
        """The combination in words."""
        return f"{self.model}, batch {self.batch_size}, {self.precision}{', compiled' if self.compiled else ''}"


def training_grid(*, quick: bool) -> list[Training]:
    """Return all combinations: every detector in each setting before the next one; compiled ones last, as they take long."""
    settings = [(32, "fp32"), (256, "bf16"), (32, "bf16"), (256, "fp32")]
    if quick:
        return [Training(model, 4, "fp32", False) for model in MODELS] + [Training("lstm", 4, "bf16", False)]
    return [Training(model, *setting, compiled) for compiled in (False, True) for setting in settings for model in MODELS]


def training(setup: Setup, deadline: Deadline, report: Report) -> None:
    """Part: the speed of each detector on one repeated batch, and in training with the loader."""
    run_grid(
        training_grid(quick=setup.quick),
        lambda combination: measure(combination, setup, deadline, report),
        lambda combination: (combination.scenario, TOGETHER),
        setup,
        deadline,
        report,
        lambda combination: COMPILE_SECONDS if combination.compiled else 0.0,
    )


def measure(combination: Training, setup: Setup, deadline: Deadline, report: Report) -> None:
    """Measure one combination of the training part; no step waits for the device.

    Raises:
        RuntimeError: If the model was to be compiled, and cannot be.
    """
    scenario, seconds = combination.scenario, 0.1 if setup.quick else 1.2
    if setup.device != "cpu":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    if combination.compiled:
        torch.compiler.reset()  # or the models before would use up its limit of compilations
    loader, stepper, step = made_step(setup, combination)
    batches = endless(loader)
    # of several shapes; the first ones compile, and choose kernels
    for batch in islice(batches, QUICK_STEPS if setup.quick else WARM_STEPS):
        step(batch)
    wait_for(loader.device)
    if combination.compiled and stepper._engine is stepper.model:
        raise RuntimeError("the model cannot be compiled here, for the reason in the log")
    report.add(scenario, CEILING, "records/s", [ceiling(loader, step, batch, seconds / 3) for _ in range(3)])
    timer, begun = dp.StepTimer(device=loader.device), time.perf_counter()
    with sampled(loader) as use:
        for batch in timer(batches):
            step(batch)
            if time.perf_counter() - begun > seconds or deadline.passed:
                break
        wait_for(loader.device)
        passed = time.perf_counter() - begun
    report.add(scenario, TOGETHER, "records/s", [timer.records / passed], cache="warm", beside=CEILING)
    report.add(scenario, "host waits for data", "%", [100 * timer.wait_share], cache="warm")
    report.add(scenario, "device idle between steps", "%", [100 * timer.gap_share], cache="warm")
    if use:
        report.add(scenario, "device busy, by its driver", "%", [float(share) for share in use], cache="warm")
    if setup.device != "cpu":
        report.add(scenario, "peak memory of the device", "MB", [torch.cuda.max_memory_allocated() / 1e6])


def made_step(setup: Setup, combination: Training) -> tuple[Any, Stepper, Callable[[Any], torch.Tensor]]:
    """Return a loader of the detector's set, its stepper, and a function that takes one step on a batch without waiting."""
    data = read(setup, "[33, 1024] float16" if combination.model == "lstm" else "traces")
    config = TrainConfig(
        batch_size=combination.batch_size,
        precision=combination.precision,  # type: ignore[arg-type]
        compile=combination.compiled,
    )
    loader = make_loader(combination.model, data, config, "train", setup.device)
    target = find_target(data, loader.kind, splits=("train",))
    return loader, *trial(combination.model, loader, config, target, Processes(dp.World.detect()))


def ceiling(loader: Any, step: Callable[[Any], object], batch: Any, seconds: float) -> float:
    """Return records per second of steps on one batch. Waits for the device once, behind the last step."""

    def spent(steps: int) -> float:
        begun = time.perf_counter()
        for _ in range(steps):
            step(batch)
        wait_for(loader.device)
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
        loader, _, step = made_step(setup, Training(model, 4 if setup.quick else 32, "fp32", False))
        batches = endless(loader)
        for batch in islice(batches, 3):
            step(batch)
        wait_for(loader.device)
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

    def note(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if "synchronizing" not in str(message).lower() or "prototype" in str(message).lower():
            return
        own = [frame for frame in traceback.extract_stack() if not OWN_FOLDERS.isdisjoint(Path(frame.filename).parents)]
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
