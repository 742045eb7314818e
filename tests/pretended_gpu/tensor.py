"""Tensors of the pretended GPU, and what happens when PyTorch's operators meet them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from tests.pretended_gpu.log import LOG
from tests.pretended_gpu.memory import is_pinned, is_under_way, pinned_like

DEVICE = torch.device("cuda", 0)
# operators whose result's size, or value, the host has to know
WAITING = {"nonzero", "masked_select", "bincount", "unique", "_unique2", "unique_consecutive", "unique_dim", "is_nonzero"}
WAITING |= {"equal", "_local_scalar_dense", "_linalg_check_errors"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
NO_KERNEL = {"view", "_unsafe_view", "t", "transpose", "permute", "slice", "select", "unsqueeze", "squeeze", "expand"}
NO_KERNEL |= {"as_strided", "detach", "alias", "split", "unbind", "split_with_sizes", "empty", "empty_strided", "empty_like"}
NO_KERNEL |= {"new_empty", "new_empty_strided", "_reshape_alias", "reshape", "record_stream", "is_pinned", "unfold", "diagonal"}
NO_KERNEL |= {
    "lift_fresh",
    "set_",
    "resize_",
    "is_same_size",
    "sym_size",
    "sym_stride",
    "_local_scalar_dense",
    "chunk",
    "narrow",
}


class PretendedTensor(torch.Tensor):
    """`cuda:0` to Python, a CPU tensor to autograd and the dispatcher."""

    inner: torch.Tensor  # type: ignore[assignment]

    @staticmethod
    def __new__(cls: Any, inner: torch.Tensor) -> Any:
        wrapper = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=inner.device,
        )
        wrapper.inner = inner
        return wrapper

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"PretendedTensor({self.inner})"

    def __deepcopy__(self, memo: dict[int, Any]) -> PretendedTensor:
        copied = PretendedTensor(self.inner.detach().clone())
        return torch.nn.Parameter(copied, self.requires_grad) if isinstance(self, torch.nn.Parameter) else copied  # type: ignore[return-value]

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """`cuda:0`."""
        return DEVICE

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        """True."""
        return True

    @property
    def is_cpu(self) -> bool:  # type: ignore[override]
        """False."""
        return False

    def get_device(self) -> int:
        """Return 0."""
        return 0

    def numpy(self, *_: Any, **__: Any) -> Any:
        """Refuse, as a GPU's tensor does."""
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")

    def __array__(self, *_: Any, **__: Any) -> Any:
        return self.numpy()

    def tolist(self) -> Any:
        """Wait, and return the values."""
        LOG.add("wait", "tolist")
        return self.inner.detach().tolist()

    def cpu(self, *_: Any, **__: Any) -> torch.Tensor:
        """Wait, and return the values in a tensor of the CPU."""
        return self.to("cpu")

    def to(self, *args: Any, **options: Any) -> torch.Tensor:
        """Copy to another device or type; to the CPU with `non_blocking` the values come at the next synchronisation."""
        args = tuple(DEVICE if isinstance(one, PretendedTensor) else one for one in args)
        known = {name: value for name, value in options.items() if name in ("device", "dtype", "non_blocking")}
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **known)
        if device is not None and device.type == "meta":
            return torch.empty(self.shape, dtype=dtype or self.dtype, device="meta")
        if device is not None and device.type == "cpu":
            return _to_host(self.inner.detach().to(dtype or self.dtype), non_blocking)
        return super().to(dtype) if dtype is not None and dtype != self.dtype else self

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {})


