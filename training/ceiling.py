"""Measure the maximum speed of a model on one repeated batch, which waits for no data; writes nothing."""

from __future__ import annotations

import time
from dataclasses import replace

import torch

from dali_pipeline import DataError, Dataset, replay
from dali_pipeline.runtime.threads import default_threads
from training.build import make_loader
from training.config import ModelName, TrainConfig
from training.prepare import Options, check_trace, find_data, models_for
from training.processes import Processes
from training.resolve import resolved
from training.step import trial
from training.target import find_target
from training.watch import traced

SECONDS, LEAST_STEPS = 5.0, 5  # per model


def tell_ceilings(options: Options, config: TrainConfig, processes: Processes) -> None:
    """Print one line per model: the records per second if it never waited for a batch."""
    data = processes.first(lambda: measurable_data(options))
    config = replace(config, models=models_for(data, config.models, config.level))
    config = processes.first(lambda: resolved(data, config)[0])
    config.check_shares(processes.world_size)
    with traced(options.trace, processes.rank):
        for name in config.models:
            rate, nbytes = ceiling(name, data, config, options, processes)
            if processes.is_first:
                print(
                    f"{name}: {rate:,.0f} records/s ({rate * nbytes / 1e9:.2f} GB/s of batches) on one batch again and again: "
                    "no loader can make it train faster",
                    flush=True,
                )


def measurable_data(options: Options) -> Dataset:
    """Return the data set; refuse data that cannot be measured."""
    check_trace(options.trace)
    return find_data(options)


def ceiling(name: ModelName, data: Dataset, config: TrainConfig, options: Options, processes: Processes) -> tuple[float, float]:
    """Return records per second of all processes together, and bytes per record in a batch; takes about SECONDS."""
    conduct, shares = options.conduct, processes.world_size
    torch.set_num_threads(conduct.threads if isinstance(conduct.threads, int) else default_threads())
    loader = make_loader(name, data, config, "train", conduct.device, num_workers=conduct.num_workers, world_size=shares)
    if not loader.num_records:
        raise DataError(f"split 'train' of {data.root} has no records of {loader.kind}, which {name} trains on; expected some")
    target = find_target(data, loader.kind, config.target, config.task, layers=config.layers, splits=("train",))
    _, step = trial(name, loader, config, target, processes)
    batch = next(iter(loader))

    def seconds(steps: int) -> float:
        begun = time.perf_counter()
        for repeated in replay([batch], steps):
            share = step(repeated)
        float(share)  # waits for a GPU
        return time.perf_counter() - begun

    seconds(LEAST_STEPS)  # the first steps compile, and choose kernels
    a_step = seconds(LEAST_STEPS) / LEAST_STEPS  # in every process, because they take steps together
    steps = processes.first(lambda: max(LEAST_STEPS, round(SECONDS / a_step)))
    return steps * config.batch_size / seconds(steps), batch.nbytes / len(batch)
