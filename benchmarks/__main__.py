"""Run every benchmark, one after the other in one process: `python -m benchmarks`, which `make bench` runs.

python -m benchmarks                    # 10 minutes on two cores
python -m benchmarks --full             # larger sets, longer samples: what the README's figures are of
python -m benchmarks --quick            # 2 minutes, without peers, into benchmarks/results/quick: no figure to quote
python -m benchmarks scaling layers     # these alone
"""

from __future__ import annotations

import os
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from dali_pipeline.cli.app import new_app, run

QUICK = Path(__file__).parent / "results" / "quick"


class Sizes(NamedTuple):
    """Options of a benchmark, by how long it may take."""

    some: str = ""
    full: str = ""
    quick: str = ""


THEMES = {
    "limits": Sizes(some="--megabytes 256 --seconds 0.4", quick="--repeats 2 --megabytes 64 --seconds 0.1"),
    "sequences": Sizes(
        some="--records 1000 --seconds 0.3", full="--records 4000", quick="--repeats 2 --records 1000 --seconds 0.2 --no-peers"
    ),
    "graphs": Sizes(some="--records 300 --seconds 0.3", quick="--repeats 2 --records 100 --seconds 0.2 --no-peers"),
    "steps": Sizes(some="--repeats 3 --rows 100000 --seconds 0.2", quick="--repeats 1 --rows 30000 --seconds 0.05"),
    "budgets": Sizes(some="--records 5000", quick="--records 500"),
    "scaling": Sizes(
        some="--repeats 3 --megabytes 16 --seconds 0.1",
        full="--megabytes 64 --seconds 0.3",
        quick="--repeats 1 --megabytes 8 --seconds 0.05 --no-memory",
    ),
    "layers": Sizes(some="--megabytes 32", full="--megabytes 64", quick="--repeats 1 --megabytes 16"),
    "scale": Sizes(
        some="--repeats 2 --gigabytes 0.25,0.5 --most-shards 1000",
        full="--gigabytes 0.25,0.5,1",
        quick="--repeats 1 --gigabytes 0.1 --most-shards 100",
    ),
    "stores": Sizes(some="--megabytes 100 --window 16", quick="--repeats 1 --megabytes 20 --window 4"),
    "training": Sizes(some="--megabytes 8 --seconds 0.3", quick="--repeats 1 --megabytes 4 --seconds 0.1"),
    "convert": Sizes(
        some="--gigabytes 0.3 --memory-gigabytes 0 --repeats 3 --files 5000",
        full="--gigabytes 1 --memory-gigabytes 0 --repeats 5",
        quick="--gigabytes 0.02 --memory-gigabytes 0 --repeats 1 --files 200",
    ),
    "in_place": Sizes(
        some="--gigabytes 0.3 --files 5000",
        full="--gigabytes 2 --files 1000000",
        quick="--repeats 1 --gigabytes 0.05 --files 200",
    ),
}
app = new_app()


@app.command()
def main(
    themes: Annotated[
        list[str] | None, typer.Argument(help=f"Themes to measure: {', '.join(THEMES)}.", show_default="all")
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="Use larger data sets and longer samples.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Run every theme briefly, on small data sets.")] = False,
) -> None:
    """Measure, and draw the plots; write rows to benchmarks/results, or to the folder BENCH_RESULTS."""
    if full and quick:
        raise typer.BadParameter("--full and --quick; expected one of them")
    for theme in themes or []:
        if theme not in THEMES:
            raise typer.BadParameter(f"{theme!r}; expected some of {', '.join(THEMES)}")
    if quick:
        os.environ.setdefault("BENCH_RESULTS", str(QUICK))
    for theme in themes or THEMES:
        sizes = THEMES[theme]
        chosen = sizes.quick if quick else sizes.full if full else sizes.some
        _run(theme, chosen.split())
    _run("plot", [os.environ["BENCH_RESULTS"]] if "BENCH_RESULTS" in os.environ else [])


def _run(theme: str, options: list[str]) -> None:
    """Run a theme like its own command line; exit if it fails."""
    command = f"benchmarks.{theme}"
    print(f"python -m {' '.join([command, *options])}", flush=True)
    sys.argv, begun = [command, *options], time.perf_counter()  # which rows tell
    if code := run(import_module(command).app, command):
        raise typer.Exit(code)
    print(f"{theme}: {time.perf_counter() - begun:.0f} seconds\n", flush=True)


if __name__ == "__main__":
    sys.exit(run(app, "benchmarks"))
