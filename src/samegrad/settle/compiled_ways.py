"""Compiled chunks of a settled plan: how many rows at a time, which blocks run again, and captured or not.

What a compiler keeps and how fast its kernels are is known when it has compiled, which takes tens of seconds, so few
are tried. Each way (nothing runs again, every block does) begins with the rows that its followed step was predicted to
fit with, and goes to as many as a line through what was measured puts within the budget. Between the two ways a line
says how many blocks have room to be kept.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from samegrad.errors import CannotSplit
from samegrad.levers.chunk_loss import ChunkLoss
from samegrad.levers.compile import Compile
from samegrad.levers.graphs import Graphs
from samegrad.levers.recompute import Recompute
from samegrad.levers.split_rows import SplitRows
from samegrad.measure.within_memory import WithinMemory
from samegrad.plan.options import Options
from samegrad.plan.traced import predict_traced
from samegrad.records import Footprint, Plan
from samegrad.settle.again_ways import blocks_of
from samegrad.settle.candidates import Search, Tried
from samegrad.settle.edits import Levers, compiled_plan, even_rows, rows_of, with_levers

# Sizes of chunk that fit and are compiled of each way; another one where none has fitted yet.
_MOST_ROWS_TRIED = 2
# More rows at a time than these are worth another compilation.
_WORTH_MORE_ROWS = 1.5
# Of a model's blocks, that must have room to be kept for another compilation.
_WORTH_KEEPING = 0.25
# Logits of a chunk of a head's loss, compiled: they alone are held, 256 MiB of them in bfloat16.
_HEAD_LOGITS = 2**27
# Below this a line through one measurement is no promise.
_ROOM_FRACTION = 0.97


def compiled_candidates(settled: Plan, search: Search, options: Options) -> Iterator[Tried]:
    """Those that fit. A large head's loss runs in chunks, unless the model works on its logits: then they are whole."""
    head = _head(search)
    yield from _beside(head, settled, search, options)
    if head and search.reasons.pop(Compile.name, None) is not None:
        yield from _beside({}, settled, search, options)


def _beside(head: Levers, settled: Plan, search: Search, options: Options) -> Iterator[Tried]:
    pinned = options.rows is not None
    again = _again(search)
    first = {way: rows_of(settled) if pinned else _first_rows(head, runs, settled, search)
             for way, runs in (("kept", {}), ("again", again))}  # fmt: skip
    # All rows at once and nothing twice is the fastest, where it fits.
    ways = ("kept", "again") if first["kept"] == settled.batch_rows else ("again", "kept")
    found: dict[str, list[Tried]] = {}
    for way in ways if again else ("kept",):
        found[way] = []
        for one in _by_rows(settled, head | (again if way == "again" else {}), first[way], search, pinned=pinned):
            yield one
            found[way].append(one)
        if Compile.name in search.reasons:
            return
        if way == "kept" and any(rows_of(one.plan) == settled.batch_rows for one in found[way]):
            return
    if (between := _between(settled, head, again, found, search)) is not None:
        some = _measured(between, search)
        if some is not None:
            yield some


def _between(
    settled: Plan, head: Levers, again: Levers, found: dict[str, list[Tried]], search: Search
) -> Plan | None:
    """The plan in which as few blocks run again as a line between all and none of them puts within the budget.

    None where that is hardly one less, or where one of the two ways did not fit at all.
    """
    if not found.get("again") or not found.get("kept"):
        return None
    all_again, kept = max(found["again"], key=_tried_rows), max(found["kept"], key=_tried_rows)
    rows = _tried_rows(all_again)
    standing = _standing_bytes(search)
    kept_bytes = standing + (kept.rung.peak_bytes - standing) / _tried_rows(kept) * rows
    room_bytes = search.most * _ROOM_FRACTION - all_again.rung.peak_bytes
    blocks = again[Recompute.name]["blocks"]
    spared = int(len(blocks) * room_bytes / max(1.0, kept_bytes - all_again.rung.peak_bytes))
    if not _WORTH_KEEPING * len(blocks) <= spared < len(blocks):
        return None
    # The last ones are kept: what they hold is gone when the first of the others runs again.
    return compiled_plan(settled, head | {Recompute.name: {"blocks": blocks[: len(blocks) - spared]}}, rows)


