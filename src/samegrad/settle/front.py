"""Budgets against step times: which plan each amount of memory buys, for a device at hand or a card that is not.

Every number is predicted. On a card each plan is followed whole, so that its budget is the steady cap it needs there;
at hand the laws of the probes speak, and what is chosen in the end is measured when it is settled.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from samegrad.declared import DeclaredStep
from samegrad.errors import CannotTrace
from samegrad.levers.expandable_segments import ExpandableSegments
from samegrad.measure.events import Trace
from samegrad.measure.target import Target
from samegrad.plan.front import front_candidates, plan_front, strictly_smaller
from samegrad.plan.margin import budget_of_cap
from samegrad.plan.options import Options
from samegrad.plan.traced import traced_candidates
from samegrad.records import Footprint, Front, FrontPoint, Plan
from samegrad.settle.beside import followed_beside
from samegrad.settle.followed_step import FollowedStep
from samegrad.settle.following import follow
from samegrad.settle.lever_ways import with_lever_ways
from samegrad.settle.on_card import footprint_of, in_growing, named
from samegrad.settle.probing import aliases_for, measure
from samegrad.settle.untried_ways import with_untried_ways

# Of the budget in segments of fixed sizes, below which one in segments that grow is worth its lever.
_LESS_FRACTION = 0.98


def front_here(declared: DeclaredStep, batch: Any, options: Options) -> Front:
    """The front on the device that the model is on."""
    aliases = aliases_for(declared)
    measurement = with_untried_ways(declared, aliases, measure(declared, batch, aliases), batch)
    footprint = followed_beside(declared, aliases, measurement, batch).footprint
    return _front(declared, batch, footprint, plan_front(footprint, options))


def front_on_card(declared: DeclaredStep, batch: Any, target: Target, options: Options) -> Front:
    """The front on a card, at hand or not. Raises CannotTrace."""
    step, footprint = follow(declared, aliases_for(declared), batch, target)
    smallest = min((one.peak_bytes for one in traced_candidates(footprint, options)), default=0)
    footprint = with_lever_ways(step, footprint, options, target.budget(smallest))
    left_out: list[str] = []
    followed = tuple(_followed(step, footprint, front_candidates(footprint, options), left_out))
    front = strictly_smaller(followed)
    # What all others are compared with, also where growing segments do the same in less.
    plain = [point for point in followed if not point.plan.levers and point not in front]
    front = (*(point for point in plain if point.seconds <= front[0].seconds), *front)
    return dataclasses.replace(_front(declared, batch, footprint, front), left_out=tuple(left_out))


def _followed(
    step: FollowedStep, footprint: Footprint, points: tuple[FrontPoint, ...], left_out: list[str]
) -> Iterator[FrontPoint]:
    """``points`` as followed whole, in both kinds of segments; those that cannot be are named in ``left_out``."""
    for point in points:
        try:
            trace = step.trace(point.plan)
        except CannotTrace as error:
            left_out.append(f"{named(point.plan)} cannot be followed: {error.found}")
            continue
        plain = _judged(step, footprint, point.plan, trace)
        yield plain
        if ExpandableSegments.name not in footprint.refusals:
            grown = _judged(step, footprint, in_growing(point.plan, "taken: so the allocator needs less"), trace)
            if grown.budget_bytes < _LESS_FRACTION * plain.budget_bytes:
                yield grown


def _judged(step: FollowedStep, footprint: Footprint, plan: Plan, trace: Trace) -> FrontPoint:
    """``plan`` with the budget that its steady cap needs."""
    predicted = footprint_of(step, footprint, plan, trace)
    assert plan.budget is not None and predicted.steady_cap_bytes is not None
    needed = budget_of_cap(predicted.steady_cap_bytes)
    plan = dataclasses.replace(
        plan,
        budget=dataclasses.replace(plan.budget, total_bytes=needed),
        predicted_peak_bytes=predicted.steady_cap_bytes,
        predicted_seconds=predicted.seconds,
    )
    return FrontPoint(budget_bytes=needed, seconds=predicted.seconds or 0.0, plan=plan)


def _front(declared: DeclaredStep, batch: Any, footprint: Footprint, points: tuple[FrontPoint, ...]) -> Front:
    return Front(
        device=footprint.device,
        counting=footprint.counting,
        basis=footprint.basis,
        batch_rows=footprint.batch_rows,
        points=tuple(dataclasses.replace(point, plan=declared.signed(point.plan, batch)) for point in points),
    )
