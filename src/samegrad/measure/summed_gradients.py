"""A chunk that adds its gradients to those of the chunks before it, from a trace of the chunk alone.

The sums stand beside the chunk, and what it makes itself goes as soon as it has been added: late in its backward such
a chunk holds less than the first one, whose gradients become the sums.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Collection

from samegrad.measure.events import MemoryEvent, Operation, Trace
from samegrad.records import Category, Phase


def with_summed_gradients(trace: Trace, *, lasting_bytes: Collection[int] = ()) -> Trace:
    """``trace`` whose gradients go after the operation that made them; those made in forward, when backward begins.

    ``lasting_bytes``: sizes of parameters that several modules share. Their gradients wait until all parts are there.
    The sums are not in it.
    """
    last_uses: dict[int, int] = {}
    for event in trace.events:
        made = event.category is Category.GRADIENTS and event.change_bytes > 0 and event.operation >= 0
        if made and event.change_bytes not in lasting_bytes:
            last_uses[event.storage] = _last_use(trace.operations, event)
    events = [e for e in trace.events if e.change_bytes > 0 or e.storage not in last_uses]
    given = [
        event._replace(change_bytes=-event.change_bytes, operation=last_uses[event.storage])
        for event in events
        if event.storage in last_uses
    ]
    # In order of operations, what an operation gives back after what it takes.
    places = [event.operation for event in events]
    for event in sorted(given, key=lambda event: -event.operation):
        events.insert(bisect.bisect_right(places, event.operation), event)
    return dataclasses.replace(trace, events=tuple(events))


def _last_use(operations: tuple[Operation, ...], made: MemoryEvent) -> int:
    """The operation after which a gradient has been added to the sums."""
    at = made.operation
    while at + 1 < len(operations) and operations[at].phase in (Phase.FORWARD, Phase.LOSS):
        at += 1
    return at
