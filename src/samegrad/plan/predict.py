"""What a footprint says of any plan: by what was followed where the plan was, else by each of its levers' own laws."""

from __future__ import annotations

import dataclasses
from typing import Any

from samegrad.levers import PredictedLever, find_levers
from samegrad.levers._variants import peaks_by_phase
from samegrad.levers.expandable_segments import ExpandableSegments
from samegrad.plan.traced import predict_traced
from samegrad.plan.whole_ways import footprint_under, whole_levers_of
from samegrad.records import Footprint, Origin


def predict_plan(footprint: Footprint, levers: dict[str, dict[str, Any]]) -> Footprint:
    """The footprint under ``levers``, in slot order. Raises BadInput where one of them was neither followed nor probed.

    Peaks are those that ``footprint`` counts: counted bytes, or what is allocated, in whatever segments.
    """
    levers = {name: knobs for name, knobs in levers.items() if name != ExpandableSegments.name}
    followed = predict_traced(footprint, levers)
    whole = whole_levers_of(levers)
    # Of a split alone the bytes are known better from its own laws.
    split_alone = levers.keys() - whole.keys() <= {"host_rows", "split_rows"} and _has_laws(footprint, whole)
    if followed is not None and levers and not split_alone:
        rows = levers.get("split_rows", {}).get("rows", footprint.batch_rows)
        most = rows if isinstance(rows, int) else max(rows)
        found = _predicted(footprint, most, followed.peak_bytes, followed.seconds)
        return dataclasses.replace(found, host_bytes=followed.host_bytes)
    under = predicted = footprint_under(footprint, whole)
    known = find_levers()
    for name in sorted(levers.keys() - whole.keys(), key=lambda name: known[name].slot):
        lever = known[name](**levers[name])
        assert isinstance(lever, PredictedLever)
        predicted = lever.predict(predicted)
    if predicted is not under and predicted.origin is Origin.PREDICTED:
        return predicted if followed is None else dataclasses.replace(predicted, seconds=followed.seconds)
    rows = footprint.batch_rows
    return _predicted(
        under, rows, under.predicted_peak_bytes(rows=rows), under.predicted_seconds(rows=rows),
        peaks_by_phase(under.plain_laws, rows=rows, batch_rows=rows),
    )  # fmt: skip


def _has_laws(footprint: Footprint, whole: dict[str, dict[str, Any]]) -> bool:
    """Whether the step was probed in chunks, under those levers that leave chunks as they are."""
    probed = [way.laws for way in footprint.probed if way.levers == whole]
    return bool(footprint.laws if not whole else probed and probed[0])


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
