"""How a logical batch is run: rows at a time and ODE steps that run again, by pin, by budget, or as the document does.

1. Without a budget: ``batch_size`` rows at a time, checkpointing where it is asked for.
2. With one, where nothing is pinned, the fastest plan that was measured to fit: on a GPU the engine chooses which ODE
   steps run again; elsewhere none, every step and groups of about the square root of all are measured.
3. A pin holds, and the rows at a time are chosen round it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import samegrad as sg

from .data import StyleBatch
from .model import StyleFlow
from .options import FlowStyleOptions

Declare = Callable[..., sg.Step]
Blocks = list[str | list[str]]


def planned_step(options: FlowStyleOptions, model: StyleFlow, declare: Declare, batch: StyleBatch) -> sg.Step:
    """The step that ``declare(budget=... | plan=...)`` makes, under the plan that ``options`` ask for.

    Raises BudgetTooSmall naming the option where a pin does not fit.
    """
    pinned = options.pinned_checkpoint
    if options.budget is None:
        return declare(plan=document_plan(options, model))
    if pinned is None and sg.find_device(options.device).type == "cuda":
        return declare(budget=options.budget)
    every = (pinned,) if pinned is not None else _groups(options.ode_integration_steps)
    plan, footprint = _fastest(options, model, declare, batch, every)
    step = declare(plan=plan)
    step.footprint = footprint
    return step


def document_plan(options: FlowStyleOptions, model: StyleFlow) -> sg.Plan:
    """``batch_size`` rows at a time; checkpointing only where it is asked for."""
    levers: dict[str, dict[str, Any]] = {}
    origins = {}
    if options.accumulation_steps > 1:
        levers |= {"host_rows": {}, "split_rows": {"rows": options.size("batch_size")}}
        given = options.batch_size is not None
        origins["split_rows.rows"] = sg.KnobOrigin.PINNED if given else sg.KnobOrigin.DEFAULT
    if options.pinned_checkpoint:
        levers |= _recompute(model, options.pinned_checkpoint)
        origins["recompute.blocks"] = sg.KnobOrigin.PINNED
    return sg.Plan(
        levers=levers,
        exactness=sg.Exactness.SAME_SUM if "split_rows" in levers else sg.Exactness.SAME_BITS,
        batch_rows=options.logical_rows,
        knob_origins=origins,
    )


def step_blocks(model: StyleFlow, every: int) -> Blocks:
    """The ODE steps in runs of ``every`` that run again together, as the lever ``recompute`` takes them."""
    names = [f"steps.{index}" for index in range(len(model.steps))]
    return [run if len(run) > 1 else run[0] for run in (names[i : i + every] for i in range(0, len(names), every))]


def _recompute(model: StyleFlow, every: int) -> dict[str, dict[str, Any]]:
    return {"recompute": {"blocks": step_blocks(model, every)}}


def _groups(steps: int) -> tuple[int, ...]:
    """No checkpointing, groups of about the square root of all steps, and every step."""
    return tuple(dict.fromkeys((0, max(1, round(math.sqrt(steps))), 1)))


def _fastest(
    options: FlowStyleOptions, model: StyleFlow, declare: Declare, batch: StyleBatch, every: tuple[int, ...]
) -> tuple[sg.Plan, sg.Footprint]:
    """The fastest of the plans that were measured to fit, one for each way to checkpoint."""
    found: list[tuple[sg.Plan, sg.Footprint]] = []
    refused: list[sg.BudgetTooSmall] = []
    for count in every:
        try:
            found.append(_settled(options, model, declare, batch, count))
        except sg.BudgetTooSmall as refusal:
            refused.append(refusal)
    if found:
        return min(found, key=lambda settled: settled[0].predicted_seconds or math.inf)
    if options.pinned_checkpoint is None:
        # The last way needs the least.
        raise refused[-1]
    raise sg.BudgetTooSmall(
        asked=f"{_in_words(options)} within {options.budget}",
        found=refused[-1].found,
        do="leave it out and let the budget decide, or raise the budget",
        option="use_gradient_checkpointing" if options.checkpoint_every is None else "checkpoint_every",
    )


def _in_words(options: FlowStyleOptions) -> str:
    if options.checkpoint_every is not None:
        return f"--checkpoint_every {options.checkpoint_every}"
    return "--use_gradient_checkpointing" if options.use_gradient_checkpointing else "--no-use_gradient_checkpointing"


def _settled(
    options: FlowStyleOptions, model: StyleFlow, declare: Declare, batch: StyleBatch, every: int
) -> tuple[sg.Plan, sg.Footprint]:
    """The fastest rows at a time that were measured to fit, with every so manyth ODE step's state kept; 0 keeps all.

    The model's own checkpoints stand in for the lever while it is measured: they keep and run again the same.
    """
    before = model.checkpoint_every
    model.checkpoint_every = every
    try:
        with declare() as step:
            plan, footprint = sg.settle_plan(step, batch, budget=options.budget)
            if "recompute" in plan.levers:
                # The engine's own choice of steps, where one is pinned: fewer rows at a time in its place.
                assert plan.budget is not None
                fits = [r for r in range(1, plan.batch_rows) if footprint.predicted_peak_bytes(rows=r) <= _most(plan)]
                plan, footprint = sg.settle_plan(step, batch, budget=options.budget, rows=max(fits, default=1))
    finally:
        model.checkpoint_every = before
    if not every:
        return plan, footprint
    origin = sg.KnobOrigin.CHOSEN if options.pinned_checkpoint is None else sg.KnobOrigin.PINNED
    levers = {name: knobs for name, knobs in plan.levers.items() if name != "recompute"} | _recompute(model, every)
    return (
        dataclasses.replace(plan, levers=levers, knob_origins={**plan.knob_origins, "recompute.blocks": origin}),
        footprint,
    )


def _most(plan: sg.Plan) -> float:
    # What is left lets the measurement of it differ from its law.
    assert plan.budget is not None
    return 0.9 * plan.budget.total_bytes
