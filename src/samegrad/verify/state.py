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
from collections.abc import Callable, Mapping, Sequence

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

    def checks(self, precision: Precision, apart: Callable[[], Mapping[str, Tensor]] = dict) -> list[Check]:
        """The state as it is now, right after the planned step, against the plain step's.

        ``apart``: runs the plain step with its sums added up in another order and returns ``sums_now()``; asked only
        where sums differ by more than usual.
        """
        changed = self.state.changed()
        exact = [name for name in changed if name not in self.sums]
        buffers = bits_check(
            "buffers", exact, "buffers after the planned step, bit for bit those after the plain step"
        )
        drawn = bits_check(
            "generators", self.generators.advanced(), "random generators end where they do after the plain step"
        )
        return [buffers, drawn, *self.sum_checks(precision, apart)]

    def sum_checks(self, precision: Precision, apart: Callable[[], Mapping[str, Tensor]] = dict) -> list[Check]:
        """The floating numbers alone, as ``checks`` has them: one check, none where the plain step updated none."""
        if not self.sums:
            return []
        usual = tolerance.entry_allowed(precision)
        moved = self._moved(self.sums_now())
        worst = max(moved, key=lambda key: _size(moved[key]), default="")
        error, allowed = moved.get(worst, 0.0), usual
        if not error <= allowed:
            later = apart()
            again = self._moved(later) if later else {}
            allowed_of = {key: tolerance.allowed_with_unrest(usual, again.get(key, 0.0)) for key in moved}
            worst = max(moved, key=lambda key: _size(moved[key]) / allowed_of[key])
            error, allowed = moved[worst], allowed_of[worst]
        return [_sums_check(precision, error, allowed, worst if error else "", proves=True)]

    def sums_now(self) -> Mapping[str, Tensor]:
        """The floating numbers that the plain step updated, as they are now."""
        return _floating(self.modules, list(self.sums))

    def _moved(self, now: Mapping[str, Tensor]) -> dict[str, float]:
        """By name, how far the sums are from the plain step's, relative to their size; infinitely where one is gone."""
        moved = {}
        for name, before in self.sums.items():
            there = now.get(name)
            if there is None or there.shape != before.shape:
                moved[name] = math.inf
            elif before.numel():
                moved[name] = float((there - before).abs().max()) / self._scale(name)
        return moved

    def _scale(self, name: str) -> float:
        """The size of the terms in the sum ``name``. A running mean near zero is what is left of values as large as
        their deviation, which stands beside it."""
        largest = float(self.sums[name].abs().max())
        path, _, last = name.rpartition(".")
        variance = self.sums.get(f"{path}.running_var" if path else "running_var")
        if last == "running_mean" and variance is not None:
            largest = max(largest, float(variance.max()) ** 0.5)
        return largest or 1.0


def judged_again(
    checks: Sequence[Check], before: Precision, precision: Precision, *, least: float = 0.0
) -> list[Check]:
    """``checks``, made in ``before``, with that of sums judged in ``precision``, and by ``least`` at least."""
    usual = tolerance.entry_allowed(precision)
    return [
        _sums_check(precision, check.error, max(check.allowed, usual, least), check.worst, proves=least <= usual)
        if check.name == _sums_in(before)
        else check
        for check in checks
    ]


def _sums_check(precision: Precision, error: float, allowed: float, worst: str, *, proves: bool) -> Check:
    """Tier 1 where it ``proves`` that the same numbers were added up, in a precision that can."""
    tier = 1 if proves and tolerance.proves_logic(precision) else 2
    return dataclasses.replace(check_of(_sums_in(precision), error, allowed, worst), tier=tier)


def _sums_in(precision: Precision) -> str:
    return f"buffers that are sums, {precision.name}"


def _size(error: float) -> float:
    """``error``, what is no number being the largest."""
    return math.inf if math.isnan(error) else error


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
