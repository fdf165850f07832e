"""The content of a user's list, dict, set or deque, read and written as Python keeps it.

A class that is made of one of these may give its methods another meaning: transformers' registry of outputs, a dict,
files what is put under an object by the name of its class. Copied and filled again through such methods it would be
another one. So the methods of the class below it are called here, and never its own.
"""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict, deque
from typing import Any

CONTAINERS = (list, tuple, dict, set, deque)
_STANDARD = frozenset((list, dict, set, deque, OrderedDict, defaultdict))


def plain(container: Any) -> Any:
    """A list, dict, OrderedDict, set or deque of its own with the entries of ``container``; a tuple as it is."""
    if isinstance(container, OrderedDict):
        return OrderedDict(OrderedDict.items(container))
    if isinstance(container, dict):
        return dict(dict.items(container))
    if isinstance(container, list):
        return list.copy(container)
    if isinstance(container, set):
        return set(set.__iter__(container))
    if isinstance(container, deque):
        return deque(deque.__iter__(container), _longest(container))
    return container


def values(container: Any) -> list[Any]:
    """The entries of ``container``, of a dict its values, in order."""
    content = plain(container)
    return list(content.values()) if isinstance(content, dict) else list(content)


def refill(container: Any, content: Any) -> None:
    """``content``, as ``plain`` gave it, in place of what is in ``container``; a tuple stays as it is."""
    if isinstance(container, OrderedDict):
        OrderedDict.clear(container)
        for key, entry in content.items():
            OrderedDict.__setitem__(container, key, entry)
    elif isinstance(container, dict):
        dict.clear(container)
        dict.update(container, content)
    elif isinstance(container, list):
        list.__setitem__(container, slice(None), content)
    elif isinstance(container, set):
        set.clear(container)
        set.update(container, content)
    elif isinstance(container, deque):
        deque.clear(container)
        deque.extend(container, content)


def twin(container: Any) -> Any:
    """Another of the same class with the same entries; of a class of the user's with the same attributes too."""
    kind: Any = type(container)
    if kind in _STANDARD or isinstance(container, tuple):
        return copy.copy(container)
    made = kind.__new__(kind)
    if isinstance(container, deque):
        deque.__init__(made, (), _longest(container))
    if isinstance(container, defaultdict):
        made.default_factory = container.default_factory
    if hasattr(container, "__dict__"):
        vars(made).update(vars(container))
    refill(made, plain(container))
    return made


def _longest(container: deque[Any]) -> int | None:
    longest: int | None = deque.maxlen.__get__(container)
    return longest
