"""Chunks of a settled plan that a program runs, captured or compiled: of how many rows, and which blocks run again.

What a program keeps and how fast it is is known when it is there, and a compiler takes tens of seconds, so few are
tried. Each way (nothing runs again, every block does) begins with the rows that its followed step was predicted to
fit with; where nothing runs again it goes on to as many as fit by what a row takes, and all rows at once that run
nothing twice end the search. What lies between the two is looked for by what was measured of both (``mixed_ways.py``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from samegrad.levers.chunk_loss import ChunkLoss
from samegrad.levers.compile import Compile
from samegrad.levers.graphs import Graphs
from samegrad.plan.options import Options
from samegrad.records import Plan
from samegrad.settle.candidates import Search, Tried
from samegrad.settle.edits import Levers, even_rows, makes_room, plan_anew, rows_of
from samegrad.settle.mixed_ways import mixed_candidates
from samegrad.settle.one_chunk_way import LEAST_KEPT_SHARE, ROOM_FRACTION, Way, measured_captured, tried_rows

# Sizes of chunk of which one must fit, and those that are tried when one did.
_MOST_TOO_LARGE = 3
_MOST_ROWS_TRIED = 2
# All rows at once over those to begin with, up to which nothing runs again first: a compiler keeps less than Python.
_WORTH_KEEPING = 4
# More rows at a time than these are worth another program.
_WORTH_MORE_ROWS = 1.5


def compiled_candidates(settled: Plan, search: Search, options: Options) -> Iterator[Tried]:
    """Compiled ones that fit, captured where that fits too."""
    yield from _candidates({Compile.name: Compile().knobs()}, Compile.name, settled, search, options)


def captured_candidates(
    settled: Plan, search: Search, options: Options, *, slower_seconds: float
) -> Iterator[Tried]:
    """Ones of Python's own kernels, captured, that fit: fewer rows cost few launches then, and hold less.

    Nothing more is tried once none can be faster than ``slower_seconds``: where the device is what takes the time,
    replays win nothing.
    """
    fits = False
    for beside in makes_room(settled):
        for one in _candidates(beside, Graphs.name, settled, search, options, slower_seconds):
            fits = True
            yield one
        if fits or Graphs.name in search.reasons:
            return


def _candidates(
    base: Levers, refusable: str, settled: Plan, search: Search, options: Options, slower_seconds: float = math.inf
) -> Iterator[Tried]:
    """A large head's loss runs in chunks, unless the model works on its logits: then they are whole.

    ``base``: the levers of all of them. ``refusable``: the one that ends the search where it cannot be.
    """
    head = search.head() if ChunkLoss.exactness <= options.allow else {}
    yield from _beside(base | head, refusable, settled, search, options, slower_seconds)
    if head and search.reasons.pop(refusable, None) is not None:
        yield from _beside(base, refusable, settled, search, options, slower_seconds)


def _beside(
    levers: Levers, refusable: str, settled: Plan, search: Search, options: Options, slower_seconds: float
) -> Iterator[Tried]:
    pinned, blocks = options.rows is not None, search.blocks()
    kept, again = (Way.of(levers, some, settled, search) for some in ([], blocks))
    # All rows at once and nothing twice is the fastest, where it fits. Few rows tell little of whether it would.
    keeps_first = kept.first_rows(settled, search) * _WORTH_KEEPING >= settled.batch_rows
    ways = [kept, again] if keeps_first else [again, kept]
    for way in ways if blocks else [kept]:
        # What lies between two ways is looked for when both are known.
        most_rows_tried = _MOST_ROWS_TRIED if way is kept and (keeps_first or not blocks) else 1
        for one in _by_rows(settled, way, refusable, search, pinned=pinned, most_rows_tried=most_rows_tried):
            yield one
            way.fitted.append(one)
        if refusable in search.reasons or any(tried_rows(one) == settled.batch_rows for one in kept.fitted):
            return
        if any(one.rung.seconds * LEAST_KEPT_SHARE >= slower_seconds for one in again.fitted):
            return
    if kept.fitted and again.fitted:
        yield from mixed_candidates(settled, kept, again, search, rows=rows_of(settled) if pinned else None)
    elif again.fitted and not pinned:
        yield from _with_more_rows(settled, again, search)


def _by_rows(
    settled: Plan, way: Way, refusable: str, search: Search, *, pinned: bool, most_rows_tried: int
) -> Iterator[Tried]:
    """From the rows to begin with to as many as fit by what a row takes."""
    batch_rows = settled.batch_rows
    rows = rows_of(settled) if pinned else way.first_rows(settled, search)
    tried, fitted = set[int](), 0
    while rows not in tried and len(tried) < (most_rows_tried if fitted else _MOST_TOO_LARGE):
        tried.add(rows)
        found = measured_captured(plan_anew(settled, way.levers, rows), search)
        if found is not None:
            fitted += 1
            yield found
        if pinned or refusable in search.reasons:
            return
        if found is None:
            rows = even_rows(batch_rows, rows // 2)
            continue
        rows = _more_rows(settled, way, found, search) or rows


def _with_more_rows(settled: Plan, way: Way, search: Search) -> Iterator[Tried]:
    """What ``way`` fits beyond what it was measured with, where there is no other way to mix it with."""
    for _ in range(_MOST_ROWS_TRIED):
        rows = _more_rows(settled, way, way.largest, search)
        found = None if rows is None else measured_captured(plan_anew(settled, way.levers, rows), search)
        if found is None:
            return
        yield found
        way.fitted.append(found)


def _more_rows(settled: Plan, way: Way, found: Tried, search: Search) -> int | None:
    """As many as fit by what a row takes, where that is worth another program."""
    rows, batch_rows = tried_rows(found), settled.batch_rows
    room_bytes = search.most * ROOM_FRACTION - found.rung.peak_bytes
    more = even_rows(batch_rows, min(batch_rows, rows + int(room_bytes / way.row_bytes(found, search))))
    return more if more >= _WORTH_MORE_ROWS * rows else None
