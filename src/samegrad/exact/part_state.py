"""The state of a part of the model as it stood before a run, for the time when that run is made again.

Buffers, and Python attributes of the kinds that can hold state: counters, tensors that are no buffers, containers. What
the first run changes is kept, all else is forgotten. The second run computes with copies of what was kept; whatever it
writes is undone.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from samegrad.exact.attributes import PLAIN, can_hold_state
from samegrad.exact.batchnorm import uses_batch_statistics

# What nn.Module keeps for itself.
_MODULES_OWN = frozenset(vars(nn.Module()))
_CONTAINERS = (list, tuple, dict, set, deque)
# Vocabularies and tables: looking at each entry would cost more than the part.
_LONGEST = 256
_DEEPEST = 3


@dataclasses.dataclass(frozen=True)
class _Slot:
    """A place of ``part`` that holds state, ``holder[key]``: a copy of what stood there, and how that looked."""

    part: nn.Module
    holder: dict[str, Any]
    key: str
    before: Any
    look: Any

    @classmethod
    def of(cls, part: nn.Module, holder: dict[str, Any], key: str) -> _Slot:
        return cls(part, holder, key, _copied(holder[key]), _look(holder[key]))

    def changed(self) -> bool:
        # torch's batch_norm writes into running statistics without counting a version.
        uncounted = self.holder is self.part._buffers and uses_batch_statistics(self.part)
        return uncounted or bool(_look(self.holder.get(self.key)) != self.look)


class PartState:
    """What ``parts``, a module and its submodules, hold now in buffers and attributes."""

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        self._parts = parts
        self._kept = [_Slot.of(inner, holder, key) for inner in self._parts for holder, key in _places(inner)]

    def keep_changed(self) -> None:
        """Forgets all that did not change since."""
        self._kept = [slot for slot in self._kept if slot.changed()]

    @contextlib.contextmanager
    def standing(self) -> Iterator[None]:
        """Copies of what was kept in its place; what stands there now comes back on every way out."""
        holders = [holder for part in self._parts for holder in (part._buffers, vars(part))]
        now = [(holder, dict(holder)) for holder in holders]
        try:
            for slot in self._kept:
                # A copy again, for a graph that is kept and run again once more.
                slot.holder[slot.key] = _copied(slot.before)
            yield
        finally:
            for holder, content in now:
                # Compilers watch these: what nobody wrote into is left alone.
                if not _same_objects(holder, content):
                    holder.clear()
                    holder.update(content)


def _same_objects(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return len(a) == len(b) and all(x is y and k == j for (k, x), (j, y) in zip(a.items(), b.items()))


def _places(part: nn.Module) -> Iterator[tuple[dict[str, Any], str]]:
    for key, buffer in part._buffers.items():
        if buffer is not None:
            yield part._buffers, key
    attributes = vars(part)
    for key, value in attributes.items():
        if key not in _MODULES_OWN and can_hold_state(value):
            yield attributes, key


def _looked_into(value: Any, depth: int) -> bool:
    return isinstance(value, _CONTAINERS) and len(value) <= _LONGEST and depth < _DEEPEST


def _look(value: Any, depth: int = 0) -> Any:
    """What tells a value from the same one changed, without reading a tensor's entries."""
    if isinstance(value, Tensor):
        return id(value), value._version
    if isinstance(value, np.ndarray):
        return value.tobytes()
    if _looked_into(value, depth):
        entries = [*value, *value.values()] if isinstance(value, dict) else value
        return id(value), tuple(_look(entry, depth + 1) for entry in entries)
    return value if isinstance(value, PLAIN) else id(value)


def _copied(value: Any, depth: int = 0) -> Any:
    if isinstance(value, Tensor):
        # What hangs in a graph is made anew in every run, not written into.
        return value if value.requires_grad or isinstance(value, nn.Parameter) else value.detach().clone()
    if isinstance(value, np.ndarray):
        return value.copy()
    if not isinstance(value, (dict, set, list, deque)):
        return value
    same: Any = copy.copy(value)
    if _looked_into(value, depth) and not isinstance(value, set):
        for key, entry in value.items() if isinstance(value, dict) else enumerate(value):
            same[key] = _copied(entry, depth + 1)
    return same
