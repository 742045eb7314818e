"""Results: metrics.json, and the table that shows it. Imports nothing heavy, so a finished run is shown at once."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, cast

from rich import box
from rich.console import Console
from rich.table import Table

from dali_pipeline import UsageError
from dali_pipeline.shard import write_whole
from training.config import METRICS
from training.folder import METRICS_NAME


def write_metrics(path: Path, results: Mapping[str, Any]) -> None:
    """metrics.json, whole or not at all."""
    write_whole(path, (json.dumps(results, indent=2) + "\n").encode())


def read_metrics(folder: Path) -> dict[str, Any]:
    """What `write_metrics` wrote. Raises UsageError for a file that is not that."""
    path = folder / METRICS_NAME
    try:
        found = cast(dict[str, Any], json.loads(path.read_text()))
        whole = bool(found) and all({*METRICS} <= result["test"].keys() for result in found.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise UsageError(f"{path} does not hold the metrics of a run; remove it, and the same command makes it again")
    return found


def summarise(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation over the seeds, in the shape of one seed's metrics."""
    return {
        model: {
            "test": {name: fmean(run[model]["test"][name] for run in runs) for name in METRICS},
            "test_std": {name: stdev(run[model]["test"][name] for run in runs) for name in METRICS},
            "seeds": [run[model]["seed"] for run in runs],
        }
        for model in runs[0]
    }


def print_table(results: Mapping[str, Mapping[str, Any]], title: str) -> None:
    """A row a model: the test metrics and the threshold; with several seeds mean ± standard deviation."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=200)  # piped output is never folded
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("model")
    for name in (*METRICS, "threshold"):
        table.add_column(name, justify="right")
    for model, result in results.items():
        spread = result.get("test_std", {})
        cells = [f"{result['test'][name]:.3f}" + (f" ± {spread[name]:.3f}" if spread else "") for name in METRICS]
        threshold = result.get("threshold")
        table.add_row(model, *cells, "–" if threshold is None else f"{threshold:.3f}")
    console.print(table)
