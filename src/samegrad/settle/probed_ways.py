"""The step probed under levers that leave its chunks as they are, where a budget does not hold the plain step.

The same small runs as of the plain step give its laws. What a lever gains in time is smaller than what two runs of one
step differ by on a busy machine, so plain and changed steps are timed in turn, and what is within that is no gain.
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

from samegrad.data.prefetch import stream_chunks
from samegrad.declared import DeclaredStep
from samegrad.errors import CannotSplit, UsageError
from samegrad.exact.aliases import ParameterAliases
from samegrad.exact.out_of_memory import OutOfMemory
from samegrad.exact.split import SplitStep
from samegrad.exact.step_draws import StepDraws
from samegrad.exact.undisturbed import FailsOnFewRows
from samegrad.execute.apply import in_force
from samegrad.levers import Slot, find_levers
from samegrad.levers._variants import most_rows
from samegrad.measure.laws import fit_laws
from samegrad.measure.probe import time_plain
from samegrad.measure.probe_sets import MORE_ROOM, kept_row_bytes, plain_probes, split_probes
from samegrad.measure.within_memory import WithinMemory
from samegrad.plan.margin import usable_bytes
from samegrad.plan.options import Options
from samegrad.records import Budget, Exactness, Phase, Plan, ProbedWay
from samegrad.settle.lever_ways import Levers, holds_less, lever_sets, offered_levers
from samegrad.settle.own_code import own_code_under
from samegrad.settle.probing import Measurement

# What a lever must gain of a step's time to count as faster.
_CLEARLY_FASTER = 0.95
_TURNS = 2


def with_probed_ways(
    declared: DeclaredStep, aliases: ParameterAliases, measurement: Measurement, batch: Any, budget: Budget,
    options: Options,
) -> Measurement:  # fmt: skip
    """``measurement`` with the step probed under each of its levers, or why it was not. Nothing of the user's changes.

    Not under what pins host memory: how much that is, only a trace says.
    """
    footprint, refusals = measurement.footprint, dict(measurement.footprint.refusals)
    slots = {name: lever.slot for name, lever in find_levers().items()}
    offered = {
        name: knobs
        for name, knobs in offered_levers(footprint, options).items()
        if slots[name] not in (Slot.SAVED, Slot.STATE)
    }
    found = []
    for levers in lever_sets(offered, []):
        try:
            with own_code_under(levers, declared):
                found.append(_probed(declared, aliases, measurement, batch, budget, levers))
        except (CannotSplit, UsageError, OutOfMemory) as error:
            if len(levers) == 1:
                refusals[next(iter(levers))] = error.found
    changed = dataclasses.replace(footprint, probed=tuple(found), refusals=refusals)
    return dataclasses.replace(measurement, footprint=changed)


def _probed(
    declared: DeclaredStep, aliases: ParameterAliases, measurement: Measurement, batch: Any, budget: Budget,
    levers: Levers,
) -> ProbedWay:  # fmt: skip
    footprint, ways, layout = measurement.footprint, measurement.ways, declared.layout(batch)
    plan = Plan(levers=levers, exactness=Exactness.ROUNDED, batch_rows=layout.rows)
    draws = StepDraws(ways.sites)
    # For their bytes alone: a lever's seconds are told by runs in turn with the plain step.
    with in_force(plan, declared, layout.rows) as execution:
        whole = plain_probes(
            execution.declared, batch, layout, draws, whole_only=isinstance(ways.refusal, FailsOnFewRows), timed_runs=0
        )
    few = most = whole[-1].batch_rows
    if declared.device.type == "cuda":
        # At a few rows launches hide what its kernels gain.
        most = max(few, most_rows(footprint.plain_laws, layout.rows, usable_bytes(budget)))
    slower = _slower_on_rows_that_fit(declared, batch, plan, (few, most), draws)
    missing = measurement.turn.missing_state_bytes
    turn = tuple(law for law in footprint.plain_laws if law.phase is Phase.OPTIMIZER)
    way = ProbedWay(
        levers=levers,
        plain_laws=(*fit_laws(whole, missing_bytes=missing), *turn),
        laws=footprint.laws,
        kept_row_bytes=footprint.kept_row_bytes,
        seconds_per_row=None if footprint.seconds_per_row is None else footprint.seconds_per_row * slower,
        seconds_per_chunk=None if footprint.seconds_per_chunk is None else footprint.seconds_per_chunk * slower,
    )
    # Chunks of what holds no less at once, and is no faster, hold no less either.
    if ways.by_rows is None or (slower >= 1.0 and not holds_less(way, footprint)):
        return way
    with in_force(plan, declared, layout.rows) as execution:
        split = SplitStep(execution.declared, aliases, ways.by_rows, stream_chunks)
        parts = split_probes(split, batch, layout, timed_runs=0)
    kept = kept_row_bytes(parts) if footprint.kept_row_bytes is not None else None
    return dataclasses.replace(way, laws=(*fit_laws(parts, missing_bytes=missing), *turn), kept_row_bytes=kept)


def _slower_on_rows_that_fit(
    declared: DeclaredStep, batch: Any, plan: Plan, span: tuple[int, int], draws: StepDraws
) -> float:
    """``_slower`` on the most rows of ``span`` that there is memory for: laws of few rows may be a little low."""
    few, rows = span
    while True:
        with WithinMemory(declared) as memory:
            return _slower(declared, batch, plan, rows, draws)
        if rows <= few:
            raise memory.refusal(asked=f"time the step under {', '.join(plan.levers)} on {rows} rows", do=MORE_ROOM)
        rows = max(few, rows // 2)


def _slower(declared: DeclaredStep, batch: Any, plan: Plan, rows: int, draws: StepDraws) -> float:
    """The time of the step under ``plan`` as a part of the plain one's; 1 where it is hardly faster."""
    layout = declared.layout(batch)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(_TURNS):
        for under in seconds:
            with contextlib.ExitStack() as stack:
                running = stack.enter_context(in_force(plan, declared, layout.rows)).declared if under else declared
                seconds[under].append(time_plain(running, batch, layout, batch_rows=rows, draws=draws))
    clearly = max(seconds[True]) < _CLEARLY_FASTER * min(seconds[False])
    ratio = min(seconds[True]) / min(seconds[False])
    return ratio if clearly else max(1.0, ratio)
