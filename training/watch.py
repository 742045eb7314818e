"""Watch: show the progress of a training, and say at its end what limits the speed."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from rich.progress import TextColumn

from dali_pipeline import StepTimer, Trace
from dali_pipeline.runtime.progress import progress_bar

DRAW_SECONDS = 0.5
INPUT_BOUND = 0.2  # a training that waits for a larger share of the time is called input-bound


class Watch(AbstractContextManager["Watch"]):
    """A progress bar: loss of this process's records, rates of all processes, share of the time waiting for data, GPU use.

    It reads the loss from the device only when it draws, which is twice per second on a terminal.
    """

    def __init__(
        self, name: str, total_steps: int, timer: StepTimer, device: torch.device, world_size: int, show: bool
    ) -> None:
        self._timer, self._device, self._world_size = timer, device, world_size
        self._bar = progress_bar(TextColumn("{task.fields[said]}"))
        self._bar.disable = self._bar.disable or not show
        self._task = self._bar.add_task(name, total=total_steps, said="")
        self._drawn = 0.0

    def step(self, before: int, done: int, share: torch.Tensor) -> None:
        """Update the bar. before, done: steps of earlier epochs, and of this one; share: return value of `Stepper.step`."""
        if self._bar.disable or time.monotonic() - self._drawn < DRAW_SECONDS:
            return
        self._drawn = time.monotonic()
        records, gigabytes = speed(self._timer, self._world_size)
        said = [f"loss {float(share) * self._world_size:.4f}", f"{records:,.0f} records/s", f"{gigabytes:.2f} GB/s"]
        on_gpu = self._device.type == "cuda"
        said.append(f"{self._timer.gap_share if on_gpu else self._timer.wait_share:.0%} waiting")
        used = gpu_use(self._device)
        said += [] if used is None else [f"GPU {used}%"]
        self._bar.update(self._task, completed=before + done, said=", ".join(said))

    def __enter__(self) -> Watch:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._bar.stop()


def speed(timer: StepTimer, world_size: int) -> tuple[float, float]:
    """Return records and gigabytes per second of all processes: those of this one times their number."""
    return timer.records_per_second * world_size, timer.bytes_per_second * world_size / 1e9


def verdict(timer: StepTimer, world_size: int, device: torch.device) -> str:
    """Return a sentence that says whether the input limits the speed, by the GPU's gaps between steps, and what to do."""
    if timer.gap_share >= INPUT_BOUND:
        advice = "input-bound: try more --num-workers, a larger --batch-size, fewer --layers, or a faster disk"
    elif device.type == "cuda":
        advice = "not input-bound: --precision bf16, --compile or a faster GPU would help, a faster disk would not"
    else:
        advice = "not input-bound: more cores or a GPU would help, a faster disk would not"
    records, gigabytes = speed(timer, world_size)
    apart = f"(the first batch, {timer.start_seconds:.1f} s, apart)"
    waiting = f"{timer.gap_share:.0%} of the time waiting for data {apart}"
    if device.type == "cuda":
        gap, host = f"{timer.gap_share:.0%}", f"{timer.steady_wait_share:.0%}"
        waiting = f"the GPU idle {gap} of the time between steps, the host waiting for data {host} {apart}"
    return f"{records:,.0f} records/s, {gigabytes:.2f} GB/s, {waiting}: {advice}"


def traced(path: Path | None, rank: int) -> AbstractContextManager[Any]:
    """Return a trace of the block if `path` is given; later processes add their rank to the file name."""
    if path is None:
        return nullcontext()
    return Trace(path.with_stem(f"{path.stem}-{rank}") if rank else path)


def gpu_use(device: torch.device) -> int | None:
    """Return the percentage of the last second in which the GPU was busy; None if there is no GPU or no such figure."""
    if device.type != "cuda":
        return None
    try:
        return torch.cuda.utilization(device)
    except Exception:  # the driver's errors, which differ between systems
        return None
