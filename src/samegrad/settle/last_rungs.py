"""The rungs that are tried on a device: those that are predicted to fit, or the last ones within the budget itself.

Predictions may come to a share of a budget, since small probes do not see gaps in segments and what libraries take
late. A measurement sees them. So where nothing is predicted to fit, what is predicted to be within the whole budget is
tried before it is refused.
"""

from __future__ import annotations

import dataclasses

from samegrad.errors import BudgetTooSmall, CannotSplit
from samegrad.plan.choose import choose_plan
from samegrad.plan.margin import budget_for
from samegrad.plan.options import Options
from samegrad.records import Budget, Counting, Footprint, Plan

# Each one that fails costs a step, or the memory of one.
_MOST = 4


def rungs_to_try(
    footprint: Footprint, options: Options, budget: Budget
) -> tuple[tuple[Plan, ...], BudgetTooSmall | None]:
    """The ladder of ``choose_plan``, or the smallest plans above it with the refusal that holds if none of them fits.

    Raises BudgetTooSmall or CannotSplit where there are none.
    """
    try:
        return choose_plan(footprint, options, budget), None
    except BudgetTooSmall as refusal:
        # Counted bytes have no gaps, and what is pinned was refused by its own number.
        if budget.counting is not Counting.CUDA_ALLOCATOR or options.rows is not None:
            raise
        total = budget_for(budget.total_bytes, budget.counting)
        try:
            wider = choose_plan(footprint, options, dataclasses.replace(budget, total_bytes=total))
        except (BudgetTooSmall, CannotSplit):
            raise refusal from None
        within = [plan for plan in wider if (plan.predicted_peak_bytes or 0) <= budget.total_bytes]
        if not within:
            raise
        # Of equally large ones the later ones hold fewer rows at a time.
        order = sorted(range(len(within)), key=lambda place: (within[place].predicted_peak_bytes or 0, -place))
        last = [within[place] for place in sorted(order[:_MOST])]
        return tuple(dataclasses.replace(plan, budget=budget) for plan in last), refusal
