"""Real steps that leave nothing behind: to measure what a step does, optimizer and all, and have it not done.

Copies of what changes lie on the host, so that on a device they take no part in what is measured.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from samegrad.declared import DeclaredStep
from samegrad.exact.attributes import Attribute, can_hold_state
from samegrad.exact.undisturbed import undisturbed
from samegrad.measure.shadows import held_with_hooks, named_modules


@contextlib.contextmanager
def undone(declared: DeclaredStep) -> Iterator[None]:
    """A block whose steps are undone on every way out.

    Weights, gradients, buffers, optimizer, generators, and what the step's functions and hooks hold are then as they
    were, the same objects with the same content. Inside, gradients are absent at first.
    """
    held = held_with_hooks(declared, named_modules(declared))
    with undisturbed(declared.modules, declared.device, held):
        parameters = [p for module in declared.modules for p in module.parameters()]
        if declared.optimizer is not None:
            parameters += [p for group in declared.optimizer.param_groups for p in group["params"]]
        weights = [(p, p.grad, _Content(p)) for p in dict.fromkeys(parameters)]
        optimizer = None if declared.optimizer is None else _OptimizerContent(declared.optimizer)
        for parameter in parameters:
            parameter.grad = None
        try:
            yield
        finally:
            if optimizer is not None:
                optimizer.restore()
            for parameter, gradient, content in weights:
                content.restore()
                parameter.grad = gradient


class _Content:
    """A value and what it held: a tensor's bits on the host, or what an attribute of its kind holds."""

    def __init__(self, value: Any) -> None:
        self._value = value
        self._kept = value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else Attribute.of(value)

    @torch.no_grad()
    def restore(self) -> Any:
        if not isinstance(self._kept, Tensor):
            return self._kept.restored()
        self._value.copy_(self._kept)
        return self._value


class _OptimizerContent:
    """State, groups and attributes of an optimizer."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._state = {parameter: (state, _entries(state)) for parameter, state in optimizer.state.items()}
        self._groups = [(group, _entries(group)) for group in optimizer.param_groups]
        self._names = set(vars(optimizer))
        own = {name: value for name, value in vars(optimizer).items() if name not in ("state", "param_groups")}
        self._attributes = _entries({name: value for name, value in own.items() if can_hold_state(value)})

    def restore(self) -> None:
        self._optimizer.state.clear()
        for parameter, (state, entries) in self._state.items():
            self._optimizer.state[parameter] = _put_back(state, entries)
        self._optimizer.param_groups[:] = [_put_back(group, entries) for group, entries in self._groups]
        mine = vars(self._optimizer)
        for name in mine.keys() - self._names:
            del mine[name]
        mine.update({name: content.restore() for name, content in self._attributes.items()})


def _entries(mapping: Mapping[str, Any]) -> dict[str, _Content]:
    # The parameters of a group are restored with all others.
    return {name: _Content(value) for name, value in mapping.items() if name != "params"}


def _put_back(mapping: Any, entries: Mapping[str, _Content]) -> Any:
    kept = {name: value for name, value in mapping.items() if name == "params"}
    mapping.clear()
    mapping.update(kept | {name: content.restore() for name, content in entries.items()})
    return mapping
