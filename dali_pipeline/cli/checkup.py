"""The command `doctor`: examine a loader, and print or draw the result."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich import box
from rich.table import Table

from dali_pipeline.cli.arguments import CacheBytes, CacheDir, FilesRoot, SetArgument, parse_cache_bytes, parse_num_workers
from dali_pipeline.errors import DataError, PipelineError, UsageError
from dali_pipeline.runtime.progress import plain_console, progress_bar
from dali_pipeline.types import Kind

if TYPE_CHECKING:
    from dali_pipeline.dataset.dataset import Dataset
    from dali_pipeline.tools.doctor import MakeStep
    from dali_pipeline.tools.knobs import Setup

ADVICE = {
    "disk": "a faster or local disk, fewer layers (`layers=`), or smaller values (`convert --dtype int8`)",
    "store": "a cache that holds the set (`--cache-bytes`), a faster link, fewer layers, or smaller values",
    "page cache": "faster memory, or smaller values (`convert --dtype int8`)",
    "gather": "more background threads (`num_workers=`), fewer layers, or smaller values",
    "decode": "`dtype=torch.float16`, or a GPU to decode on",
    "collate": "smaller batches of graphs, fewer layers (`layers=`), or a GPU to collate on",
    "host to device": "float16 all the way (`dtype=torch.float16`), or smaller values",
    "model": "nothing: the data come faster than the model takes them",
}


def doctor_command(
    data: SetArgument,
    records: Annotated[
        Literal["sequences", "graphs"] | None,
        typer.Option(help="Kind of record to load. [default: sequences if there are any, otherwise graphs]"),
    ] = None,
    step: Annotated[
        str | None,
        typer.Option(
            metavar="MODULE:FUNCTION",
            help="FUNCTION(loader) returns a callable that takes one training step on a batch. [default: no model]",
            show_default=False,
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Records per batch.")] = 32,
    num_workers: Annotated[
        str, typer.Option(metavar="auto|N", help="Background threads for sequences, or processes for graphs.")
    ] = "auto",
    engine: Annotated[Literal["dali", "torch"], typer.Option(help="Engine of the SequenceLoader.")] = "dali",
    device: Annotated[str, typer.Option(help="Device of the batches: auto, cpu, cuda or cuda:N.")] = "auto",
    seconds: Annotated[float, typer.Option(min=0.01, help="Measuring time per stage, in seconds.")] = 3.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Also draw the stages to this PNG file.", show_default=False)
    ] = None,
    cache_dir: CacheDir = None,
    cache_bytes: CacheBytes = None,
    files_root: FilesRoot = None,
) -> None:
    """Measure which stage limits a loader, and say what to change; with --step, also whether training waits for data.

    \b
    Measures every stage alone (disk or store, page cache, gather, decode, collate, copy to the GPU, training step on one
    repeated batch) and all stages together. Predicts the gain of every change, and tries the best change that needs neither a
    conversion nor another machine. Takes under a minute. Exits 0 (fed, or no step given), 1 (input-bound) or 2 (cannot run).
    train.py --doctor does the same for its detectors, with the flags of a training.
    Examples:
      python -m dali_pipeline doctor data/sciq
      python -m dali_pipeline doctor data/traces --step mymodel:make_step --batch-size 64 --json
    """
    from dali_pipeline.dataset.dataset import open_dataset
    from dali_pipeline.loaders.device import make_current
    from dali_pipeline.tools.knobs import Setup
    from dali_pipeline.tools.picture import check_picture

    check_picture(plot)
    make_step = None if step is None else named_function(step)
    opened = open_dataset(data, cache_dir, parse_cache_bytes(cache_bytes), files_root)
    kind: Kind = records or opened.schema.kinds[0]
    if kind not in opened.schema.kinds:
        raise DataError(f"{opened.root} holds no {kind}; it has {' and '.join(opened.schema.kinds)}")
    make_current(device)
    setup = Setup(batch_size=batch_size, num_workers=parse_num_workers(num_workers), engine=engine, device=device)
    raise typer.Exit(check_up(opened, kind, setup, make_step, step or "no model", seconds, as_json, plot))


def named_function(text: str) -> Callable[[Any], Any]:
    """Import the function that `MODULE:FUNCTION` names, also from the working folder; raise UsageError if that fails."""
    module, _, name = text.partition(":")
    if not module or not name:
        raise UsageError(f"step is {text!r}; expected MODULE:FUNCTION, such as mymodel:make_step")
    sys.path.insert(0, str(Path.cwd()))
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UsageError(
            f"step is {text!r}, which cannot be had ({error}); expected a function of a module on the path"
        ) from None
    finally:
        sys.path.pop(0)
    if not callable(function):
        raise UsageError(f"step is {text!r}, which is no function; expected one that takes a loader")
    named: Callable[[Any], Any] = function
    return named


def check_up(
    data: Dataset,
    kind: Kind,
    setup: Setup,
    make_step: MakeStep | None,
    model: str,
    seconds: float,
    as_json: bool,
    plot: Path | None,
) -> int:
    """Examine a loader, print or draw the result, and return the exit code. model: name of the step."""
    from dali_pipeline.tools.doctor import examine

    with progress_bar() as bar:
        task = bar.add_task("examine", total=7 + (kind == "graphs") + (make_step is not None))

        def tell(stage: str) -> None:
            bar.update(task, advance=1, description=stage)

        try:
            report = examine(data, kind, setup, make_step, tell, seconds)
        except (ValueError, RuntimeError, TypeError, OSError) as error:  # exit code 2, because 1 means input-bound
            if isinstance(error, PipelineError):
                raise
            raise PipelineError(f"{data.root}: {model} cannot be trained on it ({type(error).__name__}: {error})") from error
    advice = ADVICE[report["narrowest"]]
    if report["verdict"] == "input-bound" and report["narrowest"] == "model":
        advice = "reading while the model computes (`num_workers=1`), as one waits for the other"
    report |= {"model": model, "batch_size": setup.batch_size, "advice": advice}
    if plot is not None:
        draw_stages(report, plot)
    if as_json:
        typer.echo(json.dumps(report))
    else:
        print_checkup(report)
    return 1 if report["verdict"] == "input-bound" else 0


def print_checkup(report: dict[str, Any]) -> None:
    """Print the result as text; piped output is never wrapped."""
    console, machine, together = plain_console(), report["machine"], report["together"]
    where = ", ".join(machine["gpus"]) or "no GPU"
    console.print(
        f"{report['root']}: {report['records']} of {report['bytes_per_record']:,.0f} bytes, batches of {report['batch_size']}, "
        f"{report['model']} on {machine['cores']:g} cores and {where}"
    )
    table = Table("stage", "records/s", "GB/s", "", box=box.SIMPLE_HEAD)
    slowest = report["stages"][report["narrowest"]]["records_per_second"]
    for name, facts in report["stages"].items():
        fits = "the cache holds the data" if name == "store" else "the data fit in memory"
        note = "" if facts["counted"] else f"not counted: {fits}"
        if name == report["narrowest"]:
            note = "narrowest"
        bar = "█" * max(1, min(40, round(4 * facts["records_per_second"] / slowest)))
        rate, speed = f"{facts['records_per_second']:,.0f}", f"{facts['bytes_per_second'] / 1e9:.2f}"
        table.add_row(name, rate, speed, f"{bar} {note}")
    console.print(table)
    rate = f"all together {together['records_per_second']:,.0f} records/s"
    if "model" not in report["stages"]:
        console.print(f"{rate}; --step, or train.py --doctor, holds that against a model")
    else:
        console.print(f"{report['verdict']}: {rate}, {together['wait_share']:.0%} of the time waits for data")
    console.print(f"the narrowest stage is {report['narrowest']}; what helps: {report['advice']}")
    table = Table("change", "records/s predicted", "", "measured", box=box.SIMPLE_HEAD)
    for name, facts in sorted(report["knobs"].items(), key=lambda item: -item[1]["predicted"]):
        gain = facts["predicted"] / together["records_per_second"] - 1
        measured = "" if facts["measured"] is None else f"{facts['measured']:,.0f}"
        table.add_row(name, f"{facts['predicted']:,.0f}", f"{gain:+.0%}", measured)
    console.print(table)
    if report["next"] is None:
        console.print("no change of options promises a tenth more, so none was tried")
    console.print(machine_line(machine))
    for warning in report["warnings"]:
        console.print(f"warning: {warning}")


def machine_line(machine: dict[str, Any]) -> str:
    """Return the facts about a machine in one line."""
    shared = machine["shared_memory"]
    facts = [
        f"{machine['memory_available'] / 1e9:.1f} of {machine['memory'] / 1e9:.1f} GB of memory to be had",
        f"{'no' if shared is None else f'{shared / 1e9:.1f} GB of'} /dev/shm",
        f"{machine['open_files']:,} open files",
        f"{machine['free_disk'] / 1e9:.1f} GB free on {machine['file_system'] or 'a file system of unknown kind'}",
        f"torch {machine['torch']} with {machine['threads']} threads",
        f"CUDA {machine['cuda'] or 'none'}",
        f"driver {machine['driver'] or 'none'}",
    ]
    return f"machine: {', '.join(facts)}"


def draw_stages(report: dict[str, Any], path: Path) -> None:
    """Draw the records per second of every stage, of all together, and of each change as predicted and as measured."""
    from matplotlib.figure import Figure

    from dali_pipeline.tools.picture import COLOURS, entitle, save

    figure = Figure(figsize=(11, 3.8), layout="constrained")
    stages, knobs = figure.subplots(1, 2)
    together = report["together"]["records_per_second"]
    names = list(report["stages"])[::-1]
    for name in names:
        facts = report["stages"][name]
        colour = COLOURS[1] if name == report["narrowest"] else COLOURS[2] if facts["counted"] else COLOURS[3]
        stages.barh(name if facts["counted"] else f"{name}\n(not counted)", facts["records_per_second"], color=colour)
    lowest = min(facts["records_per_second"] for facts in report["stages"].values())
    stages.set(xscale="log", xlabel="records a second, log scale", title="each stage alone", xlim=(lowest / 4, None))
    changes = sorted(report["knobs"].items(), key=lambda item: item[1]["predicted"])
    for name, facts in changes:
        knobs.barh(name, facts["predicted"], color=COLOURS[2])
        if facts["measured"] is not None:
            knobs.plot(facts["measured"], name, "D", color=COLOURS[0], markeredgecolor="black", label="as measured")
    knobs.set(xlabel="records a second", title="each change, as predicted")
    knobs.tick_params(axis="y", labelsize=8)
    for axes in (stages, knobs):
        axes.axvline(together, color="black", linestyle="--", label=f"all together, now: {together:,.0f}")
        axes.legend(fontsize=8, loc="lower right")
    verdict = "the loader alone"
    if "model" in report["stages"]:
        verdict = f"{report['verdict']}, {report['together']['wait_share']:.0%} of the time waits for data"
    title = f"{Path(report['root']).name}, {report['model']}: {verdict}; narrowest: {report['narrowest']}"
    entitle(figure, title, fontsize=11)
    save(figure, path)
