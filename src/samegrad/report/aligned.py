"""Two courses of one step laid over each other phase by phase: one may have made some operations more."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

from samegrad.records import Phase, TimelinePoint

_Runs = list[tuple[Phase, list[TimelinePoint]]]


def aligned(points: Sequence[TimelinePoint], onto: Sequence[TimelinePoint]) -> list[TimelinePoint]:
    """``points`` moved so that each phase lies where it does in ``onto``; as they are where no phase is in both.

    A phase that ``onto`` lacks, a hand-over say, lies between its neighbours; one that only ``onto`` has stays empty.
    """
    ours, theirs = _runs(points), _runs(onto)
    partner = _partners(ours, theirs)
    if not partner:
        return list(points)
    starts, targets = _starts(ours), _starts(theirs)
    moved = []
    for index, (_, run) in enumerate(ours):
        if index in partner:
            first = last = index
        else:
            # All that has no partner here shares the gap between the neighbours that have one.
            first = max((i for i in partner if i < index), default=-1) + 1
            last = min((i for i in partner if i > index), default=len(ours)) - 1
        to_start, to_end = _target(first, last, partner, targets)
        start, end = starts[first], starts[last + 1]
        scale = (to_end - to_start) / (end - start) if end > start else 0.0
        moved += [
            dataclasses.replace(point, position_fraction=to_start + (point.position_fraction - start) * scale)
            for point in run
        ]
    return moved


def _target(first: int, last: int, partner: dict[int, int], targets: Sequence[float]) -> tuple[float, float]:
    """Where the runs ``first`` to ``last`` are to begin and end."""
    if first in partner:
        return targets[partner[first]], targets[partner[first] + 1]
    begin = targets[partner[first - 1] + 1] if first - 1 in partner else targets[0]
    return begin, targets[partner[last + 1]] if last + 1 in partner else targets[-1]


def _partners(ours: _Runs, theirs: _Runs) -> dict[int, int]:
    """Which run of ``theirs`` each of ``ours`` is: as many as can be in order, of those that lie closest."""
    best = [[0.0] * (len(theirs) + 1) for _ in range(len(ours) + 1)]
    for i, j in itertools.product(reversed(range(len(ours))), reversed(range(len(theirs)))):
        with_both = _likeness(ours[i], theirs[j]) + best[i + 1][j + 1]
        best[i][j] = max(with_both, best[i + 1][j], best[i][j + 1])
    partner = {}
    i = j = 0
    while i < len(ours) and j < len(theirs):
        if best[i][j] == best[i + 1][j]:
            i += 1
        elif best[i][j] == best[i][j + 1]:
            j += 1
        else:
            partner[i] = j
            i, j = i + 1, j + 1
    return partner


def _likeness(ours: tuple[Phase, list[TimelinePoint]], theirs: tuple[Phase, list[TimelinePoint]]) -> float:
    """Nothing for two phases; for one, less where its runs lie apart, since chunks repeat their phases."""
    if ours[0] is not theirs[0]:
        return 0.0
    return 1.5 - min(1.0, abs(ours[1][0].position_fraction - theirs[1][0].position_fraction))


def _runs(points: Sequence[TimelinePoint]) -> _Runs:
    return [(phase, list(run)) for phase, run in itertools.groupby(points, key=lambda point: point.phase)]


def _starts(runs: _Runs) -> list[float]:
    """Where each run begins, and where the last one ends."""
    starts = [run[0].position_fraction for _, run in runs]
    return [*starts, *(run[-1].position_fraction for _, run in runs[-1:])]
