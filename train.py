"""Train the detectors and print how well they tell hallucinations from answers.

    python train.py                                             # makes the demonstration's data first, if need be
    python train.py --preprocessed-dir preprocessed_data --epochs 50 --batch-size 32
    python train.py --data data/traces --model lstm --layers 12:20
    python train.py --seeds 3                                   # mean and spread over three seeds

Stop it whenever you like: the same command goes on where it was, and, once finished, prints its results again.
"""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from dali_pipeline import DataError, Dataset, UsageError, open_dataset
from dali_pipeline.cli import CONTEXT
from dali_pipeline.cli import run as run_command_line
from training.config import MODELS, ModelName, TrainConfig
from training.folder import METRICS_NAME, check_folder, check_resume, claim_folder, find_checkpoint
from training.interrupt import Interrupted, Interrupts
from training.results import print_table, read_metrics, summarise, write_metrics

DATA_FOLDER = Path("data")
RUNS_FOLDER = Path("runs")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Where input and output lie: what changes no number."""

    data: Path | None
    preprocessed_dir: Path | None
    converted_dir: Path | None
    output_dir: Path | None
    resume: str
    device: str
    seeds: int


def main(options: Options, config: TrainConfig) -> None:
    """The whole run, step by step."""
    interrupts = Interrupts()
    refuse_many_processes()
    data = find_data(options)
    config = replace(config, models=models_for(data, config.models))
    check_labels(data)
    folder, described, anew = find_folder(options, config, data)
    if (folder / METRICS_NAME).exists() and not anew:
        print(f"{folder}: finished before; --resume never trains again")
    else:
        check_settings(data, config, folder, options)
        claim_folder(folder, described, replace=anew)
        train_seeds(data, config, folder, options, interrupts)
    print_results(folder, data)


def refuse_many_processes() -> None:
    """One process for now: several would each write the same files."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("train.py runs in one process; start it with python, not with torchrun")


def find_data(options: Options) -> Dataset:
    """The data set that was named; the one converted from the folder that was named; or the demonstration's."""
    if options.data and options.preprocessed_dir:
        raise UsageError("--data and --preprocessed-dir exclude each other; give one")
    if options.data:
        return open_dataset(options.data)
    if options.preprocessed_dir:
        from dali_pipeline.ingest.convert import convert, gigabytes
        from dali_pipeline.ingest.sources import Source

        source = Source.find(options.preprocessed_dir)
        beside = options.preprocessed_dir.resolve()
        converted = options.converted_dir or beside.with_name(beside.name + "_converted")
        if options.converted_dir is None and not converted.exists() and not os.access(beside.parent, os.W_OK):
            raise UsageError(f"{beside.parent} cannot be written to; name a folder for the converted data with --converted-dir")
        if not (converted / "manifest.json").exists():
            free = gigabytes(shutil.disk_usage(existing_parent(converted)).free)
            print(
                f"converting {gigabytes(source.nbytes)} in {len(source.files)} files to {converted} ({free} free), once",
                flush=True,
            )
        return convert(options.preprocessed_dir, converted)
    from dali_pipeline.ingest.demo import demo_dataset

    if not (DATA_FOLDER / "sciq" / "manifest.json").exists():
        print(f"making the demonstration's data in {DATA_FOLDER / 'sciq'}: some 3 minutes on two cores, once", flush=True)
    return demo_dataset(DATA_FOLDER)


def existing_parent(path: Path) -> Path:
    """The nearest folder above that exists."""
    return next(folder for folder in path.absolute().parents if folder.exists())


def models_for(data: Dataset, asked: tuple[ModelName, ...]) -> tuple[ModelName, ...]:
    """The models that the data can train: all three asked of half a data set are those of that half."""
    possible = tuple(name for name in asked if ("sequences" if name == "lstm" else "graphs") in data.schema.kinds)
    holds = f"{data.root} holds {' and '.join(data.schema.kinds)} only"
    if not possible or (possible != asked and asked != MODELS):
        raise DataError(f"{holds}, on which {', '.join(sorted(set(asked) - set(possible)))} cannot train")
    if possible != asked:
        print(f"{holds}: training {', '.join(possible)}")
    return possible


def check_labels(data: Dataset) -> None:
    """Every split needs records of at least two classes, or no score can be computed."""
    for split in ("train", "val", "test"):
        counts = data.label_counts(split)
        if len(counts) < 2:
            found = f"labels all {next(iter(counts))}" if counts else "no records"
            raise DataError(f"split {split!r} of {data.root} has {found}; expected at least two classes in train, val and test")


def find_folder(options: Options, config: TrainConfig, data: Dataset) -> tuple[Path, dict[str, Any], bool]:
    """The output folder, what its config.json is to say, and whether the run begins anew; another run's folder is refused."""
    suffix = f"-{options.seeds}-seeds" if options.seeds > 1 else ""
    folder = options.output_dir or RUNS_FOLDER / (config.folder_name(data) + suffix)
    described = {**config.to_dict(data), "seeds": options.seeds}
    anew = options.resume == "never"
    check_folder(folder, described, replace=anew)
    return folder, described, anew


