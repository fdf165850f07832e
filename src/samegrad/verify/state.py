"""What a step leaves behind beside gradients: buffers, attributes and generators, compared bit for bit.

What the plain step itself updates and is a floating number, or several, is a sum over rows (running statistics): in
chunks its additions come in another order, so it is judged by rounding. Everything else may not differ in a bit.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from samegrad import trees
from samegrad.declared import DeclaredStep
from samegrad.exact.undisturbed import Generators, ModuleState
from samegrad.records import Check
from samegrad.verify import tolerance
from samegrad.verify.compare import bits_check, check_of
from samegrad.verify.tolerance import Precision


@dataclasses.dataclass(frozen=True)
class LeftBehind:
    """State after the plain step: a snapshot to compare with, and the floating numbers that step updated."""

    modules: tuple[nn.Module, ...]
    state: ModuleState
    generators: Generators
    sums: Mapping[str, Tensor]

    @classmethod
    def after(cls, declared: DeclaredStep, before: ModuleState) -> LeftBehind:
        """Taken now, right after the plain step that began at ``before``."""
        modules = tuple(declared.modules)
        sums = _floating(modules, before.changed())
        return cls(modules, ModuleState(modules), Generators(declared.device), sums)

    def checks(self, precision: Precision) -> list[Check]:
        """The state as it is now, right after the planned step, against the plain step's."""
        changed = self.state.changed()
        exact = [name for name in changed if name not in self.sums]
        buffers = bits_check(
            "buffers", exact, "buffers after the planned step, bit for bit those after the plain step"
        )
        drawn = bits_check(
            "generators", self.generators.advanced(), "random generators end where they do after the plain step"
        )
        if not self.sums:
            return [buffers, drawn]
        return [buffers, drawn, self._sums_check(precision)]

    def _sums_check(self, precision: Precision) -> Check:
        worst, error = "", 0.0
        now_floating = _floating(self.modules, list(self.sums))
        for name, before in self.sums.items():
            now = now_floating.get(name)
            if now is None or now.shape != before.shape:
                return check_of(f"buffers that are sums, {precision.name}", math.inf, 0.0, name)
            if not before.numel():
                continue
            difference = float((now - before).abs().max())
            relative = difference / self._scale(name)
            if not relative <= error:
                worst, error = name, relative
        tier = 1 if tolerance.proves_logic(precision) else 2
        check = check_of(f"buffers that are sums, {precision.name}", error, tolerance.entry_allowed(precision), worst)
        return dataclasses.replace(check, tier=tier)

    def _scale(self, name: str) -> float:
        """The size of the terms in the sum ``name``. A running mean near zero is what is left of values as large as
        their deviation, which stands beside it."""
        largest = float(self.sums[name].abs().max())
        path, _, last = name.rpartition(".")
        variance = self.sums.get(f"{path}.running_var" if path else "running_var")
        if last == "running_mean" and variance is not None:
            largest = max(largest, float(variance.max()) ** 0.5)
        return largest or 1.0


def _floating(modules: Sequence[nn.Module], names: Sequence[str]) -> dict[str, Tensor]:
    """By name of a buffer or an attribute, the numbers in it, (n,) float64, where all of them are floating ones."""
    found = {}
    for module in modules:
        for path, part in module.named_modules():
            for key, value in (part._buffers | vars(part)).items():
                name = f"{path}.{key}" if path else key
                if name not in names:
                    continue
                leaves = trees.leaves_of(value)
                if leaves and all(_is_floating(leaf) for leaf in leaves):
                    parts = [torch.as_tensor(leaf).detach().double().reshape(-1) for leaf in leaves]
                    found[name] = torch.cat(parts).clone()
    return found


def _is_floating(leaf: object) -> bool:
    return leaf.is_floating_point() if isinstance(leaf, Tensor) else isinstance(leaf, float)
