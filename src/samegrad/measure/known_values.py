"""Whole numbers and truth values that are known in a trace: masks, lengths and counts of the batch, and what follows.

Models look at them to choose their way: whether a mask hides anything, how long the longest row is. Where everything
that such a value came from is known, it is computed beside the trace, on the CPU, and the trace is that of this batch.
Numbers with a fraction are never carried along.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

from samegrad import trees
from samegrad.exact.dataless import has_data
from samegrad.measure.replaced import replaced

_WHOLE = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_MOST_ELEMENTS = 2**22
# Operations without tensors whose results are known.
_MADE_OF_NUMBERS = {f"aten::{name}" for name in ("arange", "zeros", "ones", "full", "scalar_tensor")}
# What these make depends on the shape of their argument alone.
_ALIKE = {"new_ones": 1, "new_zeros": 0, "ones_like": 1, "zeros_like": 0}
_CPU = torch.device("cpu")


class Unknown(Exception):
    """Something that a value depends on is not known."""


def remember(twin: Tensor, tensor: Tensor) -> None:
    """The values of ``tensor`` are those of its ``twin``, if they are of a kind that is carried along."""
    if tensor.dtype in _WHOLE and tensor.numel() <= _MOST_ELEMENTS and has_data(tensor):
        with unset_fake_temporarily():
            _attach(twin, tensor.detach().cpu())


def carry(source: Tensor, target: Tensor) -> None:
    """``target`` holds a copy of ``source``."""
    value = _known(source)
    if value is not None:
        _attach(target, value)


def follow(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
    """Computes the values of ``result`` if they are known."""
    if not isinstance(result, FakeTensor) or result.dtype not in _WHOLE or result.numel() > _MOST_ELEMENTS:
        return
    value: Any = None
    try:
        value = evaluate(func, args, kwargs)
    except Unknown:
        filling = _ALIKE.get(func._opname)
        if filling is not None:
            with unset_fake_temporarily():
                value = torch.full(result.shape, filling, dtype=result.dtype, device=_CPU)
    if isinstance(value, Tensor):
        # A tensor that is written into counts its version when the operation has returned.
        _attach(result, value, writes=func._schema.is_mutable)


def evaluate(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The operation's real result, tensors of it on the CPU. Raises Unknown."""
    leaves, spec = trees.flatten((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if torch.Tag.nondeterministic_seeded in func.tags or not (tensors or func._schema.name in _MADE_OF_NUMBERS):
        raise Unknown
    values = {id(tensor): _known(tensor) for tensor in tensors}
    if any(value is None for value in values.values()):
        raise Unknown
    with unset_fake_temporarily():
        if func._schema.is_mutable:
            values = {key: value.clone() for key, value in values.items() if value is not None}
        here = [_CPU if isinstance(leaf, torch.device) else values.get(id(leaf), leaf) for leaf in leaves]
        real_args, real_kwargs = trees.unflatten(here, spec)
        return func(*real_args, **real_kwargs)


@contextlib.contextmanager
def shown() -> Iterator[None]:
    """A block in which a library that asks whether it may look at a tensor's values is told what is so.

    They ask by ``isinstance(tensor, torch._subclasses.FakeTensor)``; torch itself asks elsewhere.
    """

    class WithoutValues(type):
        def __instancecheck__(cls, tensor: Any) -> bool:
            return isinstance(tensor, FakeTensor) and _known(tensor) is None

        def __subclasscheck__(cls, kind: type) -> bool:
            return issubclass(kind, FakeTensor)

    with replaced(torch._subclasses, {"FakeTensor": WithoutValues("FakeTensor", (), {})}):
        yield


def _known(tensor: Tensor) -> Tensor | None:
    version, value = getattr(tensor, "_samegrad_values", (None, None))
    return value if version == tensor._version else None


def _attach(tensor: Any, value: Tensor, writes: bool = False) -> None:
    tensor._samegrad_values = tensor._version + writes, value
