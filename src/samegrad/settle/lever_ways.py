"""The step followed under levers that leave its chunks as they are, where a budget does not hold the plain step.

Each is followed on the whole batch, and, where rows may be split beside it, on part of it; at other rows its storages
lie on lines, as those of the plain step do. Optimizer state on the host changes what is resident and nothing else, so
one trace of it serves every other way as well. What can be chosen only together with another lever is followed with it.
What was probed on the device to be no faster and to hold no less is not followed: that takes seconds, and a plan would
take it or leave it by chance.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from samegrad.errors import CannotTrace, UsageError
from samegrad.levers import Slot, find_levers, find_whole_levers
from samegrad.levers.autocast import Autocast
from samegrad.levers.optimizer_state import OptimizerState
from samegrad.measure.laws import peak_of
from samegrad.plan.options import Options
from samegrad.plan.whole_ways import footprint_under
from samegrad.records import Budget, Category, Footprint, ProbedWay
from samegrad.settle.followed_step import FollowedStep
from samegrad.settle.traced_ways import traces_under, way_of
from samegrad.unit_tables import TracedWay, UnitTable
from samegrad.units import format_bytes

Levers = dict[str, dict[str, Any]]

# Of the budget, from which on optimizer state is worth sending to the host.
_WORTH_FRACTION = 0.05
# Of the plain step's peak, below which a lever's saves something.
_LESS_FRACTION = 0.98


def with_lever_ways(step: FollowedStep, footprint: Footprint, options: Options, budget: Budget) -> Footprint:
    """``footprint``, which has the ways of the plain step, with those under levers, or why they were not followed."""
    refusals = dict(footprint.refusals)
    state = footprint.resident_bytes.get(Category.OPTIMIZER_STATE, 0)
    if state < _WORTH_FRACTION * budget.total_bytes:
        small = f"not needed: the optimizer's state is {format_bytes(state)} of {format_bytes(budget.total_bytes)}"
        refusals.setdefault(OptimizerState.name, small)
    offered = offered_levers(dataclasses.replace(footprint, refusals=refusals), options)
    ways = list(footprint.traced)
    for levers in lever_sets(offered, [way.levers for way in ways if way.levers]):
        if _brings_nothing(footprint, levers):
            continue
        try:
            ways.append(_followed(step, levers))
        except (CannotTrace, UsageError) as error:
            # Of several levers together, nothing is said of each.
            if len(levers) == 1:
                refusals[next(iter(levers))] = f"it cannot be followed: {error.found}"
    if OptimizerState.name in offered:
        try:
            ways += [*_with_state_on_host(step, tuple(ways))]
        except (CannotTrace, UsageError) as error:
            refusals[OptimizerState.name] = f"it cannot be followed: {error.found}"
    return dataclasses.replace(footprint, traced=tuple(ways), refusals=refusals)


def _brings_nothing(footprint: Footprint, levers: Levers) -> bool:
    """Whether the step was probed under ``levers``, took no less time and held no less."""
    way = next((way for way in footprint.probed if way.levers == levers), None)
    if way is None:
        return False
    rows = footprint.batch_rows
    seconds = footprint_under(footprint, levers).predicted_seconds(rows=rows)
    plain_seconds = footprint.predicted_seconds(rows=rows)
    if seconds is None or plain_seconds is None or seconds < plain_seconds:
        return False
    return not holds_less(way, footprint)


def holds_less(way: ProbedWay, footprint: Footprint) -> bool:
    """Whether the whole step holds clearly less under ``way`` than plain."""
    rows = footprint.batch_rows
    under, plain = (peak_of(laws, rows, rows) for laws in (way.plain_laws, footprint.plain_laws))
    return under < _LESS_FRACTION * plain


def offered_levers(footprint: Footprint, options: Options) -> Levers:
    """The levers that leave chunks as they are, with the knobs they have by default, which this step may take."""
    return {
        name: lever().knobs()
        for name, lever in find_whole_levers().items()
        if name not in footprint.refusals and lever.exactness <= options.allow
    }


def lever_sets(offered: Levers, followed: list[Levers]) -> Iterator[Levers]:
    """What is looked at anew: each lever alone, and what rounds beside every other one and every way of the step."""
    alone = [{name: knobs} for name, knobs in offered.items() if name != OptimizerState.name]
    yield from alone
    if Autocast.name in offered:
        rounding = {Autocast.name: offered[Autocast.name]}
        for others in [*alone, *followed]:
            if Autocast.name not in others:
                yield rounding | others


def _followed(step: FollowedStep, levers: Levers) -> TracedWay:
    whole = step.trace_whole(levers)
    # What leaves for the host need not be made again, and costs the link as much in chunks as at once. (Which tensors
    # are large enough to leave differs from rows to rows, so that each number of them would be a trace of its own.)
    leaves = any(find_levers()[name].slot is Slot.SAVED for name in levers)
    if leaves or step.ways.by_rows is None:
        return way_of(step, levers, {step.layout.rows: whole}, [] if leaves else step.blocks)
    return way_of(step, levers, traces_under(step, levers, whole), step.blocks)


def _with_state_on_host(step: FollowedStep, ways: tuple[TracedWay, ...]) -> Iterator[TracedWay]:
    """Each of ``ways`` with the optimizer's state on the host between its turns, by one trace of the plain step."""
    levers = {OptimizerState.name: OptimizerState().knobs()}
    found = way_of(step, levers, {step.layout.rows: step.trace_whole(levers)}, [])
    away_bytes = ways[0].tables[0].resident_bytes - found.tables[0].resident_bytes
    more_seconds = found.optimizer_seconds - ways[0].optimizer_seconds
    for way in ways:
        yield dataclasses.replace(
            way,
            levers=way.levers | levers,
            tables=tuple(_less(table, away_bytes) for table in way.tables),
            later_tables=tuple(_less(table, away_bytes) for table in way.later_tables),
            optimizer_bytes=max(way.optimizer_bytes, found.optimizer_bytes),
            optimizer_seconds=way.optimizer_seconds + more_seconds,
            host_state_bytes=found.host_state_bytes,
        )


def _less(table: UnitTable, away_bytes: int) -> UnitTable:
    return dataclasses.replace(table, resident_bytes=table.resident_bytes - away_bytes)
