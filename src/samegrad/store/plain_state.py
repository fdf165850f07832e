"""Plain Python values to strict JSON and back equal: tuples stay tuples, int keys ints, infinities infinities.

What JSON lacks is written as an object with one marked key: ``{"$tuple": […]}``, ``{"$float": "inf"}``,
``{"$pairs": [[key, value], …]}``, ``{"$counter": …}``, ``{"$bytes": "hex"}``, ``{"$tensor": "name"}``. Nothing is
pickled, and nothing read back can run code.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from samegrad.errors import BadInput, UsageError

_MARKS = ("$tuple", "$float", "$pairs", "$counter", "$bytes", "$tensor")


def to_plain(value: Any, *, place: str, tensors: dict[str, Tensor] | None = None) -> Any:
    """``value`` as strict JSON data. Tensors in it are put into ``tensors`` under their place and referred to.

    One tensor met twice is stored once. An OrderedDict comes back as a dict. Raises UsageError naming the place
    of a value that has no such form, a tensor included when ``tensors`` is None.
    """
    names = {id(tensor): name for name, tensor in (tensors or {}).items()}
    return _write(value, place, tensors, names)


def _write(value: Any, place: str, tensors: dict[str, Tensor] | None, names: dict[int, str]) -> Any:
    def inner(part: Any, key: object) -> Any:
        return _write(part, f"{place}.{key}" if place else str(key), tensors, names)

    if value is None or type(value) in (bool, int, str):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"$float": str(float(value))}
    if type(value) is list:
        return [inner(part, i) for i, part in enumerate(value)]
    if type(value) is tuple:
        return {"$tuple": [inner(part, i) for i, part in enumerate(value)]}
    if type(value) in (dict, OrderedDict, Counter):
        return _write_mapping(value, inner)
    if type(value) is bytes:
        return {"$bytes": value.hex()}
    if isinstance(value, Tensor) and tensors is not None:
        if id(value) not in names:
            # Keys with dots in them can make two places read alike.
            names[id(value)] = place if place not in tensors else f"{place}#{len(tensors)}"
            tensors[names[id(value)]] = value
        return {"$tensor": names[id(value)]}
    raise UsageError(
        asked=f"save the state at {place or 'its root'}",
        found=f"a {type(value).__module__}.{type(value).__qualname__}, which has no exact form in JSON",
        do="put tensors into tensors=, and turn the rest into numbers, strings, lists, tuples or dicts",
    )


def _write_mapping(value: Mapping[Any, Any], inner: Callable[[Any, object], Any]) -> Any:
    if type(value) is Counter:
        return {"$counter": [[inner(k, "key"), inner(v, k)] for k, v in value.items()]}
    # A dict that looks like one of the marks is written as pairs, so that it comes back as itself.
    if all(type(key) is str for key in value) and not (len(value) == 1 and next(iter(value)) in _MARKS):
        return {key: inner(part, key) for key, part in value.items()}
    return {"$pairs": [[inner(key, "key"), inner(part, key)] for key, part in value.items()]}


def from_plain(value: Any, *, place: str, tensors: Mapping[str, Tensor] | None = None) -> Any:
    """The value that ``to_plain`` was given; one tensor object per name of ``tensors``. Raises BadInput."""
    try:
        return _read(value, tensors or {})
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise BadInput(
            asked=f"read the state {place}",
            found=f"not what samegrad writes ({type(error).__name__}: {error})",
            do="give the state that samegrad saved, unchanged",
        ) from None


def _read(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_read(part, tensors) for part in value]
    if not isinstance(value, dict):
        return value
    mark: str
    content: Any
    mark, content = next(iter(value.items())) if len(value) == 1 else ("", None)
    if mark == "$tuple":
        return tuple(_read(part, tensors) for part in content)
    if mark == "$float":
        return float(content)
    if mark in ("$pairs", "$counter"):
        pairs = {_read(key, tensors): _read(part, tensors) for key, part in content}
        return pairs if mark == "$pairs" else Counter(pairs)
    if mark == "$bytes":
        return bytes.fromhex(content)
    if mark == "$tensor":
        return tensors[content]
    return {key: _read(part, tensors) for key, part in value.items()}
