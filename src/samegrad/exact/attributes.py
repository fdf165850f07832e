"""Python attributes of a module that can hold state, as they were: to compare with and to return to.

Plain values, tensors that are no buffers, numpy's arrays, and containers of those: a queue of fixed length changes
without growing. Objects of other kinds are not looked into; what they do to the outputs shows when rows run twice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from samegrad.exact import containers
from samegrad.exact.containers import CONTAINERS
from samegrad.exact.dataless import has_data
from samegrad.exact.out_of_memory import is_out_of_memory

# What counts or switches something.
PLAIN = (int, float, str, bool, type(None))
_SCALARS = frozenset(PLAIN)
_ARRAYS = (Tensor, np.ndarray)
# Vocabularies and tables: looking at each entry would cost more than a step.
_LONGEST = 4096
_DEEPEST = 3


def can_hold_state(value: Any) -> bool:
    return isinstance(value, (*PLAIN, *_ARRAYS, *CONTAINERS))


def never_changes(value: Any) -> bool:
    """Whether nobody can write into ``value``, only put another in its place: numbers, text, short tuples of them."""
    kind = type(value)
    return kind in _SCALARS or (kind is tuple and len(value) <= _LONGEST and _SCALARS.issuperset(map(type, value)))


def arrays_in(value: Any, depth: int = 0) -> list[Tensor | np.ndarray]:
    """``value`` where it is a tensor or an array, or those in it where it is a short container."""
    if isinstance(value, CONTAINERS) and depth < _DEEPEST and len(value) <= _LONGEST:
        return [array for entry in containers.values(value) for array in arrays_in(entry, depth + 1)]
    return [value] if isinstance(value, _ARRAYS) else []


@dataclasses.dataclass(frozen=True)
class Attribute:
    """One attribute: the object, and a copy of its content where that can change."""

    value: Any
    content: Any

    @classmethod
    def of(cls, value: Any) -> Attribute:
        return cls(value, _content(value))

    def same(self, now: Any) -> bool:
        return _same(now, self.value, self.content)

    def restored(self) -> Any:
        """The object, with the content that it had."""
        _restore(self.value, self.content)
        return self.value


def kept(value: Any) -> Any:
    """What ``stands`` and ``restored`` take for an attribute as it is now.

    Itself where it never changes: a model has thousands of those, every step looks at all of them, and so many small
    objects would have Python's collector go through the whole process every few steps.
    """
    return value if never_changes(value) else Attribute.of(value)


def stands(before: Any, now: Any) -> bool:
    """Whether an attribute is as it was when it was ``kept`` as ``before``."""
    if type(before) is Attribute:
        return before.same(now)
    return now is before or Attribute.of(before).same(now)


def restored(before: Any) -> Any:
    """What was ``kept`` as ``before``, with the content that it had."""
    return before.restored() if type(before) is Attribute else before


@dataclasses.dataclass(frozen=True)
class _Entries:
    """A container's content (``containers.plain``), and the entries in order with copies of their own."""

    plain: Any
    entries: tuple[tuple[Any, Any], ...]


def _content(value: Any, depth: int = 0) -> Any:
    if isinstance(value, Tensor):
        # Weights are compared elsewhere, and too large to be copied.
        return None if isinstance(value, nn.Parameter) else value.detach().clone()
    if isinstance(value, np.ndarray):
        return value.copy()
    if not isinstance(value, CONTAINERS):
        return None
    looked_into = depth < _DEEPEST and len(value) <= _LONGEST
    entries = containers.values(value) if looked_into else []
    return _Entries(containers.plain(value), tuple((entry, _content(entry, depth + 1)) for entry in entries))


def _same(now: Any, value: Any, content: Any) -> bool:
    if now is value and not isinstance(content, (*_ARRAYS, _Entries)):
        return True
    if isinstance(value, nn.Parameter):
        # Which of them stands there is not state: recurrent layers list the weights that they ran with.
        return isinstance(now, nn.Parameter)
    if isinstance(content, Tensor):
        return isinstance(now, Tensor) and same_tensor(now, content)
    if isinstance(content, np.ndarray):
        return isinstance(now, np.ndarray) and _same_array(now, content)
    if isinstance(content, _Entries):
        return isinstance(now, CONTAINERS) and _same_entries(containers.plain(now), value, content)
    if isinstance(now, PLAIN) and isinstance(value, PLAIN):
        return bool(now == value or (now != now and value != value))
    # Of other kinds nothing is known: as little as where they are attributes themselves.
    return not can_hold_state(now) and not can_hold_state(value)


def _same_entries(now: Any, value: Any, content: _Entries) -> bool:
    if len(now) != len(content.plain):
        return False
    if isinstance(value, set):
        return bool(now == content.plain)
    if isinstance(value, dict) and not (isinstance(now, dict) and now.keys() == content.plain.keys()):
        return False
    return not content.entries or all(
        _same(entry, before, copied) for entry, (before, copied) in zip(containers.values(now), content.entries)
    )


def _same_array(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | ((a != a) & (b != b))).all())


def same_tensor(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal, not a number being itself. Without data there is nothing to differ in."""
    if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
        return False
    if not has_data(a) or not has_data(b):
        return True
    return torch.equal(a.detach(), b) or bool(((a == b) | ((a != a) & (b != b))).all())


def put_back(value: Tensor, content: Tensor) -> None:
    """Writes ``content`` where ``value`` differs from it; where no memory is left to compare, without looking."""
    if not _known_same(lambda: same_tensor(value, content)):
        value.detach().copy_(content)


def _known_same(compare: Callable[[], bool]) -> bool:
    try:
        return compare()
    except Exception as error:  # of many types; all but one kind go on
        if not is_out_of_memory(error):
            raise
        return False


def _restore(value: Any, content: Any) -> None:
    if isinstance(content, Tensor):
        put_back(value, content)
    elif isinstance(content, np.ndarray):
        if not _same_array(value, content):
            value[...] = content
    elif isinstance(content, _Entries) and not _known_same(lambda: _same(value, value, content)):
        for entry, copied in content.entries:
            _restore(entry, copied)
        containers.refill(value, content.plain)
