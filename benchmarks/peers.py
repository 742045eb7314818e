"""Other loaders for comparison (peers), each in a separate process that measures on request.

They run in `.venv-peers` (`make peers`), as their pins clash with ours, or, where that is missing, with our own interpreter,
which has what some of them need. One that cannot run says why.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from benchmarks.harness import Results

ROOT = Path(__file__).parent.parent
READY = ROOT / ".venv-peers" / ".ready"  # which make writes last
START_SECONDS, SAMPLE_SECONDS, END_SECONDS = 600, 300, 10


class Peer:
    """A running peer, or the reason why it cannot run.

    label: its name, version and number of workers. trials: the samples by which that number was chosen. Both once it is ready.
    """

    def __init__(self, theme: str, name: str, records: Path, folder: Path, *, batch_size: int, seconds: float) -> None:
        folder.mkdir()
        spec = {"theme": theme, "peer": name, "records": str(records), "folder": str(folder)}
        # libraries keep caches at home, and two of them would ask a hub
        home = {"HOME": str(folder.parent), "HF_HUB_OFFLINE": "1", "DISABLE_TELEMETRY": "1"}
        self._log = folder.with_suffix(".log")
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [
                    str(READY.parent / "bin" / "python" if READY.exists() else sys.executable),
                    *("-m", "benchmarks.peer", json.dumps({**spec, "batch_size": batch_size, "seconds": seconds})),
                ],
                cwd=ROOT,
                env={**os.environ, **home},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                bufsize=0,
                start_new_session=True,  # so that it ends with all its workers
            )
        self.name = self.label = name
        self.why: str | None = None
        self.trials: dict[int, list[float]] = {}

    def await_ready(self) -> None:
        """Wait until it has written, checked and tried."""
        answer = self._answer(START_SECONDS)
        self.why, self.trials = answer.get("why"), dict(answer.get("trials", []))
        if self.trials:
            self.label = f"{self.name} {answer['version']}, workers={answer['workers']}"

    def sample(self) -> float:
        """Measure the records per second now; NaN, and `why`, if it has failed."""
        assert self._process.stdin is not None
        if self.why:
            return float("nan")
        with suppress(BrokenPipeError):
            self._process.stdin.write(b"go\n")
        answer = self._answer(SAMPLE_SECONDS)
        self.why = answer.get("why")
        return float(answer.get("rate", "nan"))

    def close(self) -> None:
        """End it and its workers."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()  # which it takes as its end
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(END_SECONDS)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process.stdout.close()

    def _answer(self, limit_seconds: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], limit_seconds)[0]:
            return {"why": f"no answer in {limit_seconds} seconds"}
        line = self._process.stdout.readline()
        if line:
            answer: dict[str, Any] = json.loads(line.replace(f"{ROOT}/".encode(), b""))  # rows name no folder of a machine
            return answer
        last = self._log.read_text().strip().split("\n")[-1]
        return {"why": f"it ended with {self._process.wait()}: {last}"[:300]}


@contextmanager
def running(
    theme: str, names: Iterable[str], records: Path, folder: Path, *, batch_size: int, seconds: float
) -> Iterator[list[Peer]]:
    """Start the peers one after the other, so that none disturbs another's trials; yield them by name."""
    with ExitStack() as stack:
        peers: list[Peer] = []
        for number, name in enumerate(names):
            where = folder / f"{theme}-peer-{number}"
            peer = Peer(theme, name, records, where, batch_size=batch_size, seconds=seconds)
            stack.callback(peer.close)
            peer.await_ready()
            print(f"{peer.label}: {peer.why or 'ready'}", flush=True)
            peers.append(peer)
        yield peers


def report(
    results: Results,
    scenario: str,
    rates: dict[str, list[float]],
    peers: list[Peer],
    limit: Callable[[str], str],
    ours: list[str],
) -> None:
    """Write a row for every way against its limit, for the peers' trials, and for ours against each peer."""
    limits = {limit(name) for name in rates}
    failed = {peer.label for peer in peers if peer.why}
    for name in (name for name in rates if name not in failed):
        reference = limit(name)
        against = rates[reference] if reference != name else None
        cache = "" if reference == name or name in limits else "warm"
        results.add(scenario, name, "records/s", rates[name], reference if against else "", against, cache=cache)
    for peer in peers:
        for workers, samples in peer.trials.items():
            results.add(scenario, f"{peer.name}, trial, workers={workers}", "records/s", samples, cache="warm")
        if peer.why:
            results.missing(scenario, peer.label, peer.why)
            continue
        for name in ours:
            results.add(scenario, name, "records/s", rates[name], peer.label, rates[peer.label], cache="warm")
