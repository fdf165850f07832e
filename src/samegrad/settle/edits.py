"""A settled plan with other levers or other rows at a time."""

from __future__ import annotations

import dataclasses
from typing import Any

from samegrad.levers import find_levers
from samegrad.levers.expandable_segments import ExpandableSegments
from samegrad.levers.layout import Layout
from samegrad.levers.optimizer_state import OptimizerState
from samegrad.levers.split_rows import SplitRows
from samegrad.records import Exactness, KnobOrigin, Plan

Levers = dict[str, dict[str, Any]]


def with_levers(plan: Plan, more: Levers) -> Plan:
    """``plan`` with the levers of ``more`` as well, in the order in which they nest."""
    known = find_levers()
    levers = dict(sorted((plan.levers | more).items(), key=lambda item: known[item[0]].slot))
    exactness = max((known[name].exactness for name in levers), default=Exactness.SAME_BITS)
    origins = {f"{name}.{knob}": KnobOrigin.CHOSEN for name, knobs in levers.items() for knob in knobs}
    return dataclasses.replace(plan, levers=levers, exactness=exactness, knob_origins=origins | plan.knob_origins)


def plan_anew(settled: Plan, levers: Levers, rows: int) -> Plan:
    """The settled plan's batch and layout, ``rows`` at a time, under ``levers`` instead of its own."""
    kept = {n: knobs for n, knobs in settled.levers.items() if n in (Layout.name, ExpandableSegments.name)}
    if rows < settled.batch_rows:
        kept |= {name: knobs for name, knobs in settled.levers.items() if name == "host_rows"}
        kept |= {SplitRows.name: {"rows": rows, "kept_chunks": 0}}
    origins = {name: origin for name, origin in settled.knob_origins.items() if name.partition(".")[0] in kept}
    return with_levers(dataclasses.replace(settled, levers=kept, knob_origins=origins), levers)


def makes_room(settled: Plan) -> list[Levers]:
    """What others are tried beside, one after the other until something fits: it costs time, and may be needed."""
    name = OptimizerState.name
    return [{}, {name: settled.levers[name]}] if name in settled.levers else [{}]


def rows_of(plan: Plan) -> int:
    """Rows of the largest chunk."""
    rows = plan.levers.get(SplitRows.name, {}).get("rows", plan.batch_rows)
    return rows if isinstance(rows, int) else max(rows)


def even_rows(batch_rows: int, rows: int) -> int:
    """As many chunks as ``rows`` at a time make, all of one size where that can be, so that one graph serves them."""
    chunks = -(-batch_rows // max(1, rows))
    dividing = next((n for n in range(chunks, 2 * chunks) if batch_rows % n == 0), chunks)
    return -(-batch_rows // dividing)
