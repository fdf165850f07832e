"""Looking without touching: whatever runs inside leaves generators, buffers and modules as they were."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

# Python attributes of modules that count or switch something are plain values of these kinds.
_PLAIN = (int, float, str, bool, type(None))


class Generators:
    """The states of the generators a model can draw from: torch's on the CPU and the device, numpy's, Python's."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.states = self.read()

    def read(self) -> dict[str, Any]:
        states: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
        if self._device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self._device)
        if "numpy" in sys.modules:
            states["numpy"] = sys.modules["numpy"].random.get_state(legacy=True)
        return states

    def advanced(self) -> list[str]:
        """The generators that drew since this snapshot."""
        now = self.read()
        return [name for name, state in self.states.items() if not _same_state(state, now[name])]

    def restore(self) -> None:
        torch.set_rng_state(self.states["torch"])
        random.setstate(self.states["python"])
        if "cuda" in self.states:
            torch.cuda.set_rng_state(self.states["cuda"], self._device)
        if "numpy" in self.states:
            sys.modules["numpy"].random.set_state(self.states["numpy"])


def _same_state(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, tuple):
        return len(a) == len(b) and all(_same_state(x, y) for x, y in zip(a, b))
    return bool((a == b) if isinstance(a, _PLAIN) else (a == b).all())


class ModuleState:
    """Buffers and plain Python attributes of modules, to compare with and to return to."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._parts = [(name, part) for module in modules for name, part in module.named_modules()]
        self._buffers = [
            (part, name, key, buffer, buffer.detach().clone())
            for name, part in self._parts
            for key, buffer in part._buffers.items()
            if buffer is not None
        ]
        self._attributes = [(part, name, _plain_attributes(part)) for name, part in self._parts]

    def changed(self) -> list[str]:
        """What changed since this snapshot, as ``module.buffer`` or ``module.attribute``."""
        found = []
        for part, name, key, buffer, before in self._buffers:
            now = part._buffers.get(key)
            if now is not buffer or not torch.equal(now.detach(), before):
                found.append(f"{name}.{key}" if name else key)
        for part, name, before in self._attributes:
            now = _plain_attributes(part)
            found += [f"{name}.{k}" if name else k for k in now if k not in before or now[k] != before[k]]
        return found

    @torch.no_grad()
    def restore(self) -> None:
        for part, _, key, buffer, before in self._buffers:
            part._buffers[key] = buffer
            if not torch.equal(buffer.detach(), before):
                buffer.copy_(before)
        for part, _, before in self._attributes:
            for key, value in _plain_attributes(part).items():
                if key not in before:
                    del vars(part)[key]
                elif before[key] != value and isinstance(before[key], _PLAIN):
                    vars(part)[key] = before[key]


def _plain_attributes(part: nn.Module) -> dict[str, Any]:
    """Counters and switches by value; lists, tuples and dicts by length, since their growth is what matters."""
    found: dict[str, Any] = {}
    for key, value in vars(part).items():
        if key.startswith("_") or key == "training":
            continue
        if isinstance(value, _PLAIN):
            found[key] = value
        elif isinstance(value, (list, tuple, dict)):
            found[key] = ("length", len(value))
    return found


@contextlib.contextmanager
def undisturbed(modules: Sequence[nn.Module], device: torch.device) -> Iterator[tuple[Generators, ModuleState]]:
    """Snapshots that are restored on every way out."""
    generators, state = Generators(device), ModuleState(modules)
    try:
        yield generators, state
    finally:
        state.restore()
        generators.restore()
