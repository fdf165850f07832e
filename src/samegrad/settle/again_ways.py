"""The step with its blocks run again on the whole batch, probed, where rows could be split too and nothing is followed.

On a card a trace says what running blocks again saves, beside a split as well. On the CPU there is no card to follow
the step for, and a plan would always split: in more chunks than it takes blocks to keep little.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from samegrad.declared import DeclaredStep
from samegrad.errors import CannotSplit
from samegrad.exact.aliases import ParameterAliases
from samegrad.exact.mapped import MappedStep
from samegrad.exact.out_of_memory import OutOfMemory
from samegrad.exact.step_draws import StepDraws
from samegrad.exact.unit_chain import Unit, find_units
from samegrad.execute.trial import examine_mapped, few_rows
from samegrad.levers.recompute import Recompute
from samegrad.measure.laws import fit_mapped_laws
from samegrad.measure.probe import time_plain, time_split
from samegrad.measure.probe_sets import mapped_probes
from samegrad.measure.within_memory import WithinMemory
from samegrad.plan.whole_ways import plain_share
from samegrad.records import Footprint, Phase, Variant
from samegrad.settle.probing import Measurement


def with_blocks_again(
    declared: DeclaredStep, aliases: ParameterAliases, measurement: Measurement, batch: Any
) -> Measurement:
    """``measurement`` with what running every block again takes, or why it was not tried. Nothing is left changed."""
    footprint, ways = measurement.footprint, measurement.ways
    if footprint.traced or ways.by_rows is None:
        return measurement
    refusals = {name: why for name, why in footprint.refusals.items() if name != Recompute.name}
    variants = footprint.variants
    with WithinMemory(declared) as memory:
        try:
            variants = (*variants, _probed(declared, aliases, measurement, batch))
        except (CannotSplit, OutOfMemory) as refused:
            refusals[Recompute.name] = refused.found
    if memory.found:
        refusals[Recompute.name] = memory.found
    changed = dataclasses.replace(footprint, variants=variants, refusals=refusals)
    return dataclasses.replace(measurement, footprint=changed)


def _probed(declared: DeclaredStep, aliases: ParameterAliases, measurement: Measurement, batch: Any) -> Variant:
    footprint, ways, layout = measurement.footprint, measurement.ways, declared.layout(batch)
    lever = Recompute(blocks_of(declared, batch))
    examine_mapped(declared, aliases, batch, layout, lever, ways.sites, ways.rules)
    step = MappedStep(declared, aliases, ways.mapped_examination(), lever.scheme())
    probes = mapped_probes(step, batch, layout, in_chunks=False, timed_runs=0)
    rows = probes[-1].batch_rows
    # One after the other, since what else the machine does comes and goes.
    plain = time_plain(declared, batch, layout, batch_rows=rows, draws=StepDraws(ways.sites))
    again = time_split(step, batch, layout, [rows])
    per_row, per_chunk = _seconds(footprint, max(1.0, again / plain) * plain_share(footprint), again / rows)
    turn = tuple(law for law in footprint.plain_laws if law.phase is Phase.OPTIMIZER)
    return Variant(
        lever=lever.name,
        knobs=lever.knobs(),
        laws=(*fit_mapped_laws(probes, missing_bytes=measurement.turn.missing_state_bytes), *turn),
        forwards_per_step=lever.forwards,
        seconds_per_row=per_row,
        seconds_per_chunk=per_chunk,
    )


def _seconds(footprint: Footprint, slower: float, few_row_seconds: float) -> tuple[float | None, float | None]:
    """Of a row and of all at once: ``slower`` than rows in chunks are, or as a row of few took, whichever is less.

    Where launches are most of the time, the rows of small chunks seem to take more than those of all at once do.
    """
    if footprint.seconds_per_row is None or footprint.seconds_per_chunk is None:
        return None, None
    per_row, per_chunk = slower * footprint.seconds_per_row, slower * footprint.seconds_per_chunk
    rows = footprint.batch_rows
    return (few_row_seconds, 0.0) if few_row_seconds * rows < per_row * rows + per_chunk else (per_row, per_chunk)


def blocks_of(declared: DeclaredStep, batch: Any) -> list[str | list[str]]:
    """Every block of the model by itself, seen on a few rows. Raises CannotSplit where it has none."""
    chain = find_units(declared, few_rows(declared, batch, declared.layout(batch))[0])
    parts = [part for unit in chain.units for part in _parts_of(unit)]
    if not parts:
        raise CannotSplit(
            asked="run blocks of the model again in backward",
            found=chain.reason or chain.why_single_layers,
            do="split the rows, or run the step whole",
        )
    return [part.paths[0] if len(part.paths) == 1 else list(part.paths) for part in parts]


def _parts_of(unit: Unit) -> list[Unit]:
    """The blocks of a unit that is a row of them, or itself where it is one."""
    inner = [part for part in unit.inner if part.has_parts]
    return inner or [unit] * unit.has_parts
