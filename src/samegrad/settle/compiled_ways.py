"""Compiled chunks of a settled plan: how many rows at a time, which blocks run again, and captured or not.

What a compiler keeps and how fast its kernels are is known when it has compiled, which takes tens of seconds, so few
are tried. Each way (nothing runs again, every block does) begins with the rows that its followed step was predicted to
fit with, and goes to as many as fit by what a row takes. Between the two ways a line says how many blocks have room to
be kept.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

from samegrad.errors import CannotSplit
from samegrad.levers.compile import Compile
from samegrad.levers.graphs import Graphs
from samegrad.levers.recompute import Recompute
from samegrad.levers.split_rows import SplitRows
from samegrad.measure.within_memory import WithinMemory
from samegrad.plan.options import Options
from samegrad.plan.traced import predict_traced
from samegrad.records import Plan
from samegrad.settle.again_ways import blocks_of
from samegrad.settle.candidates import Search, Tried
from samegrad.settle.edits import Levers, compiled_plan, even_rows, rows_of, with_levers

# Sizes of chunk that fit and are compiled of each way; another one where none has fitted yet.
_MOST_ROWS_TRIED = 2
# More rows at a time than these are worth another compilation.
_WORTH_MORE_ROWS = 1.5
# Of a model's blocks, that must have room to be kept for another compilation; so many of those at most.
_WORTH_KEEPING = 1 / 6
_MOST_SPARINGS = 2
# Of the budget, where a line says that nothing more has room.
_WORTH_ROOM = 0.05
# Below this a line through one measurement is no promise.
_ROOM_FRACTION = 0.97


@dataclasses.dataclass
class _Way:
    """Levers beside the compiler, what Python's step is predicted to hold under them, and what fitted.

    ``blocks``: those that run again. ``predicted``: bytes by the rows at a time, where the step was followed.
    """

    levers: Levers
    blocks: list[str | list[str]]
    predicted: dict[int, int]
    fitted: list[Tried] = dataclasses.field(default_factory=list)

    @property
    def largest(self) -> Tried:
        return max(self.fitted, key=_tried_rows)


def compiled_candidates(settled: Plan, search: Search, options: Options) -> Iterator[Tried]:
    """Those that fit. A large head's loss runs in chunks, unless the model works on its logits: then they are whole."""
    head = search.head()
    yield from _beside(head, settled, search, options)
    if head and search.reasons.pop(Compile.name, None) is not None:
        yield from _beside({}, settled, search, options)


def _beside(head: Levers, settled: Plan, search: Search, options: Options) -> Iterator[Tried]:
    pinned, blocks = options.rows is not None, _blocks(search)
    kept, again = (_way(head, some, settled, search) for some in ([], blocks))
    # All rows at once and nothing twice is the fastest, where it fits.
    ways = [kept, again] if _first_rows(kept, settled, search) == settled.batch_rows else [again, kept]
    for way in ways if blocks else [kept]:
        for one in _by_rows(settled, way, search, pinned=pinned):
            yield one
            way.fitted.append(one)
        if Compile.name in search.reasons or any(_tried_rows(one) == settled.batch_rows for one in kept.fitted):
            return
    if kept.fitted and again.fitted:
        yield from _sparing(settled, kept, again, search)


def _sparing(settled: Plan, kept: _Way, again: _Way, search: Search) -> Iterator[Tried]:
    """As few blocks again as fit: by a line between all and none of them, and then by what was measured.

    The line comes from fewer rows and is too steep, so where there is room a few blocks are kept all the same.
    """
    found, spared, few = again.largest, 0, max(1, round(_WORTH_KEEPING * len(again.blocks)))
    rows, all_bytes = _tried_rows(found), found.rung.peak_bytes
    more_rows = rows - _tried_rows(kept.largest)
    none_bytes = kept.largest.rung.peak_bytes + _row_bytes(kept, kept.largest, search) * more_rows
    block_bytes = max(1.0, (none_bytes - all_bytes) / len(again.blocks))
    for _ in range(_MOST_SPARINGS):
        room_bytes = search.most * _ROOM_FRACTION - found.rung.peak_bytes
        more = int(room_bytes / block_bytes)
        if not spared and room_bytes >= _WORTH_ROOM * search.most:
            more = max(more, few)
        more = min(more, len(again.blocks) - 1 - spared)
        if more < few:
            return
        spared += more
        # The last ones are kept: what they hold is gone when the first of the others runs again.
        run_again: Levers = {Recompute.name: {"blocks": again.blocks[: len(again.blocks) - spared]}}
        tried = _measured(compiled_plan(settled, kept.levers | run_again, rows), search)
        if tried is None:
            return
        yield tried
        found, block_bytes = tried, max(1.0, (tried.rung.peak_bytes - all_bytes) / spared)


