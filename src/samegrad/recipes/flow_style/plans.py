"""How a logical batch is run: rows at a time and ODE steps that run again, by pin, by budget, or as the document does.

1. Without a budget: ``batch_size`` rows at a time.
2. A pin on checkpointing is the model's own option, and part of the step; the rows at a time are chosen round it.
3. With a budget and no pin, on a GPU: the engine chooses rows and which ODE steps run again. Elsewhere splitting rows
   is enough nearly always; where fewer than ``batch_size`` would run at a time, every step again and groups of about
   the square root of all are measured too, and the fastest that fits is taken.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import samegrad as sg

from .data import StyleBatch
from .model import StyleFlow
from .options import FlowStyleOptions

Declare = Callable[..., sg.Step]
Blocks = list[str | list[str]]


def planned_step(options: FlowStyleOptions, model: StyleFlow, declare: Declare, batch: StyleBatch) -> sg.Step:
    """The step that ``declare(budget=... | plan=...)`` makes, under the plan that ``options`` ask for.

    Raises BudgetTooSmall, naming the option where checkpointing is pinned off and that does not fit.
    """
    pinned, on_gpu = options.pinned_checkpoint, sg.find_device(options.device).type == "cuda"
    model.checkpoint_every, model.may_run_again = pinned or 0, pinned is None
    if options.budget is None:
        return declare(plan=document_plan(options))
    if pinned or (pinned is None and on_gpu):
        return declare(budget=options.budget)
    if pinned == 0:
        plan, footprint = _all_kept(options, declare, batch)
    else:
        plan, footprint = _fastest(options, model, declare, batch)
    step = declare(plan=plan)
    step.footprint = footprint
    return step


def document_plan(options: FlowStyleOptions) -> sg.Plan:
    """``batch_size`` rows at a time."""
    if options.accumulation_steps == 1:
        return sg.Plan(levers={}, exactness=sg.Exactness.SAME_BITS, batch_rows=options.logical_rows)
    given = options.batch_size is not None
    return sg.Plan(
        levers={"host_rows": {}, "split_rows": {"rows": options.size("batch_size")}},
        exactness=sg.Exactness.SAME_SUM,
        batch_rows=options.logical_rows,
        knob_origins={"split_rows.rows": sg.KnobOrigin.PINNED if given else sg.KnobOrigin.DEFAULT},
    )


def step_blocks(model: StyleFlow, every: int) -> Blocks:
    """The ODE steps in runs of ``every`` that run again together, as the lever ``recompute`` takes them."""
    names = [f"steps.{index}" for index in range(len(model.steps))]
    return [run if len(run) > 1 else run[0] for run in (names[i : i + every] for i in range(0, len(names), every))]


def _fastest(
    options: FlowStyleOptions, model: StyleFlow, declare: Declare, batch: StyleBatch
) -> tuple[sg.Plan, sg.Footprint]:
    """The fastest plan that was measured to fit: with all ODE steps kept, or with some of them run again."""
    found: list[tuple[sg.Plan, sg.Footprint]] = []
    refused: list[sg.BudgetTooSmall] = []
    steps = options.ode_integration_steps
    for every in dict.fromkeys((0, max(1, round(math.sqrt(steps))), 1)):
        try:
            found.append(_settled(options, model, declare, batch, every))
        except sg.BudgetTooSmall as refusal:
            refused.append(refusal)
        if every == 0 and found and _rows_of(found[0][0]) >= options.size("batch_size"):
            # Running steps again takes time, and saves what is not needed.
            break
    if not found:
        # The last way needs the least.
        raise refused[-1]
    return min(found, key=lambda settled: settled[0].predicted_seconds or math.inf)


def _rows_of(plan: sg.Plan) -> int:
    rows = plan.levers.get("split_rows", {}).get("rows", plan.batch_rows)
    return int(rows if isinstance(rows, int) else max(rows))


def _settled(
    options: FlowStyleOptions, model: StyleFlow, declare: Declare, batch: StyleBatch, every: int
) -> tuple[sg.Plan, sg.Footprint]:
    """The fastest rows at a time that were measured to fit, with every so manyth ODE step's state kept; 0 keeps all.

    The model's own checkpoints stand in for the lever while it is measured: they keep and run again the same.
    """
    model.checkpoint_every = every
    try:
        with declare() as step:
            plan, footprint = sg.settle_plan(step, batch, budget=options.budget)
    finally:
        model.checkpoint_every = 0
    if not every:
        return plan, footprint
    levers = plan.levers | {"recompute": {"blocks": step_blocks(model, every)}}
    origins = {**plan.knob_origins, "recompute.blocks": sg.KnobOrigin.CHOSEN}
    # What the plan says of levers is about the step with checkpoints of its own.
    reasons = {"recompute": "taken: the fastest that was measured to fit, beside other groups of ODE steps and none"}
    if "split_rows" not in levers:
        reasons["split_rows"] = "not needed: with ODE steps run again all rows fit at once"
    return dataclasses.replace(plan, levers=levers, knob_origins=origins, reasons=plan.reasons | reasons), footprint


def _all_kept(options: FlowStyleOptions, declare: Declare, batch: StyleBatch) -> tuple[sg.Plan, sg.Footprint]:
    """The plan with checkpointing pinned off."""
    with declare() as step:
        try:
            return sg.settle_plan(step, batch, budget=options.budget)
        except sg.BudgetTooSmall as refusal:
            raise sg.BudgetTooSmall(
                asked=f"--no_use_gradient_checkpointing within {options.budget}",
                found=refusal.found,
                do="leave it out and let the budget decide, or raise the budget",
                option="use_gradient_checkpointing",
            ) from refusal
