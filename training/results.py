"""Read and write metrics.json, and print it as a table. Imports nothing heavy, so a finished run is shown at once."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, cast

from rich import box
from rich.console import Console
from rich.table import Table

from dali_pipeline import UsageError
from dali_pipeline.storage.whole import write_whole
from training.config import METRICS
from training.folder import METRICS_NAME

# the detector that each is compared with, and what it adds to that one
ADDS = {"gnn_lstm": ("structure", "lstm"), "gvae_lstm": ("uncertainty", "gnn_lstm")}
HEADS = {"average_precision": "av. precision"}


def write_metrics(path: Path, results: Mapping[str, Any]) -> None:
    """Write metrics.json, whole or not at all."""
    write_whole(path, (json.dumps(results, indent=2) + "\n").encode())


def read_metrics(folder: Path) -> dict[str, Any]:
    """Return the results that `write_metrics` wrote; raise UsageError for any other file."""
    path = folder / METRICS_NAME
    try:
        results = cast(dict[str, Any], json.loads(path.read_text()))
        whole = bool(results) and all({*METRICS} <= result["test"].keys() for result in results.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise UsageError(f"{path} does not hold the metrics of a run; remove it, and the same command makes it again")
    return results


def summarise(runs: Sequence[Mapping[str, Any]], over: str) -> dict[str, Any]:
    """Return mean and standard deviation over runs, in the form of one run's metrics. over: `seeds` or `folds`."""
    summary: dict[str, Any] = {}
    for model in runs[0]:
        metrics: dict[str, Any] = {}
        for split in ("test", "val"):
            values = {name: [run[model][split][name] for run in runs] for name in METRICS}
            metrics[split] = {name: fmean(of_runs) for name, of_runs in values.items()}
            metrics[f"{split}_std"] = {name: stdev(of_runs) for name, of_runs in values.items()}
        metrics[over] = [run[model]["seed"] for run in runs] if over == "seeds" else list(range(len(runs)))
        if "against" in runs[0][model]:
            gains = [run[model]["against"]["difference"] for run in runs]
            metrics["against"] = {**runs[0][model]["against"], "difference": fmean(gains), "std": stdev(gains)}
            del metrics["against"]["interval"]
        summary[model] = metrics
    return summary


def print_table(results: Mapping[str, Mapping[str, Any]], title: str) -> None:
    """Print a row per model: test metrics, AUROC with its interval, threshold; for several runs mean ± standard deviation."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=200)  # piped output is never wrapped
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("model")
    several = any("test_std" in result for result in results.values())
    for name in METRICS:
        table.add_column(HEADS.get(name, name), justify="right")
    if not several:
        table.add_column("threshold", justify="right")
    for model, result in results.items():
        cells = [_cell(result, name) for name in METRICS]
        threshold = result.get("threshold")
        table.add_row(model, *cells, *([] if several else ["–" if threshold is None else f"{threshold:.3f}"]))
    console.print(table)
    for model, result in results.items():
        if "against" in result:
            print(said_of(model, result["against"]))


def _cell(result: Mapping[str, Any], name: str) -> str:
    if "test_std" in result:
        return f"{result['test'][name]:.3f} ± {result['test_std'][name]:.3f}"
    low, high = result["test_interval"][name]
    return f"{result['test'][name]:.3f}" + (f" [{low:.3f}, {high:.3f}]" if name == "auroc" else "")


def said_of(model: str, against: Mapping[str, Any]) -> str:
    """Return the gain of a detector in words, for example `structure: gnn_lstm +0.014 AUROC [-0.004, +0.032] beside lstm`."""
    gain = f"{against['difference']:+.3f} AUROC"
    if "std" in against:
        return f"{against['adds']}: {model} {gain} ± {against['std']:.3f} beside {against['model']}"
    low, high = against["interval"]
    note = "" if low > 0 or high < 0 else ", which these records cannot tell from none"
    return f"{against['adds']}: {model} {gain} [{low:+.3f}, {high:+.3f}] beside {against['model']}{note}"
