"""What a plan must leave of weights and of the optimizer's state: the same bits, the same strides, the same place.

Levers that stand between steps move both. What they did not put back is found, named, and put back here: the weights
are the user's, and later comparisons must begin with them.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any, Self

import torch
from torch import Tensor

from samegrad.declared import DeclaredStep
from samegrad.exact.attributes import same_tensor
from samegrad.levers import StandingLever, levers_of
from samegrad.records import Check, Plan
from samegrad.verify.compare import bits_check

PUT_BACK = "weights and optimizer state put back"


@dataclasses.dataclass(frozen=True)
class _Copy:
    """A tensor's values on the host, and how it lay."""

    values: Tensor
    stride: tuple[int, ...]
    device: torch.device

    @classmethod
    def of(cls, tensor: Tensor) -> _Copy:
        return cls(tensor.detach().to("cpu", copy=True), tensor.stride(), tensor.device)

    def is_still(self, tensor: Tensor) -> bool:
        lies = tensor.stride() == self.stride and tensor.device == self.device
        return lies and same_tensor(tensor.detach().cpu(), self.values)

    def made_again(self) -> Tensor:
        made = torch.empty_strided(self.values.shape, self.stride, dtype=self.values.dtype, device=self.device)
        return made.copy_(self.values)


@dataclasses.dataclass(frozen=True)
class Kept:
    """A snapshot of weights and optimizer state; empty for plans that leave them where they are."""

    declared: DeclaredStep
    copies: dict[str, _Copy]

    @classmethod
    @contextlib.contextmanager
    def under(cls, plan: Plan, declared: DeclaredStep) -> Iterator[Self]:
        """A block after which all is as it was, on every way out."""
        stands = any(isinstance(lever, StandingLever) for lever in levers_of(plan))
        found = _tensors(declared) if stands else ()
        kept = cls(declared, {name: _Copy.of(tensor) for name, tensor, _, _ in found})
        try:
            yield kept
        finally:
            kept.checks()

    def checks(self) -> list[Check]:
        """Whether all is as it was; what is not is put back."""
        if not self.copies:
            return []
        moved = []
        for name, tensor, holder, key in list(_tensors(self.declared)):
            copy = self.copies.get(name)
            if copy is not None and not copy.is_still(tensor):
                moved.append(name)
                _put(holder, key, copy.made_again())
        return [bits_check(PUT_BACK, moved, "bits, strides and places after the plan are those before it")]


def _tensors(declared: DeclaredStep) -> Iterator[tuple[str, Tensor, Any, str]]:
    """Name and tensor of all weights and optimizer states, and what holds each under which key."""
    names: dict[Tensor, str] = {}
    for module in declared.modules:
        for name, parameter in module.named_parameters():
            names[parameter] = name
            yield name, parameter, parameter, "data"
    for weight, state in declared.optimizer.state.items() if declared.optimizer is not None else ():
        for key, value in state.items() if isinstance(state, dict) else ():
            if type(value) is Tensor:
                yield f"{key} of {names.get(weight, 'a weight')}", value, state, key


def _put(holder: Any, key: str, tensor: Tensor) -> None:
    if isinstance(holder, dict):
        holder[key] = tensor
    else:
        setattr(holder, key, tensor)
