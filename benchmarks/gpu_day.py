"""Measure this project on a GPU machine in under ten minutes: `python -m benchmarks.gpu_day`.

python -m benchmarks.gpu_day                        # into benchmarks/results, or into the folder that $OUT names
python -m benchmarks.gpu_day --parts loaders        # some parts alone
python -m benchmarks.gpu_day --dry-run              # everything small and on the CPU, in a minute: does the script itself work?

Every part has its share of the time, what one leaves goes to those behind it, and one that fails, crashes or hangs is told in
a line while the others go on. gpu_day.json is written anew with everything that is told, so that it is whole whenever the run
ends. Each theme's rows go to `gpu_<theme>_<machine>_<date>.csv` beside it, which `make plots` draws.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from benchmarks import harness
from benchmarks.gpu_work import Message, Setup, Worker, reason
from dali_pipeline.cli.app import new_app, run
from dali_pipeline.errors import UsageError
from dali_pipeline.storage.whole import write_whole

GRACE_SECONDS = 20.0  # behind a deadline, for the measurement under way
DRY_SECONDS = 600.0  # small sets, not short budgets, make a dry run short
app = new_app()


class Part(NamedTuple):
    """A part: its weight in the division of time, and its function as `module:name`."""

    name: str
    weight: float
    target: str


PARTS = (
    Part("versions", 30, "benchmarks.gpu_parts:versions"),
    Part("tests", 90, "benchmarks.gpu_parts:tests"),
    Part("limits", 40, "benchmarks.gpu_parts:limits"),
    Part("sets", 40, "benchmarks.gpu_sets:make_all"),
    Part("loaders", 150, "benchmarks.gpu_loaders:loaders"),
    Part("training", 150, "benchmarks.gpu_training:training"),
    Part("waits", 30, "benchmarks.gpu_training:waits"),
)


class Rows(harness.Results):
    """Rows of one theme in a folder, under the command that was run."""

    def __init__(self, theme: str, folder: Path, versions: dict[str, Any]) -> None:
        super().__init__(theme, [])
        self.path = folder / self.path.name
        names = {"torch": "torch", "numpy": "numpy", "pyg": "torch-geometric", "dali": "nvidia-dali"}
        self.facts |= {
            "command": self.facts["command"].replace(f"benchmarks.{theme}", "benchmarks.gpu_day", 1),
            "versions": ", ".join(
                [self.facts["versions"], *(f"{names[key]} {versions[key]}" for key in names if key in versions)]
            ),
        }


class Findings:
    """All messages of the parts: as JSON, rewritten with every message, and as rows of CSV files.

    Args:
        path: Of the JSON.
        folder: Of the CSV files.
        about: Facts of the run, in JSON types.
    """

    def __init__(self, path: Path, folder: Path, about: dict[str, Any]) -> None:
        self._path, self._folder = path, folder
        self._rows: dict[str, Rows] = {}
        self.parts: dict[str, dict[str, Any]] = {}
        self._found = {**about, "parts": self.parts}

    def begin(self, part: str, budget_seconds: float) -> None:
        """Open a part."""
        self.parts[part] = {
            "outcome": "begun",
            "why": "",
            "budget_seconds": round(budget_seconds, 1),
            "seconds": None,
            "facts": {},
            "rows": [],
            "failures": [],
            "left_out": 0,
            "combinations": None,
        }
        self.write()

    def take(self, part: str, message: Message) -> None:
        """Store a message of a part."""
        state = self.parts[part]
        if "facts" in message:
            state["facts"] |= message["facts"]
        elif "left_out" in message:
            state["left_out"], state["combinations"] = message["left_out"]["count"], message["left_out"]["total"]
        elif "failed" in message:
            state["failures"].append(message["failed"])
        else:
            state["rows"].append(message["row"])
        self.write()
        try:
            self._tabulate(part, message)
        except Exception as error:  # the JSON has it, and no table is worth the rest of the day
            state["no_csv"] = reason(error)

    def _tabulate(self, part: str, message: Message) -> None:
        if not message.keys() & {"row", "failed"}:
            return
        versions = self.parts.get("versions", {}).get("facts", {})
        if part not in self._rows:
            self._rows[part] = Rows(f"gpu_{part}", self._folder, versions)
        if "failed" in message:
            self._rows[part].missing(**message["failed"])
            return
        row = message["row"]
        same = (row["scenario"], row["beside"], row["unit"])
        others = (other for other in self.parts[part]["rows"] if (other["scenario"], other["measured"], other["unit"]) == same)
        against = next(others, None)
        beside, values = (row["beside"], against["values"]) if against else ("", None)
        self._rows[part].add(row["scenario"], row["measured"], row["unit"], row["values"], beside, values, row["cache"])

    def end(self, part: str, seconds: float, error: str) -> None:
        """Close a part. error: why it failed, empty if it did not; single measurements that failed make it fail, too."""
        state = self.parts[part]
        if not error and state["failures"]:
            first = state["failures"][0]
            which = f"{first['scenario']}: {first['measured']}"
            error = f"{len(state['failures'])} measurements failed, the first one ({which}) with {first['why']}"
        state |= {"outcome": "failed" if error else "worked", "why": error, "seconds": round(seconds, 1)}
        self.write()

    def line(self, part: str) -> str:
        """Return a part's outcome in a line."""
        state = self.parts[part]
        left_out = f", {state['left_out']} of {state['combinations']} combinations left out" if state["left_out"] else ""
        return f"{part}: {state['outcome']} after {state['seconds']} s{left_out}{': ' if state['why'] else ''}{state['why']}"

    @property
    def failed(self) -> bool:
        """Whether a part did."""
        return any(found["outcome"] != "worked" for found in self.parts.values())

    def write(self) -> None:
        """Write the JSON, whole or not at all."""
        write_whole(self._path, json.dumps(self._found, indent=1).encode())

    def table(self) -> str:
        """Return the parts as a table of text."""
        lines = [f"{'part':<10}{'seconds':>8}{'budget':>8}{'rows':>6}{'left out':>10}  outcome"]
        for name, found in self.parts.items():
            left_out = f"{found['left_out']} of {found['combinations']}" if found["left_out"] else "0"
            outcome = f"{found['outcome']}{': ' if found['why'] else ''}{found['why']}"
            seconds, budget = found["seconds"] or 0, found["budget_seconds"]
            lines.append(f"{name:<10}{seconds:>8.1f}{budget:>8.0f}{len(found['rows']):>6}{left_out:>10}  {outcome}")
        return "\n".join(lines)


