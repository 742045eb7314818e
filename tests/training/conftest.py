"""What the tests of a run share."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

import training.prepare as prepare_module


@pytest.fixture
def restored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Signal handlers as they were, and `runs/` in the test's own folder."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    monkeypatch.setattr(prepare_module, "RUNS_FOLDER", tmp_path / "runs")
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def no_baselines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs without baselines, which take as long as the training of so few records."""
    monkeypatch.setattr("training.run.fitted_baselines", lambda *_: (None, {}))
