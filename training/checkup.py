"""train.py --doctor: measure whether a training waits for data, with its flags and model; writes nothing."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from dataclasses import replace
from typing import Any

from dali_pipeline import UsageError
from dali_pipeline.cli.checkup import check_up
from dali_pipeline.loaders.loader import Loader
from dali_pipeline.tools import doctor
from dali_pipeline.tools.knobs import Setup
from dali_pipeline.tools.stages import Train
from training.build import parts_of_records
from training.config import ModelName, TrainConfig, kind_of
from training.prepare import Options, find_data, models_for
from training.processes import Processes
from training.resolve import resolved
from training.step import trial
from training.target import Target, find_target


def examine_training(options: Options, config: TrainConfig, processes: Processes, *, as_json: bool) -> int:
    """Examine the first model that the data can train, print the result, and return 0 (fed) or 1 (input-bound)."""
    if processes.world_size > 1:
        raise UsageError(f"--doctor examines one process, and {processes.world_size} were started; run it without torchrun")
    with redirect_stdout(sys.stderr if as_json else sys.stdout):
        data = find_data(options)
        name = models_for(data, config.models, config.level)[0]
        config, _ = resolved(data, replace(config, models=(name,)))
        target = find_target(data, kind_of(name), config.target, config.task, layers=config.layers, splits=("train",))
    conduct = options.conduct
    setup = Setup(
        batch_size=config.batch_size,
        num_workers=conduct.num_workers,
        device=conduct.device,
        **parts_of_records(name, data.schema, config),
    )
    seconds = doctor.SECONDS
    return check_up(
        data, kind_of(name), setup, lambda loader: train_step(name, loader, config, target), name, seconds, as_json, None
    )


def train_step(name: ModelName, loader: Loader[Any], config: TrainConfig | None = None, target: Target | None = None) -> Train:
    """Return a callable that takes one training step of a detector on a batch, like train.py."""
    target = target or find_target(loader.data, loader.kind, splits=("train",))
    return trial(name, loader, config or TrainConfig(), target, Processes(loader.world))[1]
