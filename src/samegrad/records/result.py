"""What became of a step that was run."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from samegrad.json_record import Record


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recovery(Record):
    """One attempt of a step that ran out of memory and was undone, and the plan that ran the same batch after it.

    ``place``: phase, module and line where memory ran out, as far as they are known, and ``found`` the error's first
    line. ``seconds`` went into the attempt and into undoing it. ``left`` and ``taken`` are the levers of both plans,
    with the peaks that they were predicted to need. ``rank``: the rank that ran out, None where there is only one.
    """

    place: str
    found: str
    seconds: float
    left: dict[str, dict[str, Any]]
    taken: dict[str, dict[str, Any]]
    left_predicted_bytes: int | None = None
    taken_predicted_bytes: int | None = None
    rank: int | None = None



@dataclasses.dataclass(frozen=True, kw_only=True)
class StepResult(Record):
    """One optimizer step: its loss, time and memory. Peaks are absent where nothing was counting.

    ``allocator_retries``: how often in this step the allocator had to empty its cache and ask again; a step that fits
    does so never. ``driver_process_bytes``: what the driver says this process holds, context and libraries included.
    ``recoveries``: the attempts that ran out of memory before the one that counts.
    ``counted``: its tensor bytes were counted operation by operation meanwhile, so that ``seconds`` are more than the
    step's own; ``timed`` leaves such steps out.
    """

    index: int
    loss: float
    seconds: float
    batch_rows: int
    grad_norm: float | None = None
    allocated_bytes: int | None = None
    reserved_bytes: int | None = None
    peak_allocated_bytes: int | None = None
    peak_reserved_bytes: int | None = None
    allocator_retries: int | None = None
    driver_process_bytes: int | None = None
    recoveries: tuple[Recovery, ...] = ()
    counted: bool = False


def timed(results: Iterable[StepResult]) -> list[float]:
    """Seconds of the steps beside which nothing was counted."""
    return [result.seconds for result in results if not result.counted]