def _measured(plan: Plan, search: Search) -> Tried | None:
    """``plan`` captured; as it is where that does not fit, since a pool of its own holds more, or cannot be.

    Without launches it is no slower, and it is compiled for that: otherwise gradients add up in another way.
    """
    captured = None if Graphs.name in search.reasons else search.measured(with_levers(plan, {Graphs.name: {}}))
    if captured is not None or Compile.name in search.reasons:
        return captured
    return search.measured(plan)


def _blocks(search: Search) -> list[str | list[str]]:
    """The blocks of the model that can run again, where it has any."""
    # Where memory runs out, the settled plan stands all the same.
    with WithinMemory(search.declared), contextlib.suppress(CannotSplit):
        return blocks_of(search.declared, search.batch)
    return []


def _way(head: Levers, blocks: list[str | list[str]], settled: Plan, search: Search) -> _Way:
    again: Levers = {Recompute.name: {"blocks": blocks}} if blocks else {}
    footprint, predicted = search.measurement.footprint, dict[int, int]()
    for followed in footprint.traced:
        if followed.levers.keys() != head.keys():
            continue
        for rows in [table.rows for table in followed.tables]:
            split: Levers = {} if rows == settled.batch_rows else {SplitRows.name: {"rows": rows}}
            found = predict_traced(footprint, followed.levers | split | again)
            if found is not None:
                predicted[rows] = found.peak_bytes
    return _Way(head | again, blocks, predicted)


def _first_rows(way: _Way, settled: Plan, search: Search) -> int:
    """The rows to begin with: those that Python's step fits with, as predicted, or those of the settled plan."""
    fitting = [rows for rows, held in way.predicted.items() if held <= search.most * _ROOM_FRACTION]
    return even_rows(settled.batch_rows, max(fitting, default=rows_of(settled)))


def _row_bytes(way: _Way, found: Tried, search: Search) -> float:
    """What a row more takes: as predicted, or by a line from what stands under every plan through ``found``.

    That line is too steep: what a compiled chunk holds at any size is counted to its rows.
    """
    standing_bytes = sum(search.measurement.footprint.resident_bytes.values())
    by_line = (found.rung.peak_bytes - standing_bytes) / _tried_rows(found)
    if len(way.predicted) < 2:
        return max(1.0, by_line)
    fewest, most = min(way.predicted), max(way.predicted)
    return max(1.0, min(by_line, (way.predicted[most] - way.predicted[fewest]) / (most - fewest)))


def _by_rows(settled: Plan, way: _Way, search: Search, *, pinned: bool) -> Iterator[Tried]:
    """From the rows to begin with to as many as fit by what a row takes."""
    batch_rows = settled.batch_rows
    rows = rows_of(settled) if pinned else _first_rows(way, settled, search)
    tried, fitted = set[int](), 0
    while rows not in tried and len(tried) < _MOST_ROWS_TRIED + (fitted == 0):
        tried.add(rows)
        found = _measured(compiled_plan(settled, way.levers, rows), search)
        if found is not None:
            fitted += 1
            yield found
        if pinned or Compile.name in search.reasons:
            return
        if found is None:
            rows = even_rows(batch_rows, rows // 2)
            continue
        room_bytes = search.most * _ROOM_FRACTION - found.rung.peak_bytes
        more = rows + int(room_bytes / _row_bytes(way, found, search))
        if (even := even_rows(batch_rows, min(batch_rows, more))) >= _WORTH_MORE_ROWS * rows:
            rows = even


def _tried_rows(one: Tried) -> int:
    return rows_of(one.plan)
