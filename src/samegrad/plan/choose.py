"""The plans that fit a budget, fastest first: a pure function of a footprint.

No tensor and no device is touched here, so a footprint read from a file is planned like a fresh one. The same
footprint, options and budget give the same ladder.
"""

from __future__ import annotations

from collections.abc import Iterator

from samegrad.errors import BudgetTooSmall, CannotSplit
from samegrad.levers import Lever, find_levers
from samegrad.levers.host_rows import HostRows
from samegrad.levers.split_rows import SplitRows
from samegrad.plan.explain import floor_sentence, ways_down
from samegrad.plan.margin import budget_for, usable_bytes
from samegrad.plan.options import Options
from samegrad.records import Budget, Exactness, Footprint, KnobOrigin, Plan
from samegrad.units import format_bytes


def choose_plan(footprint: Footprint, options: Options, budget: Budget) -> tuple[Plan, ...]:
    """A ladder of plans, the fastest that is predicted to fit first, each next one smaller.

    Raises BudgetTooSmall with what the floor is made of and the cheapest ways down, and CannotSplit when only a
    split would fit and the step cannot be split.
    """
    usable = usable_bytes(budget)
    ladder = tuple(_rungs(footprint, options, budget, usable))
    if ladder:
        return ladder
    raise _nothing_fits(footprint, options, budget)


def _nothing_fits(footprint: Footprint, options: Options, budget: Budget) -> BudgetTooSmall | CannotSplit:
    within = f"within {format_bytes(budget.total_bytes)} ({budget.source})"
    refusal = SplitRows.refusal(footprint)
    pinned = options.rows if options.rows is None or isinstance(options.rows, int) else max(options.rows)
    splits = pinned is None or pinned < footprint.batch_rows
    if splits and refusal is not None:
        return CannotSplit(
            asked=f"a plan {within}" if pinned is None else f"{pinned} rows at a time {within}",
            found=f"the plain step needs {format_bytes(_plain_peak(footprint))} and cannot be split: {refusal}",
            do="; ".join(ways_down(footprint, budget)),
        )
    if splits and options.allow < SplitRows.exactness:
        return BudgetTooSmall(
            asked=f"a plan {within} that is {options.allow.name}",
            found=f"the plain step needs {format_bytes(_plain_peak(footprint))}, and any smaller plan splits it, "
            f"which is {SplitRows.exactness.name}: {SplitRows.exactness.explained()}",
            do=f"allow {SplitRows.exactness.name}, or raise the budget to "
            f"{format_bytes(budget_for(_plain_peak(footprint), budget.counting))}",
            option="--budget",
        )
    if pinned is not None:
        needed = footprint.predicted_peak_bytes(rows=pinned)
        return BudgetTooSmall(
            asked=f"{pinned} rows at a time ({options.rows_origin.value}) {within}",
            found=f"{pinned} rows need {format_bytes(needed)}",
            do="drop the pin and let the plan choose the rows, or raise the budget to "
            f"{format_bytes(budget_for(needed, budget.counting))}",
        )
    return BudgetTooSmall(
        asked=f"a plan {within}",
        found=floor_sentence(footprint),
        do="; ".join(ways_down(footprint, budget)),
        option="--budget",
    )


def _rungs(footprint: Footprint, options: Options, budget: Budget, usable: int) -> Iterator[Plan]:
    host = [HostRows()] if HostRows.refusal(footprint) is None else []
    if options.rows is not None:
        rows = options.rows if isinstance(options.rows, int) else list(options.rows)
        whole = rows if isinstance(rows, int) else max(rows)
        if whole >= footprint.batch_rows:
            if _plain_peak(footprint) <= usable:
                yield _plan(footprint, [], budget, {})
        elif _may_split(footprint, options) and footprint.predicted_peak_bytes(rows=whole) <= usable:
            yield _plan(footprint, [*host, SplitRows(rows)], budget, {"split_rows.rows": options.rows_origin})
        return
    if _plain_peak(footprint) <= usable:
        yield _plan(footprint, [], budget, {})
    if _may_split(footprint, options):
        for lever in SplitRows.candidates(footprint, usable):
            yield _plan(footprint, [*host, lever], budget, {"split_rows.rows": KnobOrigin.CHOSEN})


def _may_split(footprint: Footprint, options: Options) -> bool:
    return SplitRows.refusal(footprint) is None and options.allow >= SplitRows.exactness and bool(footprint.laws)


def _plain_peak(footprint: Footprint) -> int:
    return footprint.predicted_peak_bytes(rows=footprint.batch_rows)


def _plan(footprint: Footprint, levers: list[Lever], budget: Budget, origins: dict[str, KnobOrigin]) -> Plan:
    predicted = footprint
    for lever in levers:
        predicted = lever.predict(predicted)
    peak = predicted.peak_allocated_bytes if levers else _plain_peak(footprint)
    seconds = predicted.seconds if levers else footprint.predicted_seconds(rows=footprint.batch_rows)
    taken = {lever.name: lever.knobs() for lever in sorted(levers, key=lambda lever: lever.slot)}
    return Plan(
        levers=taken,
        exactness=max((lever.exactness for lever in levers), default=Exactness.SAME_BITS),
        batch_rows=footprint.batch_rows,
        budget=budget,
        predicted_peak_bytes=peak,
        predicted_seconds=seconds,
        knob_origins=origins,
        reasons=_reasons(footprint, taken, peak),
    )


def _reasons(footprint: Footprint, taken: dict[str, dict[str, object]], peak: int) -> dict[str, str]:
    plain = _plain_peak(footprint)
    reasons = {}
    for name, lever in find_levers().items():
        refused = lever.refusal(footprint)
        if name in taken:
            saved = f"saves {format_bytes(plain - peak)} of the plain step's {format_bytes(plain)}"
            reasons[name] = f"taken: {saved}" if name == "split_rows" else "taken: only chunks travel to the device"
        elif refused is not None:
            reasons[name] = f"refused: {refused}"
        else:
            reasons[name] = "not needed: the plain step fits"
    return reasons
