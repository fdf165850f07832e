"""Both sides of a comparison once more, on copies in float64: gradients, and the state that the step updates."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch

from samegrad.declared import DeclaredStep
from samegrad.exact.float64 import widened
from samegrad.exact.out_of_memory import is_out_of_memory
from samegrad.exact.undisturbed import ModuleState
from samegrad.measure.failures import first_line, line_of
from samegrad.records import Check
from samegrad.verify import tolerance
from samegrad.verify.compare import Allowance, Gradients, Unrest, same_function
from samegrad.verify.sides import Bench, Planned, parameter_names
from samegrad.verify.state import LeftBehind
from samegrad.verify.twin import NarrowestSeen, float64_twin
from samegrad.verify.unrest import sums_apart, unrest_of


def widened_if_needed(
    plain: Gradients, ours: Gradients, allowance: Allowance, unrest: Callable[[], Unrest]
) -> list[Check]:
    """The same-function checks; only where they fail is it asked how much the plain step itself moves."""
    checks = same_function(plain, ours, allowance)
    if all(check.passed for check in checks):
        return checks
    return same_function(plain, ours, dataclasses.replace(allowance, unrest=unrest()))


@dataclasses.dataclass(frozen=True)
class Float64Run:
    """Both sides in float64, the narrowest dtype that was met there, and what brought it in."""

    plain: Gradients
    ours: Gradients
    narrowest: torch.dtype
    narrowed_by: str
    planned: Planned
    bench: Bench
    behind: list[Check]

    @classmethod
    def run(cls, planned: Planned, bench: Bench, plain: Gradients) -> Float64Run | str:
        """Why not, in words, where float64 cannot run.

        A loss that holds parameters of its own out of reach cannot, nor can code that fixes a dtype or closes over
        the model itself.
        """
        names = set(parameter_names(planned.declared).values())
        if held := sorted(plain.by_name.keys() - names):
            return f"{held[0]} is held where no copy of it can be made"
        if any(p.is_complex() for p in planned.declared.network.parameters()):
            return "the model has complex parameters"
        try:
            twin = float64_twin(planned)
            wide = Bench(bench.generators, ModuleState.of(twin.declared), widened(bench.rows))
            seen = NarrowestSeen()

            def watched(rows: Any) -> Gradients:
                with seen:
                    return twin.reference(rows)

            with repeatable(planned.declared):
                oracle = wide.run(watched)
                if oracle.by_name.keys() != plain.by_name.keys():
                    # It would leave gradients there.
                    return "forward or loss_fn closes over the model itself, and not over the one that it is given"
                left = LeftBehind.after(twin.declared, wide.state)
                again = wide.run(twin.handed_over)
                behind = left.sum_checks(
                    tolerance.precision_of(torch.float64), lambda: sums_apart(twin, wide, left)
                )
        except (RuntimeError, TypeError) as error:
            if is_out_of_memory(error):
                raise
            # Of two dtypes in one operation, mostly; or of a module that cannot be copied.
            return f"a copy of the step in float64 cannot run: {first_line(error)}{line_of(error)}"
        return cls(oracle, again, seen.dtype, seen.where, twin, wide, behind)

    def unrest(self) -> Unrest:
        with repeatable(self.planned.declared):
            return unrest_of(self.planned, self.bench, self.plain)

    def checks(self, allowance: Allowance) -> list[Check]:
        return widened_if_needed(self.plain, self.ours, allowance, self.unrest)


@contextlib.contextmanager
def repeatable(declared: DeclaredStep) -> Iterator[None]:
    """A block without autocast, where convolutions repeat themselves: cuDNN's transposed ones in float64 would not."""
    # torch has no types here.
    cudnn = cast(Any, torch.backends.cudnn)
    before = cudnn.deterministic
    cudnn.deterministic = True
    try:
        with torch.autocast(declared.device.type, enabled=False):
            yield
    finally:
        cudnn.deterministic = before
