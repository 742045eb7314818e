"""checkup: the command `doctor`, what it prints and draws of an examination."""

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

from dali_pipeline.cli.arguments import CacheBytes, CacheDir, SetArgument, parse_cache_bytes, parse_num_workers
from dali_pipeline.errors import DataError, PipelineError, UsageError
from dali_pipeline.runtime.progress import progress_bar
from dali_pipeline.tools.describe import plain_console
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
    opened = open_dataset(data, cache_dir, parse_cache_bytes(cache_bytes))
    kind: Kind = records or opened.schema.kinds[0]
    if kind not in opened.schema.kinds:
        raise DataError(f"{opened.root} holds no {kind}; it has {' and '.join(opened.schema.kinds)}")
    make_current(device)
    setup = Setup(batch_size=batch_size, num_workers=parse_num_workers(num_workers), engine=engine, device=device)
    raise typer.Exit(check_up(opened, kind, setup, make_step, step or "no model", seconds, as_json, plot))


def named_function(text: str) -> Callable[[Any], Any]:
    """Import what `MODULE:FUNCTION` names, from the working folder too. Raises UsageError for what is not there."""
    module, _, name = text.partition(":")
    if not module or not name:
        raise UsageError(f"step is {text!r}; expected MODULE:FUNCTION, such as mymodel:make_step")
    sys.path.insert(0, str(Path.cwd()))
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UsageError(
            f"step is {text!r}, which cannot be had ({error}); expected a function of a module on the path"
        ) from None
    finally:
        sys.path.pop(0)
    if not callable(found):
        raise UsageError(f"step is {text!r}, which is no function; expected one that takes a loader")
    function: Callable[[Any], Any] = found
    return function


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
    """Examine, print or draw what was found, and return the exit code. model: what the step is called."""
    from dali_pipeline.tools.doctor import examine

    with progress_bar() as bar:
        task = bar.add_task("examine", total=7 + (kind == "graphs") + (make_step is not None))

        def tell(stage: str) -> None:
            bar.update(task, advance=1, description=stage)

        try:
            found = examine(data, kind, setup, make_step, tell, seconds)
        except (ValueError, RuntimeError, TypeError, OSError) as error:  # exit 2, for 1 says input-bound
            if isinstance(error, PipelineError):
                raise
            raise PipelineError(f"{data.root}: {model} cannot be trained on it ({type(error).__name__}: {error})") from error
    advice = ADVICE[found["narrowest"]]
    if found["verdict"] == "input-bound" and found["narrowest"] == "model":
        advice = "reading while the model computes (`num_workers=1`), as one waits for the other"
    found |= {"model": model, "batch_size": setup.batch_size, "advice": advice}
    if plot is not None:
        draw_stages(found, plot)
    if as_json:
        typer.echo(json.dumps(found))
    else:
        print_checkup(found)
    return 1 if found["verdict"] == "input-bound" else 0


def print_checkup(found: dict[str, Any]) -> None:
    """As text; piped output is never folded."""
    console, machine, together = plain_console(), found["machine"], found["together"]
    where = ", ".join(machine["gpus"]) or "no GPU"
    console.print(
        f"{found['root']}: {found['records']} of {found['bytes_per_record']:,.0f} bytes, batches of {found['batch_size']}, "
        f"{found['model']} on {machine['cores']:g} cores and {where}"
    )
    table = Table("stage", "records/s", "GB/s", "", box=box.SIMPLE_HEAD)
    slowest = found["stages"][found["narrowest"]]["records_per_second"]
    for name, one in found["stages"].items():
        fits = "the cache holds the data" if name == "store" else "the data fit in memory"
        told = "narrowest" if name == found["narrowest"] else "" if one["counted"] else f"not counted: {fits}"
        bar = "█" * max(1, min(40, round(4 * one["records_per_second"] / slowest)))
        rate, speed = f"{one['records_per_second']:,.0f}", f"{one['bytes_per_second'] / 1e9:.2f}"
        table.add_row(name, rate, speed, f"{bar} {told}")
    console.print(table)
    rate = f"all together {together['records_per_second']:,.0f} records/s"
    if "model" not in found["stages"]:
        console.print(f"{rate}; --step, or train.py --doctor, holds that against a model")
    else:
        console.print(f"{found['verdict']}: {rate}, {together['wait_share']:.0%} of the time waits for data")
    console.print(f"the narrowest stage is {found['narrowest']}; what helps: {found['advice']}")
    table = Table("change", "records/s predicted", "", "measured", box=box.SIMPLE_HEAD)
    for name, one in sorted(found["knobs"].items(), key=lambda item: -item[1]["predicted"]):
        gain = one["predicted"] / together["records_per_second"] - 1
        measured = "" if one["measured"] is None else f"{one['measured']:,.0f}"
        table.add_row(name, f"{one['predicted']:,.0f}", f"{gain:+.0%}", measured)
    console.print(table)
    if found["next"] is None:
        console.print("no change of options promises a tenth more, so none was tried")
    console.print(machine_line(machine))
    for warning in found["warnings"]:
        console.print(f"warning: {warning}")


def machine_line(machine: dict[str, Any]) -> str:
    """Its facts."""
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


def draw_stages(found: dict[str, Any], path: Path) -> None:
    """Records a second of every stage, all together as a line; and what changes promise, the one tried as measured."""
    from matplotlib.figure import Figure

    from dali_pipeline.tools.picture import COLOURS, entitle, save

    figure = Figure(figsize=(11, 3.8), layout="constrained")
    stages, knobs = figure.subplots(1, 2)
    together = found["together"]["records_per_second"]
    names = list(found["stages"])[::-1]
    for name in names:
        one = found["stages"][name]
        colour = COLOURS[1] if name == found["narrowest"] else COLOURS[2] if one["counted"] else COLOURS[3]
        stages.barh(name if one["counted"] else f"{name}\n(not counted)", one["records_per_second"], color=colour)
    lowest = min(one["records_per_second"] for one in found["stages"].values())
    stages.set(xscale="log", xlabel="records a second, log scale", title="each stage alone", xlim=(lowest / 4, None))
    told = sorted(found["knobs"].items(), key=lambda item: item[1]["predicted"])
    for name, one in told:
        knobs.barh(name, one["predicted"], color=COLOURS[2])
        if one["measured"] is not None:
            knobs.plot(one["measured"], name, "D", color=COLOURS[0], markeredgecolor="black", label="as measured")
    knobs.set(xlabel="records a second", title="each change, as predicted")
    knobs.tick_params(axis="y", labelsize=8)
    for axes in (stages, knobs):
        axes.axvline(together, color="black", linestyle="--", label=f"all together, now: {together:,.0f}")
        axes.legend(fontsize=8, loc="lower right")
    verdict = "the loader alone"
    if "model" in found["stages"]:
        verdict = f"{found['verdict']}, {found['together']['wait_share']:.0%} of the time waits for data"
    title = f"{Path(found['root']).name}, {found['model']}: {verdict}; narrowest: {found['narrowest']}"
    entitle(figure, title, fontsize=11)
    save(figure, path)
