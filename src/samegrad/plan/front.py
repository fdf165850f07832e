"""The front of a step: the fastest plan at each budget, from the plain step's down to the smallest that is possible.

A pure function of a footprint, like ``choose_plan``, which it asks once a budget.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from samegrad.errors import BudgetTooSmall, CannotSplit
from samegrad.plan.choose import choose_plan
from samegrad.plan.margin import budget_for
from samegrad.plan.options import Options
from samegrad.records import Budget, Footprint, FrontPoint

# Of what the last plan needs, the budget that the next one is asked for.
_NEXT_FRACTION = 0.85
# Of the smallest plan's budget, how near below it a budget without a plan must be known.
_CLOSE_FRACTION = 0.03


def plan_front(footprint: Footprint, options: Options) -> tuple[FrontPoint, ...]:
    """The front, largest budget and fastest plan first; each next one needs less and takes longer."""
    return strictly_smaller(_points(footprint, options))


def strictly_smaller(points: Iterator[FrontPoint]) -> tuple[FrontPoint, ...]:
    """Those of ``points`` that no other one beats in both bytes and seconds, fastest first."""
    front: list[FrontPoint] = []
    for point in sorted(points, key=lambda point: (point.seconds, point.budget_bytes)):
        if not front or point.budget_bytes < front[-1].budget_bytes:
            front.append(point)
    return tuple(front)


def _points(footprint: Footprint, options: Options) -> Iterator[FrontPoint]:
    served = budget_for(footprint.predicted_peak_bytes(rows=footprint.batch_rows), footprint.counting)
    asked, failed = served, 0
    while True:
        point = _fastest(footprint, options, asked)
        if point is None:
            failed = asked
        else:
            served = point.budget_bytes
            yield point
        # Below the smallest plan there is nothing; how far below is found by halves.
        asked = (served + failed) // 2 if failed else int(served * _NEXT_FRACTION)
        if served - failed <= _CLOSE_FRACTION * served:
            return


def _fastest(footprint: Footprint, options: Options, budget_bytes: int) -> FrontPoint | None:
    budget = Budget(
        total_bytes=budget_bytes, device=footprint.device, counting=footprint.counting, source="a point of the front"
    )
    try:
        plan = choose_plan(footprint, options, budget)[0]
    except (BudgetTooSmall, CannotSplit):
        return None
    needed = min(budget_bytes, budget_for(plan.predicted_peak_bytes or 0, footprint.counting))
    return FrontPoint(
        budget_bytes=needed,
        seconds=plan.predicted_seconds or 0.0,
        plan=dataclasses.replace(plan, budget=dataclasses.replace(budget, total_bytes=needed)),
    )
