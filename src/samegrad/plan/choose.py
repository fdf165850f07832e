"""The plans that fit a budget, fastest first: a pure function of a footprint.

No tensor and no device is touched here, so a footprint read from a file is planned like a fresh one. The same
footprint, options and budget give the same ladder.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, cast

from samegrad.errors import BudgetTooSmall, CannotSplit
from samegrad.levers import Lever, PredictedLever, find_levers, levers_of
from samegrad.levers.chunk_loss import ChunkLoss
from samegrad.levers.host_rows import HostRows
from samegrad.levers.split_rows import SplitRows
from samegrad.plan.floor import below_floor, ways_down
from samegrad.plan.margin import budget_for, usable_bytes
from samegrad.plan.options import Options
from samegrad.plan.predict import predict_plan
from samegrad.plan.reasons import Reasons, fastest_by_lever
from samegrad.plan.traced import Candidate, traced_candidates, worth_trying
from samegrad.plan.whole_ways import footprint_under, is_allowed, whole_levers_of
from samegrad.records import Budget, Counting, Exactness, Footprint, KnobOrigin, Plan, ProbedWay
from samegrad.units import format_bytes


def choose_plan(footprint: Footprint, options: Options, budget: Budget) -> tuple[Plan, ...]:
    """A ladder of plans, the fastest that is predicted to fit first; each next one with the same levers is smaller.

    Raises BudgetTooSmall with what the floor is made of and the cheapest ways down, and CannotSplit when only a
    split would fit and the step cannot be split.
    """
    usable = usable_bytes(budget)
    followed = traced_candidates(footprint, options, budget)
    rungs = tuple(_rungs(footprint, options, budget, usable, followed))
    if rungs:
        reasons = Reasons(footprint, options.allow, fastest_by_lever(followed))
        return tuple(dataclasses.replace(plan, reasons=reasons.of(plan)) for plan in rungs)
    raise _nothing_fits(footprint, options, budget, followed)


def _nothing_fits(
    footprint: Footprint, options: Options, budget: Budget, followed: list[Candidate]
) -> BudgetTooSmall | CannotSplit:
    within = f"within {format_bytes(budget.total_bytes)} ({budget.source})"
    refusal = SplitRows.refusal(footprint)
    pinned = options.rows if options.rows is None or isinstance(options.rows, int) else max(options.rows)
    splits = pinned is None or pinned < footprint.batch_rows
    shrinks = bool(footprint.variants) or any(candidate.levers for candidate in followed)
    if splits and refusal is not None and (pinned is not None or not shrinks):
        return CannotSplit(
            asked=f"a plan {within}" if pinned is None else f"{pinned} rows at a time {within}",
            found=f"the plain step needs {format_bytes(_plain_peak(footprint))} and cannot be split: {refusal}",
            do=ways_down(footprint, budget),
        )
    if splits and options.allow < SplitRows.exactness and not any(candidate.levers for candidate in followed):
        return BudgetTooSmall(
            asked=f"a plan {within} that is {options.allow.name}",
            found=f"the plain step needs {format_bytes(_plain_peak(footprint))}, and any smaller plan splits it, "
            f"which is {SplitRows.exactness.name}: {SplitRows.exactness.explained()}",
            do=f"allow {SplitRows.exactness.name}, or raise the budget to "
            f"{format_bytes(budget_for(_plain_peak(footprint), budget.counting))}",
            option="--budget",
        )
    if pinned is not None:
        smallest = min((candidate.peak_bytes for candidate in followed), default=None)
        needed = footprint.predicted_peak_bytes(rows=pinned) if smallest is None else smallest
        return BudgetTooSmall(
            asked=f"{pinned} rows at a time ({options.rows_origin.value}) {within}",
            found=f"{pinned} rows need {format_bytes(needed)}",
            do="drop the pin and let the plan choose the rows, or raise the budget to "
            f"{format_bytes(budget_for(needed, budget.counting))}",
        )
    return below_floor(footprint, budget)


def _rungs(
    footprint: Footprint, options: Options, budget: Budget, usable: int, followed: list[Candidate]
) -> Iterator[Plan]:
    host = [HostRows()] if HostRows.refusal(footprint) is None else []
    plain = None
    if _runs_whole(footprint, options) and _plain_peak(footprint) <= usable:
        plain = _plan(footprint, [], budget, {})
    measured = _pinned if options.rows is not None else _measured
    plans = measured(footprint, options, budget, usable, host)
    if footprint.traced or footprint.probed or (footprint.laws and footprint.variants):
        under = [plan for way in footprint.probed for plan in _under(way, footprint, options, budget, usable, host)]
        chosen = _of_candidates(footprint, options, budget, usable, host, followed)
        yield from _fastest_first(plain, [*plans, *under, *chosen], footprint.counting)
    else:
        yield from [] if plain is None else [plain]
        yield from plans


def _fastest_first(plain: Plan | None, plans: list[Plan], counting: Counting) -> Iterator[Plan]:
    """What was measured and what was followed, by predicted time, as far as it is worth trying.

    Where that fits, nothing comes before it but what is faster by a lever that leaves the chunks as they are.
    """
    # Of equally fast ones the one with fewer levers, then the larger, does less.
    plans.sort(key=lambda plan: (plan.predicted_seconds or 0.0, len(plan.levers), -(plan.predicted_peak_bytes or 0)))
    if plain is not None:
        quickest = next((plan for plan in plans if whole_levers_of(plan.levers)), None)
        if quickest is not None and (quickest.predicted_seconds or 0.0) < (plain.predicted_seconds or 0.0):
            plans.remove(quickest)
            yield quickest
        yield plain
    yield from worth_trying(
        plans, counting, kind=lambda plan: frozenset(plan.levers),
        peak_bytes=lambda plan: cast(int, plan.predicted_peak_bytes),
    )  # fmt: skip


def _under(
    way: ProbedWay, footprint: Footprint, options: Options, budget: Budget, usable: int, host: list[HostRows]
) -> Iterator[Plan]:
    """The plans that laws of probes under ``way`` predict, on all rows or some at a time."""
    if not is_allowed(way, options.allow):
        return
    under = footprint_under(footprint, way.levers)
    own = [find_levers()[name](**knobs) for name, knobs in way.levers.items()]
    if _runs_whole(under, options) and _plain_peak(under) <= usable:
        yield _plan(footprint, own, budget, {})
    if options.rows is None and not _may_split(under, options):
        return
    measured = _pinned if options.rows is not None else _splits
    for plan in measured(under, options, budget, usable, host):
        yield _plan(footprint, [*own, *levers_of(plan)], budget, plan.knob_origins)


def _of_candidates(
    footprint: Footprint,
    options: Options,
    budget: Budget,
    usable: int,
    host: list[HostRows],
    followed: list[Candidate],
) -> Iterator[Plan]:
    """The plans of followed steps that fit."""
    for candidate in followed:
        names = {lever.name for lever in candidate.levers}
        # The plain step is there already; a split alone is predicted better by its own laws.
        if names and candidate.peak_bytes <= usable and not (footprint.laws and names == {SplitRows.name}):
            levers = [*(host if SplitRows.name in names else []), *candidate.levers]
            is_pinned = options.rows is not None and SplitRows.name in names
            origins = {f"{SplitRows.name}.rows": options.rows_origin} if is_pinned else {}
            yield _plan(footprint, levers, budget, origins)


def _measured(
    footprint: Footprint, options: Options, budget: Budget, usable: int, host: list[HostRows]
) -> Iterator[Plan]:
    """The plans that laws of probes predict."""
    smallest = None
    if _may_chunk_loss(footprint, options):
        # Nothing runs twice and no chunk is launched for few rows: faster than whatever splits.
        for head in ChunkLoss.candidates(footprint, usable):
            plan = _plan(footprint, [head], budget, {})
            smallest = plan.predicted_peak_bytes
            yield plan
    for plan in _splits(footprint, options, budget, usable, host):
        if smallest is None or cast(int, plan.predicted_peak_bytes) < smallest:
            yield plan


def _splits(
    footprint: Footprint, options: Options, budget: Budget, usable: int, host: list[HostRows]
) -> Iterator[Plan]:
    """A few rows at a time, through the whole model or in parts of it."""
    if _may_split(footprint, options):
        for lever in SplitRows.candidates(footprint, usable):
            yield _plan(footprint, [*host, lever], budget, {})
    for mapped in _mapped(footprint, options, usable):
        yield _plan(footprint, [mapped], budget, {})


def _runs_whole(footprint: Footprint, options: Options) -> bool:
    pinned = options.rows
    return pinned is None or (pinned if isinstance(pinned, int) else max(pinned)) >= footprint.batch_rows


def _pinned(
    footprint: Footprint, options: Options, budget: Budget, usable: int, host: list[HostRows]
) -> Iterator[Plan]:
    """The plans that laws of probes predict for rows that are pinned."""
    if options.rows is None or _runs_whole(footprint, options):
        return
    rows = options.rows if isinstance(options.rows, int) else list(options.rows)
    for lever in _with_rows(footprint, options, rows, usable):
        if predict_plan(footprint, {lever.name: lever.knobs()}).peak_allocated_bytes <= usable:
            yield _plan(footprint, [*host, lever], budget, {f"{lever.name}.rows": options.rows_origin})


def _with_rows(footprint: Footprint, options: Options, rows: int | list[int], usable: int) -> list[Lever]:
    """The ways to run ``rows`` at a time."""
    if _may_split(footprint, options):
        return [SplitRows(rows).keeping(footprint, usable)]
    return [
        find_levers()[variant.lever](rows=rows, **variant.knobs)  # type: ignore[call-arg]  # its fields are its knobs
        for variant in footprint.variants
        if find_levers()[variant.lever].exactness <= options.allow and _has_rows(variant.lever)
    ]


def _has_rows(lever: str) -> bool:
    return any(field.name == "rows" for field in dataclasses.fields(cast(Any, find_levers()[lever])))


def _mapped(footprint: Footprint, options: Options, usable: int) -> list[Lever]:
    """Parts of the model in chunks, where rows cannot be split through all of it: the fastest first, then smaller."""
    fitting: list[tuple[float, int, Lever]] = []
    for lever in {variant.lever: find_levers()[variant.lever] for variant in footprint.variants}.values():
        if lever.refusal(footprint) is not None or lever.exactness > options.allow:
            continue
        for candidate in cast(type[PredictedLever], lever).candidates(footprint, usable):
            predicted = candidate.predict(footprint)
            if predicted.peak_allocated_bytes <= usable:
                fitting.append((predicted.seconds or 0.0, predicted.peak_allocated_bytes, candidate))
    ladder: list[Lever] = []
    smallest = None
    for _, peak, smaller in sorted(fitting, key=lambda entry: entry[:2]):
        if smallest is None or peak < smallest:
            smallest = peak
            ladder.append(smaller)
    return ladder


def _may_split(footprint: Footprint, options: Options) -> bool:
    return SplitRows.refusal(footprint) is None and options.allow >= SplitRows.exactness and bool(footprint.laws)


def _may_chunk_loss(footprint: Footprint, options: Options) -> bool:
    return ChunkLoss.refusal(footprint) is None and options.allow >= ChunkLoss.exactness


def _plain_peak(footprint: Footprint) -> int:
    return footprint.predicted_peak_bytes(rows=footprint.batch_rows)


def _plan(footprint: Footprint, levers: list[Lever], budget: Budget, origins: dict[str, KnobOrigin]) -> Plan:
    """``origins``: of the knobs that were not chosen here."""
    taken = {lever.name: lever.knobs() for lever in sorted(levers, key=lambda lever: lever.slot)}
    chosen = {f"{name}.{knob}": KnobOrigin.CHOSEN for name, knobs in taken.items() for knob in knobs}
    predicted = predict_plan(footprint, taken)
    return Plan(
        levers=taken,
        exactness=max((lever.exactness for lever in levers), default=Exactness.SAME_BITS),
        batch_rows=footprint.batch_rows,
        budget=budget,
        predicted_peak_bytes=predicted.peak_allocated_bytes,
        predicted_seconds=predicted.seconds,
        knob_origins=chosen | origins,
    )


