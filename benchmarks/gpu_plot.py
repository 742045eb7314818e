"""Draw docs/gpu.png: loaders with the link to the device, training with its ceiling (benchmarks/gpu_day.py)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial

from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter

from benchmarks.harness import Row, rows_of
from dali_pipeline.tools.picture import COLOURS

LINES = (*COLOURS, "#009E73", "#CC79A7")  # two more of Okabe and Ito's
LIMITS = {"host to device, pinned": "--", "host to device, pageable": ":"}
TOGETHER, IDLE = "with the loader", "device idle between steps"
BARS = {"ceiling": COLOURS[1], TOGETHER: COLOURS[2]}
Rows = list[Row]


def gpu_panels() -> Iterator[Callable[[Axes], None]]:
    """Yield a panel for each batch size of loaders and of training; none if no GPU was measured."""
    limits, loaders = rows_of("gpu_limits"), [row for row in rows_of("gpu_loaders") if row["unit"] == "GB/s"]
    for size in _batch_sizes(loaders):
        of_size = [row for row in loaders if row["scenario"].endswith(f", batch {size}")]
        yield partial(loader_lines, rows=of_size, limits=limits, title=f"loaders alone, into the device, batch {size}")
    training = [row for row in rows_of("gpu_training") if row["median"]]
    for size in _batch_sizes(training):
        of_size = [row for row in training if f", batch {size}," in row["scenario"]]
        yield partial(training_bars, rows=of_size, title=f"training beside its ceiling, batch {size}")


def _batch_sizes(rows: Rows) -> list[int]:
    sizes = (re.search(r", batch (\d+)", row["scenario"]) for row in rows)
    return sorted({int(found.group(1)) for found in sizes if found})


def loader_lines(axes: Axes, rows: Rows, limits: Rows, title: str) -> None:
    """Draw GB/s by number of workers, a line for each set and engine, and the link's rates as lines across."""
    names = list(dict.fromkeys(row["scenario"].rpartition(", batch")[0] for row in rows))
    counts = sorted({row["measured"].rpartition("=")[2] for row in rows}, key=lambda count: (count != "auto", count.zfill(3)))
    for colour, name in zip(LINES, names, strict=False):
        mine = [row for row in rows if row["scenario"].startswith(f"{name}, batch")]
        for loader in dict.fromkeys(row["measured"].rpartition(",")[0] for row in mine):
            rates = {
                row["measured"].rpartition("=")[2]: float(row["median"]) for row in mine if row["measured"].startswith(loader)
            }
            places = sorted((counts.index(count), rate) for count, rate in rates.items())
            style, marker = {"dali engine": ("-", "s"), "torch engine": ("--", "o")}.get(loader, ("-", "^"))
            label = f"{name}, {loader.removesuffix(' engine')}" if "engine" in loader else name
            axes.plot(*zip(*places, strict=True), style, color=colour, marker=marker, markersize=4, label=label)
    for row in limits:
        if row["measured"] in LIMITS and row["median"]:
            label = f"{row['measured']}: {float(row['median']):.3g} GB/s"
            axes.axhline(float(row["median"]), color="black", linestyle=LIMITS[row["measured"]], linewidth=1, label=label)
    axes.set_xticks(range(len(counts)), counts)
    axes.set(title=title, xlabel="num_workers", ylabel="GB/s as stored, log scale", yscale="log")
    axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)


def training_bars(axes: Axes, rows: Rows, title: str) -> None:
    """Draw the ceiling and training with the loader as bars; behind the latter, how much of the time the device was idle."""
    scenarios = list(dict.fromkeys(row["scenario"] for row in rows))[::-1]
    medians = {(row["scenario"], row["measured"]): float(row["median"]) for row in rows}
    for number, (measured, colour) in enumerate(BARS.items()):
        rates = [medians.get((scenario, measured), 0.0) for scenario in scenarios]
        places = [place + 0.2 - 0.4 * number for place in range(len(scenarios))]
        axes.barh(places, rates, 0.38, color=colour, label=measured)
        if measured == TOGETHER:
            for place, rate, scenario in zip(places, rates, scenarios, strict=True):
                idle = medians.get((scenario, IDLE))
                note = "" if idle is None else f" device idle {idle:.1f} %"
                axes.text(max(rate, medians.get((scenario, "ceiling"), 0.0)), place, note, va="center", fontsize=7)
    axes.set_yticks(range(len(scenarios)), [re.sub(r", batch \d+", "", scenario) for scenario in scenarios], fontsize=8)
    most = max((rate for (_, measured), rate in medians.items() if measured in BARS), default=1.0)
    axes.set(title=title, xlabel="records per second", xlim=(0, 1.3 * most))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
