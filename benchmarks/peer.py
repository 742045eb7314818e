"""Run one peer in a separate process: `python -m benchmarks.peer SPEC`, started by benchmarks/peers.py.

It writes the records in the peer's format, and for each number of workers runs an epoch that must bring every record once, as
it was written, and two timed samples. Its first line on standard output tells them, or why it cannot; the number that did best
stays, its workers kept as the library keeps them. From then on every line that comes in asks for one sample more.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from benchmarks.harness import rate

TRIALS = 2  # of each number of workers; the faster counts
Batch = Mapping[str, Any]
Epochs = Callable[[], Iterator[Batch]]  # each call is another epoch


class Records(Protocol):
    """Records that a peer writes, and with which its batches are compared."""

    def __len__(self) -> int: ...

    def check(self, batch: Batch) -> list[int]:
        """Return the ids of a batch after checking that it holds the written values."""


class Way(ABC):
    """Writes and reads with one library."""

    package: str  # whose version is told
    workers: tuple[int, ...] = (0, 2, 4)  # what is tried

    @abstractmethod
    def write(self, folder: Path, records: Any) -> None:
        """Write the records to an empty folder."""

    @abstractmethod
    def loader(self, folder: Path, batch_size: int, workers: int) -> Epochs:
        """Yield shuffled epochs."""


def checked(way: Way, records: Records, folder: Path, batch_size: int, workers: int) -> Epochs:
    """Return a loader after checking that its first epoch delivers every record once, as written."""
    epochs, came = way.loader(folder, batch_size, workers), np.zeros(len(records), np.int64)
    for batch in epochs():
        np.add.at(came, records.check(batch), 1)
    if not (came == 1).all():
        raise ValueError(f"of {len(came)} records {(came == 0).sum()} did not come, {(came > 1).sum()} came more than once")
    return epochs


def sample(epochs: Epochs, seconds: float) -> float:
    """Return the records per second."""
    return rate(lambda: sum(len(batch["label"]) for batch in epochs()), seconds)


def measured(way: Way, records: Records, spec: dict[str, Any]) -> tuple[dict[int, list[float]], int, Epochs]:
    """Return samples of every number of workers, the best number, and a loader with it."""
    folder, trials = Path(spec["folder"]), {}
    way.write(folder, records)
    os.sync()
    for workers in way.workers:
        epochs = checked(way, records, folder, spec["batch_size"], workers)
        trials[workers] = [sample(epochs, spec["seconds"]) for _ in range(TRIALS)]
        del epochs  # ends its workers
    best = max(trials, key=lambda workers: max(trials[workers]))
    return trials, best, way.loader(folder, spec["batch_size"], best)


def main(spec: dict[str, Any]) -> None:
    """Answer in JSON lines on standard output; other prints go to standard error."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    try:
        theme = importlib.import_module(f"benchmarks.peers_{spec['theme']}")
        way: Way = theme.PEERS[spec["peer"]]()
        trials, best, epochs = measured(way, theme.Records(Path(spec["records"])), spec)
    except Exception as error:  # whatever keeps a peer from running is told in its row
        last = str(error).strip().split("\n")[-1]  # of a worker's error that is its message, behind a traceback
        print(json.dumps({"why": f"{type(error).__name__}: {last}"[:300]}), file=answers)
        raise
    print(json.dumps({"version": version(way.package), "workers": best, "trials": list(trials.items())}), file=answers)
    for _ in sys.stdin:
        print(json.dumps({"rate": sample(epochs, spec["seconds"])}), file=answers)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
