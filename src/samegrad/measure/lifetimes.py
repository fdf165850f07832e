"""When each storage of a trace lives, and how many bytes do at any operation."""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

from samegrad.measure.events import MemoryEvent
from samegrad.records import Category


class Lifetime(NamedTuple):
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
        born: dict[int, MemoryEvent] = {}
        sizes: dict[int, int] = {}
        died: dict[int, int] = {}
        changes = []
        for event in events:
            storage, change = event.storage, -(-abs(event.change_bytes) // round_to_bytes) * round_to_bytes
            if storage not in born:
                born[storage], sizes[storage] = event, 0
            if event.change_bytes >= 0:
                sizes[storage] += change
                changes.append(change)
            else:
                died[storage] = event.operation
                changes.append(-change)
        storages = [
            Lifetime(storage, sizes[storage], event.operation, died.get(storage, math.inf), event.category)
            for storage, event in born.items()
        ]
        live = list(itertools.accumulate(changes))
        return cls(storages, [storage.born for storage in storages], live, [event.operation for event in events])

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
