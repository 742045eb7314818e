"""What a GPU delivers is what the CPU does, to the bit: sequences, graphs, named fields, every encoding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import dali_pipeline as dp
from tests.helpers.encoded import FEATURES, assert_same_but_for_ties, greatest, made, rows_of
from tests.helpers.graphs import molecules, write_molecules


@pytest.mark.gpu
@pytest.mark.parametrize("engine", ["torch", "dali"])
def test_sequences_are_what_the_cpu_delivers(data: dp.Dataset, engine: Any) -> None:
    """Not run where there is no GPU."""
    for dtype in (torch.float16, torch.float32, torch.bfloat16):
        pairs = [dp.SequenceLoader(data, device=device, dtype=dtype, engine=engine) for device in ("cpu", "cuda")]
        for ours, theirs in zip(*pairs, strict=True):
            assert theirs.sequences.is_cuda
            assert torch.equal(ours.sequences, theirs.sequences.cpu())
            assert torch.equal(ours.labels, theirs.labels.cpu())


@pytest.mark.gpu
def test_graphs_are_what_the_cpu_delivers(data: dp.Dataset) -> None:
    """Not run where there is no GPU."""
    for ours, theirs in zip(*(dp.GraphLoader(data, device=device) for device in ("cpu", "cuda")), strict=True):
        assert theirs.graphs.x.is_cuda
        for name in ("x", "edge_index", "edge_attr", "batch", "ptr"):
            assert torch.equal(ours.graphs[name], theirs.graphs[name].cpu())


@pytest.mark.gpu
def test_named_fields_are_what_the_cpu_delivers(tmp_path: Path) -> None:
    molecule_set = write_molecules(tmp_path / "set", molecules(90))
    ours, theirs = (dp.GraphLoader(molecule_set, batch_size=7, device=device) for device in ("cuda", "cpu"))
    for batch, expected in zip(ours, theirs, strict=True):
        assert batch.graphs.x.is_cuda
        for name in ("x", "edge_index", "edge_attr", "pos", "bond", "target"):
            assert torch.equal(batch.graphs[name].cpu(), expected.graphs[name])


@pytest.mark.gpu
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("kind", ["float16", "bfloat16", "int8", "int8 by step"])
def test_gpu_decodes_to_the_bit_as_the_cpu_does(tmp_path: Path, kind: str, normalize: bool) -> None:
    """Not run where there is no GPU."""
    rows = rows_of(40, ragged=kind != "int8 by step")
    scaled = kind.startswith("int8")
    field = dp.Field.scaled(greatest(rows, by_step="step" in kind)) if scaled else dp.Field(dtype=kind, shape=(FEATURES,))
    data = made(tmp_path / "set", rows, field)
    exact: dict[int, torch.Tensor] = {}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        pair = [
            dp.SequenceLoader(data, batch_size=8, device=device, normalize=normalize, dtype=dtype) for device in ("cpu", "cuda")
        ]
        for step, (ours, theirs) in enumerate(zip(*pair, strict=True)):
            exact.setdefault(step, ours.sequences)  # float32 comes first
            assert_same_but_for_ties(ours.sequences, theirs.sequences.cpu(), exact[step])
