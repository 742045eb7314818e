"""Number of threads that torch computes with on a CPU, for models whose steps take milliseconds."""

from __future__ import annotations

import os

from dali_pipeline.errors import UsageError
from dali_pipeline.runtime.container import allowed_cores

CORES_PER_THREAD, MOST_THREADS = 4, 4  # measured: docs/log.md, 2026-11-28


def wait_passively() -> None:
    """Make OpenMP's threads sleep while they wait, unless the user chose otherwise; call it before torch loads.

    By default a waiting thread spins, and so takes the core that another thread needs.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def default_threads() -> int:
    """Return the number of torch's threads in this process: OMP_NUM_THREADS, or a fixed function of its cores.

    It is a quarter of the cores, at most 4. Parts of a small step are too short to be shared, and on a shared machine or in a
    container all parts wait for the one whose core is busy.
    """
    variable = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    if variable.strip().isdecimal() and int(variable) > 0:
        return int(variable)
    processes = max(1, int(os.environ.get("LOCAL_WORLD_SIZE") or 1))
    return int(min(MOST_THREADS, max(1, allowed_cores() / processes // CORES_PER_THREAD)))


def thread_counts() -> list[int]:
    """Return the numbers of threads worth trying: 1, 2, 4 … up to the cores of this process."""
    processes = max(1, int(os.environ.get("LOCAL_WORLD_SIZE") or 1))
    cores = max(1, int(allowed_cores() / processes))
    return [count for count in (1, 2, 4, 8, 16, 32, 64) if count <= cores]


def parse_threads(text: str | None) -> int | str | None:
    """Read `auto`, a number of at least 1, or None. Raises UsageError for anything else."""
    if text is None or text == "auto":
        return text
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise UsageError(f"threads is {text!r}; expected auto or a whole number of at least 1")
    return int(text)
