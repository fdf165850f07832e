"""Why each lever is part of a plan or is not: what it saves and costs in this very plan, or in one that takes it."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Mapping
from typing import Any, cast

from samegrad.errors import BadInput
from samegrad.levers import Lever, PredictedLever, Slot, find_levers, find_whole_levers
from samegrad.levers.expandable_segments import ExpandableSegments
from samegrad.levers.host_rows import HostRows
from samegrad.levers.recompute import Recompute
from samegrad.plan.predict import predict_plan
from samegrad.plan.traced import Candidate, predict_traced
from samegrad.records import Exactness, Footprint, Plan
from samegrad.units import format_bytes, format_seconds

_NOT_NEEDED = "not needed: "
_PLAIN_FITS = "the plain step fits"
_FOR_TIME = (Slot.ALGORITHMS, Slot.COMPILE, Slot.CAPTURE)
_Levers = Mapping[str, dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Reasons:
    """Reasons for the plans of one footprint. ``fastest``: by a lever's name, the fastest followed plan with it."""

    footprint: Footprint
    allow: Exactness
    fastest: Mapping[str, Candidate]

    @functools.cached_property
    def _followed(self) -> dict[str, int | None]:
        return {}

    @functools.cached_property
    def _predicted(self) -> dict[str, Footprint]:
        return {}

    @functools.cached_property
    def _plain(self) -> Footprint:
        return predict_plan(self.footprint, {})

    def of(self, plan: Plan) -> dict[str, str]:
        """For every lever: taken, refused, not allowed or not needed, and why."""
        reasons = {}
        for name, lever in find_levers().items():
            refused = lever.refusal(self.footprint)
            if name in plan.levers:
                reasons[name] = f"taken: {self._share(plan, name)}"
            elif refused is not None:
                reasons[name] = self._refused(plan, refused)
            elif lever.exactness > self.allow:
                reasons[name] = f"not allowed: {lever.exactness.explained()} ({lever.exactness.name})"
            else:
                reasons[name] = f"{_NOT_NEEDED}{self._not_needed(plan, lever)}"
        return reasons

    def _share(self, plan: Plan, name: str) -> str:
        """What the plan gains and pays by this lever: the difference to the same plan without it."""
        if name == HostRows.name:
            return "only chunks travel to the device"
        without = {other: knobs for other, knobs in plan.levers.items() if other not in (name, HostRows.name)}
        try:
            other = self._under(without)
        except BadInput:
            # The rest is no plan by itself.
            other, without = self._plain, {}
        less_bytes = self._less_bytes(without, plan.levers, other.peak_allocated_bytes, plan.predicted_peak_bytes or 0)
        saved_bytes = max(0, less_bytes)
        plain = f" of the plain step's {format_bytes(other.peak_allocated_bytes)}"
        beside = f" beside {' and '.join(without)}" if without else plain
        before = other.seconds
        if name == Recompute.name and not without and (before or 0.0) > (plan.predicted_seconds or 0.0):
            # It takes a forward more than the plain step, whose time was told from rows in chunks.
            before = None
        share = f"saves {format_bytes(saved_bytes)}{beside}{_cost(before, plan.predicted_seconds)}"
        # A step is measured before it is believed, and its time printed beside this is the measured one.
        if name not in find_whole_levers():
            return f"{share} (predicted)"
        if less_bytes < 0:
            share = f"takes {format_bytes(-less_bytes)} more{beside}{_cost(other.seconds, plan.predicted_seconds)}"
        pinned = self._under(plan.levers).host_bytes
        return f"{share}{f', pins {format_bytes(pinned)} on the host' if pinned else ''} (predicted)"

    def _refused(self, plan: Plan, refused: str) -> str:
        """Why a lever that cannot be taken is not: where the plain step fits, that comes first."""
        why = refused.removeprefix(_NOT_NEEDED)
        is_needless = why != refused
        if plan.levers:
            return refused if is_needless else f"refused: {refused}"
        return f"{_NOT_NEEDED}{_PLAIN_FITS}; {why if is_needless else f'refused besides: {why}'}"

    def _not_needed(self, plan: Plan, lever: type[Lever]) -> str:
        beside = " and ".join(other for other in plan.levers if other != HostRows.name)
        reason = f"the plan fits with {beside}" if beside else _PLAIN_FITS
        if lever.slot in _FOR_TIME:
            # What they hold is no reason for or against them: they are taken where a run shows that they save time.
            return f"{reason}; how much faster it would be was not tried"
        if lever.name not in self.fastest:
            # "Not needed" must not read as "compared and slower" where nothing of the lever could be compared.
            if lever.name in find_whole_levers():
                return f"{reason}; {self._alone(lever)}"
            tried = any(True for _ in cast(type[PredictedLever], lever).candidates(self.footprint, sys.maxsize))
            return reason if tried else f"{reason}; what it would save was not measured"
        fastest = self.fastest[lever.name]
        levers = {lever.name: lever.knobs() for lever in fastest.levers}
        saved_bytes = max(0, self._less_bytes({}, levers, self._plain.peak_allocated_bytes, fastest.peak_bytes))
        how = " and ".join(lever.name for lever in fastest.levers)
        cost = _cost(self._plain.seconds, fastest.seconds)
        return f"{reason}; the fastest plan with it ({how}) saves {format_bytes(saved_bytes)}{cost}"


    def _alone(self, lever: type[Lever]) -> str:
        """What the step gains and pays by a lever that leaves its chunks as they are, with nothing else."""
        levers = {lever.name: lever().knobs()}
        try:
            found = self._under(levers)
        except BadInput:
            return "what it would save was not measured"
        less = self._less_bytes({}, levers, self._plain.peak_allocated_bytes, found.peak_allocated_bytes)
        saves = f"saves {format_bytes(less)}" if less >= 0 else f"takes {format_bytes(-less)} more"
        basis = "measured" if any(way.levers == levers for way in self.footprint.probed) else "predicted"
        return f"by itself it {saves}{_cost(self._plain.seconds, found.seconds)} ({basis})"

    def _less_bytes(self, without: _Levers, levers: _Levers, without_bytes: int, with_bytes: int) -> int:
        """How much less than ``without`` the plan with ``levers`` holds; the two peaks are those that were predicted.

        Where tensors were followed, tensors: what the plain step is said to need has workspaces in it, which no lever
        saved.
        """
        before, after = (self._followed_bytes(each) for each in (without, levers))
        if before is not None and after == with_bytes:
            return before - with_bytes
        return without_bytes - with_bytes

    def _under(self, levers: _Levers) -> Footprint:
        """Raises BadInput where they are no plan."""
        # Rungs of one ladder are compared with the same few plans.
        key = repr(levers)
        if key not in self._predicted:
            self._predicted[key] = predict_plan(self.footprint, dict(levers))
        return self._predicted[key]

    def _followed_bytes(self, levers: _Levers) -> int | None:
        levers = {name: knobs for name, knobs in levers.items() if name != ExpandableSegments.name}
        key = repr(levers)
        if key not in self._followed:
            found = predict_traced(self.footprint, levers)
            self._followed[key] = None if found is None else found.peak_bytes
        return self._followed[key]


def fastest_by_lever(candidates: list[Candidate]) -> dict[str, Candidate]:
    """The first of ``candidates``, which come fastest first, that takes each lever."""
    fastest: dict[str, Candidate] = {}
    for candidate in candidates:
        for lever in candidate.levers:
            fastest.setdefault(lever.name, candidate)
    return fastest


def _cost(before_seconds: float | None, after_seconds: float | None) -> str:
    if before_seconds is None or after_seconds is None:
        return ""
    more = after_seconds - before_seconds
    return f", costs {format_seconds(more)} a step" if more >= 0 else f" and {format_seconds(-more)} of a step"
