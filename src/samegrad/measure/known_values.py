"""Values that a traced step knows though nothing has data: positions, lengths, masks of its own making.

Models look at such values to choose their way: transformers does, and finds that no attention mask is needed. What is
made of numbers alone, by operations on nothing else, is the same in every run, so it is computed beside the trace.
Whatever a weight or the batch enters stays unknown; so does all that is not of whole numbers, or is large.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils.weak import WeakIdKeyDictionary

from samegrad import trees

_FACTORIES = frozenset({"arange", "eye", "full", "ones", "scalar_tensor", "tril_indices", "triu_indices", "zeros"})
# What these make depends on their argument's shape alone.
_ALIKE = {"new_ones": 1, "new_zeros": 0, "ones_like": 1, "zeros_like": 0}
# Attention masks of every pair of positions would take time, and are looked at nowhere.
_MOST_ENTRIES = 2**20


class KnownValues:
    """The values of fake tensors, where they are known."""

    def __init__(self) -> None:
        self._values = WeakIdKeyDictionary()

    def of(self, tensor: Any) -> Tensor | None:
        """The values of ``tensor`` on the host, or None."""
        if not isinstance(tensor, FakeTensor):
            # A number that Python brings.
            return tensor if _is_small(tensor) else None
        known: Tensor | None = self._values.get(tensor)  # type: ignore[no-untyped-call]  # torch has no types here
        return known

    def number(self, tensor: Any) -> int | float | None:
        """The one value of ``tensor``, or None."""
        known = self.of(tensor)
        with unset_fake_temporarily():
            return None if known is None else known.item()

    def follow(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], given: Sequence[Tensor], made: Sequence[Tensor]
    ) -> None:
        """Computes what ``func`` has just done beside it, where that can be known, and forgets what it wrote over."""
        writes = _writes(func)
        if not made or func.namespace != "aten" or not all(map(_is_small, made)):
            if writes:
                self._forget(given)
            return
        values = [self.of(tensor) for tensor in given]
        name = func._opname
        if any(value is None for value in values):
            if writes:
                self._forget(given)
            elif name in _ALIKE:
                with unset_fake_temporarily():
                    filled = torch.full(made[0].shape, _ALIKE[name], dtype=made[0].dtype, device="cpu")
                self._values[made[0]] = filled
            return
        if (not values and name not in _FACTORIES) or torch.Tag.nondeterministic_seeded in func.tags:
            return
        with unset_fake_temporarily():
            results = func(*self._on_host(args), **self._on_host(kwargs))
        found = [leaf for leaf in trees.leaves_of(results) if isinstance(leaf, Tensor)]
        for tensor, value in zip(made, found, strict=True):
            self._values[tensor] = value

    def _on_host(self, arguments: Any) -> Any:
        def value(leaf: Any) -> Any:
            if isinstance(leaf, Tensor):
                return self.of(leaf)
            return torch.device("cpu") if isinstance(leaf, torch.device) else leaf

        leaves, spec = trees.flatten(arguments)
        return trees.unflatten([value(leaf) for leaf in leaves], spec)

    def _forget(self, written: Sequence[Tensor]) -> None:
        memory = {tensor.untyped_storage()._cdata for tensor in written}
        for tensor in list(self._values):
            if tensor.untyped_storage()._cdata in memory:
                del self._values[tensor]

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """A block in which a library that asks whether it may look at a tensor's values is told what is so.

        They ask by ``isinstance(tensor, torch._subclasses.FakeTensor)``; torch itself asks elsewhere.
        """
        values = self

        class Unknown(type):
            def __instancecheck__(cls, tensor: Any) -> bool:
                return isinstance(tensor, FakeTensor) and values.of(tensor) is None

            def __subclasscheck__(cls, kind: type) -> bool:
                return issubclass(kind, FakeTensor)

        holder: Any = torch._subclasses
        before = holder.FakeTensor
        holder.FakeTensor = Unknown("FakeTensor", (), {})
        try:
            yield
        finally:
            holder.FakeTensor = before


def _is_small(tensor: Tensor) -> bool:
    """A tensor of few whole numbers or truths."""
    counts = not (tensor.is_floating_point() or tensor.is_complex())
    return counts and tensor.layout is torch.strided and tensor.numel() <= _MOST_ENTRIES


@functools.cache
def _writes(func: Any) -> bool:
    writes: bool = func._schema.is_mutable
    return writes
