"""What a step leaves behind beside gradients: buffers, attributes and generators, compared bit for bit.

What the plain step itself updates and is a floating number, or several, is a sum over rows (running statistics): in
chunks its additions come in another order, so it is judged by rounding. Everything else may not differ in a bit.

What is added up may hang on a choice that rounding decides, of the nearest code in a codebook say: one that falls the
other way is no rounding of a sum. So sums are compared in float64 too, where none does; those of the dtype that runs
may then be off by as much as its gradients may.
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
        return [buffers, drawn, *self.sum_checks(precision)]

    def sum_checks(self, precision: Precision) -> list[Check]:
        """The floating numbers alone: one check, none where the plain step updated none."""
        if not self.sums:
            return []
        worst, error = "", 0.0
        now_floating = _floating(self.modules, list(self.sums))
        for name, before in self.sums.items():
            now = now_floating.get(name)
            if now is None or now.shape != before.shape:
                return [check_of(_sums_in(precision), math.inf, 0.0, name)]
            if not before.numel():
                continue
            difference = float((now - before).abs().max())
            relative = difference / ((float(before.abs().max()) + self._spread_of(name)) or 1.0)
            if not relative <= error:
                worst, error = name, relative
        return [_sums_check(error, worst, precision, tolerance.entry_allowed(precision))]

    def _spread_of(self, name: str) -> float:
        """Of a running mean the standard deviation: its rounding is that of the values, which may be far from it."""
        variances = self.sums.get(f"{name.removesuffix('running_mean')}running_var")
        if not name.endswith("running_mean") or variances is None or not variances.numel():
            return 0.0
        return math.sqrt(max(0.0, float(variances.max())))


def judged_again(
    checks: Sequence[Check], before: Precision, precision: Precision, *, least: float = 0.0
) -> list[Check]:
    """``checks``, made in ``before``, with that of sums judged in ``precision``, and by ``least`` at least."""
    allowed = max(least, tolerance.entry_allowed(precision))
    return [
        _sums_check(check.error, check.worst, precision, allowed) if check.name == _sums_in(before) else check
        for check in checks
    ]


def _sums_check(error: float, worst: str, precision: Precision, allowed: float) -> Check:
    tier = 1 if tolerance.proves_logic(precision) and allowed <= tolerance.entry_allowed(precision) else 2
    return dataclasses.replace(check_of(_sums_in(precision), error, allowed, worst), tier=tier)


def _sums_in(precision: Precision) -> str:
    return f"buffers that are sums, {precision.name}"


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
