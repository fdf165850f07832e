"""Compiled chunks of a settled plan: how many rows at a time, which blocks run again, and captured or not.

What a compiler keeps and how fast its kernels are is known when it has compiled, which takes tens of seconds, so few
are tried. Each way (nothing runs again, every block does) begins with the rows that its followed step was predicted to
fit with. What lies between the two is looked for by what was measured of both (``mixed_ways.py``); a model without
blocks goes to as many rows as fit by what a row takes.
"""

from __future__ import annotations

from collections.abc import Iterator

from samegrad.levers.compile import Compile
from samegrad.plan.options import Options
from samegrad.records import Plan
from samegrad.settle.candidates import Search, Tried
from samegrad.settle.edits import Levers, compiled_plan, even_rows, rows_of
from samegrad.settle.mixed_ways import mixed_candidates
from samegrad.settle.one_compiled_way import ROOM_FRACTION, Way, measured_captured, tried_rows

# Sizes of chunk of which one must fit, and those that are tried of a model without blocks when one did.
_MOST_TOO_LARGE = 3
_MOST_ROWS_TRIED = 2
# More rows at a time than these are worth another compilation.
_WORTH_MORE_ROWS = 1.5


def compiled_candidates(settled: Plan, search: Search, options: Options) -> Iterator[Tried]:
    """Those that fit. A large head's loss runs in chunks, unless the model works on its logits: then they are whole."""
    head = search.head()
    yield from _beside(head, settled, search, options)
    if head and search.reasons.pop(Compile.name, None) is not None:
        yield from _beside({}, settled, search, options)


def _beside(head: Levers, settled: Plan, search: Search, options: Options) -> Iterator[Tried]:
    pinned, blocks = options.rows is not None, search.blocks()
    kept, again = (Way.of(head, some, settled, search) for some in ([], blocks))
    # All rows at once and nothing twice is the fastest, where it fits.
    ways = [kept, again] if kept.first_rows(settled, search) == settled.batch_rows else [again, kept]
    for way in ways if blocks else [kept]:
        # What lies between two ways is looked for when both are known.
        for one in _by_rows(settled, way, search, pinned=pinned, most_rows_tried=1 if blocks else _MOST_ROWS_TRIED):
            yield one
            way.fitted.append(one)
        if Compile.name in search.reasons or any(tried_rows(one) == settled.batch_rows for one in kept.fitted):
            return
    if kept.fitted and again.fitted:
        yield from mixed_candidates(settled, kept, again, search, rows=rows_of(settled) if pinned else None)


def _by_rows(settled: Plan, way: Way, search: Search, *, pinned: bool, most_rows_tried: int) -> Iterator[Tried]:
    """From the rows to begin with to as many as fit by what a row takes."""
    batch_rows = settled.batch_rows
    rows = rows_of(settled) if pinned else way.first_rows(settled, search)
    tried, fitted = set[int](), 0
    while rows not in tried and len(tried) < (most_rows_tried if fitted else _MOST_TOO_LARGE):
        tried.add(rows)
        found = measured_captured(compiled_plan(settled, way.levers, rows), search)
        if found is not None:
            fitted += 1
            yield found
        if pinned or Compile.name in search.reasons:
            return
        if found is None:
            rows = even_rows(batch_rows, rows // 2)
            continue
        room_bytes = search.most * ROOM_FRACTION - found.rung.peak_bytes
        more = rows + int(room_bytes / way.row_bytes(found, search))
        if (even := even_rows(batch_rows, min(batch_rows, more))) >= _WORTH_MORE_ROWS * rows:
            rows = even