def run_parts(parts: Sequence[Part], setup: Setup, findings: Findings, total_seconds: float) -> None:
    """Run parts in order, each with its share of the time that is left.

    Args:
        parts: What to run.
        setup: Where, and how much.
        findings: Takes what they tell.
        total_seconds: For all of them. No part goes on behind it, whatever it does.
    """
    end = time.monotonic() + total_seconds
    worker = Worker(setup)
    try:
        for number, part in enumerate(parts):
            begun = time.monotonic()
            weights = sum(other.weight for other in parts[number:])
            seconds = max(0.0, end - begun - GRACE_SECONDS) * part.weight / weights
            findings.begin(part.name, seconds)
            print(f"{part.name}: {seconds:.0f} s at most", flush=True)
            if seconds:
                most = min(seconds + GRACE_SECONDS, end - begun)
                error = worker.run(part.target, seconds, most, lambda message, name=part.name: findings.take(name, message))  # type: ignore[misc]
            else:
                error = "no time was left"
            findings.end(part.name, time.monotonic() - begun, error)
            for name, fact in findings.parts[part.name]["facts"].items():
                if name != "output" or error:
                    print(f"  {name}: {fact}", flush=True)
            print(findings.line(part.name), flush=True)
    finally:
        worker.stop()


@app.command()
def main(
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Run a small version of every part on the CPU, in about a minute.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for JSON and CSV files. [default: $OUT or benchmarks/results]", show_default=False),
    ] = None,
    json_path: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="JSON file to write. [default: gpu_day.json in --out]", show_default=False),
    ] = None,
    parts: Annotated[str, typer.Option(metavar="LIST", help="Parts to run, for example versions,tests.")] = "all",
    seconds: Annotated[float, typer.Option(min=30, help="Time limit for all parts together, in seconds.")] = 570,
    folder: Annotated[
        Path | None,
        typer.Option(help="Folder for the temporary data sets. [default: a temporary folder]", show_default=False),
    ] = None,
) -> None:
    """Measure all parts, the most important first. Exits 0 if all worked, 1 if one failed, 2 if nothing can be run."""
    chosen = _chosen(parts)
    if dry_run:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the checks that take a GPU where there is one, too
    elif not has_gpu():
        raise UsageError("there is no GPU that torch can use; --dry-run runs everything on the CPU")
    where = out or (Path(os.environ["OUT"]) if os.environ.get("OUT") else None)
    if dry_run and where is not None and where.resolve() == (Path(__file__).parent / "results").resolve():
        raise UsageError(f"a dry run measures nothing that {where} is for; name another folder with --out")
    where = where or (Path(tempfile.mkdtemp(prefix="gpu_day-")) if dry_run else harness.RESULTS)
    where.mkdir(parents=True, exist_ok=True)
    path = json_path or where / "gpu_day.json"
    with tempfile.TemporaryDirectory(dir=folder, prefix="gpu_sets-", ignore_cleanup_errors=True) as scratch:
        setup = Setup(device="cpu" if dry_run else "cuda", folder=Path(scratch), quick=dry_run)
        about = {"begun": datetime.now(UTC).isoformat(timespec="seconds"), "device": setup.device, "dry_run": dry_run}
        findings = Findings(path, where, about)
        run_parts(chosen, setup, findings, DRY_SECONDS if dry_run else seconds)
    print(f"\n{findings.table()}\n{path}", flush=True)
    raise typer.Exit(1 if findings.failed else 0)


def _chosen(names: str) -> list[Part]:
    known = {part.name: part for part in PARTS}
    asked = list(known) if names == "all" else names.split(",")
    for name in asked:
        if name not in known:
            raise typer.BadParameter(f"{name!r}; expected some of {','.join(known)}", param_hint="--parts")
    return [known[name] for name in known if name in asked]


def has_gpu() -> bool:
    """Return whether torch can use a GPU."""
    with suppress(ImportError):
        import torch

        return torch.cuda.is_available()
    return False


if __name__ == "__main__":
    sys.exit(run(app, "benchmarks.gpu_day"))
