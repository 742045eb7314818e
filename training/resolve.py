"""What "auto" stands for on a data set: the axis that the LSTM runs over, and how the nodes of a graph become one row."""

from __future__ import annotations

from dataclasses import replace

from dali_pipeline import Dataset, UsageError
from training.config import Over, Readout, TrainConfig, kind_of
from training.statistics import run_forward

MOST_PARTITIONS, LEAST_SHARDS = 8, 4


def resolved(data: Dataset, config: TrainConfig) -> tuple[TrainConfig, list[str]]:
    """Return the configuration with what "auto" stands for on these data, and a sentence on each choice.

    Args:
        data: The data set.
        config: Settings, with models that the data can train.

    Raises:
        UsageError: There is no such axis, or it does not go with the target.
    """
    kinds, chosen = {kind_of(name) for name in config.models}, list[str]()
    if config.num_partitions == "auto":
        config = replace(config, num_partitions=partitions_for(data, config))
    if "sequences" in kinds:
        config, chosen = _over(data, config)
    elif config.over != "auto":
        raise UsageError(f"--over {config.over} is what the LSTM runs over; {', '.join(config.models)} reads graphs")
    if "graphs" not in kinds:
        if config.readout != "auto":
            raise UsageError(f"--readout {config.readout} is of graphs; {', '.join(config.models)} reads sequences")
        return config, chosen
    if config.readout != "auto" or config.level == "node":
        return config, chosen
    forward = run_forward(data, config)
    why = "all edges run to later nodes or to themselves" if forward else "edges run to earlier nodes too"
    readout: Readout = "last" if forward else "sum"
    return replace(config, readout=readout), [*chosen, f"readout: {readout}, as {why} (--readout)"]


def partitions_for(data: Dataset, config: TrainConfig) -> int:
    """Return the number of partitions that "auto" stands for; it depends on the split and the batch alone.

    The largest power of two up to MOST_PARTITIONS that divides the batch and leaves every partition LEAST_SHARDS shards,
    otherwise 1. So 1, 2, 4 and 8 processes read whole partitions, and agree on the order.
    """
    selections = [data.select("train", kind) for kind in {kind_of(name) for name in config.models}]
    shards = min(0 if selection.draws else len(selection.records) for selection in selections)
    partitions = MOST_PARTITIONS
    while partitions > 1 and (config.batch_size % partitions or shards < LEAST_SHARDS * partitions):
        partitions //= 2
    return partitions


def _over(data: Dataset, config: TrainConfig) -> tuple[TrainConfig, list[str]]:
    """Return the configuration with the axis that the LSTM runs over and the layers that it reads; and what was chosen."""
    schema, steps = data.schema, data.schema.steps
    if schema.layer_axis is None:
        own: Over = "layer" if steps == "layer" else "token"
        if config.over not in ("auto", own):
            raise UsageError(
                f"--over {config.over}, and the steps of {data.root} are named {steps!r}, with no other axis to run over; "
                f"expected --over {own}"
            )
        return replace(config, over=own), []
    over: Over = config.over if config.over != "auto" else "token" if config.level == "step" else "layer"
    if over == "layer" and config.level == "step":
        raise UsageError(
            f"--over layer reads the last step alone, and {config.target} has a value per step; expected --over token"
        )
    if over == "token" and config.layers is None:
        numbers = schema.layers or range(schema.sequence.shape[schema.layer_axis])  # type: ignore[union-attr]
        middle = numbers[len(numbers) // 2]
        said = f"over tokens, of layer {middle}, the middle one (--layers)"
        return replace(config, over=over, token_layers=str(middle)), [said]
    said = "over the layers of the last token (--over)" if over == "layer" else "over tokens (--over)"
    return replace(config, over=over), [said] if config.over == "auto" else []
