"""Down the ladder on a card that is not at hand: each plan is followed whole before it is believed.

A budget is judged by the steady cap of the very plan: its trace, with library workspaces, replayed through the
allocator's model. What one plan reserves above its tensors tells which next ones need not be followed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from samegrad.errors import BudgetTooSmall, CannotSplit, CannotTrace, NotMeasured
from samegrad.levers.expandable_segments import ExpandableSegments
from samegrad.levers.split_rows import SplitRows
from samegrad.measure.events import Trace
from samegrad.measure.rungs import Rung
from samegrad.measure.trace_reading import (
    CUDA_BLOCK_BYTES,
    by_module_at,
    find_peak,
    peak_by_phase,
    tensors_at,
    timeline,
)
from samegrad.plan.choose import choose_plan
from samegrad.plan.floor import Smallest, below_floor, floor_bytes
from samegrad.plan.margin import budget_for, budget_of_cap, most_followed_bytes
from samegrad.plan.options import Options
from samegrad.plan.predict import predict_plan
from samegrad.records import Budget, Footprint, Origin, Phase, Plan
from samegrad.settle.followed_step import FollowedStep
from samegrad.settle.lever_ways import with_lever_ways
from samegrad.settle.progress import trying
from samegrad.units import format_bytes

# A plan is passed over only where it is clearly too large by what was learnt of those before it.
_CLEARLY = 0.98
# And by how much a plan must be smaller than the last one of its levers that was too large, each of which costs a
# trace; the smallest with these levers is tried however little it is.
_SMALLER = 0.98
# What is larger by no more than this may fit where the other did not: segments lie otherwise.
_ALIKE = 1.01
# Of what a budget allows, below which a plan that fits leaves room for one that was passed over.
_NEAR = 0.85
# And of the seconds of what was passed over, above which it is looked at once more.
_SLOWER = 1.25


def with_levers_on_card(step: FollowedStep, footprint: Footprint, *, budget: Budget, options: Options) -> Footprint:
    """``footprint``, with the step followed under more levers where its plain steady cap is above ``budget``."""
    if (footprint.steady_cap_bytes or 0) <= most_followed_bytes(budget):
        return footprint
    return with_lever_ways(step, footprint, options, budget)


def settle_on_card(
    step: FollowedStep, footprint: Footprint, *, budget: Budget, options: Options
) -> tuple[Plan, Footprint]:
    """The fastest plan whose steady cap is within ``budget``, and its predicted footprint.

    Raises BudgetTooSmall or CannotSplit when nothing fits.
    """
    most = most_followed_bytes(budget)
    ladder = _ladder(footprint, options, budget)
    # Of the caps of plans with the same levers over their tensors, the least; the plain step's before one is followed.
    above: dict[frozenset[str], float] = {}
    failed: dict[frozenset[str], float] = {}
    plain_above = (footprint.steady_cap_bytes or 0) / max(1, footprint.peak_allocated_bytes)
    unfollowed, passed_over = list[str](), list[Plan]()
    # They come fastest first, and of the same levers each next one smaller.
    smallest_of = {frozenset(plan.levers): plan for plan in ladder}
    smallest = min(ladder, key=lambda plan: plan.predicted_peak_bytes or 0)
    least: _Judged | None = None
    for plan in ladder:
        kind, peak = frozenset(plan.levers), plan.predicted_peak_bytes or 0
        least_above = min(above.get(kind, plain_above), plain_above)
        hardly_smaller = peak > _SMALLER * failed.get(kind, math.inf) and plan is not smallest_of[kind]
        if plan is not smallest and (peak * least_above * _CLEARLY > most or hardly_smaller):
            passed_over.append(plan)
            continue
        outcome = trying(plan)
        try:
            judged = _judged(step, footprint, plan, most, is_last=plan is smallest)
        except CannotTrace as error:
            outcome.refused(error.found)
            unfollowed.append(f"{named(plan)} cannot be followed ({error.found})")
            continue
        outcome.found(Rung(judged.cap_bytes, judged.seconds), most)
        if judged.fits:
            # Of the same levers, what is larger than one that failed does not fit.
            open_still = [
                one for one in passed_over
                if (one.predicted_peak_bytes or 0) < _ALIKE * failed.get(frozenset(one.levers), math.inf)
            ]  # fmt: skip
            quickest = min((one.predicted_seconds or 0.0 for one in open_still), default=math.inf)
            if judged.seconds > _SLOWER * quickest or judged.cap_bytes < _NEAR * most:
                judged = _quicker(step, footprint, open_still, judged, most)
            predicted = footprint_of(step, footprint, judged.plan, judged.trace)
            settled = dataclasses.replace(
                judged.plan, budget=budget, predicted_peak_bytes=predicted.steady_cap_bytes,
                predicted_seconds=predicted.seconds,
            )  # fmt: skip
            return settled, predicted
        above[kind] = min(above.get(kind, math.inf), judged.cap_bytes / max(1, peak))
        failed[kind] = peak
        if least is None or judged.cap_bytes < least.cap_bytes:
            least = judged
    told = None
    if least is not None:
        told = Smallest(named(least.plan), footprint_of(step, footprint, least.plan, least.trace))
    raise _nothing_fits(footprint, options, budget, told, unfollowed)


@dataclasses.dataclass(frozen=True)
class _Judged:
    """A plan, in the segments that serve it, as it was followed. ``cap_bytes``: as of ``caps.Against``."""

    plan: Plan
    trace: Trace
    fits: bool
    cap_bytes: int
    seconds: float


def _nothing_fits(
    footprint: Footprint, options: Options, budget: Budget, least: Smallest | None, unfollowed: Sequence[str]
) -> BudgetTooSmall:
    needed = None
    if least is not None:
        # A little more, to survive printing.
        needed = math.ceil(1.01 * budget_of_cap(least.predicted.steady_cap_bytes or 0))
    refusal = below_floor(footprint, budget, smallest=least, needed_bytes=needed, found="; ".join(unfollowed[-4:]))
    if options.rows is None:
        return refusal
    rows = options.rows if isinstance(options.rows, int) else max(options.rows)
    return BudgetTooSmall(
        asked=f"{rows} rows at a time ({options.rows_origin.value}): {refusal.asked}", found=refusal.found,
        do=f"drop the pin and let the plan choose the rows; {refusal.do}", option=refusal.option,
    )  # fmt: skip


def _quicker(
    step: FollowedStep, footprint: Footprint, passed_over: Sequence[Plan], found: _Judged, most: int
) -> _Judged:
    """The quickest of the plans that were ``passed_over`` and fit after all, else ``found``.

    They come quickest first, and of the same levers each next one smaller, so that half of them are not looked at: of
    other levers one that would fit may be missed.
    """
    low, high = 0, len(passed_over)
    while low < high:
        middle = (low + high) // 2
        outcome = trying(passed_over[middle])
        try:
            judged = _judged(step, footprint, passed_over[middle], most)
        except CannotTrace as error:
            outcome.refused(error.found)
            low = middle + 1
            continue
        outcome.found(Rung(judged.cap_bytes, judged.seconds), most)
        if not judged.fits:
            low = middle + 1
            continue
        high = middle
        if judged.seconds < found.seconds:
            found = judged
    return found


def _judged(
    step: FollowedStep, footprint: Footprint, plan: Plan, most: int, *, is_last: bool = False
) -> _Judged:
    """``plan`` followed; where only segments that grow keep it within ``most``, in those.

    ``is_last``: where those are too large as well, they are told all the same if they need less.
    """
    trace, name = step.trace(plan), ExpandableSegments.name
    seconds = _seconds(step, trace)
    fixed = step.target.against(trace, most, expandable_segments=name in plan.levers)
    judged = _Judged(plan, trace, fixed.fits, fixed.cap_bytes, seconds)
    if fixed.fits or name in footprint.refusals:
        return judged
    may_fit = fixed.peak_allocated_bytes <= most
    # One cap takes less than it takes to find the smallest.
    if not is_last and not (may_fit and step.target.keeps(trace, most, expandable_segments=True)):
        return judged
    growing = step.target.against(trace, most, expandable_segments=True)
    if growing.cap_bytes >= fixed.cap_bytes:
        return judged
    why = f"taken: without it the allocator would need more than the {format_bytes(most)} that the budget allows"
    return _Judged(in_growing(plan, why), trace, growing.fits, growing.cap_bytes, seconds)


def in_growing(plan: Plan, why: str) -> Plan:
    """``plan`` in segments that grow; nothing that it computes changes."""
    name = ExpandableSegments.name
    return dataclasses.replace(plan, levers=plan.levers | {name: {}}, reasons=plan.reasons | {name: why})


def _ladder(footprint: Footprint, options: Options, budget: Budget) -> tuple[Plan, ...]:
    """Plans whose tensors fit, without the margin for what probes cannot see: each is followed."""
    without_margin = dataclasses.replace(budget, total_bytes=budget_for(budget.total_bytes, budget.counting))
    try:
        return choose_plan(footprint, options, without_margin)
    except (BudgetTooSmall, CannotSplit):
        if options.rows is not None or options.allow < SplitRows.exactness:
            # What is told is told of the budget that was asked for.
            return choose_plan(footprint, options, budget)
    # Nothing fits: the smallest plan is followed all the same, for what is told of it.
    enough = dataclasses.replace(budget, total_bytes=budget_for(floor_bytes(footprint), budget.counting))
    try:
        return (min(choose_plan(footprint, options, enough), key=lambda plan: plan.predicted_peak_bytes or 0),)
    except (BudgetTooSmall, CannotSplit):
        return choose_plan(footprint, options, budget)


def footprint_of(step: FollowedStep, footprint: Footprint, plan: Plan, trace: Trace | None = None) -> Footprint:
    """What the step holds and takes under ``plan``, which is followed. Raises CannotTrace.

    ``trace``: of the step under the same levers, whatever its segments.
    """
    trace = step.trace(plan) if trace is None else trace
    reserved = step.target.reserve(trace, expandable_segments=ExpandableSegments.name in plan.levers)
    shown = step.target.with_workspaces(trace)
    peak = find_peak(shown, round_to=CUDA_BLOCK_BYTES)
    rows = max(trace.sizes)
    try:
        laws = predict_plan(footprint, plan.levers)
    except NotMeasured:
        # Of a plan that was made before the step was not followed under its levers; the trace of the plan says it all.
        laws = footprint
    return dataclasses.replace(
        laws,
        origin=Origin.PREDICTED,
        rows=rows,
        peak_allocated_bytes=reserved.free_running.peak_allocated_bytes,
        peak_reserved_bytes=reserved.free_running.peak_reserved_bytes,
        steady_cap_bytes=reserved.steady.cap_bytes,
        smallest_cap_bytes=reserved.smallest.cap_bytes,
        seconds=_seconds(step, trace),
        by_category={category: amount for category, amount in peak.by_category.items() if amount},
        by_phase=peak_by_phase(shown, round_to=CUDA_BLOCK_BYTES),
        by_module=by_module_at(shown, peak),
        at_peak=tensors_at(shown, peak),
        timeline=timeline(shown),
    )


def _seconds(step: FollowedStep, trace: Trace) -> float:
    """Of a whole step: chunks that were not followed take what the others do; the optimizer's turn comes once."""
    seconds = step.target.seconds_of(trace)
    last = sum(s for operation, s in zip(trace.operations, seconds) if operation.step == 1)
    turn = sum(s for o, s in zip(trace.operations, seconds) if o.step == 1 and o.phase is Phase.OPTIMIZER)
    return turn + (last - turn) * step.layout.rows / sum(trace.sizes)


def named(plan: Plan) -> str:
    """The plan's levers in a few words."""
    return " and ".join(name for name in plan.levers if name != "host_rows") or "the plain step"
