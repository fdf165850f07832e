"""A traced step replayed through the allocator's model: what is reserved when the step runs over and over.

A trace holds two steps. The second is the one that repeats: what it takes and leaves stands in for what it found and
gave back (this step's gradients for the last one's), and all else that it leaves lives on.

Where the first turn of the optimizer makes its state, what is cached is given back before it, as ``room_for_new_state``
of a step that runs does. Weights that came to the device in pieces leave gaps between what came after them; the rest of
that is given back before the first step.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Sequence
from typing import NamedTuple

from samegrad.errors import UsageError
from samegrad.measure.allocator import CachingAllocator
from samegrad.measure.allocator_rules import DEFAULT_RULES, AllocatorRules
from samegrad.measure.events import BEFORE_THE_STEPS, MemoryEvent, Trace
from samegrad.records import Category, Phase

# Two of the trace, and two more: what the second leaves behind shows in the third, what that leaves in the fourth.
REPLAYED_STEPS = 4
# In place of a size: all that is cached is given back; before the steps, what was reserved until then is forgotten.
EMPTIES_CACHE = -1


class Request(NamedTuple):
    """A storage taken (``size_bytes`` > 0) or given back (0), during or after the trace's ``operation`` of ``step``.

    ``EMPTIES_CACHE`` for a size is no storage's.

    ``stream`` and ``pool`` as in ``MemoryEvent``.
    """

    storage: int
    size_bytes: int
    operation: int
    step: int
    stream: int = 0
    pool: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Replay:
    """What the allocator did with the requests of several steps.

    Peaks are bytes: ``requested`` as asked for, ``allocated`` in whole blocks, ``reserved`` in segments.
    ``retries_by_step``: how often all cached memory was given back to make room, in each step; what stands before the
    first counts as the first's. ``out_of_memory_at``: the request that found no room, None where all did.
    ``lowest_equal_cap_bytes`` to ``highest_equal_cap_bytes`` (None: no limit): caps under which the same happens.
    """

    cap_bytes: int | None
    peak_requested_bytes: int
    peak_allocated_bytes: int
    peak_reserved_bytes: int
    retries_by_step: tuple[int, ...]
    segments_taken: int
    out_of_memory_at: Request | None
    lowest_equal_cap_bytes: int
    highest_equal_cap_bytes: int | None

    @property
    def retries(self) -> int:
        return sum(self.retries_by_step)

    @property
    def runs(self) -> bool:
        return self.out_of_memory_at is None

    @property
    def steady(self) -> bool:
        """Whether all steps after the second ran without giving cached memory back."""
        return self.runs and not any(self.retries_by_step[2:])


def repeat_steps(trace: Trace, steps: int = REPLAYED_STEPS) -> tuple[Request, ...]:
    """The requests of ``steps`` steps: the trace's two, then the second again. Raises UsageError below two.

    A storage that the repeated step found and gave back is matched with one of the same size and category that it
    left: oldest with oldest. What it gave back without leaving the like is not given back again, and what it left
    without having found the like is not taken again, since steps that grow without end are not what is predicted.
    """
    if steps < 2:
        raise UsageError(asked=f"a replay of {steps} steps", found="a trace holds two", do="replay two steps or more")
    step_of = [operation.step for operation in trace.operations]
    requests = [_request(event, event.storage, _step(event, step_of)) for event in trace.events]
    repeated = [event for event, request in zip(trace.events, requests) if request.step == 1]
    turn = _first_turn(trace)
    if turn is not None:
        requests.insert(turn, Request(-1, EMPTIES_CACHE, trace.events[turn].operation, 0))
    if trace.pieces:
        standing = sum(event.operation == BEFORE_THE_STEPS for event in trace.events)
        requests[:standing] = _laid_out(requests[:standing], trace)
    if not repeated or steps == 2:
        return tuple(requests)
    successors = _successors(trace.events, repeated)
    born = {event.storage for event in repeated if event.change_bytes > 0}
    ended = {event.storage for event in repeated if event.change_bytes < 0}
    again = (born & ended) | set(successors.values())
    # The number of each storage in the step before; what is not matched keeps its own.
    names: dict[int, int] = {storage: storage for storage in born}
    following = 1 + max(event.storage for event in trace.events)
    for step in range(2, steps):
        before, names = names, dict(names)
        for event in repeated:
            if event.change_bytes > 0:
                if event.storage in again:
                    names[event.storage] = following
                    requests.append(_request(event, following, step))
                    following += 1
            elif event.storage in born:
                requests.append(_request(event, names[event.storage], step))
            elif event.storage in successors:
                requests.append(_request(event, before[successors[event.storage]], step))
    return tuple(requests)


def replay(
    requests: Sequence[Request],
    rules: AllocatorRules = DEFAULT_RULES,
    *,
    cap_bytes: int | None = None,
    stop_at_unsteady: bool = False,
) -> Replay:
    """Runs ``requests`` through an empty allocator, as far as there is memory.

    ``stop_at_unsteady``: also stop at the first retry after the second step, which decides whether a cap holds.
    """
    allocator = CachingAllocator(rules, cap_bytes=cap_bytes)
    if _begins_later(requests):
        allocator.begin(None)
    take, give_back = allocator.take, allocator.give_back
    retries = [0] * (1 + max((request.step for request in requests), default=0))
    failed = None
    for request in requests:
        storage, size_bytes, operation, step, stream, pool = request
        if size_bytes == EMPTIES_CACHE:
            allocator.empty_cache()
            if operation == BEFORE_THE_STEPS:
                allocator.begin(cap_bytes)
            continue
        if not size_bytes:
            give_back(storage)
            continue
        before = allocator.retries
        found = take(storage, size_bytes, stream=stream, private=pool)
        if allocator.retries != before:
            retries[step] += 1
        if not found:
            failed = request
            break
        if stop_at_unsteady and step > 1 and retries[step]:
            break
    return Replay(
        cap_bytes=cap_bytes,
        peak_requested_bytes=allocator.peak_requested_bytes,
        peak_allocated_bytes=allocator.peak_allocated_bytes,
        peak_reserved_bytes=allocator.peak_reserved_bytes,
        retries_by_step=tuple(retries),
        segments_taken=allocator.segments_taken,
        out_of_memory_at=failed,
        lowest_equal_cap_bytes=allocator.lowest_equal_cap_bytes,
        highest_equal_cap_bytes=allocator.highest_equal_cap_bytes,
    )


def _request(event: MemoryEvent, storage: int, step: int) -> Request:
    return Request(storage, max(event.change_bytes, 0), event.operation, step, event.stream, event.pool)


def _laid_out(standing: Sequence[Request], trace: Trace) -> list[Request]:
    """What stands before the steps as it came there: some in pieces, which are given back once they are one."""
    laid_out: list[Request] = []
    # Below that of a request for no storage.
    number = -2
    for request in standing:
        pieces = [
            request._replace(storage=number - n, size_bytes=size)
            for n, size in enumerate(trace.pieces.get(request.storage, ()))
        ]
        number -= len(pieces)
        laid_out += [*pieces, request, *(piece._replace(size_bytes=0) for piece in pieces)]
    # Libraries take their workspaces after that.
    workspaces = sum(event.category is Category.WORKSPACES for event in trace.events[: len(standing)])
    laid_out.insert(len(laid_out) - workspaces, Request(-1, EMPTIES_CACHE, BEFORE_THE_STEPS, 0))
    return laid_out


def _begins_later(requests: Sequence[Request]) -> bool:
    """Whether what comes first stands there before anything is counted."""
    standing = itertools.takewhile(lambda request: request.operation == BEFORE_THE_STEPS, requests)
    return any(request.size_bytes == EMPTIES_CACHE for request in standing)


def _first_turn(trace: Trace) -> int | None:
    """The first event of the first turn of an optimizer that makes its state; None where there is none."""
    turn = [
        index
        for index, event in enumerate(trace.events)
        if event.operation >= 0
        and trace.operations[event.operation].step == 0
        and trace.operations[event.operation].phase is Phase.OPTIMIZER
    ]
    made = any(trace.events[n].category is Category.OPTIMIZER_STATE and trace.events[n].change_bytes > 0 for n in turn)
    return turn[0] if made else None


def _step(event: MemoryEvent, step_of: list[int]) -> int:
    return step_of[event.operation] if event.operation >= 0 else 0


def _successors(events: Sequence[MemoryEvent], repeated: Sequence[MemoryEvent]) -> dict[int, int]:
    """For each storage that the repeated step found and gave back, the one it left in its place."""
    born = {event.storage for event in repeated if event.change_bytes > 0}
    ended = {event.storage for event in repeated if event.change_bytes < 0}
    left: dict[tuple[int, object], collections.deque[int]] = collections.defaultdict(collections.deque)
    for event in repeated:
        if event.change_bytes > 0 and event.storage not in ended:
            left[event.change_bytes, event.category].append(event.storage)
    successors = {}
    for event in events:
        if event.change_bytes > 0 and event.storage in ended and event.storage not in born:
            heirs = left[event.change_bytes, event.category]
            if heirs:
                successors[event.storage] = heirs.popleft()
    return successors
