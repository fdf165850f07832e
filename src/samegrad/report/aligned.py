"""Two courses of one step laid over each other phase by phase: one may have made some operations more."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

from samegrad.records import Phase, TimelinePoint


def aligned(points: Sequence[TimelinePoint], onto: Sequence[TimelinePoint]) -> list[TimelinePoint]:
    """``points`` moved so that each phase begins where it does in ``onto``; as they are where phases differ."""
    theirs, ours = _runs(onto), _runs(points)
    if [phase for phase, _ in theirs] != [phase for phase, _ in ours]:
        return list(points)
    starts, targets = (_starts(runs) for runs in (ours, theirs))
    moved = []
    for (_, run), (start, end), (to_start, to_end) in zip(
        ours, itertools.pairwise(starts), itertools.pairwise(targets), strict=True
    ):
        scale = (to_end - to_start) / (end - start) if end > start else 0.0
        moved += [
            dataclasses.replace(point, position_fraction=to_start + (point.position_fraction - start) * scale)
            for point in run
        ]
    return moved


def _runs(points: Sequence[TimelinePoint]) -> list[tuple[Phase, list[TimelinePoint]]]:
    return [(phase, list(run)) for phase, run in itertools.groupby(points, key=lambda point: point.phase)]


def _starts(runs: Sequence[tuple[Phase, list[TimelinePoint]]]) -> list[float]:
    """Where each run begins, and where the last one ends."""
    starts = [run[0].position_fraction for _, run in runs]
    return [*starts, *(run[-1].position_fraction for _, run in runs[-1:])]
