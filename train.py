"""Train the detectors and print how well they tell hallucinations from answers.

    python train.py                                             # makes the demonstration's data first if they are missing
    python train.py --preprocessed-dir preprocessed_data --epochs 50 --batch-size 32
    python train.py --data data/traces --model lstm --layers 12:20
    python train.py --seeds 3                                   # mean and spread over three seeds; --folds 5 over five folds
    torchrun --nproc-per-node 2 train.py --data data/traces     # the same numbers, on two processes

It may be stopped at any time. The same command continues where it stopped; once finished, it prints its results again.
"""

from __future__ import annotations

import os
import sys

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # torch reads this when it loads: waiting threads release their cores

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from dali_pipeline import Dataset, World
from dali_pipeline.cli.app import new_app
from dali_pipeline.cli.app import run as run_command_line
from dali_pipeline.cli.arguments import (
    CACHE_BYTES,
    CACHE_DIR,
    FILES_ROOT,
    parse_cache_bytes,
    parse_count_or_auto,
    parse_num_workers,
)
from dali_pipeline.runtime.threads import parse_threads
from dali_pipeline.storage.cachedfile import Place
from training.commandline import GroupedCommand, flag, print_config, take_config
from training.config import MODELS, Conduct, Over, Readout, TrainConfig
from training.folder import BASELINES_NAME, DIFFERENCES_NAME, METRICS_NAME, FolderLock, claim_folder, lacks
from training.interrupt import Interrupted, Interrupts
from training.prepare import Options, check_settings, find_data, find_folder, models_for, open_same, runs_of
from training.processes import EndedElsewhere, Processes
from training.results import print_differences, print_table, read_baselines, read_metrics, summarise, write_metrics


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """The result of `prepare` in the first process, which it sends to the others."""

    root: Place
    digest: str
    config: TrainConfig
    chosen: list[str]
    folder: Path
    finished: bool
    files_root: Place | None


def main(options: Options, config: TrainConfig) -> None:
    """Run all steps of a training."""
    with Processes.join(options.conduct.device) as processes, FolderLock() as lock:
        if options.doctor:
            from training.checkup import examine_training

            raise typer.Exit(examine_training(options, config, processes, as_json=options.as_json))
        if options.replay:
            from training.ceiling import tell_ceilings

            tell_ceilings(options, config, processes)
            return
        interrupts = Interrupts(processes)
        prepared = processes.first(lambda: prepare(options, config, processes.world_size, lock))
        data = open_same(prepared.root, prepared.digest, prepared.files_root)
        if not prepared.finished:
            train_runs(data, prepared, options, interrupts, processes)
        processes.first(lambda: print_results(prepared.folder, data, options))  # while the others wait


def prepare(options: Options, config: TrainConfig, world_size: int, lock: FolderLock | None = None) -> Prepared:
    """Find data and folder, refuse settings that cannot work, then claim and lock the folder."""
    from training.target import target_field

    data = find_data(options)
    target_field(data, config.target)
    config = replace(config, models=models_for(data, config.models, config.level))
    folder, described, anew = find_folder(options, config, data)
    finished, chosen = (folder / METRICS_NAME).exists() and not anew, list[str]()
    if finished:
        print(f"{folder}: finished before; --resume never trains again")
    else:
        from training.resolve import resolved

        config, chosen = resolved(data, config)
        check_settings(data, config, folder, options, world_size)
        (lock or FolderLock()).take(folder)
        claim_folder(folder, described, replace=anew)
    return Prepared(
        root=data.root,
        digest=data.digest,
        config=config,
        chosen=chosen,
        folder=folder,
        finished=finished,
        files_root=data.files_root,
    )


