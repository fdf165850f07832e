"""The state of a part of the model as it stood before a run, for the time when that run is made again.

Buffers, and Python attributes of the kinds that can hold state: counters, tensors that are no buffers, containers. What
the first run changes is kept, all else is forgotten. The second run computes with copies of what was kept; whatever it
writes is undone.
"""

from __future__ import annotations

import contextlib
import operator
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
from torch import Tensor, nn

from samegrad.exact import containers
from samegrad.exact.attributes import PLAIN, can_hold_state, never_changes
from samegrad.exact.batchnorm import uses_batch_statistics
from samegrad.exact.containers import CONTAINERS

# What nn.Module keeps for itself.
_MODULES_OWN = frozenset(vars(nn.Module()))
# Vocabularies and tables: looking at each entry would cost more than the part.
_LONGEST = 256
_DEEPEST = 3


class PartPlaces:
    """Where a part of the model and its submodules hold state, looked up once for many runs."""

    def __init__(self, part: nn.Module) -> None:
        self.holders: list[dict[str, Any]] = []
        # The module, the dict that holds the value, its key.
        self.places: list[tuple[nn.Module, dict[str, Any], str]] = []
        for inner in part.modules():
            buffers, attributes = inner._buffers, vars(inner)
            self.holders += [buffers, attributes]
            self.places += [(inner, buffers, key) for key, buffer in buffers.items() if buffer is not None]
            self.places += [
                (inner, attributes, key)
                for key, value in attributes.items()
                if key not in _MODULES_OWN and can_hold_state(value)
            ]


class PartState:
    """What stands in ``places`` now."""

    def __init__(self, places: PartPlaces) -> None:
        self._places = places
        values = [holder.get(key) for _, holder, key in places.places]
        # A module has many numbers that never change: those are told by identity alone.
        self._before = [(value, None) if never_changes(value) else (_copied(value), _look(value)) for value in values]
        self._kept: list[tuple[dict[str, Any], str, Any]] = []

    def keep_changed(self) -> None:
        """Keeps what changed since, and forgets all else."""
        self._kept = [
            (holder, key, before)
            for (part, holder, key), (before, look) in zip(self._places.places, self._before)
            if _changed(part, holder, key, before, look)
        ]
        self._before = []

    @contextlib.contextmanager
    def standing(self) -> Iterator[None]:
        """Copies of what was kept in its place; what stands there now comes back on every way out."""
        now = [(holder, dict(holder)) for holder in self._places.holders]
        try:
            for holder, key, before in self._kept:
                # A copy again, for a graph that is kept and run again once more.
                holder[key] = _copied(before)
            yield
        finally:
            for holder, content in now:
                # Compilers watch these: what nobody wrote into is left alone.
                if not _same_objects(holder, content):
                    holder.clear()
                    holder.update(content)


def _changed(part: nn.Module, holder: dict[str, Any], key: str, before: Any, look: Any) -> bool:
    value = holder.get(key)
    if look is None:
        return value is not before
    # torch's batch_norm writes into running statistics without counting a version.
    return (holder is part._buffers and uses_batch_statistics(part)) or bool(_look(value) != look)


def _same_objects(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return list(a) == list(b) and all(map(operator.is_, a.values(), b.values()))


def _looked_into(value: Any, depth: int) -> bool:
    return isinstance(value, CONTAINERS) and len(value) <= _LONGEST and depth < _DEEPEST


def _look(value: Any, depth: int = 0) -> Any:
    """What tells a value from the same one changed, without reading a tensor's entries."""
    if isinstance(value, Tensor):
        return id(value), value._version
    if isinstance(value, np.ndarray):
        return value.tobytes()
    if _looked_into(value, depth):
        content = containers.plain(value)
        entries = [*content, *content.values()] if isinstance(content, dict) else content
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
    same = containers.twin(value)
    if _looked_into(value, depth) and not isinstance(value, set):
        content = containers.plain(value)
        for key, entry in content.items() if isinstance(content, dict) else enumerate(list(content)):
            content[key] = _copied(entry, depth + 1)
        containers.refill(same, content)
    return same
