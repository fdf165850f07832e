"""A function by itself, on numbers drawn for it: whether it keeps rows apart.

It is run on all rows, on the first half of them and on the last, on numbers drawn in the place of those that were made
of rows. What a half gives alone must be its part of what all give.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from samegrad.exact.aliases import NARROW
from samegrad.exact.calls import tensors_in
from samegrad.exact.dataless import has_data
from samegrad.exact.out_of_memory import is_out_of_memory

# Functions that may take a device, a dtype or a length of a tensor, and none of its values.
_OF_THEM = frozenset("to type arange zeros ones full empty eye".split())
_DRAWS = frozenset(
    "rand rand_like randn randn_like randint randint_like random_ normal normal_ log_normal_ uniform_ exponential_ "
    "cauchy_ geometric_ bernoulli bernoulli_ poisson multinomial dropout dropout_ native_dropout feature_dropout "
    "alpha_dropout feature_alpha_dropout rrelu rrelu_ gumbel_softmax".split()
)
# What may follow the rows in its length alone: tensors, sizes that are as long, the first size that is a multiple of
# the rows, and all that are.
_TENSORS = frozenset({"tensors"})
_SIZES = _TENSORS | {"sizes"}
_LEADING, _MULTIPLES = frozenset({"leading"}), frozenset({"multiples"})
# How often numbers are drawn for a function.
_SEEDS = 4
# Larger tensors are not tried.
_MOST_NUMBERS = 2**22
# What a function raises that was not made for such numbers or so many rows.
_FAILURES = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a tensor is: its rows on ``axis``; taken over them, or nobody knows, by ``made``; or none of their values.

    ``sure``: False where nobody knows.
    """

    axis: int | None = None
    made: str = ""
    sure: bool = True

    @property
    def is_free(self) -> bool:
        return self.axis is None and not self.made


FREE = Kind()


