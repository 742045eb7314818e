"""Score a data set with a checkpoint, and stream the scores to a Parquet or CSV file, whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import torch
from torch import nn

from dali_pipeline import DataError, Dataset, Schema, UsageError
from dali_pipeline.loaders.loader import Loader
from dali_pipeline.loaders.options import OnNan
from dali_pipeline.reading.damage import TRIED, log
from dali_pipeline.reading.source import NotFiniteError
from dali_pipeline.runtime.outside import as_output
from dali_pipeline.runtime.progress import progress_bar
from dali_pipeline.runtime.threads import default_threads
from dali_pipeline.storage.whole import replacing
from training.build import build_model, make_loader
from training.checkpoint import load_checkpoint
from training.config import MODELS, ModelName, TrainConfig, kind_of
from training.objective import Objective
from training.report import prediction_table
from training.scoring import Scored, score_batches
from training.target import Target, same_kind, targets_of
from training.transfer import Tally

WRITERS: dict[str, Any] = {".parquet": pq.ParquetWriter, ".csv": pa_csv.CSVWriter}


@dataclass(kw_only=True)
class Counts:
    """Numbers of records.

    Attributes:
        records: Scored records.
        left_out: Records that were left out for NaN or infinite values.
        strange: Scored records without a finite output.
        tally: Scores and targets, for a table.
        name: The model.
    """

    records: int = 0
    left_out: int = 0
    strange: int = 0
    tally: Tally | None = None
    name: str = ""

    def count(self, scored: Scored, checkpoint: Path, *, keep: bool) -> None:
        """Count scored records; raise DataError for an output that is not finite, unless `keep` is set."""
        record_M = torch.repeat_interleave(torch.arange(len(scored.ids)), scored.counts)
        unfit_M = ~torch.isfinite(scored.logits).all(dim=1)
        strange = torch.zeros(len(scored.ids), dtype=torch.bool).index_put((record_M[unfit_M],), torch.tensor(True))
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
) -> Counts:
    """Score a data set, and write `output`. Memory holds a few batches, the names of one split's groups, and, if
    the records have targets, some 100 bytes of each for the table, of at most 5 million.

    Args:
        checkpoint: File that train.py kept.
        data: The data set.
        output: File to write, .parquet or .csv.
        split: Name of the split, or None for all splits.
        batch_size: Records per batch.
        device: "auto", "cpu", "cuda" or "cuda:N".
        on_nan: What to do with records that hold NaN or infinite values, like in a loader.

    Returns:
        Numbers of records.

    Raises:
        UsageError: The file is no checkpoint, the split or device is not there, or the output has another suffix.
        DataError: The records have other shapes than those of the training, or a score is not finite and `on_nan` is not
            "keep".
    """
    if output.suffix not in WRITERS:
        raise UsageError(f"{output} ends in {output.suffix!r}; expected {' or '.join(WRITERS)}")
    written = as_output(output)
    trained = read_trained(checkpoint, data, batch_size)
    name, target, config = trained.name, trained.target, trained.config
    torch.set_num_threads(default_threads())
    splits = data.splits if split is None else (split,)
    has = knows_targets(trained, data, splits)
    reads = config if has else replace(config, target="label")  # scores need no targets
    loaders = {name_: make_loader(name, data, reads, name_, device, shuffle=False, on_nan=on_nan) for name_ in splits}
    device_of = loaders[splits[0]].device
    model, objective = trained.model.to(device_of), Objective(target, device_of)
    total = sum(loader.num_records for loader in loaders.values())
    if not total:
        raise DataError(f"{data.root} has no {kind_of(name)} in {', '.join(splits)}; expected at least one record")
    counts, tally = Counts(), Tally(target)
    with progress_bar() as bar:
        task = bar.add_task("predict", total=total)

        def tables() -> Iterator[pa.Table]:
            for split_name, loader in loaders.items():
                groups = data.select(split_name, kind_of(name)).texts("groups")
                for scored in finite_batches(model, loader, config.precision, objective, has):
                    counts.count(scored, checkpoint, keep=on_nan == "keep")
                    own = [groups[position] for position in scored.positions.tolist()]
                    found = scored.predictions(target)
                    tally.add(found, own)
                    yield prediction_table(found, own, split_name)
                    bar.advance(task, len(scored.ids))
                counts.left_out += loader.num_records - loader.digest.records
            if not counts.records:
                raise DataError(
                    f"none of the {total:,} records in {data.root} holds finite values alone; expected at least one"
                )

        stream(written, tables())
    counts.tally, counts.name = tally, name
    return counts


def knows_targets(trained: Trained, data: Dataset, splits: Sequence[str]) -> bool:
    """Return whether the records have targets of the detector's kind, each a finite number; logs it if one is not."""
    name = trained.target.name
    field = targets_of(data.schema).get(name)
    if field is None or not same_kind(targets_of(trained.schema).get(name), field):
        return False
    if name != "label" and field.dtype.startswith(("float", "bfloat")):  # labels are finite
        for split in splits:
            for values, _, _ in data.select(split, kind_of(trained.name)).field_values(name, field):
                if not np.isfinite(values).all():
                    log.warning("%s of %s holds values that are not finite in split %r: no table", name, data.root, split)
                    return False
    return True


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A detector as a checkpoint holds it: name, schema of its data, settings, target and network."""

    name: ModelName
    schema: Schema
    config: TrainConfig
    target: Target
    model: nn.Module


def read_trained(checkpoint: Path, data: Dataset, batch_size: int) -> Trained:
    """Return the detector of a checkpoint; raises as `write_scores` does if there is none, or the records do not fit it."""
    state = load_checkpoint(checkpoint, "name one that train.py kept, such as lstm-best.pt")
    name = state["name"]
    if name not in MODELS:
        raise UsageError(f"{checkpoint} is of the model {name!r}; expected one of {', '.join(MODELS)}")
    try:
        schema, target = msgspec.convert(state["schema"], Schema), msgspec.convert(state["target"], Target)
    except (msgspec.ValidationError, UsageError) as error:
        raise UsageError(f"{checkpoint} holds a schema that this version does not know ({error}); name another") from None
    check_fits(checkpoint, name, schema, data)
    config = replace(settings_of(checkpoint, state), models=(name,), batch_size=batch_size)
    try:
        model = build_model(name, schema, target, config)
        model.load_state_dict(state["model"])
    except (RuntimeError, LookupError, TypeError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"{checkpoint} holds other weights than {name} has ({reason}); name another") from None
    return Trained(name=name, schema=schema, config=config, target=target, model=model)


def finite_batches(model: nn.Module, loader: Loader[Any], precision: str, objective: Objective, has: bool) -> Iterator[Scored]:
    """Yield like `score_batches`, or nothing if a short split has no record that may be scored; check the digest."""
    try:
        yield from score_batches(model, loader, precision, objective, with_losses=False, with_targets=has)
    except NotFiniteError:
        # a loader that leaves records out looks for a sound one to pad with, among the first TRIED of the split
        if NotFiniteError not in loader.skips or loader.digest.records or loader.num_records > TRIED:
            raise
    else:
        loader.check_digest(loader.digest)


def settings_of(checkpoint: Path, state: Mapping[str, Any]) -> TrainConfig:
    """Return the settings that the checkpoint was trained with, as far as a forward pass needs them."""
    try:
        known = {field.name: state["config"][field.name] for field in fields(TrainConfig) if field.name in state["config"]}
        return msgspec.convert({**known, "num_partitions": 1, "compile": False, "accumulate": 1}, TrainConfig)
    except (msgspec.ValidationError, TypeError, LookupError) as error:
        raise UsageError(f"{checkpoint} holds settings that this version does not know ({error}); name another") from None


def check_fits(checkpoint: Path, name: str, schema: Schema, data: Dataset) -> None:
    """Raise DataError unless the records have the shapes of those that the model was trained on; types may differ."""
    fields = ("sequence",) if name == "lstm" else ("x", "edge_attr")
    for field in fields:
        theirs, ours = (getattr(owner, field) for owner in (schema, data.schema))
        if (theirs and theirs.shape) != (ours and ours.shape):
            found, expected = (f"rows of shape {stored.shape}" if stored else "none" for stored in (ours, theirs))
            raise DataError(
                f"{data.root} does not fit {checkpoint}: its {field} has {found}; expected {expected}, as in training"
            )
    axes = (data.schema.layer_axis, schema.layer_axis)
    if name == "lstm" and axes[0] != axes[1]:
        found, expected = ("no axis" if axis is None else f"axis {axis} of a step" for axis in axes)
        raise DataError(f"{data.root} does not fit {checkpoint}: {found} is named layer; expected {expected}, as in training")


def stream(output: Path, tables: Iterator[pa.Table]) -> None:
    """Write the tables one after the other, whole or not at all; raise PipelineError if that fails."""
    with replacing(output, wait=False) as file:
        first = next(tables)
        with closing(WRITERS[output.suffix](file, first.schema)) as writer:
            writer.write_table(first)
            for table in tables:
                writer.write_table(table)
