"""What a traced step does over and over: chunks that are seen to do the same again are written down without being run.

Two chunks in a row are compared, operation by operation and storage by storage. What the second one gave back of the
first, the next one would give back of the second; where a chunk leaves more behind than that, all of them run.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence

from samegrad.measure.events import Operation
from samegrad.records import Category

# As the recorder has them: number of the storage, change in bytes, index of the operation.
Event = tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class Block:
    """Operations and events from one index up to another."""

    first_operation: int
    first_event: int
    end_operation: int
    end_event: int

    def is_followed_by(self, other: Block) -> bool:
        return (self.end_operation, self.end_event) == (other.first_operation, other.first_event)


@dataclasses.dataclass
class Written:
    """What a recorder has written down: its lists, as they grow."""

    operations: list[Operation] = dataclasses.field(default_factory=list)
    events: list[Event] = dataclasses.field(default_factory=list)
    sizes_bytes: list[int] = dataclasses.field(default_factory=list)
    categories: list[Category] = dataclasses.field(default_factory=list)

    def number(self, size_bytes: int, category: Category) -> int:
        """Of a storage that is new."""
        self.sizes_bytes.append(size_bytes)
        self.categories.append(category)
        return len(self.sizes_bytes) - 1

    @contextlib.contextmanager
    def block(self) -> Iterator[list[Block]]:
        """What is written down inside, in the list that it gives once it has ended."""
        first_operation, first_event, found = len(self.operations), len(self.events), list[Block]()
        yield found
        found.append(Block(first_operation, first_event, len(self.operations), len(self.events)))


class Repetition:
    """Blocks that repeat, as they are written down."""

    def __init__(self, written: Written) -> None:
        self._written = written
        # Of each loop that runs now, within the one before it: its last two blocks.
        self._loops: list[list[Block]] = [[]]

    @contextlib.contextmanager
    def block(self) -> Iterator[None]:
        """One of them, inside."""
        self._loops.append([])
        try:
            with self._written.block() as done:
                yield
        finally:
            self._loops.pop()
            self._loops[-1] = [*self._loops[-1][-1:], *done]

    def written_again(self, times: int) -> dict[int, int] | None:
        """Writes the last block down so many more times; None, and nothing, where it is not what the one before did.

        The numbers of the storages that it left, and those that the last repetition leaves in their place.
        """
        match self._loops[-1]:
            case [before, last] if before.is_followed_by(last):
                left = self._left(before, last)
            case _:
                return None
        if left is None:
            return None
        operations, events = self._written.operations, self._written.events
        repeated = operations[last.first_operation : last.end_operation]
        pattern = events[last.first_event : last.end_event]
        # The storages of the block before, as those of this one succeed them.
        ours: dict[int, int] = {number: number for number in left.values()}
        successor = left
        for _ in range(times):
            shift = len(operations) - last.first_operation
            operations += repeated
            names: dict[int, int] = {}
            for number, change, index in pattern:
                if change > 0:
                    names[number] = self._written.number(change, self._written.categories[number])
                    events.append((names[number], change, index + shift))
                else:
                    taken = names[number] if number in names else ours[successor[number]]
                    events.append((taken, change, index + shift))
            ours = {number: names[number] for number in left.values()}
        return ours

    def _left(self, before: Block, last: Block) -> dict[int, int] | None:
        """What ``last`` gave back of ``before``, and what it leaves in the place of each; None where they differ."""
        operations, categories = self._written.operations, self._written.categories
        first, second = (operations[block.first_operation : block.end_operation] for block in (before, last))
        if first != second:
            return None
        ours, theirs = (self._relative(self._written.events, block) for block in (last, before))
        if [event[1:] for event in ours] != [event[1:] for event in theirs]:
            return None
        twins = {a[0]: b[0] for a, b in zip(theirs, ours) if a[1] > 0}
        if any(categories[a] is not categories[b] for a, b in twins.items()):
            return None
        given_back = {number for number, change, _ in ours if change < 0}
        kept = {number for number in twins.values() if number not in given_back}
        left = {}
        for (theirs_number, change, _), (number, _, _) in zip(theirs, ours):
            if change > 0:
                continue
            if theirs_number in twins and twins[theirs_number] != number:
                return None
            if theirs_number not in twins:
                if number not in twins:
                    # Older than the block before: the next one would find nothing to give back.
                    return None
                left[number] = twins[number]
        return left if kept == set(left.values()) else None

    @staticmethod
    def _relative(events: Sequence[Event], block: Block) -> list[Event]:
        return [
            (number, change, index - block.first_operation)
            for number, change, index in events[block.first_event : block.end_event]
        ]