class PretendedMode(TorchDispatchMode):
    """Has what is made on, or moved to, `cuda` be a PretendedTensor."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {})


def inner(value: Any) -> Any:
    """Return what a PretendedTensor holds, anything else as it is."""
    return value.inner if isinstance(value, PretendedTensor) else value


def pretended(value: Any) -> Any:
    """Return a tensor as one of the GPU, anything else as it is."""
    return PretendedTensor(value) if isinstance(value, torch.Tensor) and not isinstance(value, PretendedTensor) else value


@contextmanager
def on_the_cpu() -> Iterator[None]:
    """Compute inside without the pretended GPU."""
    with _disable_current_modes(), LOG.paused():
        yield


def dispatch(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Carry out one operator, and log what it would cost."""
    name = func._schema.name.split("::")[1]
    special: Callable[..., Any] | None = {
        "_to_copy": _copied,
        "copy_": _copied_into,
        "record_stream": lambda *_: None,
        "is_pinned": lambda _, args, __: is_pinned(inner(args[0])),
        "_pin_memory": lambda _, args, __: pinned_like(args[0]),
    }.get(name)
    if special is not None:
        return special(func, args, kwargs)
    tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
    on_gpu = [one for one in tensors if isinstance(one, PretendedTensor)]
    asked = kwargs.get("device")
    if on_gpu:
        _check_devices(func, name, tensors)
        _log(name, args, kwargs, on_gpu)
    elif asked is not None and torch.device(asked).type == "cuda" and name not in NO_KERNEL:
        LOG.add("kernel", name)
    made_there = asked is not None and torch.device(asked).type == "cuda"
    if made_there:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    found = func(*tree_map(inner, args), **tree_map(inner, kwargs))
    if not (on_gpu or made_there):
        if not tensors and isinstance(found, torch.Tensor) and torch._C._current_autograd_node() is not None:
            found.made_by_autograd = True  # type: ignore[attr-defined]
        return found
    own = {id(one.inner): one for one in on_gpu}  # in-place operators hand back the very tensor
    return tree_map(lambda value: own[id(value)] if id(value) in own else pretended(value), found)


def _check_devices(func: Any, name: str, tensors: Sequence[torch.Tensor]) -> None:
    if name in INDEXING:
        return
    for tensor in tensors:
        # numbers may come from the CPU; and autograd makes tensors on what it takes for the gradient's device
        if not isinstance(tensor, PretendedTensor) and tensor.dim() and not getattr(tensor, "made_by_autograd", False):
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! ({func})"
            )


def _log(name: str, args: Sequence[Any], kwargs: Mapping[str, Any], on_gpu: Sequence[PretendedTensor]) -> None:
    if name in WAITING:
        LOG.add("wait", name)
    if name == "repeat_interleave" and kwargs.get("output_size") is None:
        LOG.add("wait", "repeat_interleave without output_size")
    if name in INDEXING:
        for index in (one for one in tree_leaves(args[1]) if isinstance(one, torch.Tensor)):
            if index.dtype in (torch.bool, torch.uint8):
                LOG.add("wait", "index by a mask")
            if not isinstance(index, PretendedTensor):
                LOG.add("pageable copy", "index from the CPU", index.nbytes)
    if name not in NO_KERNEL:
        LOG.add("kernel", name)


def _copied(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    source, asked = args[0], kwargs.get("device")
    # to the CPU goes `PretendedTensor.to`; where autograd asks for the device that it takes the tensor's to be, nothing moves
    was_there = isinstance(source, PretendedTensor)
    goes_there = was_there or (asked is not None and torch.device(asked).type == "cuda")
    options = {name: value for name, value in kwargs.items() if name not in ("non_blocking", "pin_memory", "device")}
    found = func(inner(source), **options)
    if was_there:
        LOG.add("kernel", "cast")
    elif goes_there:
        _log_to_device(source, found)
    return pretended(found) if goes_there else found


def _copied_into(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    target, source = args[:2]
    there, from_there = isinstance(target, PretendedTensor), isinstance(source, PretendedTensor)
    if there and from_there:
        LOG.add("kernel", "copy_")
    func(inner(target), inner(source))
    if there and not from_there and source.dim():
        _log_to_device(source, target.inner)
    elif from_there and not there:
        LOG.add("wait", "copy to the host")
    return target


def _to_host(values: torch.Tensor, non_blocking: bool) -> torch.Tensor:
    if non_blocking:
        return is_under_way(values)
    LOG.add("wait", "copy to the host")
    return values.clone()


def _log_to_device(source: torch.Tensor, found: torch.Tensor) -> None:
    pinned = is_pinned(source)
    LOG.add("pinned copy" if pinned else "pageable copy", f"{source.dtype}".removeprefix("torch."), source.nbytes)
    if pinned:
        is_under_way(found, source)