def train_runs(data: Dataset, prepared: Prepared, options: Options, interrupts: Interrupts, processes: Processes) -> None:
    """Train one run in the folder, or several runs in sub-folders, and write their mean and spread."""
    config, folder = prepared.config, prepared.folder
    from training.extras import extra
    from training.run import Job, carry_out
    from training.watch import traced

    with traced(options.trace, processes.rank):
        for number, (name, part, own) in enumerate(runs_of(options, config, data)):
            job = Job(
                data=part,
                config=own,
                folder=folder / name,
                resume="auto" if name else options.resume,
                conduct=options.conduct,
                interrupts=interrupts,
                processes=processes,
                chosen=prepared.chosen if number == 0 else [],
                probes=number == 0 or options.folds > 0,
            )
            if not processes.first((job.folder / METRICS_NAME).exists):
                if name and processes.is_first:
                    print(name.replace("-", " "), flush=True)
                    claim_folder(job.folder, own.to_dict(part), replace=False)
                carry_out(job)
    if options.runs > 1 and processes.is_first:
        from training.pairs import paired, write_differences

        folders, over = [folder / name for name, _, _ in runs_of(options, config, data)], "folds" if options.folds else "seeds"
        runs, differences = [read_metrics(own) for own in folders], list[dict[str, Any]]()
        with extra(folder / DIFFERENCES_NAME):
            differences = paired(folders, next(iter(runs[0].values()))["task"])
            write_differences(folder / DIFFERENCES_NAME, differences)
        with extra(folder / BASELINES_NAME):
            write_metrics(folder / BASELINES_NAME, summarise([read_baselines(own) for own in folders], over))
        write_metrics(folder / METRICS_NAME, summarise(runs, over, differences))


def print_results(folder: Path, data: Dataset, options: Options) -> None:
    """Print the table of metrics, and the names of the other files."""
    over = f", mean and spread over {options.runs} {'folds' if options.folds else 'seeds'}" if options.runs > 1 else ""
    results = read_metrics(folder)
    named = next(iter(results.values())).get("target", "label")
    of = "" if named == "label" else f", {named}"
    by_threshold = next(iter(results.values())).get("task", "binary") in ("binary", "multilabel")
    chosen = "; the threshold is chosen on validation" if by_threshold else ""
    print_table(results, f"Test metrics on {data.root.name}{of}{over}{chosen}", read_baselines(folder))
    if options.runs > 1:
        from training.pairs import read_differences

        if differences := read_differences(folder / DIFFERENCES_NAME):
            print_differences(differences)
    if sentence := lacks(folder):
        print(sentence)
    print(f"{folder}: {', '.join(sorted(path.name for path in folder.iterdir() if path.suffix != '.pt'))}, checkpoints")


app = new_app()


