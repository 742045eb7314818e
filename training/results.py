"""Results: metrics.json, and the table that shows it. Imports nothing heavy, so a finished run is shown at once."""

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

# what a detector adds to the one that it is held against
ADDS = {"gnn_lstm": ("structure", "lstm"), "gvae_lstm": ("uncertainty", "gnn_lstm")}
HEADS = {"average_precision": "av. precision"}


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


def summarise(runs: Sequence[Mapping[str, Any]], over: str) -> dict[str, Any]:
    """Mean and standard deviation over runs, in the shape of one run's metrics. over: `seeds` or `folds`."""
    summary: dict[str, Any] = {}
    for model in runs[0]:
        one: dict[str, Any] = {}
        for split in ("test", "val"):
            values = {name: [run[model][split][name] for run in runs] for name in METRICS}
            one[split] = {name: fmean(each) for name, each in values.items()}
            one[f"{split}_std"] = {name: stdev(each) for name, each in values.items()}
        one[over] = [run[model]["seed"] for run in runs] if over == "seeds" else list(range(len(runs)))
        if "against" in runs[0][model]:
            gains = [run[model]["against"]["difference"] for run in runs]
            one["against"] = {**runs[0][model]["against"], "difference": fmean(gains), "std": stdev(gains)}
            del one["against"]["interval"]
        summary[model] = one
    return summary


def print_table(results: Mapping[str, Mapping[str, Any]], title: str) -> None:
    """A row a model: test metrics, AUROC with its interval, the threshold; of several runs mean ± standard deviation."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=200)  # piped output is never folded
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
    """What a detector adds, in words: `structure: gnn_lstm +0.014 AUROC [-0.004, +0.032] beside lstm`."""
    gain = f"{against['difference']:+.3f} AUROC"
    if "std" in against:
        return f"{against['adds']}: {model} {gain} ± {against['std']:.3f} beside {against['model']}"
    low, high = against["interval"]
    told = "" if low > 0 or high < 0 else ", which these records cannot tell from none"
    return f"{against['adds']}: {model} {gain} [{low:+.3f}, {high:+.3f}] beside {against['model']}{told}"
