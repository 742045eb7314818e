"""What a batch holds, as a whole: copied, hashed, compared."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import xxhash

import dali_pipeline as dp
from tests.helpers.records import NAMED


def content(batch: Any) -> dict[str, Any]:
    """Everything that a batch holds, copied."""
    if isinstance(batch, dp.SequenceBatch):
        tensors = {"sequences": batch.sequences, "lengths": batch.lengths}
    elif isinstance(batch, dp.StepBatch):
        tensors = {"values": batch.values, "steps": batch.steps, "record_positions": batch.record_positions}
    else:
        tensors = {name: batch.graphs[name] for name in ("x", "edge_index", "edge_attr", "batch", "ptr")}
        tensors |= {
            "graphs_per_record": batch.graphs_per_record,
            "layer_index": batch.layer_index,
            "last_node": batch.last_node,
        }
        tensors |= {name: values for name, values in batch.graphs.to_dict().items() if name in NAMED}
    texts = {f"fields.{name}": values for name, values in batch.fields.items() if isinstance(values, list)}
    tensors |= {f"fields.{name}": values for name, values in batch.fields.items() if f"fields.{name}" not in texts}
    tensors |= {"labels": batch.labels, "valid": batch.valid}
    if not isinstance(batch, dp.StepBatch):
        tensors["positions"] = batch.positions
    return {"ids": list(batch.ids), **texts, **{name: tensor.clone() for name, tensor in tensors.items()}}


def assert_resumes(loader: Any, other: Any, expected: list[Any]) -> None:
    """Stop `loader` in the middle of epoch 0, whose batches are expected; `other` goes on to the bit."""
    loader.set_epoch(0)
    batches = iter(loader)
    first = [next(batches) for _ in range(len(expected) // 2)]
    other.load_state_dict(loader.state_dict())
    assert_same([*first, *other], expected)


def fingerprint(batches: Iterable[Any]) -> str:
    """One hash of every byte that some batches hold, in order, and of their number."""
    found, count = xxhash.xxh3_128(), 0
    for batch in batches:
        count += 1
        for name, value in sorted(content(batch).items()):
            found.update(f"{name} {value if isinstance(value, list) else value.numpy().tobytes().hex()}".encode())
    return f"{count} {found.hexdigest()}"


def assert_same(ours: Iterable[Any], theirs: Iterable[Any]) -> None:
    """Batches (or their contents) equal to the bit, and at least one."""
    one, other = ([batch if isinstance(batch, dict) else content(batch) for batch in batches] for batches in (ours, theirs))
    assert len(one) == len(other) > 0
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            if isinstance(a[name], list):
                assert a[name] == b[name], name
                continue
            assert a[name].dtype == b[name].dtype, name
            assert torch.equal(a[name], b[name]), name
