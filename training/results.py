"""Read and write metrics.json, and print it as a table. Imports nothing heavy, so a finished run is shown at once."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from math import isfinite, nan
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, cast

from rich import box
from rich.console import Console
from rich.table import Table

from dali_pipeline import UsageError
from dali_pipeline.storage.whole import write_whole
from training.config import METRICS, metrics_of
from training.folder import BASELINES_NAME, METRICS_NAME

# the detector that each is compared with, and what it adds to that one
ADDS = {"gnn_lstm": ("structure", "lstm"), "gvae_lstm": ("uncertainty", "gnn_lstm")}
HEADS = {"average_precision": "av. precision", "fpr95": "FPR at 95 % TPR", "r2": "R2"}
SHOWN = {"auroc": "AUROC", "r2": "R2"}


def write_metrics(path: Path, results: Mapping[str, Any]) -> None:
    """Write metrics.json, whole or not at all."""
    write_whole(path, (json.dumps(results, indent=2) + "\n").encode())


def read_metrics(folder: Path, name: str = METRICS_NAME) -> dict[str, Any]:
    """Return the results that `write_metrics` wrote; raise UsageError for any other file."""
    path = folder / name
    try:
        results = cast(dict[str, Any], json.loads(path.read_text()))
        whole = bool(results) and all(
            {*metrics_of(result.get("task", "binary"))} <= result["test"].keys() for result in results.values()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise UsageError(f"{path} does not hold the metrics of a run; remove it, and the same command makes it again")
    return results


def summarise(runs: Sequence[Mapping[str, Any]], over: str, differences: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
    """Return mean and standard deviation over runs, in the form of one run's metrics.

    Args:
        runs: Metrics of each run. A baseline that one run alone has keeps that run's numbers.
        over: `seeds` or `folds`.
        differences: Rows of `paired`, whose intervals know runs and questions.
    """
    summary: dict[str, Any] = {}
    by_pair = {(row["model"], row["beside"]): row for row in differences}
    for model in dict.fromkeys(name for run in runs for name in run):
        own = [run[model] for run in runs if model in run]
        first = own[0]
        metrics: dict[str, Any] = {name: first[name] for name in ("task", "target") if name in first}
        for split in ("test", "val"):
            values = {name: [run[split][name] for run in own] for name in metrics_of(first.get("task", "binary"))}
            metrics[split] = {name: fmean(of_runs) for name, of_runs in values.items()}
            metrics[f"{split}_std"] = {name: spread(of_runs) for name, of_runs in values.items()}
        metrics["runs"] = len(own)
        if "seed" in first:
            metrics[over] = [run["seed"] for run in own] if over == "seeds" else list(range(len(own)))
        if all("against" in run for run in own):
            gains = [run["against"]["difference"] for run in own]
            metrics["against"] = {
                **first["against"],
                "difference": fmean(gains),
                "std": stdev(gains) if len(gains) > 1 else 0.0,
            }
            del metrics["against"]["interval"]
            if row := by_pair.get((model, first["against"]["model"])):
                metrics["against"] |= {"interval": row["interval"], "trainings": row["trainings"]}
        summary[model] = metrics
    return summary


def read_baselines(folder: Path) -> dict[str, Any]:
    """Return the metrics of the baselines, in the form of `read_metrics`; none if the run has no such file."""
    try:
        return read_metrics(folder, BASELINES_NAME)
    except UsageError:
        return {}


def spread(values: Sequence[float]) -> float:
    """Return the standard deviation; 0 of one value, NaN if one is no finite number."""
    if not all(map(isfinite, values)):
        return nan
    return stdev(values) if len(values) > 1 else 0.0


def print_table(
    results: Mapping[str, Mapping[str, Any]], title: str, baselines: Mapping[str, Mapping[str, Any]] | None = None
) -> None:
    """Print a row per model: test metrics, the main one with its interval, threshold; for several runs mean ± deviation.

    Args:
        results: Metrics by model.
        title: Title of the table.
        baselines: Metrics of further rows, below a line. Default: none.
    """
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=200)  # piped output is never wrapped
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("model")
    several = any("test_std" in result for result in results.values())
    names = metrics_of(next(iter(results.values())).get("task", "binary"))
    with_threshold = not several and names == METRICS
    for name in names:
        table.add_column(HEADS.get(name, name), justify="right")
    if with_threshold:
        table.add_column("threshold", justify="right")
    for model, result in (*results.items(), *(baselines or {}).items()):
        if model == next(iter(baselines or ()), None):
            table.add_section()
        threshold = result.get("threshold")
        shown = f"{threshold:.3f}" if isinstance(threshold, float) else "by label" if threshold else "–"
        table.add_row(model, *(_cell(result, name) for name in names), *([shown] if with_threshold else []))
    console.print(table)
    for model, result in results.items():
        if "against" in result:
            print(said_of(model, result["against"]))


def _cell(result: Mapping[str, Any], name: str) -> str:
    if result.get("runs", 1) > 1:
        return f"{result['test'][name]:.3f} ± {result['test_std'][name]:.3f}"
    low, high = result.get("test_interval", {}).get(name, (0.0, 0.0))
    return f"{result['test'][name]:.3f}" + (f" [{low:.3f}, {high:.3f}]" if name in SHOWN and "test_interval" in result else "")


def said_of(model: str, against: Mapping[str, Any]) -> str:
    """Return the gain of a detector in words, for example `structure: gnn_lstm +0.014 AUROC [-0.004, +0.032] beside lstm`.

    Whatever one training shows, it says that another may show something else.
    """
    gain = f"{against['difference']:+.3f} {against.get('metric', 'AUROC')}"
    if "std" in against:
        gain += f" ± {against['std']:.3f}"
    if "interval" not in against:
        return f"{against['adds']}: {model} {gain} beside {against['model']}"
    low, high = against["interval"]
    trainings = against.get("trainings", 1)
    told = "" if low > 0 or high < 0 else "; these records cannot tell it from none"
    if trainings == 1:
        known = "of one training each, so the interval knows the questions and not the training: --seeds 5 knows both"
        return f"{against['adds']}: {model} {gain} [{low:+.3f}, {high:+.3f}] beside {against['model']}{told} ({known})"
    told = told and "; these records and trainings cannot tell it from none"
    return f"{against['adds']}: {model} {gain} [{low:+.3f}, {high:+.3f}] beside {against['model']}{told}"


def print_differences(differences: Sequence[Mapping[str, Any]]) -> None:
    """Print a row per pair of models: the mean difference over the runs, with the interval over questions and runs."""
    metric = differences[0]["metric"]
    print(f"Differences of {metric} on test, paired by record; intervals over questions and trainings")
    table = Table(box=box.SIMPLE_HEAD)
    for head in ("model", "beside"):
        table.add_column(head)
    for head in ("difference", "95 % interval", "± over runs"):
        table.add_column(head, justify="right")
    for row in differences:
        low, high = row["interval"]
        table.add_row(
            row["model"], row["beside"], f"{row['difference']:+.3f}", f"[{low:+.3f}, {high:+.3f}]", f"{row['std']:.3f}"
        )
    console = Console(highlight=False)
    (console if console.is_terminal else Console(highlight=False, width=200)).print(table)
