"""What makes room for a plan and leaves what it computes: tried where the plan as it is was measured to need more.

Once one plan needed it the next ones get it at once: what lies in gaps, or in copies, does so under all of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from samegrad.declared import DeclaredStep
from samegrad.errors import CannotSplit
from samegrad.levers.expandable_segments import ExpandableSegments
from samegrad.levers.layout import Layout
from samegrad.measure.rungs import Rung
from samegrad.plan.options import Options
from samegrad.records import Budget, Counting, Footprint, Plan
from samegrad.settle.own_code import own_code_under
from samegrad.units import format_bytes

# Of the plain step's time: from which on channels last is slower, and no mere noise.
_SLOWER = 1.1

Run = Callable[[Plan], Rung | None]


@dataclasses.dataclass
class GrowingWhereNeeded:
    """Measures plans in segments of fixed sizes until one is above ``most`` bytes, from then on in such as grow.

    Their tensors are within the budget as predicted; what is above lies in gaps of segments of fixed sizes, and one
    that has gaps is followed by others that have.
    """

    footprint: Footprint
    most: int
    _why: str = ""

    def measured(self, plan: Plan, run: Run) -> tuple[Plan, Rung | None]:
        """``plan``, or the same in segments that grow, and what ``run`` measured of it."""
        name = ExpandableSegments.name
        if name in plan.levers or name in self.footprint.refusals:
            return plan, run(plan)
        if not self._why:
            rung = run(plan)
            if _fits(rung, self.most):
                return plan, rung
            self._why = _why(rung, self.most)
        grown = _with(name, plan, self._why)
        return grown, run(grown)


class ChannelsLastWhereNeeded:
    """Measures plans as ``GrowingWhereNeeded`` does until one is above ``most`` bytes, from then on with channels last
    and, where that is above as well, as they are.

    Convolutions whose kernels want channels last copy their images there and back where they lie otherwise; what is
    above may be these copies.
    """

    def __init__(
        self, declared: DeclaredStep, footprint: Footprint, most: int, options: Options, budget: Budget
    ) -> None:
        self._declared = declared
        self._segments = GrowingWhereNeeded(footprint, most)
        self._most = most
        self._may = (
            budget.counting is Counting.CUDA_ALLOCATOR
            and Layout.name not in footprint.refusals
            and Layout.exactness <= options.allow
            and not _is_slower_with_channels_last(footprint)
        )
        self._why = self._refused = ""

    def measured(self, plan: Plan, run: Run) -> tuple[Plan, Rung | None]:
        """``plan``, or the same with channels last, and what ``run`` measured of it."""
        if not self._may or Layout.name in plan.levers:
            found, rung = self._segments.measured(plan, run)
            return self._told(found), rung
        as_it_is = None if self._why else self._segments.measured(plan, run)
        if as_it_is is not None:
            if _fits(as_it_is[1], self._most):
                return as_it_is
            self._why = _why(as_it_is[1], self._most)
        try:
            with own_code_under([Layout.name], self._declared):
                laid_out = self._segments.measured(_with(Layout.name, plan, self._why), run)
            if _fits(laid_out[1], self._most):
                return laid_out
        except CannotSplit as refused:
            # It would raise under every other plan as well.
            self._may, self._refused = False, f"refused: {refused.found}"
        found, rung = as_it_is or self._segments.measured(plan, run)
        return self._told(found), rung

    def _told(self, plan: Plan) -> Plan:
        if not self._refused:
            return plan
        return dataclasses.replace(plan, reasons=plan.reasons | {Layout.name: self._refused})


def _is_slower_with_channels_last(footprint: Footprint) -> bool:
    """As the step was timed with and without; where it was not, nobody knows."""
    plain = footprint.seconds_per_row
    timed = [way.seconds_per_row for way in footprint.probed if way.levers.keys() == {Layout.name}]
    return any(plain is not None and seconds is not None and seconds > _SLOWER * plain for seconds in timed)


def _fits(rung: Rung | None, most: int) -> bool:
    return rung is not None and rung.peak_bytes <= most


def _with(name: str, plan: Plan, why: str) -> Plan:
    exactness = max(plan.exactness, Layout.exactness) if name == Layout.name else plan.exactness
    return dataclasses.replace(
        plan, levers=plan.levers | {name: {}}, reasons=plan.reasons | {name: why}, exactness=exactness
    )


def _why(rung: Rung | None, most: int) -> str:
    needed = "memory ran out" if rung is None else f"{format_bytes(rung.peak_bytes)} were measured"
    return f"taken: without it {needed}, and the budget allows {format_bytes(most)}"
