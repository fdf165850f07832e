"""The whole batch at once, captured, with blocks that run again: where what was settled cannot be captured as it is.

A step whose loss couples all rows runs twice over its chunks, which is no single work to replay; and a capture holds a
pool of its own, for which the budget may have no room. Where launches are most of a step, running blocks again in a
replay costs far less than launching fewer kernels one by one. Every block runs again first, with the optimizer's state
on the host where what was settled needs that and nothing fits without; then as many of the last ones are kept as what
that was measured to hold leaves room for.
"""

from __future__ import annotations

from collections.abc import Iterator

from samegrad.levers.graphs import Graphs
from samegrad.levers.recompute import Recompute
from samegrad.records import Plan
from samegrad.settle.candidates import Search, Tried
from samegrad.settle.edits import Levers, makes_room, plan_anew
from samegrad.settle.one_chunk_way import LEAST_KEPT_SHARE, ROOM_FRACTION


def captured_with_blocks_again(settled: Plan, search: Search, *, slower_seconds: float) -> Iterator[Tried]:
    """Those that fit; nothing more is tried once none can be faster than ``slower_seconds``."""
    blocks = search.blocks()
    if not blocks:
        return
    for beside in makes_room(settled):
        again = search.measured(_whole(settled, blocks, beside))
        if again is not None:
            break
    else:
        return
    yield again
    if again.rung.seconds * LEAST_KEPT_SHARE >= slower_seconds:
        return
    footprint = search.measurement.footprint
    plain_bytes = footprint.predicted_peak_bytes(rows=settled.batch_rows)
    block_bytes = max(1.0, (plain_bytes - again.rung.peak_bytes) / len(blocks))
    kept = min(len(blocks), int((search.most * ROOM_FRACTION - again.rung.peak_bytes) / block_bytes))
    # Blocks are not all of one size: where so many do not fit, half of them may.
    for number in (kept, kept // 2):
        if number < 1:
            return
        found = search.measured(_whole(settled, blocks[: len(blocks) - number], beside))
        if found is not None:
            yield found
            return


def _whole(settled: Plan, blocks: list[str | list[str]], beside: Levers) -> Plan:
    """All rows at once, with ``blocks`` again, captured."""
    again: Levers = {Recompute.name: {"blocks": blocks}} if blocks else {}
    return plan_anew(settled, {Graphs.name: {}, **again, **beside}, settled.batch_rows)
