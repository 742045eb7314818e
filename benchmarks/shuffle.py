"""Measure how well an epoch is shuffled, compared with a shuffle buffer of the same memory: the README's table and picture.

    python -m benchmarks.shuffle                     # 512 shards of 64 records, windows of 1, 5 and 20 %: half a minute
    python -m benchmarks.shuffle --plot docs/shuffle.png

Only the sizes of the shards are made up, as the order depends on nothing else. Two sizes of record: 4 MiB, so that shards are
as large as `convert` makes them, and 66 KiB ([33, 1024] float16), so that a shard is of 4 MiB and has few hash blocks.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from benchmarks.harness import Results
from dali_pipeline.cli.app import new_app, run
from dali_pipeline.tools.picture import draw_shuffle
from dali_pipeline.tools.shufflequality import WINDOW_SHARES, Quality, measure

METHODS = {
    "buffer, file order": "buffer, files in order",
    "buffer, shuffled shards": "buffer, shards shuffled",
    "dali_pipeline": "dali_pipeline",
    "full permutation": "full permutation",
}
app = new_app()


@app.command()
def main(
    shards: Annotated[int, typer.Option(help="Number of shards of the data set.")] = 512,
    records: Annotated[int, typer.Option(help="Records per shard.")] = 64,
    batch_size: Annotated[int, typer.Option()] = 32,
    epochs: Annotated[int, typer.Option()] = 20,
    plot: Annotated[
        Path | None, typer.Option(metavar="OUT.png", help="Also draw the larger records to this PNG file.", show_default=False)
    ] = None,
) -> None:
    """Measure both figures of every method and window; write its rows to results/ and print the README's table."""
    results = Results("shuffle", ["numpy", "xxhash"])
    lines = []
    for record_bytes in (4 << 20, 33 * 1024 * 2):
        sizes = np.full(shards, records)
        name = f"{shards} shards x {records} x {record_bytes / 2**20:.3g} MiB"
        several = [
            measure(
                sizes,
                sizes * record_bytes,
                window_bytes=round(share * shards * records * record_bytes),
                batch_size=batch_size,
                epochs=epochs,
            )
            for share in WINDOW_SHARES
        ]
        for quality in several:
            scenario = f"{name}, window {quality.window_share:.0%}"
            for method in quality.methods:
                exact = [quality.full_same_shard], [quality.full_displacement]
                for measured, values, full in zip(
                    ("same-shard pairs", "displacement"), (method.same_shard, method.displacement), exact, strict=True
                ):
                    label = f"{METHODS[method.method]}: {measured}"
                    results.add(scenario, label, "share", list(values), "full permutation, exactly", full)
            lines.append(
                f"| {records * record_bytes / 2**20:.3g} MiB | {quality.window_share:.0%} | {' | '.join(_cells(quality))} |"
            )
        if plot is not None and record_bytes == 4 << 20:
            description = {"root": "simulated set", "split": "train", "splits": {"train": {"sequences": shards * records}}}
            draw_shuffle(description | {"shards": {"sequences": shards}}, {"sequences": several}, plot)
    print(f"\n| shards of | window | {' | '.join(METHODS.values())} |\n|---|---|{'---|' * len(METHODS)}")
    print("\n".join(lines))


def _cells(quality: Quality) -> list[str]:
    """Return same-shard share, displacement, and in brackets its mean distance from a third."""
    return [
        f"{np.mean(method.same_shard):.2%}; {np.mean(method.displacement):.3f} ({method.distances(quality)[1]:.4f})"
        for method in quality.methods
    ]


if __name__ == "__main__":
    sys.exit(run(app, "benchmarks.shuffle"))
