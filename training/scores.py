"""Scores of any data set by a checkpoint: streamed batch by batch into a Parquet or CSV file, whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import fields
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import torch

from dali_pipeline import DataError, Dataset, PipelineError, Schema, UsageError
from dali_pipeline.progress import progress_bar
from dali_pipeline.shard import sync_folder
from dali_pipeline.threads import default_threads
from training.build import build_model, kind_of, make_loader
from training.checkpoint import load_checkpoint
from training.config import MODELS, TrainConfig
from training.report import prediction_table
from training.scoring import score_batches

WRITERS: dict[str, Any] = {".parquet": pq.ParquetWriter, ".csv": pa_csv.CSVWriter}


def write_scores(checkpoint: Path, data: Dataset, output: Path, split: str | None, batch_size: int, device: str) -> int:
    """Writes `output` and returns its records. Memory holds a few batches, and the names of a split's groups.

    Raises UsageError for a file that is no checkpoint, a split or device that is not there, another ending; DataError for data
    whose records are not as those that the model was trained on.
    """
    if output.suffix not in WRITERS:
        raise UsageError(f"{output} ends in {output.suffix!r}; expected {' or '.join(WRITERS)}")
    state = load_checkpoint(checkpoint, "name one that train.py kept, such as lstm-best.pt")
    name = state["name"]
    if name not in MODELS:
        raise UsageError(f"{checkpoint} is of the model {name!r}; expected one of {', '.join(MODELS)}")
    try:
        schema = msgspec.convert(state["schema"], Schema)
    except (msgspec.ValidationError, UsageError) as error:
        raise UsageError(f"{checkpoint} holds a schema that this version does not know ({error}); name another") from None
    check_fits(checkpoint, name, schema, data)
    known = {one.name: state["config"][one.name] for one in fields(TrainConfig) if one.name in state["config"]}
    config = TrainConfig(
        **{**known, "models": (name,), "batch_size": batch_size, "lanes": 1, "compile": False, "accumulate": 1}
    )
    torch.set_num_threads(default_threads())
    splits = data.splits if split is None else (split,)
    loaders = {one: make_loader(name, data, config, one, device, shuffle=False) for one in splits}
    model = build_model(name, schema, state["classes"], config).to(loaders[splits[0]].device)
    try:
        model.load_state_dict(state["model"])
    except (RuntimeError, KeyError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"{checkpoint} holds other weights than {name} has ({reason}); name another") from None
    total = sum(loader.num_records for loader in loaders.values())
    if not total:
        raise DataError(f"{data.root} has no {kind_of(name)} in {', '.join(splits)}; expected at least one record")
    with progress_bar() as bar:
        task = bar.add_task("predict", total=total)

        def tables() -> Iterator[pa.Table]:
            for one, loader in loaders.items():
                groups = data.select(one, kind_of(name)).texts("groups")
                for scored in score_batches(model, loader, config.precision):
                    own = [groups[at] for at in scored.positions.tolist()]
                    yield prediction_table(scored.ids, own, scored.labels.numpy(), scored.scores, one)
                    bar.advance(task, len(scored.ids))
                loader.check_digest(loader.digest)

        stream(output, tables())
    return total


def check_fits(checkpoint: Path, name: str, schema: Schema, data: Dataset) -> None:
    """Raises DataError unless the data's records have the shapes of those that the model was trained on; types may differ."""
    fields = ("sequence",) if name == "lstm" else ("x", "edge_attr")
    for field in fields:
        theirs, ours = (getattr(one, field) for one in (schema, data.schema))
        if (theirs and theirs.shape) != (ours and ours.shape):
            found, expected = (f"rows of shape {one.shape}" if one else "none" for one in (ours, theirs))
            raise DataError(
                f"{data.root} does not fit {checkpoint}: its {field} has {found}; expected {expected}, as in training"
            )


def stream(output: Path, tables: Iterator[pa.Table]) -> None:
    """Writes the tables one after the other. Raises PipelineError where the file cannot be written."""
    temporary = output.with_name(output.name + ".tmp")
    try:
        first = next(tables)
        with closing(WRITERS[output.suffix](temporary, first.schema)) as writer:
            writer.write_table(first)
            for table in tables:
                writer.write_table(table)
        temporary.replace(output)
        sync_folder(output.parent)
    except OSError as error:
        reason = error.strerror or error
        raise PipelineError(f"{output} could not be written ({reason}); expected free space and permission") from error
    finally:
        temporary.unlink(missing_ok=True)
