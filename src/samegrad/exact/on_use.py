"""Batch leaves that move to the device when the loss first uses them.

In two passes the loss sees the whole batch, but it mostly needs the targets; moving the inputs as well would bring
onto the device just what was kept off it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor

from samegrad import trees
from samegrad.trees import RowLayout

# Questions about a leaf that need no data. The names are those of Tensor's attributes and methods.
_ABOUT_SHAPE = ("shape", "dtype", "ndim", "requires_grad", "is_leaf", "layout", "grad_fn")
_QUESTIONS = {getattr(Tensor, name).__get__ for name in _ABOUT_SHAPE} | {
    Tensor.size,
    Tensor.dim,
    Tensor.numel,
    Tensor.__len__,
    Tensor.is_floating_point,
    Tensor.stride,
}


class ArrivesOnUse(Tensor):
    """Looks like the leaf it stands for, on ``device``; any computation with it fetches the data once."""

    _fetch: Callable[[], Tensor]
    _target: torch.device
    _arrived: Tensor | None

    @staticmethod
    def of(
        shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, fetch: Callable[[], Tensor]
    ) -> ArrivesOnUse:
        # A trace would follow it as a tensor of the step's, and it is none.
        with torch._C._DisableTorchDispatch():
            leaf = torch.empty(shape, dtype=dtype, device="meta").as_subclass(ArrivesOnUse)
        leaf._fetch, leaf._target, leaf._arrived = fetch, device, None
        return leaf

    def arrived(self) -> Tensor:
        if self._arrived is None:
            self._arrived = self._fetch()
        return self._arrived

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func in _QUESTIONS:
                return func(*args, **kwargs)
            if func is Tensor.device.__get__:
                return args[0]._target
            here = [leaf.arrived() if isinstance(leaf, cls) else leaf for leaf in trees.leaves_of((args, kwargs))]
            args, kwargs = trees.unflatten(here, trees.flatten((args, kwargs))[1])
            return func(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        raise TypeError("a batch leaf that has not arrived cannot be copied; use it in a computation first")


def arriving(batch: Any, layout: RowLayout, device: torch.device) -> Any:
    """``batch`` with every leaf that is elsewhere standing by; leaves on ``device`` are left as they are."""
    leaves = trees.leaves_of(batch)
    return trees.unflatten([_standing_by(leaf, device) for leaf in leaves], layout.spec)


def _standing_by(leaf: Any, device: torch.device) -> Any:
    if isinstance(leaf, Tensor):
        if leaf.device == device:
            return leaf
        return ArrivesOnUse.of(tuple(leaf.shape), leaf.dtype, device, lambda: leaf.to(device))
    if trees.is_row_source(leaf):
        return ArrivesOnUse.of(leaf.shape, leaf.dtype, device, lambda: leaf.read(0, len(leaf)).to(device))
    return leaf
