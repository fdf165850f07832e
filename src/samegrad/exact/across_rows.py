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
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from samegrad.exact.calls import function_name, line_from, tensors_in, uncompiled
from samegrad.exact.dataless import has_data
from samegrad.exact.row_trial import FREE, Kind, RowTrial

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


@dataclasses.dataclass(frozen=True)
class Across:
    """``made``: what was taken over rows, by function and line. ``used``: where the result comes to depend on it, in
    the code of ``module``."""

    made: str
    used: str
    module: str


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
        self._written: dict[int, Kind] = {}
        for source, axis in sources:
            self._kinds[source] = Kind(axis)

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
        name = function_name(func)
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
            found = RowTrial(func, args, kwargs, before, self._kind, self._rows).kinds(name, place, made)
            if any(kind.made and not kind.sure for kind in found):
                # Its shape may be read without a call.
                self._reads(place)
            for tensor, kind in zip(made, found):
                self._mark(tensor, kind, writes)
        else:
            for tensor in made:
                self._mark(tensor, FREE, writes)
        return result

    def returns(self, outputs: Iterable[Tensor]) -> None:
        """What the code returns: without a gradient it may not be taken over rows either, nor hang on what was read."""
        if self._strict and self._read:
            self._found(Kind(made=self._read), self._read)
        for tensor in outputs:
            kind = self._kind(tensor)
            if kind is not None and kind.made and not tensor.requires_grad:
                self._found(kind, "what it returns")

    def _kind(self, tensor: Tensor) -> Kind | None:
        kind: Kind | None = self._kinds.get(tensor)
        if self._written and _has_storage(tensor):
            return self._written.get(tensor.untyped_storage().data_ptr(), kind)
        return kind

    def _mark(self, tensor: Tensor, kind: Kind, writes: bool) -> None:
        self._kinds[tensor] = kind
        if writes and kind.made and _has_storage(tensor):
            # Every other view of it holds that as well.
            self._written[tensor.untyped_storage().data_ptr()] = kind

    def _of_gradient(self, tensor: Tensor, place: str, known: Sequence[Kind]) -> Kind:
        """Graphs show how rows meet there; what is detached of it is looked at from here on."""
        if not known:
            return FREE
        if tensor.requires_grad and tensor.dim() and tensor.shape[0] % self._rows == 0:
            return Kind(0)
        return Kind(made=place, sure=tensor.requires_grad)

    def _uses(
        self, name: str, place: str, given: Sequence[Tensor], kinds: Sequence[Kind | None], args: Sequence[Any]
    ) -> None:
        if self._strict and self._read:
            self._found(Kind(made=self._read), self._read)
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
            self._found(Kind(made=place, sure=False), place)

    def _found(self, kind: Kind, used: str) -> None:
        across = Across(kind.made, used, self._running[-1] if self._running else "")
        if kind.sure or self._strict:
            self.taken = self.taken or across
        else:
            self.unknown = self.unknown or across


def _has_storage(tensor: Tensor) -> bool:
    if is_functorch_wrapped_tensor(tensor) or tensor.layout is not torch.strided:
        return False
    return has_data(tensor)


def _ends_of_slices(values: Iterable[Any]) -> Iterator[Any]:
    """What slices among ``values`` begin and end with."""
    for value in values:
        if isinstance(value, slice):
            yield from (value.start, value.stop, value.step)
        elif isinstance(value, (tuple, list)):
            yield from _ends_of_slices(value)


def _writes(name: str) -> bool:
    return name in ("__setitem__", "__set__") or (name.endswith("_") and not name.endswith("__")) or (
        name.startswith("__i") and name not in ("__index__", "__int__", "__invert__", "__iter__")
    )
