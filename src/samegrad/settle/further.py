"""Further down the ladder than a plan that was believed and ran out of memory all the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from samegrad.errors import BudgetTooSmall, CannotSplit
from samegrad.levers import find_levers
from samegrad.levers.autocast import Autocast
from samegrad.levers.expandable_segments import ExpandableSegments
from samegrad.levers.layout import Layout
from samegrad.plan.choose import choose_plan
from samegrad.plan.margin import budget_for
from samegrad.plan.options import Options
from samegrad.records import Counting, Exactness, Footprint, Plan
from samegrad.settle.edits import rows_of

# Of what failed: rungs lie close together, and each one that fails costs a step.
_LARGEST_FRACTION = 7 / 8
# What is no matter of how much is held at a time: it made room for all plans, or is how the step computes.
_KEPT = frozenset((ExpandableSegments.name, Layout.name, Autocast.name))


def smaller_plans(footprint: Footprint, plan: Plan, allow: Exactness) -> Iterator[Plan]:
    """``plan`` in segments that grow, where it is not; then plans of ``footprint`` below it, each the fastest that is
    predicted to need an eighth less than the last.

    Where none needs so much less, half as many rows at a time come next, and the smallest there is last. No tensor and
    no device is touched. Each keeps the budget and the signature of ``plan``, and the kind of segments, the layout and
    the precision that it had.
    """
    if _may_grow(footprint, plan):
        # It was measured to fit: what is missing lies in gaps.
        plan = dataclasses.replace(
            plan,
            levers=plan.levers | {ExpandableSegments.name: {}},
            reasons=plan.reasons | {ExpandableSegments.name: "taken: without it memory ran out in a step"},
        )
        yield plan
    kept = {name: knobs for name, knobs in plan.levers.items() if name in _KEPT}
    failed: Plan | None = plan
    while failed is not None and failed.predicted_peak_bytes is not None:
        found = _smaller(footprint, failed, failed.predicted_peak_bytes, allow)
        if found is not None:
            levers, reasons = found.levers | kept, {n: why for n, why in plan.reasons.items() if n in kept}
            origins = {knob: who for knob, who in plan.knob_origins.items() if knob.partition(".")[0] in kept}
            yield dataclasses.replace(
                found,
                levers=levers,
                exactness=max((find_levers()[name].exactness for name in levers), default=Exactness.SAME_BITS),
                budget=plan.budget,
                signature=plan.signature,
                parameters=plan.parameters,
                reasons=found.reasons | reasons,
                knob_origins=found.knob_origins | origins,
            )
        failed = found


def _may_grow(footprint: Footprint, plan: Plan) -> bool:
    name, budget = ExpandableSegments.name, plan.budget
    by_allocator = budget is not None and budget.counting is Counting.CUDA_ALLOCATOR
    return by_allocator and name not in plan.levers and name not in footprint.refusals


def _smaller(footprint: Footprint, failed: Plan, failed_bytes: int, allow: Exactness) -> Plan | None:
    wanted = int(failed_bytes * _LARGEST_FRACTION)
    fitting = [p for p in _ladder(footprint, failed, wanted, allow) if (p.predicted_peak_bytes or 0) <= wanted]
    if fitting:
        return fitting[0]
    rows = rows_of(failed)
    less = [
        plan
        for plan in _ladder(footprint, failed, failed_bytes, allow)
        if (plan.predicted_peak_bytes or 0, rows_of(plan)) < (failed_bytes, rows)
    ]
    # Where the optimizer's turn is the peak, rows are what else there is to go by.
    halved = next((plan for plan in less if 2 * rows_of(plan) <= rows), None)
    return halved or min(less, key=lambda plan: plan.predicted_peak_bytes or 0, default=None)


def _ladder(footprint: Footprint, failed: Plan, needed_bytes: int, allow: Exactness) -> tuple[Plan, ...]:
    """The plans within the smallest budget that ``needed_bytes`` fit; a little more may fit as well."""
    assert failed.budget is not None
    total = budget_for(needed_bytes, failed.budget.counting)
    try:
        return choose_plan(footprint, Options(allow=allow), dataclasses.replace(failed.budget, total_bytes=total))
    except (BudgetTooSmall, CannotSplit):
        return ()
