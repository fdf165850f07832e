"""What a step leaves behind beside gradients: buffers, attributes and generators, compared bit for bit.

A floating buffer that the plain step itself updates is a sum over rows (running statistics): in chunks its additions
come in another order, so it is judged by rounding. Everything else may not differ in a bit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from samegrad.declared import DeclaredStep
from samegrad.exact.undisturbed import Generators, ModuleState
from samegrad.records import Check
from samegrad.verify import tolerance
from samegrad.verify.compare import bits_check, check_of
from samegrad.verify.tolerance import Precision


@dataclasses.dataclass(frozen=True)
class LeftBehind:
    """State after the plain step: a snapshot to compare with, and the floating buffers that step updated."""

    modules: tuple[nn.Module, ...]
    state: ModuleState
    generators: Generators
    sums: Mapping[str, Tensor]

    @classmethod
    def after(cls, declared: DeclaredStep, before: ModuleState) -> LeftBehind:
        """Taken now, right after the plain step that began at ``before``."""
        modules = tuple(declared.modules)
        updated = set(before.changed())
        sums = {
            name: buffer.detach().clone()
            for name, buffer in _buffers(modules)
            if name in updated and buffer.is_floating_point()
        }
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
        for name, now in _buffers(self.modules):
            before = self.sums.get(name)
            if before is None or not before.numel():
                continue
            difference = float((now.detach().double() - before.double()).abs().max())
            relative = difference / (float(before.double().abs().max()) or 1.0)
            if not relative <= error:
                worst, error = name, relative
        tier = 1 if tolerance.proves_logic(precision) else 2
        check = check_of(f"buffers that are sums, {precision.name}", error, tolerance.entry_allowed(precision), worst)
        return dataclasses.replace(check, tier=tier)


def _buffers(modules: Sequence[nn.Module]) -> list[tuple[str, Tensor]]:
    return [pair for module in modules for pair in module.named_buffers()]
