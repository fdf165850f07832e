"""Which of the document's strategies a plan is, why, and what the document's own rule would have said. No torch.

All strategies give the same gradient. ``chunked`` and ``gradient_accumulation`` are two names for one computation: so
many centers at a time, or so many chunks.
"""

from __future__ import annotations

import dataclasses

import samegrad as sg

from .options import ScoreKernelOptions

# The document's thresholds, of one device's memory and of all devices' together.
SINGLE_FRACTION, PARALLEL_FRACTION, CHUNKED_FRACTION = 0.8, 0.6, 1.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Strategy:
    """A strategy by name: ``chunk_size`` centers at a time in ``steps`` chunks on each of ``places`` devices."""

    name: str
    chunk_size: int
    steps: int
    places: int
    reason: str


def strategy_of(
    options: ScoreKernelOptions, *, chunk_size: int, steps: int, places: int, plan: sg.Plan, visible: int = 1
) -> Strategy:
    """The name of what runs ``chunk_size`` centers at a time, in ``steps`` chunks on each of ``places``.

    ``visible``: devices that there are, whether or not they are used.
    """
    on_one = ""
    if visible > 1:
        on_one = f" on one device; --strategy model_parallel shares the centers out over all {visible}"
    if options.strategy == "model_parallel" and places == 1:
        name = "single_gpu" if steps == 1 else "chunked"
        reason = "--strategy model_parallel has one device here"
    elif options.strategy != "auto":
        name, reason = options.strategy, f"--strategy {options.strategy}"
        if plan.knob_origins.get("split_rows.rows") is sg.KnobOrigin.DEFAULT:
            reason += ", by the document's default"
    elif places > 1:
        name, reason = "model_parallel", f"there are {places} devices to share the centers out over"
    elif steps == 1:
        reason = f"all centers at once fit {_budget_in_words(plan)}, and nothing is faster{on_one}"
        name = "single_gpu"
    else:
        name, reason = "chunked", f"the fastest that fits {_budget_in_words(plan)}{on_one}"
    return Strategy(name=name, chunk_size=chunk_size, steps=steps, places=places, reason=reason)


def _budget_in_words(plan: sg.Plan) -> str:
    if plan.budget is None:
        return "what is free"
    return f"{sg.format_bytes(plan.budget.total_bytes)} ({plan.budget.source})"


def documents_choice(need_bytes: int, device_bytes: int, devices: int) -> str:
    """The document's rule on these bytes: 80 % of one device, 60 % of all, 150 % of one, and otherwise accumulation."""
    if need_bytes <= SINGLE_FRACTION * device_bytes:
        return "single_gpu"
    if devices > 1 and need_bytes <= PARALLEL_FRACTION * devices * device_bytes:
        return "model_parallel"
    if need_bytes <= CHUNKED_FRACTION * device_bytes:
        return "chunked"
    return "gradient_accumulation"


def documents_estimate(*, centers: int, batch_size: int, dim: int, parameters: int) -> int:
    """The document's own estimate in bytes, its factor of 2.5 included; compare with what is measured."""
    return int((2 * centers * dim**2 + 4 * batch_size * dim + centers * dim + 2 * parameters) * 4 * 2.5)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """What a plan holds, in the document's lines. ``precision_bytes``: factors of the centers at a time, with all that
    is computed from them; ``dense_precision_bytes``: what all P at once would be. ``total_bytes`` is the peak, at which
    not all of the others stand, and others do.
    """

    centers_bytes: int
    precision_bytes: int
    dense_precision_bytes: int
    gradients_bytes: int
    total_bytes: int

    def lines(self) -> list[str]:
        return [
            "Memory estimates:",
            f"  Centers: {sg.format_bytes(self.centers_bytes)}",
            f"  Precision matrices: {sg.format_bytes(self.precision_bytes)} "
            f"(all of them, dense and at once: {sg.format_bytes(self.dense_precision_bytes)})",
            f"  Gradients: {sg.format_bytes(self.gradients_bytes)}",
            f"  Total estimate: {sg.format_bytes(self.total_bytes)}",
        ]


def memory_estimate(
    footprint: sg.Footprint, *, rows: int, centers: int, dim: int, itemsize: int, parameter_bytes: int, total_bytes: int
) -> MemoryEstimate:
    """From the laws that were measured: what grows with the centers at a time is the precision matrices' line."""
    laws = footprint.plain_laws if rows >= footprint.batch_rows else footprint.laws
    own = centers * dim * itemsize
    per_center = max(
        law.per_chunk_row_bytes + (law.per_batch_row_bytes if rows >= footprint.batch_rows else 0.0) for law in laws
    )
    # Of a whole step the centers themselves grow with the centers at a time as well.
    counted_centers = dim * itemsize if rows >= footprint.batch_rows else 0
    return MemoryEstimate(
        centers_bytes=own,
        precision_bytes=int(max(0.0, per_center - counted_centers) * rows),
        dense_precision_bytes=centers * dim**2 * itemsize,
        gradients_bytes=parameter_bytes,
        total_bytes=total_bytes,
    )
