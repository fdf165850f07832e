"""From options to a step with its plan: on one device, or with the centers shared out over several."""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch import Tensor

import samegrad as sg
from samegrad.recipes._recipe.pinned import pinned_step

from .model import KernelModel
from .objective import BATCH_AXES, Batch, kernel_outputs, matching_loss
from .options import ScoreKernelOptions
from .parallel import Across, AcrossDevices, check_places, shard_of, unsharded


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlannedStep:
    """A step, the centers that this process holds, and how they are shared out.

    ``of_shard``: where they are, the footprint of one place's centers on their own, which the plan was made from.
    """

    step: sg.Step
    centers: Tensor
    across: Across | None = None
    of_shard: sg.Footprint | None = None
    places_error: float | None = None


def plan_on_one(
    options: ScoreKernelOptions, model: KernelModel, optimizer: torch.optim.Optimizer, centers: Tensor, samples: Tensor
) -> PlannedStep:
    """All centers on one device: as pinned, by the document's default, or chosen from the budget at the first batch."""
    declare = functools.partial(
        sg.Step, model, matching_loss, forward=kernel_outputs, batch_axes=BATCH_AXES, reduce="softmax_mean",
        optimizer=optimizer,
    )  # fmt: skip
    rows, origin = options.pinned_rows(len(centers)), sg.KnobOrigin.PINNED
    if rows is None:
        rows, origin = options.default_rows(len(centers)), sg.KnobOrigin.DEFAULT
    if rows is None:
        return PlannedStep(step=declare(budget=options.budget), centers=centers)
    if options.budget is None:
        return PlannedStep(step=declare(plan=_plan_of(rows, len(centers), origin)), centers=centers)
    largest = rows if isinstance(rows, int) else max(rows)
    step = pinned_step(
        declare,
        {"centers": centers, "samples": samples},
        budget=options.budget,
        rows=rows,
        asked=f"{largest} of {len(centers)} centers at a time within {options.budget}",
        do="ask for fewer centers at a time, leave the pin out, or raise the budget",
        option="budget",
    )
    return PlannedStep(step=step, centers=centers)


def _plan_of(rows: int | list[int], centers: int, origin: sg.KnobOrigin) -> sg.Plan:
    split = rows not in (centers, [centers])
    return sg.Plan(
        levers={"split_rows": {"rows": rows}} if split else {},
        exactness=sg.Exactness.SAME_SUM if split else sg.Exactness.SAME_BITS,
        batch_rows=centers,
        knob_origins={"split_rows.rows": origin},
    )


def plan_across(
    options: ScoreKernelOptions,
    model: KernelModel,
    optimizer: torch.optim.Optimizer,
    centers: Tensor,
    samples: Tensor,
    across: Across,
) -> PlannedStep:
    """Centers over the places of ``across``, each of which streams its own, as many at a time as its budget holds.

    The largest shard is planned on its own, on this process's device; every rank may choose another number.
    """
    here = shard_of(centers, across)
    shard = centers.tensor_split(across.places)[0]
    batch: Batch = {"centers": shard, "samples": samples}
    alone = plan_on_one(_for_shard(options, len(shard)), model, optimizer, shard, samples).step
    with alone:
        plan, rows = alone.prepare(batch), max(alone.sizes_for(batch))
        footprint = alone.footprint or sg.measure_step(alone, batch)
    across = dataclasses.replace(across, rows=rows)
    error = check_places(across, centers.device)
    step = sg.Step(
        model, matching_loss, forward=across, plain_forward=unsharded(across), batch_axes=BATCH_AXES,
        optimizer=optimizer,
        plan=sg.Plan(
            levers={},
            # Places add up their centers' terms in an order of their own.
            exactness=sg.Exactness.SAME_SUM,
            batch_rows=len(here),
            budget=plan.budget or alone.budget,
            reasons={"model_parallel": f"{across.places} places, {rows} centers at a time on each"},
        ),
    )  # fmt: skip
    beside_bytes = _gradients_beside(model, across, chunks=-(-len(shard) // rows))
    step.footprint = _of_place(footprint, rows, len(here), beside_bytes)
    return PlannedStep(step=step, centers=here, across=across, of_shard=footprint, places_error=error)


def _for_shard(options: ScoreKernelOptions, centers: int) -> ScoreKernelOptions:
    """What is asked of one place: its share of the centers, and as many steps or as large chunks."""
    steps = options.accumulation_steps
    return dataclasses.replace(
        # Under no name, whose default would be for all centers.
        options, strategy="auto", devices=(), train_kernel_size=centers, load_centers_path=None,
        accumulation_steps=None if steps is None else min(steps, centers),
    )  # fmt: skip


def _gradients_beside(model: KernelModel, across: Across, *, chunks: int) -> int:
    """Bytes of gradients that stand beside those of the shard's own step.

    A chunk's are added into sums of their own, which is one more where there is but one chunk; and in one process the
    sums of other places have arrived already when the last place runs.
    """
    times = (chunks == 1) + (isinstance(across, AcrossDevices) and across.places > 1)
    return times * sum(parameter.nbytes for parameter in model.parameters())


def _of_place(footprint: sg.Footprint, rows: int, batch_rows: int, beside_bytes: int) -> sg.Footprint:
    """The footprint of a place's streamed centers as that of a step that runs whole: that is what its plan says.

    The optimizer's turn comes when ``beside_bytes`` are gone.
    """
    laws = footprint.plain_laws if rows >= footprint.batch_rows else footprint.laws
    fixed = tuple(
        dataclasses.replace(
            law,
            fixed_bytes=float(law.peak_bytes(rows=rows, batch_rows=footprint.batch_rows))
            + (beside_bytes if law.phase.value == "backward" else 0),
            per_chunk_row_bytes=0.0, per_batch_row_bytes=0.0, per_row_pair_bytes=0.0,
        )
        for law in laws
    )  # fmt: skip
    return dataclasses.replace(
        footprint, batch_rows=batch_rows, laws=(), plain_laws=fixed, kept_row_bytes=None,
        basis=f"{footprint.basis}, of one place's centers",
    )  # fmt: skip
