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
from samegrad.levers.recompute import Recompute
from samegrad.measure.events import Trace
from samegrad.measure.second_step import repeats_itself
from samegrad.measure.target import Target
from samegrad.measure.trace_reading import CUDA_BLOCK_BYTES, peak_bytes
from samegrad.plan.options import Options
from samegrad.plan.traced import plain_peak_bytes
from samegrad.plan.whole_ways import footprint_under
from samegrad.records import Budget, Footprint
from samegrad.settle.followed_step import FollowedStep, look_at_step
from samegrad.settle.lever_ways import with_lever_ways
from samegrad.settle.probing import Measurement
from samegrad.settle.progress import working_on
from samegrad.settle.single_layers import with_blocks
from samegrad.settle.traced_ways import traced_ways
from samegrad.unit_tables import TracedWay, UnitTable


def followed_beside(
    declared: DeclaredStep,
    aliases: ParameterAliases,
    measurement: Measurement,
    batch: Any,
    budget: Budget | None = None,
    options: Options | None = None,
) -> Measurement:
    """``measurement`` with what following the step adds; as it is where the step cannot be followed, which it says.

    ``budget``: with ``options``, the step is followed as well under levers that leave its chunks as they are.
    """
    if declared.device.type != "cuda":
        return measurement
    footprint, layout = measurement.footprint, declared.layout(batch)
    working_on("following the step, to see what each module keeps")
    try:
        target, look = Target.at_hand(declared.device), look_at_step(declared, batch, layout)
        step = FollowedStep(declared, aliases, batch, layout, target, measurement.ways, look)
        plain = step.trace_whole({})
        step = with_blocks(dataclasses.replace(step, repeats=repeats_itself(plain)), plain)
        ways, refusals = traced_ways(step, plain)
        known = {name: why for name, why in refusals.items() if name not in footprint.refusals}
        kept = {n: why for n, why in footprint.refusals.items() if n != Recompute.name or Recompute.name in refusals}
        followed = dataclasses.replace(footprint, traced=ways, refusals=kept | known)
        if budget is not None and options is not None:
            followed = with_lever_ways(step, followed, options, budget)
    except (CannotTrace, UsageError) as error:
        facts = footprint.facts | {"not followed": f"{error.found}; only what was probed is planned"}
        return dataclasses.replace(measurement, footprint=dataclasses.replace(footprint, facts=facts))
    scales = _Scales(footprint, step, plain, ways[0].optimizer_seconds)
    scaled = tuple(_scaled(way, *scales.of(way)) for way in followed.traced)
    return dataclasses.replace(measurement, footprint=dataclasses.replace(followed, traced=scaled))


class _Scales:
    """By what the device holds and takes more than traces say: of the plain step, or of one under levers probed too."""

    def __init__(self, footprint: Footprint, step: FollowedStep, plain: Trace, turn_seconds: float) -> None:
        self._footprint, self._rows = footprint, step.layout.rows
        self._plain_beyond = self._measured_bytes({}) - peak_bytes(plain, round_to=CUDA_BLOCK_BYTES)
        followed = sum(s for o, s in zip(plain.operations, step.target.seconds_of(plain)) if o.step == 1)
        # Probes end before the optimizer's turn.
        self._plain_slower = self._ratio(footprint, followed - turn_seconds)

    def of(self, way: TracedWay) -> tuple[int, float]:
        """Bytes beyond those of ``way``, and the factor of its seconds."""
        table = way.tables[0]
        if not way.levers or all(probed.levers != way.levers for probed in self._footprint.probed):
            return max(0, self._plain_beyond), self._plain_slower
        beyond = self._measured_bytes(way.levers) - max(way.optimizer_bytes, plain_peak_bytes(table))
        followed = sum(unit.forward_seconds + unit.backward_seconds for unit in table.units)
        return max(0, beyond), self._ratio(footprint_under(self._footprint, way.levers), followed)

    def _measured_bytes(self, levers: dict[str, dict[str, Any]]) -> int:
        return footprint_under(self._footprint, levers).predicted_peak_bytes(rows=self._rows)

    def _ratio(self, footprint: Footprint, followed_seconds: float) -> float:
        measured = footprint.predicted_seconds(rows=self._rows)
        return 1.0 if measured is None else measured / max(followed_seconds, 1e-9)


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
