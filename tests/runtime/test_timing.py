from __future__ import annotations

import time
from collections.abc import Iterator

from dali_pipeline.runtime.timing import StepTimer, peak_rss_bytes


def slow(count: int, seconds: float) -> Iterator[bytes]:
    for _ in range(count):
        time.sleep(seconds)
        yield b"four"


def test_waiting_and_computing_are_told_apart() -> None:
    timer = StepTimer()
    for _ in timer(slow(5, 0.02)):
        time.sleep(0.005)
    assert timer.steps == 5
    assert timer.records == 20
    assert timer.wait_seconds >= 0.1
    assert timer.compute_seconds >= 0.025
    assert timer.wait_seconds > timer.compute_seconds
    assert timer.wait_share == timer.wait_seconds / timer.seconds
    assert timer.records_per_second == timer.records / timer.seconds


def test_an_untouched_timer_is_zero() -> None:
    assert StepTimer().wait_share == StepTimer().records_per_second == StepTimer().bytes_per_second == 0


def test_peak_memory_is_in_bytes() -> None:
    block = bytearray(64 << 20)
    assert len(block) < peak_rss_bytes() < 1 << 36
