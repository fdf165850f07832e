"""Tensors that a loss or a forward holds without being a module: class weights in a closure, a global, a ``partial``.

A copy of the step in float64 that met them as they are would raise, or compute no better than they are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import CellType, FunctionType
from typing import Any

import torch
from torch import Tensor

from samegrad.exact.held import global_names, of_a_library
from samegrad.exact.softmax_loss import SoftmaxLoss


def in_float64(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """``function`` with the floating tensors it holds in float64 on ``device``; itself where it holds none.

    Held by its closure, its defaults, the globals it names, and the functions and partials among these. Whatever else
    it holds is shared with the copy. Tensors that require grad are the model's and stay.
    """
    return _Widening(device).widened(function)  # type: ignore[no-any-return]


class _Widening:
    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._open: set[int] = set()

    def widened(self, value: Any) -> Any:
        """A copy of ``value`` where it holds a floating tensor, else ``value`` itself."""
        if type(value) is Tensor and value.is_floating_point() and not value.requires_grad:
            return value.to(self._device, torch.float64)
        if id(value) in self._open:  # a function that calls itself
            return value
        self._open.add(id(value))
        try:
            if type(value) is functools.partial:
                return self._partial(value)
            if type(value) is SoftmaxLoss:
                function = self.widened(value.function)
                return value if function is value.function else SoftmaxLoss(function)
            return self._function(value) if type(value) is FunctionType else value
        finally:
            self._open.discard(id(value))

    def _partial(self, value: functools.partial[Any]) -> functools.partial[Any]:
        func, args, keywords = self.widened(value.func), self._sequence(value.args), self._mapping(value.keywords)
        if func is value.func and args is value.args and keywords is value.keywords:
            return value
        return functools.partial(func, *args, **keywords)

    def _function(self, value: FunctionType) -> FunctionType:
        if of_a_library(value):
            return value
        cells, before, options = value.__closure__ or (), value.__defaults__ or (), value.__kwdefaults__ or {}
        inside = tuple(self._cell(cell) for cell in cells)
        defaults, keywords = self._sequence(before), self._mapping(options)
        names, stored = global_names(value.__code__)
        named = {name: value.__globals__[name] for name in names if name in value.__globals__}
        # What it assigns to must stay one place for the copy and itself.
        wide = {} if stored else {name: new for name, old in named.items() if (new := self.widened(old)) is not old}
        same_cells = all(a is b for a, b in zip(inside, cells))
        if same_cells and defaults is before and keywords is options and not wide:
            return value
        found = {**value.__globals__, **wide} if wide else value.__globals__
        copy = FunctionType(value.__code__, found, value.__name__, defaults or None, inside or None)
        copy.__kwdefaults__ = keywords or None
        return copy

    def _cell(self, cell: CellType) -> CellType:
        try:
            held = cell.cell_contents
        except ValueError:  # not assigned yet
            return cell
        wide = self.widened(held)
        return cell if wide is held else CellType(wide)

    def _sequence(self, values: tuple[Any, ...]) -> tuple[Any, ...]:
        wide = tuple(self.widened(value) for value in values)
        return values if all(a is b for a, b in zip(wide, values)) else wide

    def _mapping(self, values: dict[str, Any]) -> dict[str, Any]:
        wide = {name: self.widened(value) for name, value in values.items()}
        return values if all(wide[name] is values[name] for name in values) else wide
