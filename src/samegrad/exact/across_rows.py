"""Numbers taken over several rows that no gradient flows through: a mask's mean, the largest weight or length.

They show in no graph, and rows that are alike hide them from every comparison of values: where all of a mask is true,
its mean is one for any of the rows. So torch's functions are followed as the code calls them, and each whose result has
no gradient is tried by itself, on numbers drawn for it: on all rows, on the first of them and on the last. What some
rows give alone must be their part of what all give. A result that is no such thing was taken over rows, and so was all
that is computed with it.

A result whose shape depends on values, one of a function that cannot be tried, and values that Python reads are not
known. Whoever cannot look further takes them for taken; a model's rows are compared with others' masks and lengths
(``varied_rows.py``).
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.weak import WeakIdKeyDictionary

from samegrad.exact.calls import line_from, tensors_in, uncompiled
from samegrad.exact.dataless import has_data
from samegrad.exact.out_of_memory import is_out_of_memory

# What hands values to Python.
_READS = frozenset(
    "item __float__ __int__ __bool__ __index__ __complex__ __array__ tolist numpy is_nonzero equal allclose".split()
)
# Which rows are taken or written, and not what is computed with them.
_PLACES = frozenset(
    "__getitem__ __setitem__ index_select gather embedding take take_along_dim index_add index_add_ index_put "
    "index_put_ index_copy index_copy_ index_fill index_fill_ scatter scatter_ scatter_add scatter_add_ "
    "masked_scatter masked_scatter_ masked_select".split()
)
# Functions that may take a device, a dtype or a length of a tensor, and none of its values.
_OF_THEM = frozenset("to type arange zeros ones full empty eye".split())
_DRAWS = frozenset(
    "rand rand_like randn randn_like randint randint_like random_ normal normal_ log_normal_ uniform_ exponential_ "
    "cauchy_ geometric_ bernoulli bernoulli_ poisson multinomial dropout dropout_ native_dropout feature_dropout "
    "alpha_dropout feature_alpha_dropout rrelu rrelu_ gumbel_softmax".split()
)
# What may follow the rows in its length alone: tensors, and sizes that are given as numbers.
_TENSORS, _SIZES = frozenset({"tensors"}), frozenset({"sizes"})
# How often numbers are drawn for a function.
_SEEDS = 4
# Larger tensors are not tried.
_MOST_NUMBERS = 2**22
# What a function raises that was not made for such numbers or so many rows.
_FAILURES = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


@dataclasses.dataclass(frozen=True)
class Across:
    """``made``: what was taken over rows, by function and line. ``used``: where the result comes to depend on it, in
    the code of ``module``."""

    made: str
    used: str
    module: str


@dataclasses.dataclass(frozen=True)
class _Kind:
    """What a tensor is: its rows on ``axis``; taken over them, or nobody knows, by ``made``; or none of their values.

    ``sure``: False where nobody knows.
    """

    axis: int | None = None
    made: str = ""
    sure: bool = True

    @property
    def is_free(self) -> bool:
        return self.axis is None and not self.made


_FREE = _Kind()


class Followed(TorchFunctionMode):
    """Follows what the code in the block makes of ``sources``: tensors of ``rows`` rows, each with the rows' axis.

    ``running``: the modules that run. strict: whatever is not known counts as taken, and a value that Python reads
    counts from where a gradient next depends on anything. ``hooks``: those on tensors count as such a value.
    ``taken``: the first number taken over rows on which a result with a gradient depends. ``unknown``: what may be one.
    ``strangers``: tensors without a gradient of which nobody saw how they were made; none where it is not strict.
    """

    def __init__(
        self,
        sources: Iterable[tuple[Tensor, int]],
        rows: int,
        running: Sequence[str] = (),
        *,
        strict: bool = False,
        hooks: bool = True,
    ) -> None:
        super().__init__()
        self.taken: Across | None = None
        self.unknown: Across | None = None
        self.strangers: list[Tensor] = []
        self._rows, self._running, self._strict = rows, running, strict
        self._read, self._hooks = "", hooks
        self._blocks = contextlib.ExitStack()
        # By object, and none is kept alive; by storage where one was written.
        self._kinds: Any = WeakIdKeyDictionary()
        self._written: dict[int, _Kind] = {}
        for source, axis in sources:
            self._kinds[source] = _Kind(axis)

    def __enter__(self) -> Followed:
        # What was compiled calls nothing that could be seen.
        self._blocks.enter_context(uncompiled())
        super().__enter__()  # type: ignore[no-untyped-call]  # torch has no types here
        return self

    def __exit__(self, *raised: Any) -> None:
        with self._blocks:
            super().__exit__(*raised)  # type: ignore[no-untyped-call]  # torch has no types here

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = list(tensors_in((*args, *kwargs.values(), *_ends_of_slices(args[1:]))))
        kinds = [self._kind(tensor) for tensor in given]
        name = _name_of(func)
        # This method's frame is that of whoever called.
        place = f"{name} ({line})" if (line := line_from(sys._getframe(1))) else name
        writes = _writes(name)
        # An experiment needs what a write is to change.
        before = args[0].detach().clone() if writes and args and isinstance(args[0], Tensor) else None
        if self._strict:
            pairs = zip(given, kinds)
            self.strangers += [tensor for tensor, kind in pairs if kind is None and not tensor.requires_grad]
        result = func(*args, **kwargs)
        made = list(tensors_in((*args[: int(writes)], result)))
        known = [kind for kind in kinds if kind is not None and not kind.is_free]
        if not made:
            if (known and name in _READS) or (name == "register_hook" and self._hooks):
                self._reads(place)
        elif any(tensor.requires_grad for tensor in made):
            self._uses(name, place, given, kinds, args)
            for tensor in made:
                self._mark(tensor, self._of_gradient(tensor, place, known), writes)
        elif known:
            found = _Trial(func, args, kwargs, before, self._kind, self._rows).kinds(name, place, made)
            if any(kind.made and not kind.sure for kind in found):
                # Its shape may be read without a call.
                self._reads(place)
            for tensor, kind in zip(made, found):
                self._mark(tensor, kind, writes)
        else:
            for tensor in made:
                self._mark(tensor, _FREE, writes)
        return result

    def returns(self, outputs: Iterable[Tensor]) -> None:
        """What the code returns: without a gradient it may not be taken over rows either, nor hang on what was read."""
        if self._strict and self._read:
            self._found(_Kind(made=self._read), self._read)
        for tensor in outputs:
            kind = self._kind(tensor)
            if kind is not None and kind.made and not tensor.requires_grad:
                self._found(kind, "what it returns")

    def _kind(self, tensor: Tensor) -> _Kind | None:
        kind: _Kind | None = self._kinds.get(tensor)
        if self._written and _has_storage(tensor):
            return self._written.get(tensor.untyped_storage().data_ptr(), kind)
        return kind

    def _mark(self, tensor: Tensor, kind: _Kind, writes: bool) -> None:
        self._kinds[tensor] = kind
        if writes and kind.made and _has_storage(tensor):
            # Every other view of it holds that as well.
            self._written[tensor.untyped_storage().data_ptr()] = kind

    def _of_gradient(self, tensor: Tensor, place: str, known: Sequence[_Kind]) -> _Kind:
        """Graphs show how rows meet there; what is detached of it is looked at from here on."""
        if not known:
            return _FREE
        if tensor.requires_grad and tensor.dim() and tensor.shape[0] % self._rows == 0:
            return _Kind(0)
        return _Kind(made=place, sure=tensor.requires_grad)

    def _uses(
        self, name: str, place: str, given: Sequence[Tensor], kinds: Sequence[_Kind | None], args: Sequence[Any]
    ) -> None:
        if self._strict and self._read:
            self._found(_Kind(made=self._read), self._read)
        for tensor, kind in zip(given, kinds):
            if tensor.requires_grad:
                continue
            if kind is not None and kind.made:
                is_place = name in _PLACES and not (args and tensor is args[0])
                sure = kind.sure and (self._strict or not is_place)
                self._found(dataclasses.replace(kind, sure=sure), place)

    def _reads(self, place: str) -> None:
        self._read = self._read or place
        if not self._strict:
            self._found(_Kind(made=place, sure=False), place)

    def _found(self, kind: _Kind, used: str) -> None:
        across = Across(kind.made, used, self._running[-1] if self._running else "")
        if kind.sure or self._strict:
            self.taken = self.taken or across
        else:
            self.unknown = self.unknown or across


class _Trial:
    """``func`` by itself, on numbers drawn for it in the place of those that were made of rows."""

    def __init__(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        before: Tensor | None,
        kind_of: Callable[[Tensor], _Kind | None],
        rows: int,
    ) -> None:
        self._func, self._kind_of, self._rows = func, kind_of, rows
        self._writes = before is not None
        self._args = args if before is None else (before, *args[1:])
        self._kinds = {id(before): kind_of(args[0])} if before is not None else {}
        self._kwargs = kwargs
        # Of the first and of the last no row is both: the largest of all is in one of them only.
        self._some = max(1, rows // 2)
        self._empty = False

    def kinds(self, name: str, place: str, made: Sequence[Tensor]) -> list[_Kind]:
        """Of each tensor of ``made``."""
        unsure = [_Kind(made=place, sure=False)] * len(made)
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
                for follows in (_TENSORS, _TENSORS | _SIZES, frozenset()):
                    try:
                        found = self._compared(place, drawn, follows)
                    except _FAILURES as error:
                        if is_out_of_memory(error):
                            raise
                        continue
                    if len(found) == len(made):
                        return [self._with_inputs(name, place, kind, tensors) for kind in found]
        return unsure

    def _like(self, made: Tensor, tensors: Sequence[Tensor], place: str) -> _Kind:
        kinds = [(tensor.shape, kind) for tensor in tensors if (kind := self._of_argument(tensor)) is not None]
        return next((kind for shape, kind in kinds if shape == made.shape), _Kind(made=place, sure=False))

    def _with_inputs(self, name: str, place: str, kind: _Kind, tensors: Sequence[Tensor]) -> _Kind:
        """What is computed with a number that was taken over rows was taken over them too, but for what has none of
        its values."""
        inputs = [known for tensor in tensors if (known := self._of_argument(tensor)) is not None and known.made]
        if kind.is_free and _fills(name):
            return kind
        if not inputs:
            # Numbers that were drawn may all be clamped to one.
            return _Kind(made=place) if kind.is_free else kind
        return next((known for known in inputs if known.sure), kind if kind.made and kind.sure else inputs[0])

    def _compared(self, place: str, drawn: bool, follows: frozenset[str]) -> list[_Kind]:
        """drawn: numbers are. follows: what has none of the rows' values but their number, and is cut as they are."""
        ends = slice(0, self._some), slice(self._rows - self._some, self._rows)
        parts = slice(0, self._rows), *ends
        runs = [[self._run(part, seed, drawn, follows) for part in parts] for seed in range(_SEEDS)]
        found: list[list[_Kind]] = []
        for mine, other in zip(runs, (*runs[1:], runs[0])):
            each = zip(mine[0], other[0], mine[1], mine[2], strict=True)
            found.append([self._of(whole, beside, first, last, place) for whole, beside, first, last in each])
        # What is seen with some numbers may not be with others: where all of a mask is on, say.
        return [next((kind for kind in kinds if kind.made), kinds[0]) for kinds in zip(*found, strict=True)]

    def _of(self, whole: Tensor, other: Tensor, first: Tensor, last: Tensor, place: str) -> _Kind:
        if whole.shape != other.shape:
            return _Kind(made=place, sure=False)
        if whole.shape == first.shape:
            return _FREE if _same(whole, other) and _same(whole, first) else _Kind(made=place)
        if whole.dim() != first.dim() or whole.dim() != last.dim():
            return _Kind(made=place, sure=False)
        changed = [axis for axis in range(whole.dim()) if whole.shape[axis] != first.shape[axis]]
        if len(changed) != 1:
            return _Kind(made=place)
        axis, length = changed[0], first.shape[changed[0]]
        if length * self._rows != whole.shape[axis] * self._some or last.shape != first.shape:
            return _Kind(made=place, sure=False)
        apart = _same(whole.narrow(axis, 0, length), first)
        apart = apart and _same(whole.narrow(axis, whole.shape[axis] - length, length), last)
        return _Kind(axis) if apart else _Kind(made=place)

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
            if kind is not None and not kind.is_free and drawn:
                mine = _drawn(mine, generator)
            if kind is not None and kind.axis is not None:
                return self._cut(mine, kind.axis, part).clone()
            if kind is None or kind.is_free:
                for axis in range(mine.dim()) if follows >= _TENSORS else ():
                    if mine.shape[axis] in rows_long:
                        mine = self._cut(mine, axis, part)
            return mine.clone()

        def changed(leaf: Any) -> Any:
            if isinstance(leaf, Tensor):
                return argument(leaf)
            if isinstance(leaf, torch.Size):
                return tuple(map(changed, leaf))
            if follows >= _SIZES and type(leaf) is int and leaf > 0 and leaf % self._rows == 0:
                return leaf // self._rows * (part.stop - part.start)
            return leaf

        args, kwargs = pytree.tree_map(changed, (self._args, self._kwargs))
        result = self._func(*args, **kwargs)
        made = list(tensors_in((*args[: int(self._writes)], result)))
        # Memory as it was found says nothing.
        return [torch.zeros_like(tensor) for tensor in made] if self._empty else made

    def _of_argument(self, tensor: Tensor) -> _Kind | None:
        return self._kinds[id(tensor)] if id(tensor) in self._kinds else self._kind_of(tensor)

    def _cut(self, tensor: Tensor, axis: int, part: slice) -> Tensor:
        each, rest = divmod(tensor.shape[axis], self._rows)
        if rest:
            return tensor
        return tensor.narrow(axis, part.start * each, (part.stop - part.start) * each)


def _has_storage(tensor: Tensor) -> bool:
    if is_functorch_wrapped_tensor(tensor) or tensor.layout is not torch.strided:
        return False
    return has_data(tensor)


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


def _name_of(func: Any) -> str:
    name = getattr(func, "__name__", type(func).__name__)
    # Properties are descriptors, whose own name says what is read.
    return str(getattr(getattr(func, "__self__", None), "__name__", name)) if name == "__get__" else str(name)


def _ends_of_slices(values: Iterable[Any]) -> Iterator[Any]:
    """What slices among ``values`` begin and end with."""
    for value in values:
        if isinstance(value, slice):
            yield from (value.start, value.stop, value.step)
        elif isinstance(value, (tuple, list)):
            yield from _ends_of_slices(value)


def _fills(name: str) -> bool:
    """Whether it may take nothing of a tensor but what it is."""
    return name.startswith("new_") or name.endswith(("_like", "_as")) or name in _OF_THEM


def _writes(name: str) -> bool:
    return name in ("__setitem__", "__set__") or (name.endswith("_") and not name.endswith("__")) or (
        name.startswith("__i") and name not in ("__index__", "__int__", "__invert__", "__iter__")
    )
