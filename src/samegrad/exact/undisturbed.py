"""Looking without touching: whatever runs inside leaves generators, buffers and modules as they were."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from samegrad.declared import DeclaredStep
from samegrad.errors import CannotSplit
from samegrad.exact.attributes import PLAIN, can_hold_state, kept, put_back, restored, same_tensor, stands
from samegrad.exact.dataless import computing, has_data
from samegrad.exact.held import Held, held_by
from samegrad.exact.module_hooks import ModuleHooks

_NOTHING = Held()


class NotToBeTried(CannotSplit):
    """A forward on a few rows would not leave things as they are: it sets weights, or other ranks wait in it."""


class FailsOnFewRows(NotToBeTried):
    """The forward raises on a few rows of the batch; it may still run on all of them."""


class Generators:
    """The states of the generators a model can draw from: torch's on the CPU and the device, numpy's, Python's."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.states = self.read()

    def read(self) -> dict[str, Any]:
        states: dict[str, Any] = {"python": random.getstate()}
        # A trace draws nothing from torch's, and could not compare what it reads.
        if computing():
            states["torch"] = torch.get_rng_state()
            if self.device.type == "cuda":
                states["cuda"] = torch.cuda.get_rng_state(self.device)
        if "numpy" in sys.modules:
            states["numpy"] = sys.modules["numpy"].random.get_state(legacy=True)
        return states

    def advanced(self) -> list[str]:
        """The generators that drew since this snapshot."""
        now = self.read()
        return [name for name, state in self.states.items() if not _same_state(state, now[name])]

    def restore(self) -> None:
        if "torch" in self.states:
            torch.set_rng_state(self.states["torch"])
        random.setstate(self.states["python"])
        if "cuda" in self.states:
            torch.cuda.set_rng_state(self.states["cuda"], self.device)
        if "numpy" in self.states:
            sys.modules["numpy"].random.set_state(self.states["numpy"])

    @contextlib.contextmanager
    def restored_on_failure(self) -> Iterator[None]:
        """A block after which the generators are those of this snapshot, should it raise."""
        try:
            yield
        except BaseException:
            self.restore()
            raise


def _same_state(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, tuple) and any(hasattr(part, "dtype") for part in a):
        return len(a) == len(b) and all(_same_state(x, y) for x, y in zip(a, b))
    # Python's own state is a long tuple of numbers, compared in one go; numpy's has an array in it.
    same = a == b
    return bool(same.all()) if hasattr(same, "all") else bool(same)


class ModuleState:
    """Buffers and Python attributes of modules, to compare with and to return to; their hooks to return to.

    Attributes are those of the kinds that ``attributes.py`` lists. ``held``: what functions hold beside them.
    """

    @classmethod
    def of(cls, declared: DeclaredStep) -> ModuleState:
        """Of everything that running the step may change, gradients and generators aside."""
        return cls(declared.modules, held_by(declared))

    def __init__(self, modules: Sequence[nn.Module], held: Held = _NOTHING) -> None:
        self._held = held
        self._others = ModuleState(held.modules) if held.modules else None
        self._parts = [(name, part) for module in modules for name, part in module.named_modules()]
        buffers = [
            (part, name, key, buffer)
            for name, part in self._parts
            for key, buffer in part._buffers.items()
            if buffer is not None
        ]
        copies = _copies_of([buffer for _, _, _, buffer in buffers])
        self._buffers = [(*place, copy) for place, copy in zip(buffers, copies)]
        self._attributes = [(part, name, _attributes(part)) for name, part in self._parts]
        self._hooks = ModuleHooks(part for _, part in self._parts)
        self._versions = self._read_versions()

    def changed(self) -> list[str]:
        """What changed since this snapshot, as ``module.buffer`` or ``module.attribute``."""
        return [f"{path}.{key}" if path else key for path, key in self.changed_places()] + self.held_changed()

    def held_changed(self) -> list[str]:
        """What changed of that which functions hold."""
        return self._held.changed() + ([] if self._others is None else self._others.changed())

    def changed_places(self) -> list[tuple[str, str]]:
        """The same as (module path, name of the buffer or attribute)."""
        found = []
        for part, name, key, _, before in self._buffers:
            now = part._buffers.get(key)
            if now is None or not same_tensor(now, before):
                found.append((name, key))
        for part, name, attributes in self._attributes:
            mine = vars(part)
            keys = [key for key, before in attributes.items() if key not in mine or not stands(before, mine[key])]
            keys += _new_keys(mine, attributes)
            found += [(name, key) for key in keys]
        return found

    def written_places(self) -> list[tuple[str, str]]:
        """What changed, and buffers that were written in place since this snapshot or the last ``restore``.

        A power iteration that has converged writes what stands there already; when the weights move it will not.
        """
        written = [
            (name, key)
            for (_, name, key, _, _), before, now in zip(self._buffers, self._versions, self._read_versions())
            if now != before
        ]
        return list(dict.fromkeys([*self.changed_places(), *written]))

    def _read_versions(self) -> list[int]:
        return [buffer._version for _, _, _, buffer, _ in self._buffers]

    def switched(self) -> bool:
        """Whether a plain value (a counter, a switch) changed since this snapshot."""
        return any(
            isinstance(vars(part).get(key), PLAIN) and not stands(before, vars(part).get(key))
            for part, _, attributes in self._attributes
            for key, before in attributes.items()
        )

    @torch.no_grad()
    def restore(self) -> None:
        for part, _, key, buffer, before in self._buffers:
            part._buffers[key] = buffer
            put_back(buffer, before)
        for part, _, attributes in self._attributes:
            mine = vars(part)
            for key in _new_keys(mine, attributes):
                del mine[key]
            for key, before in attributes.items():
                mine[key] = restored(before)
        self._hooks.restore()
        self._versions = self._read_versions()
        self._held.restore()
        if self._others is not None:
            self._others.restore()


