"""Ways through a batch that keep least and take longest, tried and probed only where the others do not do.

Lockstep that keeps every fourth boundary runs three forwards, that of several layers together twice as many as there
are: to try and to probe them takes most of planning, and a budget that a quicker way fits has no use for them. A
footprint that is for no one budget has them all.
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

from samegrad.declared import DeclaredStep
from samegrad.errors import BudgetTooSmall, CannotSplit
from samegrad.exact.aliases import ParameterAliases
from samegrad.exact.out_of_memory import OutOfMemory
from samegrad.execute.trial import MappingLever, examine_mapped
from samegrad.levers._variants import chunk_sizes
from samegrad.measure.laws import fit_mapped_laws
from samegrad.measure.probe_sets import BACKWARD_FORWARDS
from samegrad.measure.within_memory import WithinMemory
from samegrad.plan.choose import choose_plan
from samegrad.plan.margin import usable_bytes
from samegrad.plan.options import Options
from samegrad.records import Budget, Counting, Footprint, Phase, Variant
from samegrad.settle.probing import Measurement, knobs_but_rows, lever_probes

# Of a budget, what plans go down to without them: measured peaks may be above predicted ones, an allocator's by more.
_ROOM_FRACTION = {Counting.CUDA_ALLOCATOR: 0.8, Counting.TENSOR_BYTES: 0.95}
_FEWEST_CHUNKS = 2


def with_ways_needed(
    declared: DeclaredStep, aliases: ParameterAliases, measurement: Measurement, batch: Any, budget: Budget,
    options: Options,
) -> Measurement:  # fmt: skip
    """``measurement`` with as many of them as a plan within ``budget`` may need, one after the other."""
    while _needs_more(measurement, budget, options):
        measurement = _with_next_way(declared, aliases, measurement, batch)
    return measurement


def _needs_more(measurement: Measurement, budget: Budget, options: Options) -> bool:
    """Whether one that is untried may be the fastest within ``budget``, or the only one."""
    untried = measurement.ways.untried
    if not untried:
        return False
    try:
        ladder = choose_plan(measurement.footprint, options, budget)
    except (BudgetTooSmall, CannotSplit):
        return True
    fastest = ladder[0].predicted_seconds
    smallest = min((peak for plan in ladder if (peak := plan.predicted_peak_bytes) is not None), default=None)
    least_seconds = [_least_seconds(lever, measurement.footprint, options) for lever in untried]
    if fastest is None or smallest is None or smallest > _ROOM_FRACTION[budget.counting] * usable_bytes(budget):
        return True
    return any(seconds is None or seconds < fastest for seconds in least_seconds)


def _least_seconds(lever: MappingLever, footprint: Footprint, options: Options) -> float | None:
    """What a step by ``lever`` takes at least: in as few chunks as there can be. None where nothing is known of it."""
    like = _like(lever, footprint)
    if like is None:
        return None
    pinned = options.rows if options.rows is None or isinstance(options.rows, int) else list(options.rows)
    chunks = _FEWEST_CHUNKS if pinned is None else len(chunk_sizes(pinned, footprint.batch_rows))
    rows = -(-footprint.batch_rows // chunks)
    seconds = like.predicted_seconds(rows=rows, batch_rows=footprint.batch_rows)
    return None if seconds is None else seconds * _longer(lever, like)


def _like(lever: MappingLever, footprint: Footprint) -> Variant | None:
    """The lever with all that it may keep, as probed."""
    return next((variant for variant in footprint.variants if variant.lever == lever.name), None)


def _longer(lever: MappingLever, like: Variant) -> float:
    """By forwards and backward: chunks launch as often as they run."""
    return (lever.forwards + BACKWARD_FORWARDS) / (like.forwards_per_step + BACKWARD_FORWARDS)


def with_untried_ways(
    declared: DeclaredStep, aliases: ParameterAliases, measurement: Measurement, batch: Any
) -> Measurement:
    """``measurement`` with what all of them take, but for those that cannot be taken. Nothing is left changed."""
    while measurement.ways.untried:
        measurement = _with_next_way(declared, aliases, measurement, batch)
    return measurement


def _with_next_way(
    declared: DeclaredStep, aliases: ParameterAliases, measurement: Measurement, batch: Any
) -> Measurement:
    """With the first of them; as it is, but for that, where it cannot be taken or finds no memory: ways that keep more
    say why, or stand."""
    footprint, ways, layout = measurement.footprint, measurement.ways, declared.layout(batch)
    lever, *others = ways.untried
    ways = dataclasses.replace(ways, untried=tuple(others))
    with WithinMemory(declared), contextlib.suppress(CannotSplit, OutOfMemory):
        examine_mapped(declared, aliases, batch, layout, lever, ways.sites, ways.rules)
        variant = _probed(declared, aliases, measurement, batch, lever)
        footprint = dataclasses.replace(
            footprint,
            variants=(*footprint.variants, variant),
            refusals={name: why for name, why in footprint.refusals.items() if name != lever.name},
        )
        ways = dataclasses.replace(ways, mapped=(*ways.mapped, lever))
    return dataclasses.replace(measurement, footprint=footprint, ways=ways)


def _probed(
    declared: DeclaredStep, aliases: ParameterAliases, measurement: Measurement, batch: Any, lever: MappingLever
) -> Variant:
    """For its bytes alone: its seconds are those of the way that keeps more, by how often a row runs."""
    footprint = measurement.footprint
    like = _like(lever, footprint)
    probes = lever_probes(declared, aliases, measurement.ways, lever, batch, timed_runs=0)
    turn = tuple(law for law in footprint.plain_laws if law.phase is Phase.OPTIMIZER)
    per_row = per_chunk = None
    if like is not None and like.seconds_per_row is not None and like.seconds_per_chunk is not None:
        longer = _longer(lever, like)
        per_row, per_chunk = like.seconds_per_row * longer, like.seconds_per_chunk * longer
    return Variant(
        lever=lever.name,
        knobs=knobs_but_rows(lever),
        laws=(*fit_mapped_laws(probes, missing_bytes=measurement.turn.missing_state_bytes), *turn),
        forwards_per_step=lever.forwards,
        seconds_per_row=per_row,
        seconds_per_chunk=per_chunk,
    )
