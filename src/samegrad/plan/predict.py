"""What a footprint says of any plan: by what was followed where the plan was, else by each of its levers' own laws."""

from __future__ import annotations

import dataclasses
from typing import Any

from samegrad.levers import find_levers
from samegrad.plan.traced import predict_traced
from samegrad.records import Footprint, Origin


def predict_plan(footprint: Footprint, levers: dict[str, dict[str, Any]]) -> Footprint:
    """The footprint under ``levers``, in slot order. Raises BadInput where one of them was neither followed nor probed.

    Peaks are those that ``footprint`` counts: counted bytes, or what is allocated.
    """
    known = find_levers()
    followed = predict_traced(footprint, levers)
    # Of a split alone the bytes are known better from its own laws.
    split_alone = bool(footprint.laws) and set(levers) <= {"host_rows", "split_rows"}
    if followed is not None and levers and not split_alone:
        peak_bytes, seconds = followed
        rows = levers.get("split_rows", {}).get("rows", footprint.batch_rows)
        return _predicted(footprint, rows if isinstance(rows, int) else max(rows), peak_bytes, seconds)
    predicted = footprint
    for name in sorted(levers, key=lambda name: known[name].slot):
        predicted = known[name](**levers[name]).predict(predicted)
    if predicted is not footprint and predicted.origin is Origin.PREDICTED and levers:
        return predicted if followed is None else dataclasses.replace(predicted, seconds=followed[1])
    rows = footprint.batch_rows
    return _predicted(
        footprint, rows, footprint.predicted_peak_bytes(rows=rows), footprint.predicted_seconds(rows=rows),
        {law.phase: law.peak_bytes(rows=rows, batch_rows=rows) for law in footprint.plain_laws},
    )  # fmt: skip


def _predicted(
    footprint: Footprint, rows: int, peak_bytes: int, seconds: float | None, by_phase: dict[Any, int] | None = None
) -> Footprint:
    return dataclasses.replace(
        footprint,
        origin=Origin.PREDICTED,
        rows=rows,
        peak_allocated_bytes=peak_bytes,
        peak_reserved_bytes=None,
        steady_cap_bytes=None,
        smallest_cap_bytes=None,
        seconds=seconds,
        by_category={},
        by_phase=by_phase or {},
        by_module={},
        at_peak=(),
        timeline=(),
    )
