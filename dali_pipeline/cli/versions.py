"""The command `versions`: print the versions of the main packages, and check that loading and training work with them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from dali_pipeline.errors import PipelineError
from dali_pipeline.runtime.machine import unusable_gpu
from dali_pipeline.types import Array

if TYPE_CHECKING:
    from dali_pipeline.dataset.dataset import Dataset

# versions that the tests run with, as requirements*.txt pin them
TRIED = {"numpy": "2.4.6", "torch": "2.13.0", "nvidia-dali": "2.4.0", "torch-geometric": "2.8.1"}
FRAMEWORKS = tuple(TRIED)
QUICK = FRAMEWORKS[:3]  # PyG alone takes four seconds to import
IMPORTED = (  # modules that training imports, most of them only when they are needed, hours after the start
    *("matplotlib.axes", "matplotlib.figure", "matplotlib.ticker", "msgspec", "numpy", "numpy.typing"),
    *("pyarrow", "pyarrow.compute", "pyarrow.csv", "pyarrow.parquet", "rich", "rich.console", "rich.progress", "rich.table"),
    *("sklearn.compose", "sklearn.decomposition", "sklearn.exceptions", "sklearn.linear_model", "sklearn.metrics"),
    *("sklearn.multiclass", "sklearn.neural_network", "sklearn.pipeline", "sklearn.preprocessing"),
    *("tensorboard.compat.proto.event_pb2", "tensorboard.compat.proto.summary_pb2", "tensorboard.summary.writer.record_writer"),
    *("torch", "torch._dynamo.exc", "torch.distributed", "torch.nn", "torch.nn.parallel", "torch.nn.utils.rnn"),
    *("torch_geometric.data", "torch_geometric.nn", "torch_geometric.utils", "typer", "typer.core", "xxhash", "yaml"),
)
RECORDS, STEPS, FEATURES = 8, 3, 4


def versions_command(
    quick: Annotated[
        bool,
        typer.Option(
            "--quick", help="Only check that packages and driver fit together: under 5 s, without a computation on the GPU."
        ),
    ] = False,
) -> None:
    """Print the installed versions of NumPy, torch, DALI and PyG, and check that loading and training work with them.

    \b
    Writes a few records, reads them with every engine, compares the results, imports every package that training imports, and
    takes one training step on the best device. Exits 0 if all of it works, otherwise 2 with one sentence.
    Examples:
      python -m dali_pipeline versions
      python -m dali_pipeline versions --quick
    """
    for name, installed, tried in versions(QUICK if quick else FRAMEWORKS):
        print(f"{name:<16} {installed:<24} tried with {tried}")
    check_fit()
    if quick:
        print("fits: NumPy, torch, DALI and the driver; nothing was run")
        return
    with written_records() as (data, values):
        print(check_loaders(data, values))
        print(check_training(data))


def versions(names: tuple[str, ...] = FRAMEWORKS) -> Iterator[tuple[str, str, str]]:
    """Yield name, installed version and tested version of each package; raise PipelineError if one cannot be imported."""
    for name in names:
        yield name, _installed(name), TRIED[name]


def _installed(name: str) -> str:
    from dali_pipeline.loaders.dali import describe_dali  # so that --help need not wait for the loaders

    return describe_dali() if name == "nvidia-dali" else str(_imported(name.replace("-", "_")).__version__)


def _imported(name: str) -> Any:
    from dali_pipeline.loaders.dali import not_imported

    try:
        return import_module(name)
    except Exception as error:  # a library that is built for other versions may raise anything
        raise not_imported(name.replace("_", "-"), error) from error


def check_fit() -> None:
    """Raise PipelineError if DALI and torch are built for different versions of CUDA, or torch cannot use the GPU."""
    from dali_pipeline.loaders.dali import check_dali

    check_dali()
    if why := unusable_gpu():
        raise PipelineError(why)


@contextmanager
def written_records() -> Iterator[tuple[Dataset, Array]]:
    """Yield a temporary data set of sequences and graphs, and the values of both, (RECORDS, STEPS, FEATURES)."""
    import dali_pipeline as dp

    field = dp.Field(dtype="float16", shape=(FEATURES,))
    values = np.random.default_rng(0).standard_normal((RECORDS, STEPS, FEATURES), np.float32).astype(np.float16)
    edges, nodes = np.array([[0, 1], [1, 2]]), np.array([STEPS])
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch) / "set"
        with dp.ShardWriter(root, dp.Schema(sequence=field, x=field), split=dp.SplitRule.parse("100/0/0")) as writer:
            for number, rows in enumerate(values):
                graphs = dp.Graphs(x=rows, edge_index=edges, edge_attr=None, node_counts=nodes, edge_counts=nodes - 1)
                writer.write({"id": number, "label": number % 2, "sequence": rows, "graphs": graphs})
        yield dp.open_dataset(root), values


def check_loaders(data: Dataset, values: Array) -> str:
    """Return a sentence if both engines and the graph loader deliver the written values; otherwise raise PipelineError."""
    import torch

    import dali_pipeline as dp
    from dali_pipeline.loaders.loader import Loader

    loaders: dict[str, Loader[Any]] = {
        "SequenceLoader with engine='torch'": dp.SequenceLoader(data, batch_size=RECORDS, engine="torch"),
        "SequenceLoader with engine='dali'": dp.SequenceLoader(data, batch_size=RECORDS),
        "GraphLoader": dp.GraphLoader(data, batch_size=RECORDS),
    }
    for name, loader in loaders.items():
        with _one_sentence(f"{name} on {loader.device}"):
            batch = next(iter(loader))
            delivered = batch.graphs.x if isinstance(batch, dp.GraphBatch) else batch.sequences
            expected = torch.from_numpy(values[[int(id_) for id_ in batch.ids]]).float().reshape(delivered.shape)
            same = torch.equal(delivered.cpu(), expected)
        if not same:
            raise PipelineError(
                f"{name} on {delivered.device} does not give what was written; expected the same {RECORDS} records"
            )
    where = "a GPU" if torch.cuda.is_available() else "the CPU"
    return f"serves: both engines and the graph loader gave the same {RECORDS} records on {where}"


def check_training(data: Dataset) -> str:
    """Return a sentence if all modules of training can be imported and a step works; otherwise raise PipelineError."""
    for name in IMPORTED:
        _imported(name)
    import dali_pipeline as dp

    sequences, graphs = (
        dp.SequenceLoader(data, batch_size=RECORDS, num_workers=0),
        dp.GraphLoader(data, batch_size=RECORDS, num_workers=0),
    )
    for name, loader, take in (("an LSTM", sequences, _lstm_loss), ("a graph convolution", graphs, _graph_loss)):
        with _one_sentence(f"a step of {name} on {loader.device}"):
            loss = take(next(iter(loader)), loader.device)
        if not np.isfinite(loss):
            raise PipelineError(f"a step of {name} on {loader.device} has a loss of {loss}; expected a finite number")
    where = "a GPU" if sequences.device.type == "cuda" else "the CPU"
    return f"trains: an LSTM and a graph convolution took a step on {where}, and all that training imports is here"


def _lstm_loss(batch: Any, device: Any) -> float:
    from torch import nn
    from torch.nn.utils.rnn import pack_padded_sequence

    lstm = nn.LSTM(FEATURES, FEATURES, batch_first=True, bidirectional=True).to(device)
    packed = pack_padded_sequence(batch.sequences, batch.lengths, batch_first=True, enforce_sorted=False)
    return _step(lstm, lambda: lstm(packed)[0].data)


def _graph_loss(batch: Any, device: Any) -> float:
    from torch import nn
    from torch_geometric.nn import GINConv

    convolution = GINConv(nn.Linear(FEATURES, FEATURES)).to(device)
    return _step(convolution, lambda: convolution(batch.graphs.x, batch.graphs.edge_index))


def _step(model: Any, forward: Callable[[], Any]) -> float:
    """Take one training step, and return the loss after it."""
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    torch.autograd.backward(forward().square().mean())
    optimizer.step()
    return float(forward().square().mean())


@contextmanager
def _one_sentence(what: str) -> Iterator[None]:
    """Turn exceptions of libraries within the block into a PipelineError of one sentence."""
    try:
        yield
    except PipelineError:
        raise
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else ""
        raise PipelineError(
            f"{what} fails ({type(error).__name__}: {reason}); expected packages that fit each other"
        ) from error