def check_settings(data: Dataset, config: TrainConfig, folder: Path, options: Options) -> None:
    """What would fail later fails now, before anything is written: layers, a device or a checkpoint that cannot be used."""
    from training.checkpoint import read_checkpoint
    from training.trainer import make_loader

    check_resume(options.resume, config.models, options.seeds)
    for name in config.models:
        for split in data.splits:
            make_loader(name, data, config, split, options.device)
        if checkpoint := find_checkpoint(options.resume, folder, name):
            read_checkpoint(checkpoint, name, config.to_dict(data))


def train_seeds(data: Dataset, config: TrainConfig, folder: Path, options: Options, interrupts: Interrupts) -> None:
    """One run in the folder itself, or one in a folder of its own for every seed, and their mean and spread."""
    if options.seeds == 1:
        train_models(data, config, folder, options, interrupts)
        return
    runs = []
    for seed in range(config.seed, config.seed + options.seeds):
        one = folder / f"seed-{seed}"
        one.mkdir(exist_ok=True)
        print(f"seed {seed}")
        if not (one / METRICS_NAME).exists():
            train_models(data, replace(config, seed=seed), one, options, interrupts)
        runs.append(read_metrics(one))
    write_metrics(folder / METRICS_NAME, summarise(runs))


def train_models(data: Dataset, config: TrainConfig, folder: Path, options: Options, interrupts: Interrupts) -> None:
    """Trains one model after the other and writes metrics.json, history.csv and curves.png."""
    from training.metrics import Predictions
    from training.report import draw_curves, write_history
    from training.run import evaluate, train
    from training.trainer import HistoryRow

    results: dict[str, Any] = {}
    histories: dict[str, list[HistoryRow]] = {}
    tests: dict[str, Predictions] = {}
    for name in config.models:
        trainer = train(name, data, config, folder, options.device, options.resume, interrupts, histories)
        histories[name] = trainer.history
        results[name], tests[name] = evaluate(trainer)
    write_history(folder / "history.csv", histories)
    draw_curves(
        folder / "curves.png",
        histories,
        tests,
        f"{data.root.name}: {data.num_records('test', data.schema.kinds[0]):,} test records",
    )
    write_metrics(folder / METRICS_NAME, results)


def print_results(folder: Path, data: Dataset) -> None:
    """The table, and where the rest lies."""
    print_table(read_metrics(folder), f"Test metrics on {data.root.name}; the threshold is chosen on validation")
    print(f"{folder}: metrics.json, history.csv, checkpoints" + (", curves.png" if (folder / "curves.png").exists() else ""))


app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False, context_settings=CONTEXT)


@app.command()
def command_line(
    data: Annotated[Path | None, typer.Option(metavar="SET", help="A data set, as convert or extract writes it.")] = None,
    preprocessed_dir: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Folder with lstm_solo/*.pt and gnn/*.pt; converted once.")
    ] = None,
    converted_dir: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Where to. [default: beside it]")] = None,
    model: Annotated[Literal["all", "lstm", "gnn_lstm", "gvae_lstm"], typer.Option(help="Detector to train.")] = "all",
    epochs: Annotated[int, typer.Option(help="Passes over the training split.")] = 10,
    batch_size: Annotated[int, typer.Option(help="Records a step, over all processes.")] = 32,
    lr: Annotated[float, typer.Option(help="Highest learning rate of the one-cycle schedule.")] = 1e-3,
    dropout: Annotated[float, typer.Option(help="Dropout rate.")] = 0.3,
    seed: Annotated[int, typer.Option(help="Of weights, dropout and order.")] = 0,
    seeds: Annotated[int, typer.Option(help="Runs with this many seeds, from --seed on; prints mean and spread.")] = 1,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    layers: Annotated[
        str | None, typer.Option(metavar="LIST", help="Steps (or graphs) of each record to use: 12:20 or 8,16. [default: all]")
    ] = None,
    output_dir: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="[default: a name made of the configuration]")
    ] = None,
    resume: Annotated[
        str, typer.Option(metavar="auto|never|PATH", help="Go on, start anew, or go on from a checkpoint.")
    ] = "auto",
) -> None:
    """Train the detectors and print their test metrics.

    \b
    Examples:
      python train.py
      python train.py --preprocessed-dir preprocessed_data --epochs 50 --batch-size 32
      python train.py --data data/traces --model lstm --layers 12:20
      python train.py --seeds 3
    """
    if seeds < 1:
        raise UsageError(f"seeds is {seeds}; expected at least 1")
    models = MODELS if model == "all" else (model,)
    config = TrainConfig(models=models, epochs=epochs, batch_size=batch_size, lr=lr, dropout=dropout, seed=seed, layers=layers)
    options = Options(
        data=data,
        preprocessed_dir=preprocessed_dir,
        converted_dir=converted_dir,
        output_dir=output_dir,
        resume=resume,
        device=device,
        seeds=seeds,
    )
    try:
        main(options, config)
    except Interrupted as stop:
        print(f"train.py: stopped by {stop}; the same command goes on from here", file=sys.stderr)
        raise typer.Exit(stop.exit_code) from None


if __name__ == "__main__":
    sys.exit(run_command_line(app, "train.py"))
