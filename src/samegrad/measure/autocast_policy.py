"""What ``torch.autocast("cuda")`` casts, read from torch's own installed header, as Python kernels.

torch's kernels ask every tensor whether it is on a CUDA device before they cast it; a traced tensor is not. So the same
policy stands here for the time of a trace, the cache of cast weights included.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

_HEADER = Path(torch.__file__).parent / "include" / "ATen" / "autocast_mode.h"
# The header's lists of operations; norms are cast by asking for a float32 result, in a table of their own.
_POLICIES = ("LOWER_PRECISION_FP", "FP32", "FP32_SET_OPT_DTYPE", "PROMOTE")
_NARROW = (torch.float16, torch.bfloat16)
Kernel = Callable[..., Any]


@functools.cache
def read_policy() -> dict[str, tuple[tuple[str, str], ...]]:
    """Policy to (operation, overload) pairs. Raises OSError or ValueError where the header is not as expected."""
    text = _HEADER.read_text()
    lists = {}
    for policy in _POLICIES:
        found = re.search(rf"#define AT_FORALL_{policy}\(_\)(.*?[^\\])\n", text, re.DOTALL)
        entries = re.findall(r"_\(\s*(?:ADD_NS\()?(\w+)\)?\s*(?:,\s*(\w+)\s*)?\)", found[1]) if found else []
        if not entries:
            raise ValueError(f"no list AT_FORALL_{policy} in {_HEADER.name}")
        lists[policy] = tuple((name, overload or "default") for name, overload in entries)
    return lists


class CastCache:
    """The narrow copies of weights that autocast makes once and keeps until its outermost block ends."""

    def __init__(self) -> None:
        self._casts: dict[int, tuple[Tensor, Tensor]] = {}

    def clear(self) -> None:
        self._casts.clear()

    def cast(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        cached = (
            tensor.dtype is torch.float32
            and dtype is torch.get_autocast_dtype("cuda")
            and tensor.requires_grad
            and tensor.is_leaf
            and not tensor._is_view()
            and torch.is_autocast_cache_enabled()
        )
        if not cached:
            return tensor.to(dtype)
        if id(tensor) not in self._casts:
            # The tensor is kept too, so that its id stays its own.
            self._casts[id(tensor)] = tensor, tensor.to(dtype)
        return self._casts[id(tensor)][1]


def kernels(cache: CastCache) -> Iterator[tuple[Any, Kernel]]:
    """Every operation of the policy and the kernel that stands for it under autocast."""
    make = {"LOWER_PRECISION_FP": _lowered, "FP32": _widened, "FP32_SET_OPT_DTYPE": _reduced_wide, "PROMOTE": _promoted}
    for policy, entries in read_policy().items():
        for name, overload in entries:
            packet = getattr(torch.ops.aten, name, None)
            if packet is not None and overload in packet.overloads():
                operation = getattr(packet, overload)
                yield operation, _below_autocast(make[policy](operation, cache))
    norm = torch.ops.aten.norm
    for narrow, wide in ((norm.Scalar, norm.ScalarOpt_dtype), (norm.ScalarOpt_dim, norm.ScalarOpt_dim_dtype)):
        yield narrow, _below_autocast(_norm(wide))


def _below_autocast(kernel: Kernel) -> Kernel:
    excluded = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCUDA)

    def run(*args: Any, **kwargs: Any) -> Any:
        with cast(Any, torch._C)._ExcludeDispatchKeyGuard(excluded):
            return kernel(*args, **kwargs)

    return run


def _lowered(operation: Any, cache: CastCache) -> Kernel:
    return lambda *args, **kwargs: _run_as(operation, torch.get_autocast_dtype("cuda"), cache, args, kwargs)


def _widened(operation: Any, cache: CastCache) -> Kernel:
    return lambda *args, **kwargs: _run_as(operation, torch.float32, cache, args, kwargs)


def _promoted(operation: Any, cache: CastCache) -> Kernel:
    def run(*args: Any, **kwargs: Any) -> Any:
        dtypes = {t.dtype for arg in args for t in (arg if isinstance(arg, (list, tuple)) else (arg,)) if _eligible(t)}
        dtype = torch.float32 if torch.float32 in dtypes else torch.get_autocast_dtype("cuda")
        return _run_as(operation, dtype, cache, args, kwargs)

    return run


def _reduced_wide(operation: Any, _: CastCache) -> Kernel:
    names = [argument.name for argument in operation._schema.arguments]
    place = names.index("dtype") if "dtype" in names else None

    def run(*args: Any, **kwargs: Any) -> Any:
        if place is not None and args and _eligible(args[0]):
            if place < len(args):
                wide = torch.float32 if args[place] is None else args[place]
                args = (*args[:place], wide, *args[place + 1 :])
            elif kwargs.get("dtype") is None:
                kwargs = {**kwargs, "dtype": torch.float32}
        return operation(*args, **kwargs)

    return run


def _norm(wide: Any) -> Kernel:
    def run(values: Tensor, *args: Any) -> Any:
        return wide(values, *args, dtype=torch.float32 if values.dtype in _NARROW else values.dtype)

    return run


def _run_as(operation: Any, dtype: torch.dtype, cache: CastCache, args: Any, kwargs: Any) -> Any:
    # Compilers that torch is built with evaluate a call's arguments from the last to the first.
    cast_args = [_cast(arg, dtype, cache) for arg in reversed(args)]
    return operation(*reversed(cast_args), **{key: _cast(value, dtype, cache) for key, value in kwargs.items()})


def _cast(value: Any, dtype: torch.dtype, cache: CastCache) -> Any:
    if isinstance(value, (list, tuple)):
        return [_cast(entry, dtype, cache) for entry in value]
    return cache.cast(value, dtype) if _eligible(value) and value.dtype is not dtype else value


def _eligible(value: Any) -> bool:
    return (
        isinstance(value, Tensor)
        and value.is_floating_point()
        and value.dtype is not torch.float64
        and value.device.type == "cuda"
    )
