"""Detached twins of a model's parameters, swapped in while chunks run.

A chunk's backward must not touch ``.grad`` nor fire the user's hooks, which belong to the total of all chunks. So
chunks run on aliases: parameters of their own that share the storage. The swap happens once a step, not once a chunk.

1. A tied parameter has one alias, in every slot where it stands.
2. Frozen parameters are not swapped.
3. The swap is undone on every way out.
4. Sharded parameters (``fully_shard``) have no aliases, which its hooks would pass by: they stand themselves, and their
   ``.grad`` is set aside.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from samegrad.exact.sharded import gradients_set_aside, is_sharded, reshard
from samegrad.exact.sums_in_backward import StandingSums
from samegrad.module_walk import parts_of

# Sums over many chunks stop growing in these dtypes (bfloat16 after 128 equal terms), so totals are kept in float32.
NARROW = (torch.bfloat16, torch.float16)


class ParameterAliases:
    """The trainable parameters of some modules and the slots they stand in, ready to be swapped.

    ``roots`` maps a prefix for names ("" for the model) to a module. ``sharded``: rule 4 holds for all of them, since
    ranks then wait for each other in every chunk.
    """

    def __init__(self, roots: Mapping[str, nn.Module]) -> None:
        self.roots = dict(roots)
        reshard(list(self.roots.values()))
        self.sharded = any(is_sharded(p) for module in self.roots.values() for p in module.parameters())
        self.names: list[str] = []
        self.parameters: list[nn.Parameter] = []
        self._beside: list[nn.Parameter] = []
        self._slots: list[tuple[nn.Module, str, int]] = []
        index_of: dict[int, int] = {}
        for root, module in self.roots.items():
            for prefix, part in module.named_modules(prefix=root):
                for name, parameter in part._parameters.items():
                    if parameter is None or not parameter.requires_grad:
                        continue
                    if id(parameter) not in index_of:
                        index_of[id(parameter)] = len(self.parameters)
                        self.parameters.append(parameter)
                        self.names.append(f"{prefix}.{name}" if prefix else name)
                    self._slots.append((part, name, index_of[id(parameter)]))

    def refreshed(self) -> ParameterAliases:
        """Aliases of what is trainable now: users freeze, unfreeze and replace parameters between steps."""
        reshard(list(self.roots.values()))
        now = [
            (part, name, parameter)
            for module in self.roots.values()
            for part in parts_of([module])
            for name, parameter in part._parameters.items()
            if parameter is not None and parameter.requires_grad
        ]
        same = len(now) == len(self._slots) and all(
            part is slot[0] and name == slot[1] and parameter is self.parameters[slot[2]]
            for (part, name, parameter), slot in zip(now, self._slots)
        )
        return self if same else ParameterAliases(self.roots)

    def sharded_names(self) -> set[str]:
        """Names of the parameters that are sharded."""
        return {name for name, parameter in zip(self.names, self.parameters) if is_sharded(parameter)}

    def beside(self, tensors: Sequence[Tensor], stand_ins: Sequence[nn.Parameter]) -> ParameterAliases:
        """These aliases and, after them, ``stand_ins`` for ``tensors``: parameters that stand in no module."""
        both = copy.copy(self)
        both.parameters = [*self.parameters, *(cast(nn.Parameter, tensor) for tensor in tensors)]
        both._beside = [*self._beside, *stand_ins]
        return both

    @contextlib.contextmanager
    def swapped(self) -> Iterator[list[nn.Parameter]]:
        """The aliases in the place of the parameters, or sharded parameters themselves without their gradients."""
        if self.sharded:
            with gradients_set_aside(list(self.roots.values()), self.parameters):
                yield self.parameters
            return
        own = self.parameters[: len(self.parameters) - len(self._beside)]
        aliases = [nn.Parameter(p.detach()) for p in own]
        with self.replaced(aliases):
            yield [*aliases, *self._beside]

    @contextlib.contextmanager
    def replaced(self, tensors: Sequence[Tensor]) -> Iterator[None]:
        """``tensors``, in the order of ``parameters``, standing in the modules in their place."""
        try:
            for part, name, index in self._slots:
                # Any tensor computes there; only the type of the slot says parameter.
                part._parameters[name] = cast(nn.Parameter, tensors[index])
            yield
        finally:
            for part, name, index in self._slots:
                part._parameters[name] = self.parameters[index]


def zero_sum(alias: Tensor) -> Tensor:
    """A sum of nothing for gradients of ``alias``: float32 where that is narrower."""
    return torch.zeros_like(alias, dtype=torch.float32 if alias.dtype in NARROW else alias.dtype, requires_grad=False)


def multiply(sums: Sequence[Tensor | None], factor: Tensor | None) -> None:
    """``sums`` times ``factor``, () float64, where there is one; in a few kernels, as there are hundreds of sums."""
    if factor is None:
        return
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for total in sums:
        if total is not None:
            by_dtype.setdefault(total.dtype, []).append(total)
    for dtype, standing in by_dtype.items():
        torch._foreach_mul_(standing, factor.to(dtype))


class GradientTotals:
    """Sums of the gradients that chunks leave on aliases, float32 where the parameter is narrower."""

    def __init__(self, aliases: Sequence[nn.Parameter]) -> None:
        self._aliases = list(aliases)
        self._wide: dict[int, Tensor] = {}
        self._standing: dict[int, Tensor] = {}

    def standing(self) -> StandingSums | None:
        """The sums, for code that adds gradients to them itself; None where chunks are looked at one by one."""
        return StandingSums(self._standing_sum)

    def _standing_sum(self, index: int) -> Tensor:
        if index not in self._standing:
            self._standing[index] = zero_sum(self._aliases[index])
        return self._standing[index]

    def fold(self) -> None:
        """Moves the last chunk's narrow gradients into their float32 sums. Wide ones already add up in place."""
        for index, alias in enumerate(self._aliases):
            if alias.grad is None or alias.dtype not in NARROW:
                continue
            if index in self._wide:
                self._wide[index].add_(alias.grad)
            else:
                self._wide[index] = alias.grad.float()
            alias.grad = None

    def magnitudes(self) -> list[Tensor | None] | None:
        """Sums of the chunks' absolute gradients, where they were kept (``GradientMagnitudes``)."""
        return None

    def taken(self, factor: Tensor | None = None) -> list[Tensor | None]:
        """The totals, in the parameters' dtypes, None where no chunk gave a gradient. The sums are given up.

        ``factor``: () float64, what all of them are multiplied by while they are still wide.
        """
        totals: list[Tensor | None] = []
        for index, alias in enumerate(self._aliases):
            wide, standing = self._wide.pop(index, None), self._standing.pop(index, None)
            total = alias.grad if wide is None else wide
            if standing is not None:
                total = standing if total is None else standing.add_(total)
            totals.append(total)
            alias.grad = None
        multiply(totals, factor)
        for index, (total, alias) in enumerate(zip(totals, self._aliases)):
            # One by one, so that each wide sum goes as its narrow total comes.
            totals[index] = None if total is None else total.to(alias.dtype)
        return totals


class GradientMagnitudes(GradientTotals):
    """Totals that keep Σ_k |g_k| as well: the scale on which a verification judges rounding."""

    def __init__(self, aliases: Sequence[nn.Parameter]) -> None:
        super().__init__(aliases)
        self._sums: list[Tensor | None] = [None] * len(self._aliases)
        self._magnitudes: list[Tensor | None] = [None] * len(self._aliases)

    def standing(self) -> None:
        """None: each chunk's gradients are looked at before they are added."""

    def fold(self) -> None:
        for index, alias in enumerate(self._aliases):
            if alias.grad is None:
                continue
            wide = alias.grad.float() if alias.dtype in NARROW else alias.grad
            total, magnitude = self._sums[index], self._magnitudes[index]
            self._sums[index] = wide if total is None else total + wide
            self._magnitudes[index] = wide.abs() if magnitude is None else magnitude + wide.abs()
            alias.grad = None

    def magnitudes(self) -> list[Tensor | None]:
        return self._magnitudes

    def taken(self, factor: Tensor | None = None) -> list[Tensor | None]:
        multiply([*self._sums, *self._magnitudes], factor)
        return [None if s is None else s.to(a.dtype) for s, a in zip(self._sums, self._aliases)]
