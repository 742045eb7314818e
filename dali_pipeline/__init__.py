"""dali_pipeline: stream sequences and graphs from data sets far larger than memory to a GPU.

Write a data set with `ShardWriter`, open it with `open_dataset`, and iterate with `SequenceLoader` or `GraphLoader`. The
docstring of each folder says what the folder is for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dali_pipeline.dataset.dataset import Dataset, open_dataset
from dali_pipeline.errors import DataError, FormatError, PipelineError, UsageError, needs_extra
from dali_pipeline.format.digest import EpochDigest
from dali_pipeline.format.label import Label
from dali_pipeline.format.record import Graphs, Record
from dali_pipeline.format.schema import Field, Schema
from dali_pipeline.loaders.state import StateError

if TYPE_CHECKING:
    from dali_pipeline.dataset.mix import mix
    from dali_pipeline.loaders.collate import GraphBatch
    from dali_pipeline.loaders.graphs import GraphLoader
    from dali_pipeline.loaders.sequences import SequenceBatch, SequenceLoader, StepBatch
    from dali_pipeline.runtime.timing import StepTimer, replay
    from dali_pipeline.runtime.trace import Trace, span
    from dali_pipeline.runtime.world import World
    from dali_pipeline.writing.split import SplitRule
    from dali_pipeline.writing.writer import ShardWriter

__version__ = "0.1.0"
__all__ = [
    "DataError",
    "Dataset",
    "EpochDigest",
    "Field",
    "FormatError",
    "GraphBatch",
    "GraphLoader",
    "Graphs",
    "Label",
    "PipelineError",
    "Record",
    "Schema",
    "SequenceBatch",
    "SequenceLoader",
    "ShardWriter",
    "SplitRule",
    "StateError",
    "StepBatch",
    "StepTimer",
    "Trace",
    "UsageError",
    "World",
    "mix",
    "open_dataset",
    "replay",
    "span",
]
# Imported on first use: torch takes 3 seconds and PyG 4 more, and a program that only reads need not import what writes.
_LAZY = {
    "GraphBatch": "loaders.collate",
    "GraphLoader": "loaders.graphs",
    "SequenceBatch": "loaders.sequences",
    "SequenceLoader": "loaders.sequences",
    "ShardWriter": "writing.writer",
    "SplitRule": "writing.split",
    "StepBatch": "loaders.sequences",
    "StepTimer": "runtime.timing",
    "Trace": "runtime.trace",
    "World": "runtime.world",
    "mix": "dataset.mix",
    "replay": "runtime.timing",
    "span": "runtime.trace",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        with needs_extra("graphs", f"dp.{name}"):
            globals()[name] = value = getattr(import_module(f"dali_pipeline.{_LAZY[name]}"), name)
        return value
    if name == "Split":
        raise AttributeError("dp.Split is now called dp.SplitRule")
    raise AttributeError(f"module 'dali_pipeline' has no attribute {name!r}")
