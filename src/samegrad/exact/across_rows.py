"""Numbers taken over several rows that no gradient flows through: a mask's mean, the largest weight or length.

They show in no graph, and rows that are alike hide them from every comparison of values: where all of a mask is true,
its mean is one for any of the rows. So torch's functions are followed as the code calls them, on two numbers of rows.
What follows the rows in its shape may still treat them alone; what is made of rows and has as many entries for eight of
them as for five was taken over them, and so was all that is computed with it. It may be looked at, but neither the
result nor its gradient may depend on it.

A function is seen where the user's code calls it, not what torch does inside. Those that return as many rows as they
take (a sum that runs along them) show in values, unless the rows are alike.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from samegrad.exact.calls import line_from, tensors_in

# What hands values to Python.
_READS = frozenset(
    "item __float__ __int__ __bool__ __index__ __complex__ __array__ tolist numpy is_nonzero equal allclose".split()
)
# Of which only the length or the place is taken from a tensor.
_FILLS = frozenset("arange zeros ones full empty linspace eye".split())
# Which rows are taken, and not what is computed with them.
_TAKES = frozenset("__getitem__ index_select gather embedding take take_along_dim masked_select nonzero where".split())


@dataclasses.dataclass(frozen=True)
class Across:
    """``made``: what was taken over rows, by function and line. ``used``: where the result comes to depend on it, in
    the code of ``module``."""

    made: str
    used: str
    module: str


@dataclasses.dataclass(frozen=True)
class _Event:
    """One call with numbers that were made of rows. Tensors are numbered in the order in which they were met.

    ``module``: the innermost that ran. ``inputs``: number, whether a gradient flows through it, and whether it is the
    first argument. ``made``: number, shape, and whether a gradient flows through it. ``reads``: it hands values to
    Python.
    """

    function: str
    line: str
    module: str
    inputs: tuple[tuple[int, bool, bool], ...]
    made: tuple[tuple[int, tuple[int, ...], bool], ...]
    reads: bool

    @property
    def place(self) -> str:
        return f"{self.function} ({self.line})" if self.line else self.function


class Followed(TorchFunctionMode):
    """Follows what the code in the block makes of ``sources``, tensors of rows. ``running``: the modules that run."""

    def __init__(self, sources: Iterable[Tensor], running: Sequence[str] = ()) -> None:
        super().__init__()
        self.events: list[_Event] = []
        self.returned: list[int] = []
        self._running = running
        # By object, and none is kept alive.
        self._numbers: Any = WeakIdKeyDictionary()
        self._count = 0
        for source in sources:
            self._number(source)

    def returns(self, outputs: Iterable[Tensor]) -> None:
        """What the code returns: without a gradient it may not be taken over rows either."""
        self.returned = [self._numbers[t] for t in outputs if t in self._numbers and not t.requires_grad]

    def _number(self, tensor: Tensor) -> int:
        found: int | None = self._numbers.get(tensor)
        if found is None:
            found = self._numbers[tensor] = self._count
            self._count += 1
        return found

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = (*args, *(kwargs or {}).values())
        inputs = [
            (self._numbers[tensor], tensor.requires_grad, bool(args) and tensor is args[0])
            for tensor in tensors_in(given)
            if tensor in self._numbers
        ]
        result = func(*args, **(kwargs or {}))
        if inputs:
            self._note(_name_of(func), inputs, given, result)
        return result

    def _note(self, name: str, inputs: list[tuple[int, bool, bool]], given: tuple[Any, ...], result: Any) -> None:
        written = given[:1] if _writes(name) else ()
        made = [(self._number(t), tuple(t.shape), t.requires_grad) for t in tensors_in((*written, result))]
        if made or name in _READS:
            # The frame of this method, that of the one above, and then whoever called.
            line = line_from(sys._getframe(2))
            module = self._running[-1] if self._running else ""
            self.events.append(_Event(name, line, module, tuple(inputs), tuple(made), name in _READS))


def _name_of(func: Any) -> str:
    name = getattr(func, "__name__", type(func).__name__)
    # Properties are descriptors, whose own name says what is read.
    return str(getattr(getattr(func, "__self__", None), "__name__", name)) if name == "__get__" else str(name)


def _writes(name: str) -> bool:
    return name in ("__setitem__", "__set__") or (name.endswith("_") and not name.endswith("__")) or (
        name.startswith("__i") and name not in ("__index__", "__int__", "__invert__", "__iter__")
    )


def across(followed: Followed, on_few: Followed, *, strict: bool) -> Across | None:
    """The first number taken over rows on which a result with a gradient depends, in runs on many and on few rows.

    strict: a value that Python reads, and what is taken by such a number, counts as well; and runs that call different
    functions, which nobody can compare.
    """
    many, few = followed.events, on_few.events
    taken: dict[int, str] = {}
    # Tensors that take nothing from rows but a device, a dtype and lengths of other axes.
    filled: set[int] = set()
    for a, b in zip(many, few):
        if a.function != b.function or len(a.made) != len(b.made):
            return Across("other code", a.place, a.module) if strict else None
        takes = not strict and a.function in _TAKES
        over = [(number, flows) for number, flows, first in a.inputs if number in taken and (first or not takes)]
        hidden = [number for number, flows in over if not flows]
        if strict and a.reads:
            return Across(taken[hidden[0]] if hidden else a.place, a.place, a.module)
        if hidden and any(flows for _, _, flows in a.made):
            return Across(taken[hidden[0]], a.place, a.module)
        fills = a.function in _FILLS or a.function.startswith("new_") or a.function.endswith("_like")
        fills = fills or all(number in filled for number, _, _ in a.inputs)
        for (number, shape, _), (_, other, _) in zip(a.made, b.made):
            filled.discard(number)
            if fills and shape == other:
                filled.add(number)
            elif over and not fills:
                taken[number] = taken[over[0][0]]
            elif shape == other:
                taken[number] = a.place
    if strict and len(many) != len(few):
        further = max(many, few, key=len)[min(len(many), len(few))]
        return Across("other code", further.place, further.module)
    return next((Across(taken[number], "what it returns", "") for number in followed.returned if number in taken), None)
