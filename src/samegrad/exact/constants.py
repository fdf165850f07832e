"""What a captured chunk takes for constant: every plain value and every address that its Python code could read.

A replayed graph does not read Python again. A rate that a schedule changes, a layer switched or replaced, a class
weight that is another tensor now: each would go unseen, and the gradient would be that of the step before. So what the
user's code can see is read in every step and compared; where it differs, the chunk is captured again.

Looked at: the modules' attributes and hooks, parameters and buffers by their memory, and what the loss, the forward and
the modules' own code hold in closures, globals and objects (``held.py``). Tensors count by address and not by value:
kernels read those themselves.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from samegrad.declared import DeclaredStep
from samegrad.exact.attributes import PLAIN, can_hold_state
from samegrad.exact.held import held_in, of_a_library

_STRIDED = torch.strided
_DEEPEST = 3
_LONGEST = 256
# Of nn.Module itself; what else begins with an underscore belongs to the layer.
_OF_MODULES = frozenset(vars(nn.Module()))
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclasses.dataclass(frozen=True)
class Constants:
    """The places, as they were found. ``now()`` reads them again."""

    modules: tuple[nn.Module, ...]
    places: tuple[Callable[[], Any], ...]
    values: tuple[Hashable, ...]

    @classmethod
    def of(cls, declared: DeclaredStep) -> Constants:
        parts = {id(part): part for module in declared.modules for part in module.modules()}
        functions = {f"{type(part).__name__}.forward": type(part).forward for part in parts.values()}
        held = held_in(
            {"loss_fn": declared.loss_fn, "forward": declared.forward, **functions}, declared.modules, largest_bytes=-1
        )
        modules = (*parts.values(), *(part for module in held.modules for part in module.modules()))
        places = tuple(place.read for place in held.places)
        return cls(modules, places, _values(modules, places))

    def hold(self) -> bool:
        """Whether all of it is as it was."""
        return self.values == _values(self.modules, self.places)


def _values(modules: tuple[nn.Module, ...], places: tuple[Callable[[], Any], ...]) -> tuple[Hashable, ...]:
    found: list[Hashable] = []
    for part in modules:
        attributes = vars(part)
        found.append(part.training)
        found += [tuple(map(id, attributes[name].values())) for name in _HOOKS]
        found += [(key, id(child)) for key, child in attributes["_modules"].items()]
        found += [_seen(tensor) for tensor in attributes["_parameters"].values()]
        found += [_seen(tensor) for tensor in attributes["_buffers"].values()]
        found += [_seen(value) for key, value in attributes.items() if key not in _OF_MODULES]
    for read in places:
        try:
            found.append(_seen(read()))
        except (KeyError, ValueError):  # deleted
            found.append(None)
    return tuple(found)


def _seen(value: Any, depth: int = 0) -> Hashable:
    """``value`` as far as code that is not run again could depend on it."""
    if isinstance(value, PLAIN):
        # 1, 1.0 and True are equal and not the same constant; not a number is not even equal to itself.
        return type(value), repr(value) if isinstance(value, float) else value
    if isinstance(value, Tensor):
        if value.layout is not _STRIDED:
            return id(value), value.shape
        return value.data_ptr(), value.shape, value.stride(), value.dtype, value.requires_grad
    if isinstance(value, np.ndarray):
        return value.shape, value.tobytes() if value.nbytes <= _LONGEST * 8 else id(value)
    if depth < _DEEPEST and isinstance(value, (list, tuple, set)) and len(value) <= _LONGEST:
        return type(value), tuple(_seen(entry, depth + 1) for entry in value)
    if depth < _DEEPEST and isinstance(value, dict) and len(value) <= _LONGEST:
        return tuple((repr(key), _seen(entry, depth + 1)) for key, entry in value.items())
    if depth < 1 and isinstance(getattr(value, "__dict__", None), dict) and not of_a_library(type(value)):
        return id(value), tuple((key, _seen(entry, depth + 1)) for key, entry in vars(value).items()
                                if can_hold_state(entry))  # fmt: skip
    return id(value)
