"""The smallest caps on reserved memory under which a step runs: at all, and without giving cached memory back.

A cap changes what happens only where it refuses a segment, so one replay speaks for a whole range of caps: it says
from which to which the same would have happened. The search halves what is left and skips those ranges. More memory
can hurt (another block is cached, another one is split), so above the cap that is found others are tried as well.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Sequence

from samegrad.measure.allocator_rules import DEFAULT_RULES, SEGMENT_ROUNDING_BYTES, AllocatorRules
from samegrad.measure.replay import Replay, Request, replay

# How many caps above the one that was found are tried, evenly spaced.
_TRIED_ABOVE = 8
# Of a limit, how near a cap above it is looked for.
_NEAR_FRACTION = 0.02


class Goal(enum.Enum):
    """What a cap must allow."""

    RUNS = "all requests are served, after giving cached memory back where needed"
    STEADY = "after the second step no cached memory is given back"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cap:
    """The smallest cap that serves a ``goal`` such that all larger ones that were tried serve it too.

    ``largest_failing_bytes``: the largest cap that was seen to fail. ``tried``: replays made.
    """

    goal: Goal
    cap_bytes: int
    largest_failing_bytes: int
    tried: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reserved:
    """What a step makes the allocator reserve: without a cap, and the smallest caps under which it runs."""

    free_running: Replay
    steady: Cap
    smallest: Cap


@dataclasses.dataclass(frozen=True, kw_only=True)
class Against:
    """Whether a step's steady cap is within a limit. ``cap_bytes``: that cap, or about it where the limit fails."""

    fits: bool
    cap_bytes: int
    peak_allocated_bytes: int


def steady_against(requests: Sequence[Request], rules: AllocatorRules, most_bytes: int) -> Against:
    """Whether the steady cap of ``requests`` of several steps is within ``most_bytes``.

    Where it is not, a few replays say so, and about where it lies; to find it takes many.
    """
    free_running = replay(requests, rules)
    allocated_bytes, serving = free_running.peak_allocated_bytes, free_running.lowest_equal_cap_bytes

    def is_steady(cap_bytes: int) -> bool:
        return replay(requests, rules, cap_bytes=cap_bytes, stop_at_unsteady=True).steady

    if serving <= most_bytes or is_steady(most_bytes):
        cap_bytes = find_cap(requests, Goal.STEADY, rules, free_running=free_running).cap_bytes
        return Against(fits=cap_bytes <= most_bytes, cap_bytes=cap_bytes, peak_allocated_bytes=allocated_bytes)
    failing = max(most_bytes, allocated_bytes)
    while serving - failing > _NEAR_FRACTION * most_bytes and (cap := _between(failing, serving)) is not None:
        serving, failing = (cap, failing) if is_steady(cap) else (serving, cap)
    return Against(fits=False, cap_bytes=max(serving, failing), peak_allocated_bytes=allocated_bytes)


def predict_reserved(
    requests: Sequence[Request],
    rules: AllocatorRules = DEFAULT_RULES,
) -> Reserved:
    """The free-running peak and both caps of the requests of several steps (``repeat_steps``)."""
    free_running = replay(requests, rules)
    steady = find_cap(requests, Goal.STEADY, rules, free_running=free_running)
    smallest = find_cap(requests, Goal.RUNS, rules, free_running=free_running, no_more_than_bytes=steady.cap_bytes)
    return Reserved(free_running=free_running, steady=steady, smallest=smallest)


def find_cap(
    requests: Sequence[Request],
    goal: Goal,
    rules: AllocatorRules = DEFAULT_RULES,
    *,
    free_running: Replay | None = None,
    no_more_than_bytes: int | None = None,
) -> Cap:
    """The smallest cap, in steps of 2 MiB, that serves ``goal``.

    ``no_more_than_bytes``: a cap that is known to serve it, with all above.
    """
    free_running = free_running or replay(requests, rules)
    serving = free_running.lowest_equal_cap_bytes if no_more_than_bytes is None else no_more_than_bytes
    # Live blocks need no less than themselves; expandable segments pass a cap by up to a page.
    passing_bytes = rules.large_segment_bytes if rules.expandable_segments else 0
    failing = max(0, free_running.peak_allocated_bytes - passing_bytes - SEGMENT_ROUNDING_BYTES)
    known = [serving]
    tried = 0
    while True:
        while (cap := _between(failing, serving)) is not None:
            tried += 1
            done = replay(requests, rules, cap_bytes=cap, stop_at_unsteady=goal is Goal.STEADY)
            if _serves(done, goal):
                serving = min(cap, _rounded_up(done.lowest_equal_cap_bytes))
                known.append(serving)
            else:
                # Expandable segments pass a cap by up to a page, so a range may reach into what is known to serve.
                equal = done.highest_equal_cap_bytes or cap
                failing = max(cap, min(equal, serving - SEGMENT_ROUNDING_BYTES))
        refuting = None
        for cap in _above(serving, max(known)):
            tried += 1
            done = replay(requests, rules, cap_bytes=cap, stop_at_unsteady=goal is Goal.STEADY)
            if not _serves(done, goal):
                refuting = max(cap, done.highest_equal_cap_bytes or cap)
        if refuting is None:
            return Cap(goal=goal, cap_bytes=serving, largest_failing_bytes=failing, tried=tried)
        failing = refuting
        serving = min(cap for cap in known if cap > refuting)


def _serves(done: Replay, goal: Goal) -> bool:
    return done.runs if goal is Goal.RUNS else done.steady


def _between(failing: int, serving: int) -> int | None:
    """A multiple of 2 MiB halfway between, None where there is none left."""
    lowest = failing // SEGMENT_ROUNDING_BYTES + 1
    highest = -(-serving // SEGMENT_ROUNDING_BYTES) - 1
    return (lowest + highest) // 2 * SEGMENT_ROUNDING_BYTES if lowest <= highest else None


def _above(serving: int, highest: int) -> list[int]:
    step = (highest - serving) // (_TRIED_ABOVE + 1)
    caps = [_rounded_up(serving + step * (k + 1)) for k in range(_TRIED_ABOVE)]
    return sorted({cap for cap in caps if serving < cap < highest})


def _rounded_up(cap_bytes: int) -> int:
    return -(-cap_bytes // SEGMENT_ROUNDING_BYTES) * SEGMENT_ROUNDING_BYTES