@app.command(cls=GroupedCommand)
def command_line(
    ctx: typer.Context,
    data: Annotated[
        str | None, flag("Data", "Folder or URL of the data set.", "--data s3://bucket/traces", metavar="SET")
    ] = None,
    cache_dir: Annotated[Path | None, flag("Data", CACHE_DIR, "--cache-dir /local/cache", metavar="FOLDER")] = None,
    cache_bytes: Annotated[str | None, flag("Data", CACHE_BYTES, "--cache-bytes 500GiB", metavar="SIZE")] = None,
    files_root: Annotated[str | None, flag("Data", FILES_ROOT, "--files-root /mnt/vllm", metavar="FOLDER")] = None,
    preprocessed_dir: Annotated[
        Path | None,
        flag(
            "Data",
            "Folder with lstm_solo/*.pt and gnn/*.pt, which is converted once.",
            "--preprocessed-dir pre",
            metavar="FOLDER",
        ),
    ] = None,
    converted_dir: Annotated[
        Path | None,
        flag(
            "Data",
            "Folder for the converted data set. [default: beside --preprocessed-dir]",
            "--converted-dir /fast/traces",
            metavar="FOLDER",
        ),
    ] = None,
    layers: Annotated[
        str | None,
        flag("Data", "Time steps or graphs to use of each record. [default: all]", "--layers 12:20 or 8,16", metavar="LIST"),
    ] = None,
    target: Annotated[
        str,
        flag(
            "Data",
            "What to predict: label, record.NAME, step.NAME or node.NAME; a whole number or bool is a class, else a value.",
            "--target step.is_wrong",
            metavar="NAME",
        ),
    ] = "label",
    task: Annotated[
        Literal["binary", "multiclass", "multilabel", "regression"] | None,
        flag("Data", "Task on the target. [default: what its type says]", "--task regression", show_default=False),
    ] = None,
    num_partitions: Annotated[
        str,
        flag(
            "Data",
            "Number of disjoint sets of shards, of which each process or node reads only its own. By default as many, up to "
            "8, as the batch and the shards allow; the number of processes does not matter.",
            "--num-partitions 2",
        ),
    ] = "auto",
    num_workers: Annotated[
        str,
        flag(
            "Data", "Number of threads (sequences) or processes (graphs) that read ahead.", "--num-workers 2", metavar="auto|N"
        ),
    ] = "auto",
    model: Annotated[
        Literal["all", "lstm", "gnn_lstm", "gvae_lstm"], flag("Model", "Detector to train.", "--model lstm")
    ] = "all",
    over: Annotated[
        Over,
        flag(
            "Model",
            "What the LSTM runs over where tokens have layers: the layers of the last token, or the tokens of --layers "
            "(by default the middle one). [auto: layer, but token for a target per step]",
            "--over token",
        ),
    ] = "auto",
    readout: Annotated[
        Readout,
        flag(
            "Model",
            "How the nodes of a graph become one row. [auto: last if all edges run to later nodes, otherwise sum]",
            "--readout sum",
        ),
    ] = "auto",
    dropout: Annotated[float, flag("Model", "Dropout rate.", "--dropout 0.5")] = 0.3,
    kl_weight: Annotated[
        float, flag("Model", "Weight of the KL divergence in the loss of gvae_lstm.", "--kl-weight 0.01")
    ] = 1e-3,
    epochs: Annotated[int, flag("Training", "Number of passes over the training split.", "--epochs 50")] = 10,
    batch_size: Annotated[int, flag("Training", "Records per step, over all processes together.", "--batch-size 128")] = 32,
    lr: Annotated[float, flag("Training", "Highest learning rate of the one-cycle schedule.", "--lr 3e-4")] = 1e-3,
    weight_decay: Annotated[float, flag("Training", "Weight decay of AdamW.", "--weight-decay 0.1")] = 0.01,
    clip_norm: Annotated[
        float, flag("Training", "Maximum norm of the gradient; 0 turns clipping off.", "--clip-norm 0.5")
    ] = 1.0,
    accumulate: Annotated[
        int,
        flag(
            "Training", "Number of pieces that a batch is split into, to save memory (gradient accumulation).", "--accumulate 4"
        ),
    ] = 1,
    seed: Annotated[int, flag("Training", "Seed of weights, dropout, order and folds.", "--seed 1")] = 0,
    seeds: Annotated[
        int, flag("Training", "Number of runs, each with a seed of its own: --seed, --seed + 1, …", "--seeds 3")
    ] = 1,
    folds: Annotated[
        int,
        flag(
            "Training",
            "Number of cross-validation folds over train and val, by group, one run per fold; 0 for none.",
            "--folds 5",
        ),
    ] = 0,
    device: Annotated[str, flag("Speed", "Device to train on: auto, cpu, cuda or cuda:N.", "--device cpu")] = "auto",
    threads: Annotated[
        str | None,
        flag(
            "Speed",
            "Torch threads per process on a CPU; auto measures. [default: OMP_NUM_THREADS, or a quarter of the cores]",
            "--threads auto",
            metavar="auto|N",
            show_default=False,
        ),
    ] = None,
    precision: Annotated[
        Literal["fp32", "bf16", "fp16"], flag("Speed", "Precision of the forward pass (autocast).", "--precision bf16")
    ] = "fp32",
    compiled: Annotated[
        bool, flag("Speed", "Compile the model with torch.compile; worth it on long runs.", "--compile", "--compile")
    ] = False,
    output_dir: Annotated[
        Path | None,
        flag(
            "Output",
            "Folder of the results and checkpoints. [default: a name made from the configuration]",
            "--output-dir runs/one",
            metavar="FOLDER",
        ),
    ] = None,
    resume: Annotated[
        str,
        flag(
            "Output",
            "Continue the run in the folder, start anew, or continue from a checkpoint file.",
            "--resume never",
            metavar="auto|never|PATH",
        ),
    ] = "auto",
    checkpoint_minutes: Annotated[
        float, flag("Output", "Minutes between checkpoints within an epoch; 0 for none.", "--checkpoint-minutes 1")
    ] = 10.0,
    checkpoint_steps: Annotated[
        int, flag("Output", "Steps between checkpoints within an epoch; 0 for none.", "--checkpoint-steps 500")
    ] = 0,
    replay: Annotated[
        bool, flag("Speed", "Only measure the speed of the model on one repeated batch.", "--replay", "--replay")
    ] = False,
    doctor: Annotated[
        bool,
        flag(
            "Speed",
            "Only measure whether training waits for data, and say what to change; exits 0 (fed) or 1 (input-bound).",
            "--doctor",
            "--doctor",
        ),
    ] = False,
    as_json: Annotated[
        bool, flag("Speed", "Print the findings of --doctor as one JSON object and nothing else.", "--doctor --json", "--json")
    ] = False,
    trace: Annotated[
        Path | None,
        flag("Speed", "Write a timeline of the run to this file, for ui.perfetto.dev.", "--trace trace.json", metavar="FILE"),
    ] = None,
    config: Annotated[
        Path | None,
        flag(
            "Output",
            "YAML file with values of flags; flags on the command line win.",
            "--config run.yaml",
            is_eager=True,
            callback=take_config,
        ),
    ] = None,
    show_config: Annotated[
        bool, flag("Output", "Print all flags in the form that --config reads, and exit.", "--print-config", "--print-config")
    ] = False,
) -> None:
    """Train the detectors and print their test metrics.

    \b
    Examples:
      python train.py
      python train.py --preprocessed-dir preprocessed_data --epochs 50 --batch-size 32
      python train.py --data data/traces --model lstm --layers 12:20
      torchrun --nproc-per-node 2 train.py --data data/traces --precision bf16
      python train.py --seeds 3
    """
    training = TrainConfig(
        models=MODELS if model == "all" else (model,),
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        dropout=dropout,
        weight_decay=weight_decay,
        kl_weight=kl_weight,
        seed=seed,
        layers=layers,
        target=target,
        task=task,
        over=over,
        readout=readout,
        num_partitions=parse_count_or_auto("num partitions", num_partitions, 1),
        precision=precision,
        accumulate=accumulate,
        clip_norm=clip_norm,
        compile=compiled,
    )
    options = Options(
        data=data,
        cache_dir=cache_dir,
        cache_bytes=parse_cache_bytes(cache_bytes),
        files_root=files_root,
        preprocessed_dir=preprocessed_dir,
        converted_dir=converted_dir,
        output_dir=output_dir,
        resume=resume,
        seeds=seeds,
        folds=folds,
        replay=replay,
        doctor=doctor,
        as_json=as_json,
        trace=trace,
        conduct=Conduct(
            device=device,
            num_workers=parse_num_workers(num_workers),
            threads=parse_threads(threads),
            checkpoint_minutes=checkpoint_minutes,
            checkpoint_steps=checkpoint_steps,
        ),
    )
    if show_config:
        print_config(ctx)
        return
    try:
        main(options, training)
    except Interrupted as stop:
        if World.detect().rank == 0:
            print(f"train.py: stopped by {stop}; the same command goes on from here", file=sys.stderr)
        raise typer.Exit(stop.exit_code) from None
    except EndedElsewhere as end:
        print(end, end="", file=sys.stderr)
        raise typer.Exit(2) from None


if __name__ == "__main__":
    sys.exit(run_command_line(app, "train.py"))
