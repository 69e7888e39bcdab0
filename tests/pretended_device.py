"""A pretended second device: tensors on it say so and refuse what a real one refuses; it computes on the CPU.

It shows where tensors are, not CUDA graphs or compiled loops; `pytest -m gpu` holds the same laws on a real device.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

# A type that torch knows as an accelerator beside CUDA, so that only what is general is asked of it.
DEVICE = torch.device("xpu", 0)
_FACTS = {"device": DEVICE, "is_xpu": True, "is_cpu": False}
# These copy between devices, or read nothing of the other tensor but its shape.
_CROSS = ("copy_", "load_state_dict", "expand_as", "view_as", "reshape_as", "_has_compatible_shallow_copy_type")
# Elsewhere a number on the CPU, a tensor without dimensions, may stand beside tensors of the device.
_NO_NUMBERS = ("cat", "stack", "embedding", "index_select", "gather", "index_add", "index_copy")


class Event:
    """A mark in the device's only stream, which is never behind."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.seconds = 0.0

    def record(self, stream: object = None) -> None:
        self.seconds = time.perf_counter()

    def elapsed_time(self, later: Event) -> float:
        return (later.seconds - self.seconds) * 1e3


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _tensors(value)
    elif isinstance(values, dict):
        yield from _tensors(list(values.values()))


# The memory is tagged and not the tensor, so views, parameters and `.data` are where their memory is.
def _is_there(tensor: Tensor) -> bool:
    return getattr(tensor.untyped_storage(), "pretended", False)


def _tag(result: Any) -> Any:
    for tensor in _tensors(result):
        tensor.untyped_storage().pretended = True  # type: ignore[attr-defined]
    return result


def _is_device(value: Any) -> bool:
    return isinstance(value, (str, torch.device)) and torch.device(value) in (DEVICE, torch.device(DEVICE.type))


def _move(tensor: Tensor, device: Any, options: tuple[Any, ...]) -> Tensor:
    """`Tensor.to` with any of its arguments; what changes its device is a copy."""
    dtype = tensor.dtype
    for option in options:
        if isinstance(option, Tensor):
            device, dtype = (DEVICE if _is_there(option) else "cpu"), option.dtype
        elif isinstance(option, (str, torch.device)):
            device = option
        elif isinstance(option, torch.dtype):
            dtype = option
    there = _is_there(tensor)
    target = there if device is None else _is_device(device)
    moved = tensor.to(dtype) if target or device is None else tensor.to(device, dtype)
    moved = moved.clone() if there != target and moved is tensor else moved
    return _tag(moved) if target else moved


class PretendedDevice(TorchFunctionMode):
    """While it is entered, `DEVICE` exists."""

    def __enter__(self) -> PretendedDevice:
        self._patches = ExitStack()
        room = {"mem_get_info": (1 << 30, 1 << 30), "memory_reserved": 0, "memory_allocated": 0, "clock_rate": 1000}
        facts = {"is_available": True, "device_count": 1, "get_device_name": "pretended", "current_stream": None}
        for name, value in {**room, **facts, "synchronize": None, "empty_cache": None}.items():
            self._patches.enter_context(mock.patch.object(torch.xpu, name, lambda *_, value=value: value))
        self._patches.enter_context(mock.patch.object(torch.xpu, "Event", Event))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patches.close()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, name = dict(kwargs or {}), func.__name__
        there = [_is_there(tensor) for tensor in _tensors([args, kwargs])]
        attribute = getattr(getattr(func, "__self__", None), "__name__", "") if name in ("__get__", "__set__") else ""
        if attribute in _FACTS and any(there):
            return _FACTS[attribute]
        if name in ("numpy", "__array__", "__dlpack__") and any(there):
            raise TypeError(f"can't convert {DEVICE} device type tensor to numpy. Use Tensor.cpu() first")
        if name in ("to", "cpu", "as_tensor", "asarray") and isinstance(args[0], Tensor):
            return _move(args[0], "cpu" if name == "cpu" else None, (*args[1:], *kwargs.values()))
        wanted = kwargs.get("device")
        target = any(there) if wanted is None else _is_device(wanted)
        if target and wanted is not None:
            kwargs["device"] = "cpu"
        if func is torch.autograd.grad:  # gradients are where their tensors are, whatever lies between
            inputs = _tensors(args[1])
            return tuple(_tag(g) if _is_there(x) else g for g, x in zip(func(*args, **kwargs), inputs, strict=True))
        if name in _CROSS or attribute == "data":
            return func(*args, **kwargs)
        if any(there) and not all(there):
            _check_mixed(name, args, kwargs)
        if target and isinstance(kwargs.get("generator"), torch.Generator):
            raise RuntimeError(f"Expected a {DEVICE.type!r} device type for generator but found 'cpu'")
        result = func(*args, **kwargs)
        return _tag(result) if target else result


def _check_mixed(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse tensors of both devices, as CUDA does."""
    here = [tensor for tensor in _tensors([args, kwargs]) if not _is_there(tensor)]
    first = args[0] if isinstance(args[0], Tensor) else None
    if name in ("__getitem__", "__setitem__"):
        keys, value = list(_tensors(args[1])), list(_tensors(args[2:]))
        if not keys:  # a slice, which is copied into
            return
        # An index may stay on the CPU, and so may a number that is written.
        if first is not None and _is_there(first) and all(_is_there(v) or v.dim() == 0 for v in value):
            return
    elif name.strip("_") not in _NO_NUMBERS and all(tensor.dim() == 0 for tensor in here):
        in_place = (name.endswith("_") and not name.endswith("__")) or name.startswith("__i")
        if not (in_place and first is not None and not _is_there(first)):
            return
    raise RuntimeError(
        f"Expected all tensors to be on the same device, but found at least two devices, {DEVICE} and cpu! "
        f"(in {name}, shapes {[tuple(tensor.shape) for tensor in _tensors([args, kwargs])]})"
    )
