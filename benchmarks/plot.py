"""Draws docs/speed.png from results/*.csv: `python -m benchmarks.plot`. What was not measured is left out."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from benchmarks.harness import Row, rows_of
from dali_pipeline.cli import CONTEXT, run
from dali_pipeline.picture import COLOURS, save

OURS, PEER, LIMIT = COLOURS[2], COLOURS[3], COLOURS[1]
LIMITS = ("gather", "limit")
app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False, context_settings=CONTEXT)
Rows = list[Row]


def bars(axes: Axes, rows: Rows, title: str) -> None:
    """Records a second of every way, ours and others', fastest first; the limit as a line."""
    rates: dict[str, tuple[float, float, float]] = {}
    for row in rows:
        if row["median"] and "trial" not in row["measured"]:
            rates.setdefault(row["measured"], (float(row["median"]), float(row["lowest"]), float(row["highest"])))
        if (
            row["reference"] and row["reference"] not in rates and "workers=" in row["reference"]
        ):  # a peer, as ours was held against it
            rates[row["reference"]] = (float(row["reference_median"]),) * 3
    limit = next((rates.pop(name) for name in LIMITS if name in rates), None)
    names = sorted(rates, key=lambda name: rates[name][0])
    medians = [rates[name][0] for name in names]
    spread = [
        [max(0.0, rates[name][0] - rates[name][1]) for name in names],
        [max(0.0, rates[name][2] - rates[name][0]) for name in names],
    ]
    ours = ["engine" in name or "GraphLoader" in name for name in names]
    axes.barh(names, medians, xerr=spread, color=[OURS if one else PEER for one in ours], error_kw={"linewidth": 0.8})
    if limit is not None:
        axes.axvline(limit[0], color=LIMIT, linestyle="--", label="arrays in memory: the limit")
        axes.legend(fontsize=7, loc="lower right")
    axes.set(title=title, xlabel="records a second (median, lowest to highest)")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.tick_params(axis="y", labelsize=7)


def first_batches(axes: Axes, rows: Rows) -> None:
    """Seconds by number of shards."""
    for engine in ("dali", "torch"):
        for state, line in (("warm", "-"), ("cold", ":")):
            mine = [row for row in rows if row["measured"] == f"{engine} engine, first batch, {state}"]
            shards = [int(row["scenario"].split()[0].replace(",", "")) for row in mine]
            axes.plot(shards, [float(row["median"]) for row in mine], line, marker="o", label=f"{engine} engine, {state}")
    axes.set(title="first batch", xlabel="shards", ylabel="seconds from opening", xscale="log", ylim=(0, None))
    axes.legend(fontsize=7)


def memory(axes: Axes, rows: Rows) -> None:
    """Above the imports, by size of the data."""
    mine = [row for row in rows if row["measured"].endswith("memory above imports")]
    names = [f"{row['scenario']}, {row['measured'].split()[0]}" for row in mine]
    axes.bar(names, [float(row["median"]) for row in mine], color=OURS)
    if mine:
        axes.axhline(float(mine[0]["reference_median"]), color=LIMIT, linestyle="--", label="a window and 300 MB")
        axes.legend(fontsize=7)
    axes.set(title="peak memory of an epoch", ylabel="MB above imports")
    axes.tick_params(axis="x", labelsize=7)


@app.command()
def main(path: Annotated[Path, typer.Argument(help="The picture.")] = Path("docs/speed.png")) -> None:
    """Draw what results/ holds."""
    sequences, graphs, scale = (rows_of(name) for name in ("sequences", "graphs", "scale"))
    panels: list[Callable[[Axes], None]] = []
    for rows in (sequences, graphs):
        names = dict.fromkeys(row["scenario"] for row in rows)
        panels += [partial(bars, rows=[row for row in rows if row["scenario"] == name], title=name) for name in names]
    panels += [partial(first_batches, rows=scale), partial(memory, rows=scale)] if scale else []
    figure = Figure(figsize=(13, 4.2 * -(-len(panels) // 2)), layout="constrained")
    every = figure.subplots(-(-len(panels) // 2), 2, squeeze=False).flatten().tolist()
    for axes, panel in zip(every, panels, strict=False):
        panel(axes)
    for axes in every[len(panels) :]:
        axes.axis("off")
    save(figure, path)
    print(path)


if __name__ == "__main__":
    sys.exit(run(app, "benchmarks.plot"))
