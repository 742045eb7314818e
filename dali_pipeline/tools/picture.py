"""Draw the pictures of `inspect`: the distributions of a data set, and the orders of its epochs."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dali_pipeline.errors import UsageError, needs_extra
from dali_pipeline.runtime.outside import as_output
from dali_pipeline.storage.whole import write_whole
from dali_pipeline.tools.shufflequality import METHODS, Quality
from dali_pipeline.types import Kind

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, FigureBase

COLOURS = ("#E69F00", "#D55E00", "#0072B2", "#777777")  # Okabe and Ito 2008: told apart without red and green
HATCHES = ("//", "..", "", "xx")  # told apart without any colour


def draw_description(report: dict[str, Any], path: Path) -> None:
    """Draw a histogram of each distribution, the label balance of each split, and the spread of the features."""
    from matplotlib.figure import Figure

    panels = [*report["distributions"].items()]
    extra = 1 + bool(report["statistics"])
    columns = min(3, len(panels) + extra)
    lines = -(-(len(panels) + extra) // columns)
    figure = Figure(figsize=(4.5 * columns, 3.4 * lines), layout="constrained")
    entitle(figure, f"{Path(report['root']).name}: {report['bytes'] / 1e9:.3f} GB")
    all_axes = figure.subplots(lines, columns, squeeze=False).flatten().tolist()
    for axes, (name, facts) in zip(all_axes, panels, strict=False):
        axes.bar(
            np.array(facts["edges"][:-1]) - 0.5,
            facts["counts"],
            width=np.diff(facts["edges"]),
            align="edge",
            edgecolor="white",
            linewidth=0.5,
        )
        axes.axvline(facts["median"], color="C1", label=f"median {facts['median']:g}")
        axes.set(title=name, ylabel="records" if name in ("steps", "graphs") else "graphs")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(fontsize=8)
    balance = all_axes[len(panels)]
    classes = sorted({label for counts in report["labels"].values() for label in counts}, key=int)
    below = np.zeros(len(report["labels"]))
    for label in classes:
        counts = np.array([split_counts.get(label, 0) for split_counts in report["labels"].values()])
        balance.bar(list(report["labels"]), counts, bottom=below, label=f"label {label}")
        below += counts
    balance.set(title="records by split and label")
    balance.legend(fontsize=8)
    if report["statistics"]:
        axes = all_axes[len(panels) + 1]
        axes.plot(np.sort(report["statistics"]["std"])[::-1])
        axes.set(
            title="spread of the features (training split)",
            xlabel="feature, by spread",
            ylabel="standard deviation",
            yscale="log",
        )
    for axes in all_axes[len(panels) + extra :]:
        axes.set_axis_off()
    save(figure, path, dpi=110)


def draw_shuffle(report: dict[str, Any], measured: dict[Kind, list[Quality]], path: Path) -> None:
    """Draw, for the first kind, delivered place against file position by window and method, and both measures as bars."""
    from matplotlib.figure import Figure

    kind, qualities = next(iter(measured.items()))
    rows = len(qualities)
    figure = Figure(figsize=(11, 2.35 * rows + 3.6), layout="constrained")
    above, below = figure.subfigures(2, 1, squeeze=False, height_ratios=[2.35 * rows, 3.3]).flatten().tolist()
    entitle(
        above,
        f"{Path(report['root']).name}, {report['split']}: order of {report['splits'][report['split']][kind]:,} {kind} in "
        f"{report['shards'][kind]:,} shards, batches of {qualities[0].batch_size}",
        fontsize=11,
    )
    grid = above.subplots(rows, len(METHODS), squeeze=False, sharex=True, sharey=True)
    for row, quality in enumerate(qualities):
        for column, method in enumerate(quality.methods):
            axes, points = grid[row, column], np.array(method.points)
            axes.scatter(*points.T, s=3, color=COLOURS[column], linewidths=0, rasterized=True)
            axes.set(xlim=(0, 1), ylim=(0, 1), xticks=[0, 0.5, 1], yticks=[0, 0.5, 1])
            if row == 0:
                axes.set_title(method.method, fontsize=10)
            if row == rows - 1:
                axes.set_xlabel("delivered at (share of the epoch)", fontsize=8)
        grid[row, 0].set_ylabel(f"window {quality.window_share * 100:.3g} % of the data\nposition in the files", fontsize=8)
    left, right = below.subplots(1, 2)
    _bars(left, qualities, [[method.same_shard for method in quality.methods] for quality in qualities])
    left.set(title="same-shard pairs within a batch", ylabel="share (log scale)", yscale="log")
    _bars(right, qualities, [[method.displacement for method in quality.methods] for quality in qualities])
    right.set(title="mean displacement", ylabel="share of the epoch")
    for axes, exact in ((left, qualities[0].full_same_shard), (right, qualities[0].full_displacement)):
        axes.axhline(exact, color="black", linestyle="--", linewidth=1, label="full permutation, exactly")
    handles, labels = right.get_legend_handles_labels()
    below.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=8, frameon=False)
    save(figure, path, dpi=90)


def _bars(axes: Axes, qualities: list[Quality], values: list[list[tuple[float, ...]]]) -> None:
    """Draw values by window, method and epoch as bars; error bars go from the lowest epoch to the highest."""
    ticks, width = np.arange(len(qualities)), 0.8 / len(METHODS)
    for number, method in enumerate(METHODS):
        epochs = np.array([by_method[number] for by_method in values])
        means = epochs.mean(axis=1)
        # if all epochs are equal, rounding can move their mean beyond them
        reach = np.maximum(0, np.stack([means - epochs.min(axis=1), epochs.max(axis=1) - means]))
        places = ticks + (number - (len(METHODS) - 1) / 2) * width
        style: dict[str, Any] = {"color": COLOURS[number], "hatch": HATCHES[number], "edgecolor": "white", "linewidth": 0}
        axes.bar(places, means, width * 0.92, label=method, yerr=reach, error_kw={"linewidth": 1}, **style)
    axes.set_xticks(ticks, [f"{quality.window_share * 100:.3g} %" for quality in qualities])
    axes.set_xlabel("window (of the data)", fontsize=9)


def entitle(figure: FigureBase, title: str, **style: Any) -> None:
    """Set the title of a figure literally: a dollar sign in a name does not begin a formula."""
    figure.suptitle(title, parse_math=False, **style)


def check_picture(path: Path | None) -> None:
    """Raise UsageError, before anything is measured, if the file name has no known suffix or its folder is missing."""
    if path is None:
        return
    with needs_extra("plots", f"{path}: drawing a picture"):
        from matplotlib.backend_bases import FigureCanvasBase

    known = FigureCanvasBase.get_supported_filetypes()
    if not path.suffix:
        raise UsageError(f"{path} has no suffix; expected a name such as out.png")
    if path.suffix[1:].lower() not in known:
        raise UsageError(f"{path} cannot be drawn; expected a name such as out.png, with one of {', '.join(sorted(known))}")
    if not as_output(path).parent.is_dir():
        raise UsageError(f"{path} cannot be written; expected the name of a file in a folder that is there")


def save(figure: Figure, path: Path, dpi: int = 120) -> None:
    """Write a picture, whole or not at all, in the format of the file name; raise PipelineError if that fails."""
    content = io.BytesIO()
    figure.savefig(content, dpi=dpi, format=path.suffix[1:].lower())
    write_whole(as_output(path), content.getvalue())
