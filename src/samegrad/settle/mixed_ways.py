"""Chunks of some rows, captured or compiled, with some blocks that run again: between the ways that were measured.

More rows at a time are fewer chunks, each of which costs launches and another sum of gradients; blocks that are kept
are not run twice; both take memory. Bytes are taken for linear in the rows and in the rows times the kept blocks,
seconds in the chunks and in the blocks that run again. Two measurements, one with every block again and one with none,
and what following the step predicts give these planes; the pair that is the fastest by them is measured, and each
measurement bends them. A few are enough.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from samegrad.levers.graphs import Graphs
from samegrad.levers.recompute import Recompute
from samegrad.records import Plan
from samegrad.settle.candidates import Search, Tried
from samegrad.settle.edits import Levers, plan_anew
from samegrad.settle.one_chunk_way import ROOM_FRACTION, Way, measured_captured, tried_rows

_MOST_TRIED = 3
# Of a step's time, that must be won by another program.
_WORTH_FRACTION = 0.99
# Of the time of a step whose blocks all run again: those, where it was not followed (one forward more on about three);
# as many chunks more as it has, and what they may come to where nothing was measured at other rows.
_AGAIN_SHARE, _CHUNK_SHARE, _UNKNOWN_CHUNK_SHARE = 0.25, 0.1, 0.5
# How much what was predicted counts beside what was measured.
_PRIOR_WEIGHT = 0.01
# Of the room, what a mixture that did not fit holds at least.
_TOO_LARGE = 1.03


@dataclasses.dataclass(frozen=True)
class _Point:
    """``kept`` blocks of a step are, ``rows`` at a time: what it was measured to hold, and to take if that is known."""

    rows: int
    kept: int
    peak_bytes: float
    seconds: float | None


class _Planes:
    """Bytes and seconds by the rows at a time and the blocks that are kept, through ``points``."""

    def __init__(self, kept: Way, again: Way, search: Search) -> None:
        one = again.largest
        self._batch_rows, self._blocks = one.plan.batch_rows, len(again.blocks)
        self._captured = Graphs.name in one.plan.levers
        self.points = [self._point(found, 0) for found in again.fitted]
        self.points += [self._point(found, self._blocks) for found in kept.fitted]
        standing_bytes = float(sum(search.measurement.footprint.resident_bytes.values()))
        row_bytes, seconds = again.row_bytes(one, search) * self._batch_rows, one.rung.seconds
        self._expected_bytes = [standing_bytes, row_bytes, None]
        chunk_share = _CHUNK_SHARE if len({point.rows for point in self.points}) > 1 else _UNKNOWN_CHUNK_SHARE
        self._expected_seconds = [None, chunk_share * seconds, _again_share(kept, again) * seconds]
        self._fit()

    def learn(self, pair: tuple[int, int], found: Tried | None, most_bytes: float) -> None:
        """Of rows and kept blocks that were measured; None where they did not fit."""
        too_large = _Point(*pair, most_bytes * _TOO_LARGE, None)
        self.points.append(too_large if found is None else self._point(found, pair[1]))
        self._fit()

    def peak_bytes(self, rows: int, kept: int) -> float:
        return float(np.dot(self._bytes, self._sizes(rows, kept)))

    def seconds(self, rows: int, kept: int) -> float:
        return float(np.dot(self._seconds, self._work(rows, kept)))

    def fastest(self, room_bytes: float, rows_to_try: Sequence[int]) -> tuple[int, int] | None:
        """Rows and kept blocks that fit and were not measured, the fastest."""
        seen = {(point.rows, point.kept) for point in self.points}
        found = [
            (self.seconds(rows, kept), -rows, kept)
            for rows in rows_to_try
            for kept in range(self._blocks + 1)
            if (rows, kept) not in seen and self.peak_bytes(rows, kept) <= room_bytes
        ]
        if not found:
            return None
        _, rows, kept = min(found)
        return -rows, kept

    def _point(self, found: Tried, kept: int) -> _Point:
        # Launches are another matter than chunks: what is not captured tells nothing of what is.
        alike = (Graphs.name in found.plan.levers) is self._captured
        return _Point(tried_rows(found), kept, found.rung.peak_bytes, found.rung.seconds if alike else None)

    def _fit(self) -> None:
        sizes = [self._sizes(point.rows, point.kept) for point in self.points]
        self._bytes = _plane(sizes, [point.peak_bytes for point in self.points], self._expected_bytes)
        ran = [(point, point.seconds) for point in self.points if point.seconds is not None]
        work = [self._work(point.rows, point.kept) for point, _ in ran]
        self._seconds = _plane(work, [seconds for _, seconds in ran], self._expected_seconds)

    def _sizes(self, rows: int, kept: int) -> tuple[float, float, float]:
        share = rows / self._batch_rows
        return 1.0, share, share * kept / self._blocks

    def _work(self, rows: int, kept: int) -> tuple[float, float, float]:
        chunks = -(-self._batch_rows // rows) / -(-self._batch_rows // self.points[0].rows)
        return 1.0, chunks, 1 - kept / self._blocks


def mixed_candidates(
    settled: Plan, kept: Way, again: Way, search: Search, *, rows: int | None = None
) -> Iterator[Tried]:
    """Those that fit, each chosen by what was measured before. ``rows``: pinned by somebody."""
    planes, whole = _Planes(kept, again, search), settled.batch_rows
    # All chunks of one size, so that one graph serves them; with fewer rows nothing is won where all blocks are kept.
    least = tried_rows(kept.largest)
    rows_to_try = [rows] if rows is not None else [n for n in range(least, whole + 1) if whole % n == 0]
    best = min(one.rung.seconds for one in (*kept.fitted, *again.fitted))
    for _ in range(_MOST_TRIED):
        pair = planes.fastest(search.most * ROOM_FRACTION, rows_to_try)
        if pair is None or planes.seconds(*pair) > _WORTH_FRACTION * best:
            return
        found = measured_captured(_plan_of(settled, kept, again, *pair), search)
        planes.learn(pair, found, search.most)
        if found is not None:
            yield found
            best = min(best, found.rung.seconds)


def _plan_of(settled: Plan, kept: Way, again: Way, rows: int, number: int) -> Plan:
    """``rows`` at a time, with ``number`` blocks kept: the last ones, which are gone when the others run again."""
    run_again = again.blocks[: len(again.blocks) - number]
    more: Levers = {Recompute.name: {"blocks": run_again}} if run_again else {}
    return plan_anew(settled, kept.levers | more, rows)


def _plane(
    places: Sequence[Sequence[float]], values: Sequence[float], expected: Sequence[float | None]
) -> Sequence[float]:
    """Coefficients, none negative, that give ``values`` at ``places``; of those the ones nearest to ``expected``."""
    known = [(index, value) for index, value in enumerate(expected) if value is not None]
    rows = [*places, *(_PRIOR_WEIGHT * np.eye(len(expected))[index] for index, _ in known)]
    right = [*values, *(_PRIOR_WEIGHT * value for _, value in known)]
    found: Sequence[float] = np.linalg.lstsq(np.array(rows), np.array(right), rcond=None)[0].clip(min=0.0)
    return found


def _again_share(kept: Way, again: Way) -> float:
    """Of a step's time, what blocks that run again take, by following it."""
    both = sorted(kept.predicted.keys() & again.predicted.keys())
    if not both or not again.predicted[both[-1]].seconds:
        return _AGAIN_SHARE
    return max(0.0, 1 - kept.predicted[both[-1]].seconds / again.predicted[both[-1]].seconds)
