"""The step under levers that leave its chunks as they are, as a footprint has it: by probes or as it was followed."""

from __future__ import annotations

import dataclasses
from typing import Any

from samegrad.errors import NotMeasured
from samegrad.levers import find_levers, find_whole_levers
from samegrad.records import Budget, Exactness, Footprint, ProbedWay
from samegrad.unit_tables import TracedWay


def whole_levers_of(levers: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Those of a plan's levers that leave the chunks as they are, with their knobs."""
    return {name: knobs for name, knobs in levers.items() if name in find_whole_levers()}


def footprint_under(footprint: Footprint, levers: dict[str, dict[str, Any]]) -> Footprint:
    """The footprint of the step under such ``levers``, as it was probed. Raises NotMeasured where it was not."""
    if not levers:
        return footprint
    way = next((way for way in footprint.probed if way.levers == levers), None)
    if way is None:
        raise NotMeasured(
            asked=f"predict {' and '.join(f'{name} {knobs}' for name, knobs in levers.items())}",
            found="the step was neither probed nor followed under that",
            do="settle a plan within a budget that the plain step does not keep: it is looked at there",
        )
    return dataclasses.replace(
        footprint,
        plain_laws=way.plain_laws,
        laws=way.laws,
        kept_row_bytes=way.kept_row_bytes,
        seconds_per_row=way.seconds_per_row,
        seconds_per_chunk=way.seconds_per_chunk,
        # These were found of the plain step.
        variants=(),
        head=None,
        traced=(),
        probed=(),
    )


def is_allowed(way: ProbedWay | TracedWay, allow: Exactness) -> bool:
    """Whether every lever of ``way`` is as exact as that, or more so."""
    return all(find_levers()[name].exactness <= allow for name in way.levers)


def has_room(way: TracedWay, budget: Budget | None, rows: int) -> bool:
    """Whether what ``way`` pins on the host at ``rows`` at a time is within the budget's host memory, if it has any."""
    if budget is None or budget.host_bytes is None:
        return True
    return way.pinned_bytes(rows=rows) <= budget.host_bytes
