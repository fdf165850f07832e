"""Measure, choose, measure again: from a declared step and a budget to a plan that is believed.

``measure_step`` probes the real step at a few rows; ``settle_plan`` walks down the ladder until a rung's measured
peak is within the budget.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from samegrad import trees
from samegrad.data.prefetch import stream_chunks
from samegrad.declared import DeclaredStep
from samegrad.errors import BudgetTooSmall, CannotSplit, EnvironmentProblem, FalseNormalise, UsageError
from samegrad.exact.aliases import ParameterAliases
from samegrad.exact.examine import Examination, examine
from samegrad.exact.sharded import refuse_sharded
from samegrad.exact.split import SplitStep
from samegrad.execute.apply import applied
from samegrad.measure import counters
from samegrad.measure.census import Residents, count_residents
from samegrad.measure.laws import fit_laws
from samegrad.measure.probe import Probe, measure_rung, probe_plain, probe_split, standing_batch_bytes
from samegrad.plan.choose import choose_plan
from samegrad.plan.margin import usable_bytes
from samegrad.plan.options import Options
from samegrad.records import Budget, Counting, Exactness, Footprint, KnobOrigin, Origin, Phase, PhaseLaw, Plan
from samegrad.trees import RowLayout
from samegrad.units import format_bytes

# Rows of a probe's chunk; few enough for any card, enough for the law to show.
_PROBE_CHUNK_ROWS = 8
# Chunks in the measurement of a rung; an allocator needs a few until its segments lie as they will.
_MEASURED_CHUNKS = {Counting.CUDA_ALLOCATOR: 4, Counting.TENSOR_BYTES: 2}


class Declares(Protocol):
    """Anything that carries a declared step: a ``Step``, for one."""

    @property
    def declared(self) -> DeclaredStep: ...


@dataclasses.dataclass(frozen=True)
class Measurement:
    """A footprint and what it took to split the step; ``split`` is None where the step cannot be split."""

    footprint: Footprint
    split: SplitStep | None
    missing_state_bytes: int = 0


def aliases_for(declared: DeclaredStep) -> ParameterAliases:
    roots = {"": declared.network}
    if declared.loss_module is not None:
        roots["loss_fn"] = declared.loss_module
    return ParameterAliases(roots)


def measure_step(step: Declares, batch: Any, device: torch.device | str | None = None) -> Footprint:
    """The footprint of ``step`` on ``batch``: probes of the real step at a few rows, and laws for all others.

    ``device``: None, or the device the model is on; planning for another card than the one at hand is not there yet
    and is refused. Nothing of the user's changes. Raises CannotSplit only where even the plain step cannot run.
    """
    declared = step.declared
    if device is not None and torch.device(device) != declared.device:
        raise EnvironmentProblem(
            asked=f"a footprint for {device}",
            found=f"the model is on {declared.device}, and a step is measured where its model is",
            do="move the model there, or measure without device=",
        )
    return measure(declared, batch, aliases_for(declared)).footprint


def measure(declared: DeclaredStep, batch: Any, aliases: ParameterAliases) -> Measurement:
    """The footprint, and the split step its probes ran.

    Rows come through buffers that are given back after each run, so that no larger one is still there in the next.
    """
    refuse_sharded(
        declared.modules,
        asked="plan a step from a budget",
        do="say how many rows run at a time: rows= or plan=; ranks would each measure and choose for themselves, and "
        "wait for each other where they chose differently",
    )
    layout = declared.layout(batch)
    residents = count_residents(declared)
    refusals: dict[str, str] = {}
    split: SplitStep | None = None
    if layout.rows > 1:
        try:
            examination = examine(declared, aliases, batch, layout)
            split = SplitStep(declared, aliases, examination, stream_chunks)
        except FalseNormalise:
            # Not a step that cannot be split, but one that was declared to be another.
            raise
        except CannotSplit as refusal:
            refusals["split_rows"] = refusal.found
    else:
        refusals["split_rows"] = "the batch has one row"
    if split is not None and split.examination.collectives:
        raise CannotSplit(
            asked="plan a step from a budget",
            found="the loss calls collectives, and each rank would run it as often as its own measurements ask",
            do="say how many rows run at a time: rows= or plan=",
        )
    if not _rows_are_elsewhere(batch, layout, declared.device):
        refusals["host_rows"] = "the batch is on the model's device already"
    plain = _plain_probes(declared, batch, layout)
    parts = _split_probes(split, batch, layout) if split is not None else []
    shown = parts[-1] if parts else plain[-1]
    seconds_per_row, seconds_per_chunk = _times(parts)
    missing = residents.missing_state_bytes
    standing = standing_batch_bytes(batch, declared.device)
    optimizer_law = _optimizer_law(residents, standing)
    footprint = Footprint(
        device=counters.device_name(declared.device),
        counting=Counting.CUDA_ALLOCATOR if declared.device.type == "cuda" else Counting.TENSOR_BYTES,
        origin=Origin.MEASURED,
        basis=f"{len(parts) + len(plain)} probes of the real step at {plain[0].batch_rows} to "
        f"{max(p.batch_rows for p in (*parts, *plain))} rows",
        rows=shown.rows,
        batch_rows=layout.rows,
        peak_allocated_bytes=shown.peak_bytes,
        peak_reserved_bytes=shown.reserved_bytes,
        seconds=shown.seconds,
        forwards_per_step=split.examination.passes if split is not None else 1,
        seconds_per_row=seconds_per_row,
        seconds_per_chunk=seconds_per_chunk,
        by_category=shown.by_category,
        by_phase=shown.by_phase,
        resident_bytes=residents.by_category,
        laws=(*fit_laws(parts, missing_bytes=missing), optimizer_law) if parts else (),
        plain_laws=(*fit_laws(plain, missing_bytes=missing), optimizer_law),
        refusals=refusals,
        facts=_facts(split.examination if split is not None else None, residents),
        timeline=shown.timeline,
    )
    return Measurement(footprint=footprint, split=split, missing_state_bytes=missing)


def _rows_are_elsewhere(batch: Any, layout: RowLayout, device: torch.device) -> bool:
    row_leaves = [leaf for leaf, axis in zip(trees.leaves_of(batch), layout.axes) if axis is not None]
    return any(not isinstance(leaf, Tensor) or leaf.device != device for leaf in row_leaves)


def _plain_probes(declared: DeclaredStep, batch: Any, layout: RowLayout) -> list[Probe]:
    # Not one row where there are more: batch normalisation in training mode refuses it.
    rows = min(_PROBE_CHUNK_ROWS, max(min(2, layout.rows), layout.rows // 2))
    shapes = dict.fromkeys((rows, min(2 * rows, layout.rows)))
    return [probe_plain(declared, batch, layout, batch_rows=n) for n in shapes]


def _split_probes(split: SplitStep, batch: Any, layout: RowLayout) -> list[Probe]:
    """Two chunks at two sizes; for two passes a third probe tells the rows of a chunk from those of the batch."""
    rows = max(1, min(_PROBE_CHUNK_ROWS, layout.rows // 4))
    shapes = [(rows, 2 * rows), (2 * rows, 4 * rows)]
    if split.examination.passes == 2:
        shapes.insert(1, (rows, 4 * rows))
    possible = [(r, min(n, layout.rows)) for r, n in shapes]
    return [probe_split(split, batch, layout, rows=r, batch_rows=n) for r, n in dict.fromkeys(possible)]


def _times(probes: Sequence[Probe]) -> tuple[float | None, float | None]:
    """Seconds a row and a chunk take, through the first and last probe of two chunks or more."""
    if len(probes) < 2:
        return None, None
    small, large = probes[0], probes[-1]
    per_row = (large.seconds - small.seconds) / max(1, large.batch_rows - small.batch_rows)
    per_row = max(per_row, 0.0)
    chunks = -(-large.batch_rows // large.rows)
    return per_row, max(0.0, (large.seconds - per_row * large.batch_rows) / chunks)


def _optimizer_law(residents: Residents, standing_bytes: int) -> PhaseLaw:
    fixed = sum(residents.by_category.values()) + residents.optimizer_temporary_bytes + standing_bytes
    return PhaseLaw(phase=Phase.OPTIMIZER, fixed_bytes=float(fixed), per_chunk_row_bytes=0.0, per_batch_row_bytes=0.0)


def _facts(examination: Examination | None, residents: Residents) -> dict[str, str]:
    facts = {}
    if examination is not None:
        if examination.passes == 1:
            facts["loss"] = f"one pass: {examination.reason}"
        else:
            facts["loss"] = (
                f"two passes, exact for every loss, at the cost of a second forward ({examination.reason}); if the "
                "loss is a mean over rows, normalise='mean' removes it"
            )
        if examination.module_hooks:
            facts["module hooks, run once a chunk"] = ", ".join(examination.module_hooks)
    if residents.note:
        facts["optimizer"] = residents.note
    return facts


def settle_plan(
    step: Declares,
    batch: Any,
    *,
    budget: Budget | str | int | None = None,
    rows: int | Sequence[int] | None = None,
    rows_origin: KnobOrigin = KnobOrigin.PINNED,
    allow: Exactness = Exactness.SAME_SUM,
) -> tuple[Plan, Footprint]:
    """The first plan of the ladder whose measured peak is within ``budget``, and the footprint it came from.

    ``rows`` pins the rows at a time (a number, or the size of every chunk) and the plan works round it. Hand the plan
    to ``Step(plan=...)``. Raises BudgetTooSmall or CannotSplit when nothing fits.
    """
    declared = step.declared
    limit = budget if isinstance(budget, Budget) else counters.read_budget(budget, declared.device)
    pinned = rows if rows is None or isinstance(rows, int) else tuple(rows)
    options = Options(rows=pinned, rows_origin=rows_origin, allow=allow)
    measurement = measure(declared, batch, aliases_for(declared))
    plan, footprint, _ = settle(declared, measurement, batch, budget=limit, options=options)
    return plan, footprint


def settle(
    declared: DeclaredStep, measurement: Measurement, batch: Any, *, budget: Budget, options: Options
) -> tuple[Plan, Footprint, int | None]:
    """As ``settle_plan``, with a measurement at hand; also the measured peak of the rung (None if not split)."""
    layout = declared.layout(batch)
    footprint = measurement.footprint
    tried: list[str] = []
    for plan in choose_plan(footprint, options, budget):
        with applied(plan, declared, layout.rows) as execution:
            sizes = execution.sizes
        if sizes is None or len(sizes) < 2 or measurement.split is None:
            return plan, footprint, None
        rows = max(sizes)
        shown = min(_MEASURED_CHUNKS[budget.counting] * rows, layout.rows)
        missing = measurement.missing_state_bytes
        rung = measure_rung(
            measurement.split, batch, layout, rows=rows, batch_rows=shown, missing_state_bytes=missing
        )
        # Not there to be measured: what the loss keeps of rows that were left out.
        unseen = _law_peak(footprint, rows, layout.rows) - _law_peak(footprint, rows, shown)
        # Counted bytes are what they are; an allocator's segments still shift as a run goes on.
        most = usable_bytes(budget) if budget.counting is Counting.CUDA_ALLOCATOR else budget.total_bytes
        if rung is not None and rung.peak_bytes + unseen <= most:
            seconds = rung.seconds * layout.rows / shown
            return dataclasses.replace(plan, predicted_seconds=seconds), footprint, rung.peak_bytes + unseen
        found = "out of memory" if rung is None else f"measured {format_bytes(rung.peak_bytes + unseen)}"
        tried.append(f"{rows} rows: predicted {format_bytes(plan.predicted_peak_bytes or 0)}, {found}")
        if options.rows is not None:
            break
    raise BudgetTooSmall(
        asked=f"a plan within {format_bytes(budget.total_bytes)}",
        found="every rung measured more than that: " + "; ".join(tried[:4]),
        do="raise the budget; please report the step, since its prediction was wrong",
    )


def _law_peak(footprint: Footprint, rows: int, batch_rows: int) -> int:
    return max(law.peak_bytes(rows=rows, batch_rows=batch_rows) for law in footprint.laws)


def check_one_of(*, budget: Any, rows: Any, plan: Any) -> None:
    """Raises UsageError when more than one of the three ways to say how a step runs is given."""
    given = [name for name, value in (("budget", budget), ("rows", rows), ("plan", plan)) if value is not None]
    if len(given) > 1:
        raise UsageError(
            asked=" and ".join(f"{name}=" for name in given),
            found="each of them decides how many rows run at a time",
            do="give one of budget, rows and plan (or none: then the budget is what is free now)",
        )

