"""Scores of any data set by a checkpoint: streamed batch by batch into a Parquet or CSV file, whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import torch
from torch import nn

from dali_pipeline import DataError, Dataset, Schema, UsageError
from dali_pipeline.loaders.loader import Loader
from dali_pipeline.loaders.options import OnNan
from dali_pipeline.reading.damage import TRIED
from dali_pipeline.reading.source import NotFiniteError
from dali_pipeline.runtime.outside import as_output
from dali_pipeline.runtime.progress import progress_bar
from dali_pipeline.runtime.threads import default_threads
from dali_pipeline.storage.whole import replacing
from training.build import build_model, make_loader
from training.checkpoint import load_checkpoint
from training.config import MODELS, TrainConfig, kind_of
from training.report import prediction_table
from training.scoring import Scored, score_batches

WRITERS: dict[str, Any] = {".parquet": pq.ParquetWriter, ".csv": pa_csv.CSVWriter}


@dataclass(kw_only=True)
class Told:
    """Numbers of records: scored, left out for NaN or infinite values, and, of those scored, without a finite output."""

    records: int = 0
    left_out: int = 0
    strange: int = 0

    def count(self, scored: Scored, checkpoint: Path, *, keep: bool) -> None:
        """Counts scored records. Raises DataError, unless to `keep` it, for an output that is no finite number."""
        strange = ~torch.isfinite(scored.logits).all(dim=1)
        if strange.any() and not keep:
            first = scored.ids[int(strange.int().argmax())]
            raise DataError(
                f"{checkpoint} gives record {first!r} an output that is no finite number, though "
                "its values are: the weights are damaged or too large; --on-nan keep writes such scores"
            )
        self.records += len(scored.ids)
        self.strange += int(strange.sum())


def write_scores(
    checkpoint: Path, data: Dataset, output: Path, split: str | None, batch_size: int, device: str, on_nan: OnNan = "raise"
) -> Told:
    """Writes `output` and counts its records. Memory holds a few batches, and the names of a split's groups.

    on_nan: what becomes of records with NaN or infinite values, as in a loader. Raises UsageError for a file that is no
    checkpoint, a split or device that is not there, another ending; DataError for data whose records are not as those that the
    model was trained on, and, unless to "keep", for a score that is no finite number.
    """
    if output.suffix not in WRITERS:
        raise UsageError(f"{output} ends in {output.suffix!r}; expected {' or '.join(WRITERS)}")
    target = as_output(output)
    state = load_checkpoint(checkpoint, "name one that train.py kept, such as lstm-best.pt")
    name = state["name"]
    if name not in MODELS:
        raise UsageError(f"{checkpoint} is of the model {name!r}; expected one of {', '.join(MODELS)}")
    try:
        schema = msgspec.convert(state["schema"], Schema)
    except (msgspec.ValidationError, UsageError) as error:
        raise UsageError(f"{checkpoint} holds a schema that this version does not know ({error}); name another") from None
    check_fits(checkpoint, name, schema, data)
    config = replace(settings_of(checkpoint, state), models=(name,), batch_size=batch_size)
    torch.set_num_threads(default_threads())
    splits = data.splits if split is None else (split,)
    loaders = {one: make_loader(name, data, config, one, device, shuffle=False, on_nan=on_nan) for one in splits}
    try:
        model = build_model(name, schema, state["classes"], config)
        model.load_state_dict(state["model"])
    except (RuntimeError, LookupError, TypeError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"{checkpoint} holds other weights than {name} has ({reason}); name another") from None
    model.to(loaders[splits[0]].device)
    total = sum(loader.num_records for loader in loaders.values())
    if not total:
        raise DataError(f"{data.root} has no {kind_of(name)} in {', '.join(splits)}; expected at least one record")
    told = Told()
    with progress_bar() as bar:
        task = bar.add_task("predict", total=total)

        def tables() -> Iterator[pa.Table]:
            for one, loader in loaders.items():
                groups = data.select(one, kind_of(name)).texts("groups")
                for scored in finite_batches(model, loader, config.precision):
                    told.count(scored, checkpoint, keep=on_nan == "keep")
                    own = [groups[at] for at in scored.positions.tolist()]
                    yield prediction_table(scored.ids, own, scored.labels.numpy(), scored.scores, one)
                    bar.advance(task, len(scored.ids))
                told.left_out += loader.num_records - loader.digest.records
            if not told.records:
                raise DataError(
                    f"none of the {total:,} records in {data.root} holds finite values alone; expected at least one"
                )

        stream(target, tables())
    return told


def finite_batches(model: nn.Module, loader: Loader[Any], precision: str) -> Iterator[Scored]:
    """What `score_batches` gives, and nothing where a short split has no record that may be scored; the digest is checked."""
    try:
        yield from score_batches(model, loader, precision, with_losses=False)
    except NotFiniteError:
        # a loader that leaves records out looks for a sound one to pad with, among TRIED of the split
        if NotFiniteError not in loader.skips or loader.digest.records or loader.num_records > TRIED:
            raise
    else:
        loader.check_digest(loader.digest)


def settings_of(checkpoint: Path, state: Mapping[str, Any]) -> TrainConfig:
    """The settings that the checkpoint was trained with, as far as a forward pass looks at them."""
    try:
        known = {one.name: state["config"][one.name] for one in fields(TrainConfig) if one.name in state["config"]}
        return msgspec.convert({**known, "num_partitions": 1, "compile": False, "accumulate": 1}, TrainConfig)
    except (msgspec.ValidationError, TypeError, LookupError) as error:
        raise UsageError(f"{checkpoint} holds settings that this version does not know ({error}); name another") from None


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
    """Writes the tables one after the other, whole or not at all. Raises PipelineError where the file cannot be written."""
    with replacing(output, wait=False) as file:
        first = next(tables)
        with closing(WRITERS[output.suffix](file, first.schema)) as writer:
            writer.write_table(first)
            for table in tables:
                writer.write_table(table)
