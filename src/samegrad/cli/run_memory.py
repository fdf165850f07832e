"""Signs that memory is short while a run goes on: attempts that were undone, and an allocator at its edge. No torch."""

from __future__ import annotations

from collections.abc import Sequence

from samegrad.records import StepResult
from samegrad.report.recoveries import describe_recovery

# The first two steps make the optimizer's state, and segments still find their places.
WARM_UP_STEPS = 2
SMALLER = "give a smaller --budget, so that the plan takes fewer rows at a time"


def thrashing_line(results: Sequence[StepResult]) -> str | None:
    """The first step after the warm-up in which the allocator had to empty its cache, in words; None without one."""
    for result in results:
        if result.index >= WARM_UP_STEPS and result.allocator_retries:
            return (
                f"warning: in step {result.index} the allocator emptied its cache {result.allocator_retries} times "
                f"to go on. The plan is at the edge of its budget and such steps are slow: {SMALLER}"
            )
    return None


def memory_notes(results: Sequence[StepResult]) -> tuple[str, ...]:
    """What a report says of them: each recovery, and whose the verdict is then; how many steps had to try again."""
    notes = [f"Step {r.index}: {describe_recovery(recovery)}." for r in results for recovery in r.recoveries]
    if notes:
        notes.append("The verdict is that of the plan the run began with; the plan shown is the one it ended with.")
    short = [result for result in results[WARM_UP_STEPS:] if result.allocator_retries]
    if short:
        notes.append(f"In {len(short)} of {len(results)} steps the allocator emptied its cache to go on: {SMALLER}.")
    return tuple(notes)
