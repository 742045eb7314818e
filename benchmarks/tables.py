"""Make the tables of docs/results.md from the newest results: `make plots` writes them between their marks.

A mark is a line `<!-- speed: THEME, SCENARIO -->`; what stands between it and the next `<!-- end -->` is replaced.
"""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks.harness import Row, results_path, rows_of
from dali_pipeline.errors import UsageError
from dali_pipeline.storage.whole import write_whole

LABELS = {
    "gather": "numpy copies rows that lie in memory: the limit",
    "gather and cast": "the same, and torch casts to float32",
    "preadv from the page cache": "the system copies them from the page cache, into memory used again",
    "preadv of x, and cast": "the system copies their features from the page cache, and torch casts",
    "DALI, a constant batch": "DALI passes a constant batch through",
    "slice and concatenate": "numpy slices and concatenates arrays in memory: the limit",
}
MARK = re.compile(r"(<!-- speed: (\w+), (.+?) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def is_ours(name: str) -> bool:
    """Return whether a way is one of our loaders."""
    return " engine" in name or name.startswith("GraphLoader")


def spread(row: Row) -> tuple[float, float]:
    """Return the quartiles; from older files without them, the lowest and highest value."""
    lower, upper = row.get("lower_quartile") or row["lowest"], row.get("upper_quartile") or row["highest"]
    return float(lower), float(upper)


def reach_of(rows: list[Row]) -> str:
    """Return the result of `spread` in words."""
    return "quartiles" if rows[0].get("lower_quartile") else "lowest to highest"


def update_tables(path: Path) -> None:
    """Replace the tables in a file, except those whose theme was not measured; raise UsageError for an unknown scenario."""
    write_whole(path, MARK.sub(_replaced, path.read_text(encoding="utf-8")).encode())


def _replaced(found: re.Match[str]) -> str:
    head, theme, scenario, _, end = found.groups()
    file = results_path(theme)
    if file is None:
        return found.group()
    rows = [row for row in rows_of(theme) if row["scenario"] == scenario]
    if not rows:
        raise UsageError(
            f"{file.name} has no scenario {scenario!r}, which docs/results.md wants a table of; measure it, or name another"
        )
    return head + table(rows, f"../benchmarks/results/{file.name}") + end


def table(rows: list[Row], link: str) -> str:
    """Return a row per way, fastest first, ours with the best number of workers; then those that cannot run, and why."""
    first: dict[str, Row] = {}
    for row in rows:
        if "trial" not in row["measured"]:
            first.setdefault(row["measured"], row)
    best: dict[str, Row] = {}
    for name, row in first.items():
        kind = re.sub(r", workers=\S+$", "", name) if is_ours(name) else name
        if row["median"] and (kind not in best or float(row["median"]) > float(best[kind]["median"])):
            best[kind] = row
    lines = []
    for row in sorted(best.values(), key=lambda row: -float(row["median"])):
        low, high = spread(row)
        limit = f"{float(row['ratio']):.2f}" if row["reference"] else ""
        name = f"**{row['measured']}**" if is_ours(row["measured"]) else LABELS.get(row["measured"], row["measured"])
        lines.append(f"| {name} | {_number(row['median'])} ({_number(low)} to {_number(high)}) | {limit} |")
    lines += [f"| {name} | cannot run: {row['why']} | |" for name, row in first.items() if row.get("why")]
    one, repeats = rows[0], max(int(row["repeats"]) for row in best.values())
    head = f"| {one['scenario']}: median of {repeats} ([CSV]({link})) | {one['unit']} ({reach_of(rows)}) | of the limit |"
    head += "\n|---|---|---|\n"
    return "\n" + head + "\n".join(lines) + f"\n\n`{one['command']}`, {one['machine']}, {one['date']}.\n\n"


def _number(value: float | str) -> str:
    """Return a number with two significant digits and thousands separators."""
    rounded = float(f"{float(value):.2g}")
    return f"{rounded:,.0f}" if rounded >= 10 else f"{rounded:g}"