@torch.no_grad()
def _copies_of(tensors: Sequence[Tensor]) -> list[Tensor]:
    """A copy of each; plain ones in a few kernels together, since a step has hundreds of small buffers."""
    plain = [t for t in tensors if type(t) is Tensor and t.layout is torch.strided and has_data(t)]
    if len(plain) < len(tensors):
        return [tensor.detach().clone() for tensor in tensors]
    copies = [torch.empty_like(tensor) for tensor in plain]
    if copies:
        torch._foreach_copy_(copies, plain)
    return copies


# What nn.Module keeps for itself.
_MODULES_OWN = frozenset(vars(nn.Module()))


def _new_keys(mine: dict[str, Any], attributes: dict[str, Any]) -> list[str]:
    return [key for key in mine if key not in attributes and key not in _MODULES_OWN and can_hold_state(mine[key])]


def _attributes(part: nn.Module) -> dict[str, Any]:
    return {
        key: kept(value)
        for key, value in vars(part).items()
        if key not in _MODULES_OWN and can_hold_state(value)
    }


@contextlib.contextmanager
def undisturbed(
    modules: Sequence[nn.Module], device: torch.device, held: Held = _NOTHING
) -> Iterator[tuple[Generators, ModuleState]]:
    """Snapshots that are restored on every way out."""
    generators, state = Generators(device), ModuleState(modules, held)
    try:
        yield generators, state
    finally:
        state.restore()
        generators.restore()


class Before:
    """Generators and module state as they are now, for blocks after which they are so again, should they raise."""

    def __init__(self, device: torch.device, state: ModuleState) -> None:
        self._generators, self._state = Generators(device), state

    @contextlib.contextmanager
    def restored_on_failure(self) -> Iterator[None]:
        with self._generators.restored_on_failure():
            try:
                yield
            except BaseException:
                self._state.restore()
                raise

    @contextlib.contextmanager
    def around(self, block: Callable[[], contextlib.AbstractContextManager[None]]) -> Iterator[None]:
        """``block()``, inside one of these."""
        with self.restored_on_failure(), block():
            yield


def undone_on_failure(declared: DeclaredStep) -> contextlib.AbstractContextManager[None]:
    """A block after which generators, buffers, attributes and what functions hold are as before, should it raise."""
    return Before(declared.device, ModuleState.of(declared)).restored_on_failure()


def step_undisturbed(declared: DeclaredStep) -> contextlib.AbstractContextManager[tuple[Generators, ModuleState]]:
    """``undisturbed`` for everything that running the step may change."""
    return undisturbed(declared.modules, declared.device, held_by(declared))