def _measured(plan: Plan, search: Search) -> Tried | None:
    """``plan`` captured; as it is where that does not fit, since a pool of its own holds more, or cannot be.

    Without launches it is no slower, and it is compiled for that: otherwise gradients add up in another way.
    """
    captured = None if Graphs.name in search.reasons else search.measured(with_levers(plan, {Graphs.name: {}}))
    if captured is not None or Compile.name in search.reasons:
        return captured
    return search.measured(plan)


def _head(search: Search) -> Levers:
    """The lever that runs the loss of a large head in chunks, where there is one."""
    head = search.measurement.footprint.head
    if head is None:
        return {}
    positions = max(ChunkLoss.fewest_positions, 1 << (_HEAD_LOGITS // head.classes).bit_length() - 1)
    return {ChunkLoss.name: {"head": head.path, "rows": positions}}


def _again(search: Search) -> Levers:
    """Every block of the model run again by itself, where it has blocks."""
    # Where there are none or memory runs out, the settled plan stands all the same.
    with WithinMemory(search.declared), contextlib.suppress(CannotSplit):
        return {Recompute.name: {"blocks": blocks_of(search.declared, search.batch)}}
    return {}


def _first_rows(head: Levers, again: Levers, settled: Plan, search: Search) -> int:
    """The rows to begin with: those that Python's step was predicted to fit with, since the compiler's holds less.

    Where that was not followed: those of the settled plan.
    """
    footprint = search.measurement.footprint
    fitting = []
    for way in footprint.traced:
        if way.levers.keys() != head.keys():
            continue
        for rows in [table.rows for table in way.tables]:
            split: Levers = {} if rows == settled.batch_rows else {SplitRows.name: {"rows": rows}}
            predicted = predict_traced(footprint, way.levers | split | again)
            if predicted is not None and predicted.peak_bytes <= search.most * _ROOM_FRACTION:
                fitting.append(rows)
    return even_rows(settled.batch_rows, max(fitting, default=rows_of(settled)))


def _by_rows(settled: Plan, levers: Levers, first_rows: int, search: Search, *, pinned: bool) -> Iterator[Tried]:
    """From ``first_rows`` at a time to as many as a line through what was measured puts within the budget."""
    rows, tried, fitted = first_rows, set[int](), 0
    while rows not in tried and len(tried) < _MOST_ROWS_TRIED + (fitted == 0):
        tried.add(rows)
        found = _measured(compiled_plan(settled, levers, rows), search)
        if found is not None:
            fitted += 1
            yield found
        if pinned or Compile.name in search.reasons:
            return
        batch_rows = settled.batch_rows
        if found is None:
            rows = even_rows(batch_rows, rows // 2)
        elif (more := _rows_that_fit(found, rows, batch_rows, search)) >= _WORTH_MORE_ROWS * rows:
            rows = more


def _rows_that_fit(found: Tried, rows: int, batch_rows: int, search: Search) -> int:
    """The most rows at a time within the budget, by a line from what stands under every plan through ``found``."""
    standing = _standing_bytes(search)
    per_row = max(1.0, (found.rung.peak_bytes - standing) / rows)
    room = (search.most * _ROOM_FRACTION - standing) / per_row
    return even_rows(batch_rows, min(batch_rows, int(room)))


def _tried_rows(one: Tried) -> int:
    return rows_of(one.plan)


def _standing_bytes(search: Search) -> int:
    footprint: Footprint = search.measurement.footprint
    return sum(footprint.resident_bytes.values())
