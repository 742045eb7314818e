"""Versions: which packages are here that an image may bring of its own, and whether the loaders serve on them."""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
from typing import Any

from dali_pipeline.schema import PipelineError

FRAMEWORKS = ("torch", "nvidia-dali", "numpy", "torch-geometric")
RECORDS = 8


def versions_command() -> None:
    """Say which torch, DALI, NumPy and PyG are here, and whether the loaders serve on them.

    \b
    Writes a handful of records, reads them through every engine and compares. Exits 0 where all agree, else 2 with a sentence.
    Example:
      python -m dali_pipeline versions
    """
    for name, found, tried in versions():
        print(f"{name:<16} {found:<24} tried with {tried}")
    print(check_loaders())


def versions() -> Iterator[tuple[str, str, str]]:
    """Name, version here and version that the project is tried with. Raises PipelineError for one that cannot be imported."""
    tried = pinned()
    for name in FRAMEWORKS:
        yield name, _found(name), next((version for pin, version in tried.items() if pin.startswith(name)), "?")


def pinned() -> dict[str, str]:
    """Versions by the names that the project is installed with."""
    try:
        lines = requires("dali-pipeline") or []
    except PackageNotFoundError:  # run from a folder that was not installed
        return {}
    return dict(re.findall(r"^([\w.-]+)==([^\s;]+)", "\n".join(lines), re.MULTILINE))


def _found(name: str) -> str:
    try:
        if name == "nvidia-dali":
            from nvidia.dali import __version__ as dali

            return str(dali)
        module = __import__(name.replace("-", "_"))
        return str(module.__version__)
    except Exception as error:  # a library built for another one fails in ways of its own
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise PipelineError(f"{name} cannot be imported ({reason}); expected it in {sys.prefix} or in the image") from error


def check_loaders() -> str:
    """A sentence on what agreed; raises PipelineError where DALI's engine, or the graph loader, gives anything else."""
    import numpy as np
    import torch

    import dali_pipeline as dp
    from dali_pipeline.loader import Loader

    rng = np.random.default_rng(0)
    schema = dp.Schema(sequence=dp.Field(dtype="float16", shape=(4,)), x=dp.Field(dtype="float16", shape=(4,)))
    values = rng.standard_normal((RECORDS, 3, 4), np.float32).astype(np.float16)
    edges, one = np.array([[0, 1], [1, 2]]), np.array([3])
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch) / "set"
        with dp.ShardWriter(root, schema, split=dp.Split.parse("100/0/0")) as writer:
            for number, rows in enumerate(values):
                graphs = dp.Graphs(x=rows, edge_index=edges, edge_attr=None, node_counts=one, edge_counts=one - 1)
                writer.write({"id": number, "label": number % 2, "sequence": rows, "graphs": graphs})
        data = dp.open_dataset(root)
        loaders: dict[str, Loader[Any]] = {
            "SequenceLoader with engine='torch'": dp.SequenceLoader(data, batch_size=RECORDS, engine="torch"),
            "SequenceLoader with engine='dali'": dp.SequenceLoader(data, batch_size=RECORDS),
            "GraphLoader": dp.GraphLoader(data, batch_size=RECORDS),
        }
        for name, loader in loaders.items():
            batch = next(iter(loader))
            found = batch.graphs.x if isinstance(batch, dp.GraphBatch) else batch.sequences
            expected = torch.from_numpy(values[[int(id_) for id_ in batch.ids]]).float().reshape(found.shape)
            if not torch.equal(found.cpu(), expected):
                raise PipelineError(
                    f"{name} on {found.device} does not give what was written; expected the same {RECORDS} records"
                )
    where = "a GPU" if torch.cuda.is_available() else "the CPU"
    return f"serves: both engines and the graph loader gave the same {RECORDS} records on {where}"
