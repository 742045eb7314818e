"""DALI's GPU pipelines on the CPU, whose outputs then say that they are on the GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from tests.pretended_gpu.tensor import on_the_cpu, pretended


@contextmanager
def dali_on_the_cpu() -> Iterator[None]:
    """Build the loaders' graphs for the CPU inside the block."""
    import nvidia.dali.plugin.pytorch as plugin
    from nvidia.dali.backend import TensorListCPU

    import dali_pipeline.loaders.resident as resident
    import dali_pipeline.loaders.sequences as sequences

    graph, iterator = sequences.sequence_graph, plugin.DALIGenericIterator
    for_gpu: list[Any] = []  # the pipelines themselves: the id of one that is gone is given to the next

    def on_cpu(*args: Any, device_id: int | None, **options: Any) -> Any:
        built = graph(*args, device_id=None, **options)
        if device_id is not None:
            for_gpu.append(built)
        return built

    class OnGpu(iterator):  # type: ignore[misc, valid-type]
        def __init__(self, pipelines: Any, *args: Any, **options: Any) -> None:
            self._says_gpu = any(pipelines[0] is one for one in for_gpu)
            with on_the_cpu():
                super().__init__(pipelines, *args, **options)

        def __next__(self) -> Any:
            with on_the_cpu():
                found = super().__next__()
            return [{name: pretended(one) for name, one in each.items()} for each in found] if self._says_gpu else found

    with (
        mock.patch.object(sequences, "sequence_graph", on_cpu),
        mock.patch.object(resident, "pinned_samples", TensorListCPU),  # DALI asks a driver about pinned memory
        mock.patch.object(plugin, "DALIGenericIterator", OnGpu),
    ):
        yield
