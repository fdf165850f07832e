"""Following CUDA's choice of kernels on a machine without one.

torch's fake tensors carry the dispatch keys of the device that they stand for. With "cuda" that is enough for a
forward, but the autograd engine then asks for a real device. So traced tensors keep CUDA's keys and say "cuda" to
Python code, but "meta" to the engine and to kernels:

    keys        AutogradCUDA, AutocastCUDA: what is dispatched is what CUDA dispatches
    Python      ``.device`` is cuda:0 and ``.is_cuda`` true, outside of operations
    C++         ``device()`` is meta: no stream, no guard, no context

What C++ decides by ``is_cuda()`` stands here in Python: autocast, and which operations are one kernel. All of it is
private to torch, so ``cuda_trial`` tries it once a process, and a trace says so where it does not work.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
import torch.cuda.amp.common
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor

from samegrad.measure import (
    accumulation,
    autocast_policy,
    fused_attention,
    fused_kernels,
    recurrent_kernels,
    shared_storages,
    wide_results,
)
from samegrad.measure.replaced import replaced

CUDA = torch.device("cuda", 0)
_META = torch.device("meta")
_ASK_DEVICE = torch.ops.prim.device.default
_TO_COPY = torch.ops.aten._to_copy.default
_ADD_IN_PLACE = torch.ops.aten.add_.Tensor

# Composite operations whose kernels on CUDA are others than those they are composed of elsewhere.
_COMPOSITES: dict[str, Callable[..., Any]] = {
    "scaled_dot_product_attention": fused_attention.attention,
    **fused_kernels.COMPOSITES,
    **recurrent_kernels.COMPOSITES,
}
_EVERYWHERE: dict[str, Callable[..., Any]] = {**shared_storages.STAND_INS, **wide_results.STAND_INS}
_STAND_INS: dict[str, Callable[..., Any]] = {
    **_EVERYWHERE,
    **fused_attention.STAND_INS,
    **fused_kernels.STAND_INS,
    **recurrent_kernels.STAND_INS,
}


class CpuDispatch:
    """Operations as the CPU dispatches them, without data."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self._stand_ins = dict(_named(_EVERYWHERE))

    def call(self, operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if _only_writes(operation, args):
            return None
        return self._stand_ins.get(operation, operation)(*args, **kwargs)


class CudaDispatch:
    """Operations as CUDA dispatches them. To be entered before, and beside, a fake tensor mode."""

    device = CUDA

    def __init__(self) -> None:
        self._running = 0
        self._stand_ins = dict(_named(_STAND_INS))
        # Counted before a trace, since counting is a small backward of its own.
        accumulation.engines_own()

    def call(self, operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The operation's results. Runs below autograd, for every operation of the trace."""
        if operation is _ASK_DEVICE:
            return _META
        if _only_writes(operation, args):
            return None
        device = kwargs.get("device")
        if device is not None and device.type == "cuda":
            kwargs = {**kwargs, "device": _META}
            if operation is _TO_COPY and _is_there(args[0], kwargs):
                # C++ asked for a copy since it sees two devices, cuda and meta.
                operation, kwargs = torch.ops.aten.alias.default, {}
        if accumulation.adds_in_place(operation, args, kwargs):
            operation = _ADD_IN_PLACE
        self._running += 1
        try:
            return self._stand_ins.get(operation, operation)(*args, **kwargs)
        finally:
            self._running -= 1

    @contextlib.contextmanager
    def followed(self) -> Iterator[None]:
        """A block in which fake tensors stand for CUDA's. Everything in torch is as before on every way out."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._devices())
            stack.enter_context(_autocast())
            stack.enter_context(_kernels(_named(_COMPOSITES), "AutogradCUDA"))
            # torch's own asks for addresses.
            stack.enter_context(replaced(nn.RNNBase, {"flatten_parameters": recurrent_kernels.lay_out_flat}))
            yield

    @contextlib.contextmanager
    def _devices(self) -> Iterator[None]:
        make = FakeTensor.__new__

        def new(kind: Any, mode: Any, memory: Any = None, device: Any = None, *rest: Any, **named: Any) -> Any:
            if device is not None and torch.device(device).type == "meta":
                device = CUDA
            return make(kind, mode, memory, device, *rest, **named)

        def set_device(tensor: Any, device: Any) -> None:
            device = torch.device(device)
            tensor._fake_device = _META if device.type in ("cuda", "meta") else device

        def device_of(tensor: Any) -> torch.device:
            if tensor.fake_mode.in_kernel_invocation:
                return _META
            device: torch.device = tensor._fake_device
            return CUDA if device.type == "meta" and not self._running else device

        replacements = {
            "__new__": staticmethod(new),
            "fake_device": property(lambda tensor: tensor._fake_device, set_device),
            "device": property(device_of),
            "is_cuda": property(lambda tensor: device_of(tensor).type == "cuda"),
        }
        # A machine with a device need not set it up for this.
        with replaced(fake_tensor, {"init_gpu_context": lambda device: None}), replaced(FakeTensor, replacements):
            yield


def _only_writes(operation: Any, args: tuple[Any, ...]) -> bool:
    """Whether the operation writes into lists of tensors and makes none: without data there is nothing to be done.

    Small constants of the host, such as an optimizer's counts, keep their values and are computed with.
    """
    return _updates_lists(operation) and args[0][0].constant is None


@functools.cache
def _updates_lists(operation: Any) -> bool:
    schema = operation._schema
    return schema.name.startswith(("aten::_foreach_", "aten::_fused_")) and not schema.returns


def _is_there(tensor: Tensor, asked: dict[str, Any]) -> bool:
    """Whether ``tensor`` is on CUDA already and nothing else about it is asked to change."""
    return (
        tensor.device.type == "cuda"
        and asked.get("dtype") in (None, tensor.dtype)
        and asked.get("layout") in (None, tensor.layout)
        and asked.get("memory_format") in (None, torch.preserve_format)
    )


def _named(table: dict[str, Callable[..., Any]]) -> Iterator[tuple[Any, Callable[..., Any]]]:
    """The operations that ``table`` names, each with what stands for it; not every torch has all of them."""
    for name, function in table.items():
        operation, _, overload = name.partition(".")
        packet = getattr(torch.ops.aten, operation, None)
        if packet is not None:
            yield getattr(packet, overload or "default"), function


@contextlib.contextmanager
def _autocast() -> Iterator[None]:
    """``torch.autocast("cuda")`` without a device; also where a checkpoint enters it again."""
    cache, clear = autocast_policy.CastCache(), torch.clear_autocast_cache

    def clear_both() -> None:
        cache.clear()
        clear()

    with contextlib.ExitStack() as stack:
        stack.enter_context(replaced(torch.cuda.amp.common, {"amp_definitely_not_available": lambda: False}))
        stack.enter_context(replaced(torch.cuda, {"is_bf16_supported": lambda *_, **__: True}))
        stack.enter_context(replaced(torch, {"clear_autocast_cache": clear_both}))
        stack.enter_context(_kernels(autocast_policy.kernels(cache), "AutocastCUDA"))
        yield


@contextlib.contextmanager
def _kernels(registrations: Iterator[tuple[Any, Callable[..., Any]]], key: str) -> Iterator[None]:
    """Python kernels in place of torch's under dispatch key ``key``."""
    library = cast(Any, torch.library.Library)("aten", "IMPL")
    try:
        with warnings.catch_warnings():
            # torch warns of every kernel that is replaced, which is what this is for.
            warnings.simplefilter("ignore")
            for operation, kernel in registrations:
                library.impl(operation, kernel, key, allow_override=True)
        yield
    finally:
        library._destroy()