class RowTrial:
    """``func`` by itself, on numbers drawn for it in the place of those that were made of rows."""

    def __init__(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        before: Tensor | None,
        kind_of: Callable[[Tensor], Kind | None],
        rows: int,
    ) -> None:
        self._func, self._kind_of, self._rows = func, kind_of, rows
        self._writes = before is not None
        self._args = args if before is None else (before, *args[1:])
        self._kinds = {id(before): kind_of(args[0])} if before is not None else {}
        self._kwargs = kwargs
        # Of the first and of the last no row is both: the largest of all is in one of them only.
        self._some = max(1, rows // 2)
        # Whether memory is made as it was found, and whether a size was cut in this run.
        self._empty = self._led = False

    def kinds(self, name: str, place: str, made: Sequence[Tensor]) -> list[Kind]:
        """Of each tensor of ``made``."""
        unsure = [Kind(made=place, sure=False)] * len(made)
        tensors = list(tensors_in((*self._args, *self._kwargs.values())))
        if name in _DRAWS:
            # Draws are keyed by their rows, which are where the numbers are that they are like.
            return [self._like(tensor, tensors, place) for tensor in made]
        if any(map(is_functorch_wrapped_tensor, tensors)) or not all(map(has_data, tensors)):
            return unsure
        if sum(tensor.numel() for tensor in (*tensors, *made)) > _MOST_NUMBERS:
            return unsure
        self._empty = "empty" in name
        with torch.no_grad(), _disable_current_modes(), torch._C.DisableTorchFunction():
            for drawn in (True, False):
                found = self._first_apart(place, drawn, len(made))
                if found is not None:
                    return [self._with_inputs(name, place, kind, tensors) for kind in found]
        return unsure

    def _first_apart(self, place: str, drawn: bool, count: int) -> list[Kind] | None:
        """By the way of cutting sizes in which rows are apart, or by the first that there is."""
        first: list[Kind] | None = None
        for follows in (_TENSORS, _TENSORS | _LEADING, _SIZES, _SIZES | _MULTIPLES, frozenset[str]()):
            try:
                found = self._compared(place, drawn, follows)
            except _FAILURES as error:
                if is_out_of_memory(error):
                    raise
                continue
            if len(found) == count and not any(kind.made for kind in found):
                return found
            # A size that is a multiple of the rows need not be of them.
            if first is None and len(found) == count and not follows & (_LEADING | _MULTIPLES):
                first = found
        return first

    def _like(self, made: Tensor, tensors: Sequence[Tensor], place: str) -> Kind:
        kinds = [(tensor.shape, kind) for tensor in tensors if (kind := self._of_argument(tensor)) is not None]
        return next((kind for shape, kind in kinds if shape == made.shape), Kind(made=place, sure=False))

    def _with_inputs(self, name: str, place: str, kind: Kind, tensors: Sequence[Tensor]) -> Kind:
        """What is computed with a number that was taken over rows was taken over them too, but for what has none of
        its values."""
        inputs = [known for tensor in tensors if (known := self._of_argument(tensor)) is not None and known.made]
        if kind.is_free and _fills(name):
            return kind
        if not inputs:
            # Numbers that were drawn may all be clamped to one.
            return Kind(made=place) if kind.is_free else kind
        return next((known for known in inputs if known.sure), kind if kind.made and kind.sure else inputs[0])

    def _compared(self, place: str, drawn: bool, follows: frozenset[str]) -> list[Kind]:
        """drawn: numbers are. follows: what has none of the rows' values but their number, and is cut as they are."""
        ends = slice(0, self._some), slice(self._rows - self._some, self._rows)
        parts = slice(0, self._rows), *ends
        runs = [[self._run(part, seed, drawn, follows) for part in parts] for seed in range(_SEEDS)]
        found: list[list[Kind]] = []
        for mine, other in zip(runs, (*runs[1:], runs[0])):
            each = zip(mine[0], other[0], mine[1], mine[2], strict=True)
            found.append([self._of(whole, beside, first, last, place) for whole, beside, first, last in each])
        # What is seen with some numbers may not be with others: where all of a mask is on, say.
        return [next((kind for kind in kinds if kind.made), kinds[0]) for kinds in zip(*found, strict=True)]

    def _of(self, whole: Tensor, other: Tensor, first: Tensor, last: Tensor, place: str) -> Kind:
        if whole.shape != other.shape:
            return Kind(made=place, sure=False)
        if whole.shape == first.shape:
            return FREE if _same(whole, other) and _same(whole, first) else Kind(made=place)
        if whole.dim() != first.dim() or whole.dim() != last.dim():
            return Kind(made=place, sure=False)
        changed = [axis for axis in range(whole.dim()) if whole.shape[axis] != first.shape[axis]]
        if len(changed) != 1:
            return Kind(made=place)
        axis, length = changed[0], first.shape[changed[0]]
        if length * self._rows != whole.shape[axis] * self._some or last.shape != first.shape:
            return Kind(made=place, sure=False)
        apart = _same(whole.narrow(axis, 0, length), first)
        apart = apart and _same(whole.narrow(axis, whole.shape[axis] - length, length), last)
        return Kind(axis) if apart else Kind(made=place)

    def _run(self, part: slice, seed: int, drawn: bool, follows: frozenset[str]) -> list[Tensor]:
        """What is made of the rows ``part`` of numbers of ``seed``."""
        generator = torch.Generator().manual_seed(seed)
        # Lengths of axes on which rows are.
        rows_long = {
            tensor.shape[kind.axis]
            for tensor in tensors_in((*self._args, *self._kwargs.values()))
            if (kind := self._of_argument(tensor)) is not None and kind.axis is not None
        }

        def argument(tensor: Tensor) -> Tensor:
            kind = self._of_argument(tensor)
            mine = tensor.detach().cpu()
            if mine.dtype in NARROW:
                # Whose rounding would hide what is taken over rows.
                mine = mine.float()
            if kind is not None and not kind.is_free and drawn:
                mine = _drawn(mine, generator)
            if kind is not None and kind.axis is not None:
                return self._cut(mine, kind.axis, part).clone()
            if kind is None or kind.is_free:
                for axis in range(mine.dim()) if follows >= _TENSORS else ():
                    if mine.shape[axis] in rows_long:
                        mine = self._cut(mine, axis, part)
            return mine.clone()

        self._led = False
        changed = partial(self._changed, part=part, follows=follows, lengths=rows_long, argument=argument)
        args, kwargs = pytree.tree_map(changed, (self._args, self._kwargs))
        result = self._func(*args, **kwargs)
        made = list(tensors_in((*args[: int(self._writes)], result)))
        # Memory as it was found says nothing.
        return [torch.zeros_like(tensor) for tensor in made] if self._empty else made

    def _changed(
        self, leaf: Any, part: slice, follows: frozenset[str], lengths: set[int], argument: Callable[[Tensor], Tensor]
    ) -> Any:
        """What stands for ``leaf`` where the rows are ``part``; sizes may come in one leaf."""
        if isinstance(leaf, Tensor):
            return argument(leaf)
        if isinstance(leaf, torch.Size):
            return tuple(self._size(size, part, follows, lengths) for size in leaf)
        return self._size(leaf, part, follows, lengths) if type(leaf) is int else leaf

    def _size(self, size: int, part: slice, follows: frozenset[str], lengths: set[int]) -> int:
        if size < 1 or size % self._rows:
            return size
        leads, self._led = follows >= _LEADING and not self._led, True
        named = follows >= _SIZES and (size == self._rows or size in lengths)
        if leads or named or follows >= _MULTIPLES:
            chosen: int = part.stop - part.start
            return size // self._rows * chosen
        return size

    def _of_argument(self, tensor: Tensor) -> Kind | None:
        return self._kinds[id(tensor)] if id(tensor) in self._kinds else self._kind_of(tensor)

    def _cut(self, tensor: Tensor, axis: int, part: slice) -> Tensor:
        each, rest = divmod(tensor.shape[axis], self._rows)
        if rest:
            return tensor
        return tensor.narrow(axis, part.start * each, (part.stop - part.start) * each)


def _drawn(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Numbers of the kind that ``tensor`` holds, no index among them that was not in its range."""
    uniform = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
    if tensor.dtype == torch.bool:
        return uniform < 0.5
    if tensor.is_floating_point() or tensor.is_complex():
        if bool(((tensor == 0) | (tensor == 1)).all()):
            # It may be a mask: some count and some do not.
            kept = torch.rand(tensor.shape, generator=generator) < 0.6
            return ((uniform + 0.1) * kept).to(tensor.dtype)
        return (uniform + 0.1).to(tensor.dtype)
    if not tensor.numel():
        return tensor
    least, most = max(0, int(tensor.min())), int(tensor.max())
    if most < 0:
        return tensor
    # Of numbers that are all one, those below it as well.
    least = 0 if least >= most else least
    return (least + (uniform * (max(most, 1) + 1 - least)).long()).to(tensor.dtype)


def _same(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.is_floating_point() or a.is_complex():
        tolerance = 64 * torch.finfo(a.dtype).eps
        return torch.allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)
    return torch.equal(a, b)


def _fills(name: str) -> bool:
    """Whether it may take nothing of a tensor but what it is."""
    return name.startswith("new_") or name.endswith(("_like", "_as")) or name in _OF_THEM


