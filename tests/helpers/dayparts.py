"""Parts of a GPU day that fail in every way; a module of their own, so that their process starts without torch."""

from __future__ import annotations

import os
import signal
import subprocess
import time

from benchmarks.gpu_work import Deadline, Report, Setup, run_grid


def works(setup: Setup, deadline: Deadline, report: Report) -> None:
    report.facts(process=os.getpid())
    report.add("some", "ceiling", "records/s", [1.0, 2.0, 3.0])
    report.add("some", "with the loader", "records/s", [1.0], cache="warm", beside="ceiling")


def fails(setup: Setup, deadline: Deadline, report: Report) -> None:
    report.facts(before="told")
    raise ValueError("first line\nsecond line")


def crashes(setup: Setup, deadline: Deadline, report: Report) -> None:
    report.facts(before="told")
    os.kill(os.getpid(), signal.SIGSEGV)


def hangs(setup: Setup, deadline: Deadline, report: Report) -> None:
    report.facts(child=subprocess.Popen(["sleep", "60"]).pid)
    time.sleep(60)


def half(setup: Setup, deadline: Deadline, report: Report) -> None:
    def measure(number: int) -> None:
        if number == 1:
            raise RuntimeError("odd")
        report.add(f"number {number}", "itself", "units", [float(number)])

    run_grid([0, 1, 2], measure, lambda number: (f"number {number}", "itself"), setup, deadline, report)
