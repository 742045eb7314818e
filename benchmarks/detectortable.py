"""The table of `benchmarks.detectors` as Markdown and as a picture, from its rows."""

from __future__ import annotations

import re
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.harness import Row
from dali_pipeline.storage.whole import write_whole
from dali_pipeline.tools.picture import COLOURS, save
from training.config import MODELS

METRICS = {"auroc": "AUROC", "average_precision": "average precision", "fpr95": "FPR at 95 % TPR"}
COLUMNS = (
    "detector",
    *(f"{metric}{part}" for metric in METRICS for part in ("", "_low", "_high", "_std")),
    "beside_probe", "beside_probe_low", "beside_probe_high",
    "seeds", "test_answers", "test_questions", "test_right", "test_wrong",
    "model", "questions", "answers", "seconds", "machine", "versions", "commit", "command", "date",
)  # fmt: skip
MARK = re.compile(r"(<!-- detectors -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def markdown(rows: list[Row], link: str = "") -> str:
    """Return the table, with the command, the machine and the date below it, and a link to the file if one is given."""
    lines = [f"| | {' | '.join(METRICS.values())} | AUROC beside the linear probe |", f"|---{'|---' * (len(METRICS) + 1)}|"]
    for row in rows:
        cells = [_cell(row, metric, signed=False) for metric in METRICS]
        cells.append(_cell(row, "beside_probe", signed=True) if row["beside_probe"] else "")
        lines.append(f"| {row['detector']} | {' | '.join(cells)} |")
    first = rows[0]
    trainings = f"mean over {first['seeds']} seeds" if first["seeds"] != "1" else "one seed"
    below = (
        f"{first['test_answers']} test answers, {first['test_right']} of them right; {trainings}, 95 % intervals over questions"
        f"{' and seeds' if first['seeds'] != '1' else ''}. {first['model']} on {first['questions']}; all {first['answers']}. "
        f"`{first['command']}`, {first['machine']}, {first['date']}{f' ([CSV]({link}))' if link else ''}."
    )
    return "\n".join([*lines, "", below])


def _cell(row: Row, name: str, *, signed: bool) -> str:
    form = "{:+.3f}" if signed else "{:.3f}"
    value, low, high = (form.format(float(row[key])) for key in (name, f"{name}_low", f"{name}_high"))
    return f"{value} [{low}, {high}]"


def panel(axes: Axes, rows: list[Row]) -> None:
    """Draw the AUROC of every baseline and detector with its interval, in the order of the table."""
    names = [row["detector"] for row in rows]
    for kind, is_detector, colour, marker in (("baselines", False, COLOURS[3], "s"), ("detectors", True, COLOURS[2], "o")):
        places = [place for place, name in enumerate(names) if (name in MODELS) == is_detector]
        aurocs = [float(rows[place]["auroc"]) for place in places]
        lows, highs = ([float(rows[place][f"auroc_{end}"]) for place in places] for end in ("low", "high"))
        below = [max(0.0, auroc - low) for auroc, low in zip(aurocs, lows, strict=True)]
        above = [max(0.0, high - auroc) for auroc, high in zip(aurocs, highs, strict=True)]
        axes.errorbar(aurocs, places, xerr=[below, above], fmt=marker, color=colour, capsize=3, label=kind)
        for auroc, place in zip(aurocs, places, strict=True):
            axes.annotate(f"{auroc:.3f}", (auroc, place), xytext=(0, 6), textcoords="offset points", ha="center", fontsize=7)
    axes.axvline(0.5, color=COLOURS[1], linestyle="--", linewidth=0.8)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.8)
    first = rows[0]
    seeds = f", {first['seeds']} seeds" if first["seeds"] != "1" else ", one seed"
    axes.set(
        title=f"{first['model']} on {first['questions']}\n{first['test_answers']} test answers{seeds}",
        xlabel="test AUROC and 95 % interval (dashed: chance)",
    )
    axes.legend(fontsize=8, loc="lower left")


def draw(rows: list[Row], path: Path) -> None:
    """Draw the picture: baselines as grey squares, detectors as blue dots."""
    figure = Figure(figsize=(7, 4.6), layout="constrained")
    panel(figure.subplots(), rows)
    save(figure, path)


def update_findings(path: Path, rows: list[Row], link: str) -> None:
    """Replace the table between its marks in a document. link: to the file of the rows."""
    table = markdown(rows, link)
    write_whole(path, MARK.sub(lambda found: f"{found[1]}\n{table}\n\n{found[3]}", path.read_text("utf-8")).encode())
