"""What levers that put parts of a model into chunks share: their rows under a budget, by laws measured for each."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from samegrad.errors import BadInput, NotMeasured
from samegrad.records import Footprint, Origin, Phase, PhaseLaw, Plan, Variant


def check_rows(lever: str, rows: int | list[int]) -> None:
    """Raises BadInput, naming the lever, for rows at a time that cannot be."""
    listed = rows if isinstance(rows, list) else [rows]
    if not listed or any(not isinstance(n, int) or isinstance(n, bool) or n < 1 for n in listed):
        raise BadInput(
            asked=f"{lever} with rows={rows!r}",
            found="not a positive whole number, nor a list of them",
            do="plan again, or correct the plan file",
        )


def chunk_sizes(rows: int | list[int], batch_rows: int) -> tuple[int, ...]:
    """The rows of each chunk of a batch of ``batch_rows``. Raises BadInput for a list that does not add up."""
    if isinstance(rows, int):
        full, rest = divmod(batch_rows, rows)
        return (*[rows] * full, *[rest] * bool(rest))
    if sum(rows) != batch_rows:
        raise BadInput(
            asked=f"chunks of {rows} rows",
            found=f"they add up to {sum(rows)}, the batch has {batch_rows} rows",
            do="give chunk sizes that add up to the batch, or one number",
        )
    return tuple(rows)


def most_rows(laws: tuple[PhaseLaw, ...], batch_rows: int, budget_bytes: int) -> int:
    """The most rows at a time, below the whole batch, that ``laws`` put within a budget; 0 for none."""
    most = batch_rows - 1
    for law in laws:
        left = budget_bytes - law.fixed_bytes - law.kept_bytes(batch_rows)
        if law.per_chunk_row_bytes > 0:
            most = int(max(0, min(most, left // law.per_chunk_row_bytes)))
        elif left < 0:
            most = 0
    return most


def rungs_of(most: int, batch_rows: int) -> Iterator[int]:
    """Rows at a time from ``most`` down to one: chunks evened out, then rungs of nine tenths."""
    rows = most
    while rows >= 1:
        chunks = -(-batch_rows // rows)
        # As many chunks as that takes, but even ones: the same time and a lower peak.
        even = -(-batch_rows // chunks)
        yield even
        rows = min(even - 1, even * 9 // 10)


def candidates_of(name: str, footprint: Footprint, budget_bytes: int) -> Iterator[tuple[Variant, int]]:
    """For each variant of lever ``name`` that was measured, the rows that fit."""
    for variant in footprint.variants:
        if variant.lever == name:
            for rows in rungs_of(most_rows(variant.laws, footprint.batch_rows, budget_bytes), footprint.batch_rows):
                yield variant, rows


def variant_of(name: str, knobs: dict[str, Any], footprint: Footprint) -> Variant:
    """The measured variant of lever ``name`` with these knobs. Raises NotMeasured when it was not."""
    mine = {knob: value for knob, value in knobs.items() if knob != "rows"}
    for variant in footprint.variants:
        if variant.lever == name and variant.knobs == mine:
            return variant
    raise NotMeasured(
        asked=f"predict {name} with {mine}", found="that was not measured for this step", do="measure the step again"
    )


def variant_in(plan: Plan, footprint: Footprint) -> Variant | None:
    """The measured variant that ``plan`` takes, None where it takes none or another one."""
    for variant in footprint.variants:
        knobs = plan.levers.get(variant.lever)
        if knobs is not None and variant.knobs == {k: v for k, v in knobs.items() if k != "rows"}:
            return variant
    return None


def peaks_by_phase(laws: tuple[PhaseLaw, ...], *, rows: int, batch_rows: int) -> dict[Phase, int]:
    """The peak of each phase: a phase has a law for each of its moments, and the largest decides."""
    by_phase: dict[Phase, int] = {}
    for law in laws:
        peak = law.peak_bytes(rows=rows, batch_rows=batch_rows)
        by_phase[law.phase] = max(peak, by_phase.get(law.phase, 0))
    return by_phase


def predicted_whole(footprint: Footprint) -> Footprint:
    """The plain step on all rows, as the laws have it; what was measured was a few rows."""
    rows = footprint.batch_rows
    by_phase = peaks_by_phase(footprint.plain_laws, rows=rows, batch_rows=rows)
    return predicted_at(footprint, rows, by_phase, footprint.predicted_seconds(rows=rows))


def predicted_without(footprint: Footprint) -> Footprint:
    """What is predicted without a lever of which only a measurement can tell what it changes."""
    return footprint if footprint.origin is Origin.PREDICTED else predicted_whole(footprint)


def predicted(name: str, knobs: dict[str, Any], footprint: Footprint, rows: int | Sequence[int]) -> Footprint:
    """The footprint with lever ``name`` taken at ``rows`` at a time, the largest of several, by its variant's laws."""
    variant = variant_of(name, knobs, footprint)
    rows = rows if isinstance(rows, int) else max(rows)
    by_phase = peaks_by_phase(variant.laws, rows=rows, batch_rows=footprint.batch_rows)
    seconds = variant.predicted_seconds(rows=rows, batch_rows=footprint.batch_rows)
    return predicted_at(footprint, rows, by_phase, seconds)


def predicted_at(footprint: Footprint, rows: int, by_phase: dict[Phase, int], seconds: float | None) -> Footprint:
    """The footprint at ``rows`` at a time, with the peak of each phase and the time of a step that are predicted."""
    return dataclasses.replace(
        footprint,
        origin=Origin.PREDICTED,
        rows=rows,
        peak_allocated_bytes=max(by_phase.values()),
        peak_reserved_bytes=None,
        by_phase=by_phase,
        seconds=seconds,
        timeline=(),
        by_category={},
    )
