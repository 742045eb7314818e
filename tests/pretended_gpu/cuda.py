"""Stand-ins for torch.cuda, cuDNN's LSTM and autocast on the pretended GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
import torch.nn.modules.rnn as rnn
import torch.nn.utils.clip_grad as clip_grad
import torch.nn.utils.rnn as packing
import torch.utils._foreach_utils as foreach_utils

from tests.pretended_gpu.log import LOG, Log
from tests.pretended_gpu.memory import TRANSFERS, forget, is_pinned, pinned_empty, pinned_like
from tests.pretended_gpu.tensor import DEVICE, PretendedMode, PretendedTensor, inner, on_the_cpu, pretended

MEMORY = 8 << 30  # bytes that it says it has


class PretendedEvent:
    """An event that is under way until it is asked for twice, or waited for."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self._behind = (0, 0)
        self._asked = 0

    def record(self, *_: Any) -> None:
        """Stand behind all copies that are under way now."""
        self._behind, self._asked = (len(TRANSFERS.to_host), len(TRANSFERS.to_device)), 0

    def synchronize(self) -> None:
        """Wait."""
        LOG.add("wait", "event.synchronize")
        self._end()

    def query(self) -> bool:
        """Return False the first time."""
        self._asked += 1
        if self._asked > 1:
            self._end()
        return self._asked > 1

    def wait(self, *_: Any) -> None:
        """Nothing to do: all there is runs in order."""

    def elapsed_time(self, _: PretendedEvent) -> float:
        """Return a millisecond."""
        return 1.0

    def _end(self) -> None:
        TRANSFERS.finish(*self._behind)
        self._behind = (0, 0)


class PretendedStream:
    """A stream; all of them run in order here."""

    cuda_stream = 0
    device = DEVICE

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def record_event(self, event: PretendedEvent | None = None) -> PretendedEvent:
        """Return an event behind what was asked for so far."""
        event = event or PretendedEvent()
        event.record()
        return event

    def wait_event(self, _: PretendedEvent) -> None:
        """The device waits, not the host."""

    def wait_stream(self, _: PretendedStream) -> None:
        """The device waits, not the host."""

    def synchronize(self) -> None:
        """Wait."""
        LOG.add("wait", "stream.synchronize")
        TRANSFERS.finish()


class _OneKernel(torch.autograd.Function):
    """A function as one kernel forward and one backward, with the numbers of the CPU's."""

    @staticmethod
    def forward(ctx: Any, call: Callable[..., Any], *tensors: Any) -> Any:
        with on_the_cpu(), torch.enable_grad():  # type: ignore[no-untyped-call]
            ctx.leaves = [inner(one).detach().requires_grad_(one.requires_grad) for one in tensors]
            ctx.found = call(*ctx.leaves)
        return tuple(pretended(one.detach()) for one in ctx.found)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        LOG.add("kernel", "backward of one kernel")
        wanted = [one for one in ctx.leaves if one.requires_grad]
        with on_the_cpu():
            outputs = [(one, inner(grad)) for one, grad in zip(ctx.found, grads, strict=True) if grad is not None]
            found = iter(torch.autograd.grad([one for one, _ in outputs], wanted, [grad for _, grad in outputs]))
        return None, *(pretended(next(found)) if one.requires_grad else None for one in ctx.leaves)


class _Functions:
    """torch._VF with cuDNN's LSTM."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch._VF, name)  # type: ignore[attr-defined]

    def lstm(self, *args: Any) -> Any:
        """Both forms: (values, states, weights, …) and, packed, (values, batch sizes, states, weights, …)."""
        packed = isinstance(args[2], (list, tuple)) and not isinstance(args[1], (list, tuple))
        values, sizes = args[0], args[1] if packed else None
        if not isinstance(values, PretendedTensor):
            return torch._VF.lstm(*args)  # type: ignore[attr-defined]
        states, weights, *rest = args[2:] if packed else args[1:]
        if isinstance(sizes, PretendedTensor):
            raise RuntimeError("batch_sizes must be on the CPU")
        values, states, weights = _autocast(values), list(map(_autocast, states)), list(map(_autocast, weights))
        kinds = {one.dtype for one in (values, *states, *weights)}
        if len(kinds) > 1:
            raise RuntimeError(f"Input and parameter tensors are not the same dtype: {kinds}")

        def call(values: Any, *others: Any) -> Any:
            parts = list(others[: len(states)]), list(others[len(states) :])
            given = (values,) if sizes is None else (values, sizes)
            return torch._VF.lstm(*given, *parts, *rest)  # type: ignore[attr-defined]

        LOG.add("LSTM", str(values.dtype).removeprefix("torch."))
        return _OneKernel.apply(call, values, *states, *weights)  # type: ignore[no-untyped-call]

    def _pack_padded_sequence(self, values: Any, lengths: torch.Tensor, *args: Any) -> Any:
        return _per_length(torch._VF._pack_padded_sequence, values, lengths, *args)  # type: ignore[attr-defined]

    def _pad_packed_sequence(self, values: Any, sizes: torch.Tensor, *args: Any) -> Any:
        return _per_length(torch._VF._pad_packed_sequence, values, sizes, *args)  # type: ignore[attr-defined]


def _per_length(function: Callable[..., Any], values: torch.Tensor, lengths: torch.Tensor, *args: Any) -> Any:
    """One of the two functions that pack sequences: a copy per length on a GPU, and lengths that have to be on the CPU."""
    if isinstance(lengths, PretendedTensor):
        raise RuntimeError("'lengths' argument should be a 1D CPU int64 tensor, but got 1D cuda:0 Long tensor")
    if not isinstance(values, PretendedTensor):
        return function(values, lengths, *args)
    for _ in set(lengths.tolist()):
        LOG.add("kernel", "copy of the steps of a length")
    with on_the_cpu():
        other = function(values.inner.detach(), lengths, *args)[1]

    def call(values: torch.Tensor) -> Any:
        return (function(values, lengths, *args)[0],)

    return _OneKernel.apply(call, values)[0], other  # type: ignore[no-untyped-call]


def _autocast(tensor: torch.Tensor) -> torch.Tensor:
    """What cuDNN's autocast does: float16, whatever type was asked for (aten/src/ATen/cudnn/AutocastRNN.cpp)."""
    return tensor.to(torch.float16) if torch.is_autocast_enabled("cuda") else tensor


