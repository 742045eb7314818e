"""Draw the pictures of docs/ from results/, and the tables of docs/results.md and findings.md: `python -m benchmarks.plot`.

Each theme is read from its newest file, `<theme>_<machine>_<date>.csv`. What was not measured is left out; without a GPU that
is gpu.png.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from benchmarks.detectortable import draw as draw_detectors
from benchmarks.detectortable import update_findings
from benchmarks.gpu_plot import gpu_panels
from benchmarks.harness import Row, results_path, rows_of
from benchmarks.tables import LABELS, is_ours, reach_of, spread, update_tables
from dali_pipeline.cli.app import new_app, run
from dali_pipeline.tools.picture import COLOURS, save

OURS, PEER, LIMIT = COLOURS[2], COLOURS[3], COLOURS[1]
STYLES = {"torch engine": (COLOURS[2], "o"), "dali engine": (COLOURS[0], "s"), "GraphLoader": (COLOURS[1], "^")}
LIMITS = ("gather", "slice and concatenate")
RESULTS, FINDINGS = Path("docs/results.md"), Path("docs/findings.md")
app = new_app()
Rows = list[Row]
Panel = Callable[[Axes], None]


def bars(axes: Axes, rows: Rows, title: str) -> None:
    """Draw the records per second of every loader, fastest first, and the limit as a line."""
    first: dict[str, Row] = {}
    for row in rows:
        if row["median"] and "trial" not in row["measured"]:
            first.setdefault(row["measured"], row)
    limit = next((float(first.pop(name)["median"]) for name in LIMITS if name in first), None)
    names = sorted(first, key=lambda name: float(first[name]["median"]))
    medians = [float(first[name]["median"]) for name in names]
    reach = [
        [max(0.0, (float(first[name]["median"]) - spread(first[name])[0])) for name in names],
        [max(0.0, (spread(first[name])[1] - float(first[name]["median"]))) for name in names],
    ]
    colours = [OURS if is_ours(name) else LIMIT if name in LABELS else PEER for name in names]
    axes.barh(names, medians, xerr=reach, color=colours, error_kw={"linewidth": 0.8})
    if limit is not None:
        axes.axvline(limit, color=LIMIT, linestyle="--", label="arrays in memory: the limit")
        axes.legend(fontsize=7, loc="lower right")
    axes.set(title=title, xlabel=f"records a second, warm (median, {reach_of(rows)})")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.tick_params(axis="y", labelsize=7)


def sizes(axes: Axes, rows: Rows) -> None:
    """Draw GB/s by the size of a record."""
    mine = [row for row in rows if row["scenario"].startswith("records of ")]
    for name, colour, marker in (
        ("gather", LIMIT, None),
        *((engine, *STYLES[engine]) for engine in ("torch engine", "dali engine")),
    ):
        of_name = [row for row in mine if row["measured"] == name]
        nbytes = [int(row["scenario"].split()[2]) for row in of_name]
        rates = [float(row["median"]) / 1e3 for row in of_name]
        label = "arrays in memory: the limit" if name == "gather" else name
        axes.plot(nbytes, rates, "--" if name == "gather" else "-", color=colour, marker=marker, label=label)
    axes.set(
        title="throughput by size of a record, warm", xlabel="bytes of a record", ylabel="GB/s", xscale="log", yscale="log"
    )
    axes.xaxis.set_major_formatter(EngFormatter(unit="B", sep=""))
    axes.legend(fontsize=7)


def workers(axes: Axes, rows: Rows) -> None:
    """Draw the records per second by number of workers, relative to none."""
    for kind, (colour, marker) in STYLES.items():
        for cache, line in (("warm", "-"), ("cold", ":")):
            mine = [row for row in rows if row["scenario"] == f"{kind}, shuffled" and row.get("cache") == cache]
            if not mine:
                continue
            alone = float(mine[0]["median"])
            counts = [int(row["measured"].removeprefix("workers=")) for row in mine]
            shares = [float(row["median"]) / alone for row in mine]
            axes.plot(counts, shares, line, color=colour, marker=marker, label=f"{kind}, {cache} ({alone:,.0f} with 0)")
            axes.set_xticks(counts)
    axes.axhline(1, color=PEER, linewidth=0.8)
    axes.set(title="scaling with workers", xlabel="num_workers", ylabel="records a second, of those with 0", ylim=(0, None))
    _legend_above(axes)


def memory(axes: Axes, rows: Rows) -> None:
    """Draw the memory above that of the imports, by size of the data."""
    mine = [row for row in rows if row["measured"].endswith("memory above imports")]
    for kind in ("torch engine", "dali engine"):
        of_kind = [row for row in mine if row["measured"].startswith(kind)]
        gigabytes = [float(row["scenario"].split()[-2]) for row in of_kind]
        colour, marker = STYLES[kind]
        axes.plot(gigabytes, [float(row["median"]) for row in of_kind], color=colour, marker=marker, label=kind)
    if mine:
        axes.axhline(float(mine[0]["reference_median"]), color=LIMIT, linestyle="--", label="a window and 300 MB")
    axes.set(title="peak memory of an epoch", xlabel="GB of data", ylabel="MB above imports, all processes", ylim=(0, None))
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.legend(fontsize=7)


def first_batches(axes: Axes, rows: Rows) -> None:
    """Draw seconds by number of shards."""
    for kind in ("torch engine", "dali engine"):
        for state, line in (("warm", "-"), ("cold", ":")):
            mine = [row for row in rows if row["measured"] == f"{kind}, first batch, {state}"]
            shards = [int(row["scenario"].split()[0].replace(",", "")) for row in mine]
            colour, marker = STYLES[kind]
            seconds = [float(row["median"]) for row in mine]
            axes.plot(shards, seconds, line, color=colour, marker=marker, label=f"{kind}, {state}")
    axes.set(title="first batch", xlabel="shards", ylabel="seconds from opening", xscale="log", ylim=(0, None))
    axes.legend(fontsize=7)


def layers(axes: Axes, rows: Rows) -> None:
    """Draw the bytes that a later epoch reads from the disk, by number of layers."""
    scenarios = list(dict.fromkeys(row["scenario"] for row in rows))
    names = ["all layers", *(f"{part} of the layers" for part in ("a quarter", "one"))]
    for number, scenario in enumerate(scenarios):
        mine = [row for row in rows if row["scenario"] == scenario and row["measured"].endswith("second epoch, read")]
        at = [place + (number - (len(scenarios) - 1) / 2) * 0.27 for place in range(len(mine))]
        axes.bar(at, [float(row["median"]) for row in mine], 0.25, color=COLOURS[number % len(COLOURS)], label=scenario)
    axes.set_xticks(range(3), names)
    axes.set(title="bytes read from the disk with `layers=`, later epochs", ylabel="MB")
    _legend_above(axes)


def ceilings(axes: Axes, rows: Rows) -> None:
    """Draw training and its ceiling."""
    names = list(dict.fromkeys(row["scenario"] for row in rows))
    for number, (measured, colour) in enumerate((("one batch again and again", LIMIT), ("with the loader", OURS))):
        mine = {row["scenario"]: float(row["median"]) for row in rows if row["measured"] == measured}
        axes.bar(
            [place + 0.4 * number - 0.2 for place in range(len(mine))], list(mine.values()), 0.38, color=colour, label=measured
        )
    axes.set_xticks(range(len(names)), names)
    axes.set(title="training, and its ceiling", ylabel="records a second")
    axes.legend(fontsize=7)


def _legend_above(axes: Axes) -> None:
    """Place the legend in the free third of the height."""
    axes.set_ylim(0, 1.4 * axes.get_ylim()[1])
    axes.legend(fontsize=7, loc="upper left", ncols=2)


def speed_panels() -> Iterator[Panel]:
    """Yield a panel for each scenario of sequences and graphs."""
    for theme in ("sequences", "graphs"):
        rows = rows_of(theme)
        for name in dict.fromkeys(row["scenario"] for row in rows):
            yield partial(bars, rows=[row for row in rows if row["scenario"] == name], title=name)


def growth_panels() -> Iterator[Panel]:
    """Yield a panel for each of the other measurements."""
    themes = (("scaling", [sizes, workers]), ("scale", [memory, first_batches]), ("layers", [layers]), ("training", [ceilings]))
    for theme, panels in themes:
        if rows := rows_of(theme):
            yield from (partial(panel, rows=rows) for panel in panels)


def draw(panels: list[Panel], path: Path, width: int, height: float) -> None:
    """Draw panels in rows; do nothing if there are none."""
    if not panels:
        return
    lines = -(-len(panels) // width)
    figure = Figure(figsize=(6.5 * width, height * lines), layout="constrained")
    every = figure.subplots(lines, width, squeeze=False).flatten().tolist()
    for axes, panel in zip(every, panels, strict=False):
        panel(axes)
    for axes in every[len(panels) :]:
        axes.axis("off")
    save(figure, path)
    print(path)


@app.command()
def main(folder: Annotated[Path, typer.Argument(help="Folder for the pictures.")] = Path("docs")) -> None:
    """Draw the results in results/; if the pictures go to docs, also write the tables of docs/results.md and findings.md."""
    draw(list(speed_panels()), folder / "speed.png", 2, 4.2)
    draw(list(growth_panels()), folder / "growth.png", 2, 3.6)
    draw(list(gpu_panels()), folder / "gpu.png", 2, 5.5)
    detectors = rows_of("detectors")
    if detectors:
        draw_detectors(detectors, folder / "detectors.png")
        print(folder / "detectors.png")
    if folder == Path("docs"):
        update_tables(RESULTS)
        print(RESULTS)
        if (path := results_path("detectors")) is not None:
            update_findings(FINDINGS, detectors, f"../benchmarks/results/{path.name}")
            print(FINDINGS)


if __name__ == "__main__":
    sys.exit(run(app, "benchmarks.plot"))
