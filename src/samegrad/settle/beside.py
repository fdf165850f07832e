"""A step that was probed on its device, followed as well: recomputation and the head's loss, planned unit by unit.

Probes are the truth and traces rank: what the plain step was measured to hold and take above its trace is added to
every plan that is made of traces. The ladder measures what is chosen before it is believed.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from samegrad.declared import DeclaredStep
from samegrad.errors import CannotTrace, UsageError
from samegrad.exact.aliases import ParameterAliases
from samegrad.measure.target import Target
from samegrad.measure.trace_reading import CUDA_BLOCK_BYTES, peak_bytes
from samegrad.settle.followed_step import FollowedStep, look_at_step
from samegrad.settle.probing import Measurement
from samegrad.settle.traced_ways import traced_ways
from samegrad.unit_tables import TracedWay, UnitTable


def followed_beside(
    declared: DeclaredStep, aliases: ParameterAliases, measurement: Measurement, batch: Any
) -> Measurement:
    """``measurement`` with what following the step adds; as it is where the step cannot be followed, which it says."""
    if declared.device.type != "cuda":
        return measurement
    footprint, layout = measurement.footprint, declared.layout(batch)
    try:
        target, look = Target.at_hand(declared.device), look_at_step(declared, batch, layout)
        step = FollowedStep(declared, aliases, batch, layout, target, measurement.ways, look)
        plain = step.trace_whole({})
        ways, refusals = traced_ways(step, plain)
    except (CannotTrace, UsageError) as error:
        facts = footprint.facts | {"not followed": f"{error.found}; only what was probed is planned"}
        return dataclasses.replace(measurement, footprint=dataclasses.replace(footprint, facts=facts))
    beyond = footprint.predicted_peak_bytes(rows=layout.rows) - peak_bytes(plain, round_to=CUDA_BLOCK_BYTES)
    followed = sum(s for o, s in zip(plain.operations, step.target.seconds_of(plain)) if o.step == 1)
    turn = sum(w.optimizer_seconds for w in ways[:1])
    measured = footprint.predicted_seconds(rows=layout.rows)
    # Probes end before the optimizer's turn.
    slower = 1.0 if measured is None else measured / max(followed - turn, 1e-9)
    scaled = tuple(_scaled(way, max(0, beyond), slower) for way in ways)
    known = {name: why for name, why in refusals.items() if name not in footprint.refusals}
    kept = {name: why for name, why in footprint.refusals.items() if name != "recompute" or "recompute" in refusals}
    return dataclasses.replace(
        measurement, footprint=dataclasses.replace(footprint, traced=scaled, refusals=kept | known)
    )


def _scaled(way: TracedWay, beyond_bytes: int, slower: float) -> TracedWay:
    return dataclasses.replace(
        way,
        tables=tuple(_table(table, beyond_bytes, slower) for table in way.tables),
        later_tables=tuple(_table(table, beyond_bytes, slower) for table in way.later_tables),
        chunk_seconds=way.chunk_seconds * slower,
        optimizer_bytes=way.optimizer_bytes + beyond_bytes,
    )


def _table(table: UnitTable, beyond_bytes: int, slower: float) -> UnitTable:
    units = tuple(
        dataclasses.replace(
            unit,
            forward_seconds=unit.forward_seconds * slower,
            backward_seconds=unit.backward_seconds * slower,
            chunk_seconds=unit.chunk_seconds * slower,
        )
        for unit in table.units
    )
    return dataclasses.replace(table, resident_bytes=table.resident_bytes + beyond_bytes, units=units)