class _Autocast(torch.autocast):
    """Autocast for cuda that holds for PretendedTensors, which autocast's C++ takes for tensors of the CPU."""

    def __init__(self, device_type: str, dtype: torch.dtype | None = None, enabled: bool = True, **options: Any) -> None:
        self._beside: Any = nullcontext()
        if device_type == "cuda":
            self._beside = torch.amp.autocast_mode.autocast("cpu", dtype=dtype or torch.float16, enabled=enabled)
        super().__init__(device_type, dtype=dtype, enabled=enabled, **options)

    def __enter__(self) -> Any:
        self._beside.__enter__()
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *args: Any) -> Any:
        found = super().__exit__(*args)  # type: ignore[no-untyped-call]
        self._beside.__exit__(*args)
        return found


def _grouped(group: Callable[..., Any]) -> Callable[..., Any]:
    def by_device(lists: Any, with_indices: bool = False) -> Any:
        return {
            (DEVICE if isinstance(one[0][0][0], PretendedTensor) else key[0], key[1]): one
            for key, one in group(lists, with_indices).items()
        }

    return by_device


def _pin(self: torch.Tensor, _: Any = None) -> torch.Tensor:
    if isinstance(self, PretendedTensor):
        raise RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned")
    return pinned_like(self)


def _synchronize(*_: Any) -> None:
    LOG.add("wait", "torch.cuda.synchronize")
    TRANSFERS.finish()


@contextmanager
def pretended_gpu() -> Iterator[Log]:
    """Have torch see one GPU inside the block; yields the log of what it is asked for. Not for several at a time."""
    current, side, functions = PretendedStream(), PretendedStream, _Functions()
    empty = torch.empty

    @contextmanager
    def on_stream(_: Any) -> Iterator[None]:
        yield

    def empty_or_pinned(*size: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        return pinned_empty(*size, dtype=options.get("dtype")) if pin_memory else empty(*size, **options)

    cuda: dict[str, Any] = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda _: None,
        "get_device_name": lambda *_: "a pretended GPU",
        "mem_get_info": lambda *_: (MEMORY, MEMORY),
        "memory_reserved": lambda *_: 0,
        "memory_allocated": lambda *_: 0,
        "synchronize": _synchronize,
        "Stream": side,
        "Event": PretendedEvent,
        "stream": on_stream,
        "current_stream": lambda *_: current,
        "get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda *_: None,
        "manual_seed_all": lambda *_: None,
        "is_bf16_supported": lambda *_, **__: True,
        "utilization": lambda *_: 50,
    }
    others = [
        (rnn, "_VF", functions),
        (packing, "_VF", functions),
        (clip_grad, "_group_tensors_by_device_and_dtype", _grouped(foreach_utils._group_tensors_by_device_and_dtype)),
        (foreach_utils, "_foreach_supported_types", [*foreach_utils._foreach_supported_types, PretendedTensor]),
        (torch.Tensor, "pin_memory", _pin),
        (torch.Tensor, "is_pinned", lambda tensor, *_: is_pinned(inner(tensor))),
        (torch.Tensor, "record_stream", lambda *_: None),
        (torch.backends.cudnn, "is_acceptable", lambda _: False),
        (torch, "inference_mode", torch.no_grad),
        (torch, "autocast", _Autocast),
        (torch, "empty", empty_or_pinned),
    ]
    overwrites = torch.__future__.get_overwrite_module_params_on_conversion()  # type: ignore[no-untyped-call]
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    forget()
    LOG.clear()
    try:
        with ExitStack() as stack:
            for name, stand_in in cuda.items():
                stack.enter_context(mock.patch.object(torch.cuda, name, stand_in))
            for owner, name, stand_in in others:
                stack.enter_context(mock.patch.object(owner, name, stand_in))
            stack.enter_context(PretendedMode())
            yield LOG
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(overwrites)
