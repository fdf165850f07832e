"""What a captured chunk takes for constant: every plain value and every address that its Python code could read.

A replayed graph does not read Python again. A rate that a schedule changes, a layer switched or replaced, a class
weight that is another tensor now: each would go unseen, and the gradient would be that of the step before. So what the
user's code can see is read in every step and compared; where it differs, the chunk is captured again.

Looked at: the modules' attributes and hooks, parameters and buffers by their memory, what the loss, the forward and
the modules' own code hold in closures, globals and objects (``held.py``), and the settings of torch that decide how
kernels compute (autocast, precision, determinism). Tensors count by address and not by value: kernels read those
themselves. What can only be compared by identity is kept alive, since the next object may get the number of one that is
gone.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from samegrad.declared import DeclaredStep
from samegrad.exact.attributes import PLAIN, can_hold_state
from samegrad.exact.held import held_in, of_a_library
from samegrad.exact.tf32 import Tf32Products
from samegrad.module_walk import parts_of

_DEEPEST = 3
_LONGEST = 256
# Of nn.Module itself; what else begins with an underscore belongs to the layer.
_OF_MODULES = frozenset(vars(nn.Module()))
# By their objects: hooks are called as they are, and a submodule has constants of its own.
_HOOKS = frozenset({"_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_modules"})
_HOLDERS = frozenset({"_parameters", "_buffers"})


@dataclasses.dataclass(frozen=True)
class Constants:
    """The places, as they were found. ``hold()`` looks at them again.

    Asked before every step, while the device waits: whether each attribute is the object that it was comes first, and
    only what that does not tell (tensors, containers, other objects) is read.
    """

    device_type: str
    ambient: Hashable
    modules: tuple[_ModuleConstants, ...]
    places: tuple[Callable[[], Any], ...]
    values: tuple[Hashable, ...]

    @classmethod
    def of(cls, declared: DeclaredStep) -> Constants:
        parts = {id(part): part for part in parts_of(declared.modules)}
        functions = {f"{type(part).__name__}.forward": type(part).forward for part in parts.values()}
        held = held_in(
            {"loss_fn": declared.loss_fn, "forward": declared.forward, **functions}, declared.modules, largest_bytes=-1
        )
        modules = tuple(map(_ModuleConstants.of, [*parts.values(), *parts_of(held.modules)]))
        places = tuple(place.read for place in held.places)
        device_type = declared.device.type
        return cls(device_type, _ambient(device_type), modules, places, _read(places))

    def hold(self) -> bool:
        """Whether all of it is as it was."""
        return (
            self.ambient == _ambient(self.device_type)
            and all(module.hold() for module in self.modules)
            and self.values == _read(self.places)
        )


@dataclasses.dataclass(frozen=True)
class _ModuleConstants:
    """One module: the objects of its attributes, which are kept alive, and what of them can change inside.

    ``read``: gives the attributes that count, of how many. ``inside``: those that stay the same objects when what they
    hold becomes another. ``empty``: of torch's own that hold nothing, which are most.
    """

    module: nn.Module
    count: int
    names: tuple[str, ...]
    read: Callable[[dict[str, Any]], tuple[Any, ...]]
    objects: tuple[Any, ...]
    inside: tuple[tuple[str, Hashable], ...]
    empty: tuple[str, ...]

    @classmethod
    def of(cls, module: nn.Module) -> _ModuleConstants:
        attributes = vars(module)
        empty = tuple(name for name in (*_HOOKS, *_HOLDERS) if not attributes[name])
        changing = [name for name, value in attributes.items() if name not in empty and _can_change(name, value)]
        inside = tuple((name, _inside(name, attributes[name])) for name in changing)
        names = (*(name for name in attributes if name not in _OF_MODULES), "training", *_HOOKS, *_HOLDERS)
        read = operator.itemgetter(*names)
        return cls(module, len(attributes), names, read, read(attributes), inside, empty)

    def hold(self) -> bool:
        # Asked for anew: a module may be given another dictionary (__setstate__).
        attributes = vars(self.module)
        try:
            objects = self.read(attributes)
        except KeyError:  # deleted
            return False
        if len(attributes) != self.count:
            return False
        if not all(map(operator.is_, objects, self.objects)):
            # What is computed anew may be equal.
            pairs = zip(self.names, objects, self.objects)
            if any(now is not before and not _same_attribute(name, now, before) for name, now, before in pairs):
                return False
        if any(map(attributes.__getitem__, self.empty)):
            return False
        return all(_inside(name, attributes[name]) == before for name, before in self.inside)


class _Same:
    """One object, and no other: equal by identity, and alive as long as it is compared with."""

    __slots__ = ("_value",)

    def __init__(self, value: Any) -> None:
        self._value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other._value is self._value

    def __hash__(self) -> int:
        return id(self._value)


def _ambient(device_type: str) -> Hashable:
    """The settings around a step that its kernels depend on."""
    # torch has no types for some of these.
    cuda: Any = torch.backends.cuda
    return (
        torch.is_autocast_enabled(device_type),
        torch.get_autocast_dtype(device_type),
        torch.is_autocast_cache_enabled(),
        torch.get_default_dtype(),
        Tf32Products.now(),
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cudnn.enabled,
        torch.backends.cudnn.benchmark,
        torch.backends.cudnn.deterministic,
        cuda.matmul.allow_fp16_reduced_precision_reduction,
        cuda.matmul.allow_bf16_reduced_precision_reduction,
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.math_sdp_enabled(),
        cuda.cudnn_sdp_enabled(),
    )


def _read(places: Sequence[Callable[[], Any]]) -> tuple[Hashable, ...]:
    found: list[Hashable] = []
    for read in places:
        try:
            found.append(_seen(read()))
        except (KeyError, ValueError):  # deleted
            found.append(None)
    return tuple(found)


def _can_change(name: str, value: Any) -> bool:
    """Whether an attribute may hold something else while it stays the same object."""
    if name in _HOOKS or name in _HOLDERS:
        return True
    return name not in _OF_MODULES and not isinstance(value, PLAIN)


def _inside(name: str, value: Any) -> Hashable:
    """What an attribute that can change holds now."""
    if name in _HOLDERS:
        return tuple([(key, _seen(tensor)) for key, tensor in value.items()])
    if name in _HOOKS:
        return tuple([(key, _Same(entry)) for key, entry in value.items()])
    return _seen(value)


def _same_attribute(name: str, now: Any, before: Any) -> bool:
    """Whether another object in the place of an attribute says the same; what it holds is looked at by itself."""
    if name in _HOOKS or name in _HOLDERS or not isinstance(before, PLAIN):
        return type(now) is type(before)
    return _seen(now) == _seen(before)


def _seen(value: Any, depth: int = 0) -> Hashable:
    """``value`` as far as code that is not run again could depend on it."""
    if isinstance(value, PLAIN):
        # 1, 1.0 and True are equal and not the same constant; not a number is not even equal to itself.
        return type(value), repr(value) if isinstance(value, float) else value
    if isinstance(value, Tensor):
        if value.layout is not torch.strided:
            return _Same(value), value.shape
        return value.data_ptr(), value.shape, value.stride(), value.dtype, value.requires_grad
    if isinstance(value, np.ndarray):
        return value.shape, value.tobytes() if value.nbytes <= _LONGEST * 8 else _Same(value)
    if depth < _DEEPEST and isinstance(value, (list, tuple, set)) and len(value) <= _LONGEST:
        return type(value), tuple(_seen(entry, depth + 1) for entry in value)
    if depth < _DEEPEST and isinstance(value, dict) and len(value) <= _LONGEST:
        return tuple((repr(key), _seen(entry, depth + 1)) for key, entry in value.items())
    if depth < 1 and isinstance(getattr(value, "__dict__", None), dict) and not of_a_library(type(value)):
        entries = ((key, _seen(entry, depth + 1)) for key, entry in vars(value).items() if can_hold_state(entry))
        return _Same(value), tuple(entries)
    return _Same(value)
