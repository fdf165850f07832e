"""When each storage of a trace lives, and how many bytes do at any operation."""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import math
from collections.abc import Sequence

from samegrad.measure.events import MemoryEvent
from samegrad.records import Category


@dataclasses.dataclass(frozen=True)
class Lifetime:
    """A storage: the operations during or after which it was taken and given back (infinite: never)."""

    storage: int
    size_bytes: int
    born: int
    died: float
    category: Category


@dataclasses.dataclass(frozen=True)
class Lifetimes:
    """All storages in the order of their birth, and live bytes after each event of the trace."""

    storages: list[Lifetime]
    births: list[int]
    live_bytes: list[int]
    operations: list[int]

    @classmethod
    def of(cls, events: Sequence[MemoryEvent], *, round_to_bytes: int = 1) -> Lifetimes:
        """``round_to_bytes``: every storage takes a multiple of it."""
        found: dict[int, Lifetime] = {}
        changes = []
        for event in events:
            change = -(-abs(event.change_bytes) // round_to_bytes) * round_to_bytes
            changes.append(change if event.change_bytes >= 0 else -change)
            known = found.get(event.storage)
            if known is None:
                known = Lifetime(event.storage, 0, event.operation, math.inf, event.category)
            if event.change_bytes >= 0:
                known = dataclasses.replace(known, size_bytes=known.size_bytes + change)
            else:
                known = dataclasses.replace(known, died=event.operation)
            found[event.storage] = known
        live = list(itertools.accumulate(changes))
        births = [storage.born for storage in found.values()]
        return cls(list(found.values()), births, live, [event.operation for event in events])

    def live_before(self, operation: int) -> int:
        """Bytes that stand when ``operation`` begins."""
        passed = bisect.bisect_left(self.operations, operation)
        return self.live_bytes[passed - 1] if passed else 0

    def peak_in(self, start: int, stop: int) -> int:
        """The most bytes from the beginning of operation ``start`` to that of ``stop``."""
        inside = slice(bisect.bisect_left(self.operations, start), bisect.bisect_left(self.operations, stop))
        return max([self.live_before(start), *self.live_bytes[inside]])

    def born_in(self, start: int, stop: int) -> list[Lifetime]:
        """Storages taken from operation ``start`` on and before ``stop``."""
        return self.storages[bisect.bisect_left(self.births, start) : bisect.bisect_left(self.births, stop)]
