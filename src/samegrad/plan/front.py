"""The front of a step: the fastest plan at each budget, from the plain step's down to the smallest that is possible.

A pure function of a footprint, like ``choose_plan``, which it asks once a budget.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

from samegrad.errors import BudgetTooSmall, CannotSplit
from samegrad.plan.choose import choose_plan
from samegrad.plan.margin import budget_for
from samegrad.plan.options import Options
from samegrad.records import Budget, Counting, Footprint, FrontPoint, Plan

# Of what the last plan needs, the budget that the next one is asked for.
_NEXT_FRACTION = 0.85
# Of the smallest plan's budget, how near below it a budget without a plan must be known.
_CLOSE_FRACTION = 0.03
# Of the fastest plan's seconds, up to which one with other levers is looked at too: segments may lie better under it.
_AS_FAST_FRACTION = 1.05


def plan_front(footprint: Footprint, options: Options) -> tuple[FrontPoint, ...]:
    """The front, largest budget and fastest plan first; each next one needs less and takes longer."""
    return strictly_smaller(front_candidates(footprint, options))


def strictly_smaller(points: Iterable[FrontPoint]) -> tuple[FrontPoint, ...]:
    """Those of ``points`` that no other one beats in both bytes and seconds, fastest first."""
    front: list[FrontPoint] = []
    for point in sorted(points, key=lambda point: (point.seconds, point.budget_bytes)):
        if not front or point.budget_bytes < front[-1].budget_bytes:
            front.append(point)
    return tuple(front)


def front_candidates(footprint: Footprint, options: Options) -> tuple[FrontPoint, ...]:
    """What may be on the front, each plan once."""
    found: dict[str, FrontPoint] = {}
    for point in _points(footprint, options):
        found.setdefault(repr(point.plan.levers), point)
    return tuple(found.values())


def _points(footprint: Footprint, options: Options) -> Iterator[FrontPoint]:
    served = budget_for(footprint.predicted_peak_bytes(rows=footprint.batch_rows), footprint.counting)
    asked, failed = served, 0
    while True:
        points = _fastest(footprint, options, asked)
        if not points:
            failed = asked
        else:
            served = points[0].budget_bytes
            yield from points
        # Below the smallest plan there is nothing; how far below is found by halves.
        asked = (served + failed) // 2 if failed else int(served * _NEXT_FRACTION)
        if served - failed <= _CLOSE_FRACTION * served:
            return


def _fastest(footprint: Footprint, options: Options, budget_bytes: int) -> list[FrontPoint]:
    """The fastest plan; where an allocator judges, with those of other levers that are about as fast."""
    budget = Budget(
        total_bytes=budget_bytes, device=footprint.device, counting=footprint.counting, source="a point of the front"
    )
    try:
        ladder = choose_plan(footprint, options, budget)
    except (BudgetTooSmall, CannotSplit):
        return []
    if footprint.counting is not Counting.CUDA_ALLOCATOR:
        ladder = ladder[:1]
    by_levers: dict[frozenset[str], Plan] = {}
    for plan in ladder:
        if (plan.predicted_seconds or 0.0) <= _AS_FAST_FRACTION * (ladder[0].predicted_seconds or 0.0):
            by_levers.setdefault(frozenset(plan.levers), plan)
    return [_point(plan, budget) for plan in by_levers.values() or ladder[:1]]


def _point(plan: Plan, budget: Budget) -> FrontPoint:
    needed = min(budget.total_bytes, budget_for(plan.predicted_peak_bytes or 0, budget.counting))
    return FrontPoint(
        budget_bytes=needed,
        seconds=plan.predicted_seconds or 0.0,
        plan=dataclasses.replace(plan, budget=dataclasses.replace(budget, total_bytes=needed)),
    )
