"""A program's step, planned: the plan in force, and its footprints as predicted and as measured."""

from __future__ import annotations

import dataclasses
from typing import Any

import samegrad as sg
from samegrad.cli.measured import followed_footprint
from samegrad.cli.training import Training
from samegrad.errors import BadInput, BudgetTooSmall, UsageError
from samegrad.measure.counters import read_budget
from samegrad.plan.explain import explain_plan
from samegrad.plan.predict import predict_plan
from samegrad.records import Budget, Footprint, Plan
from samegrad.units import format_bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Planned:
    """The plan that will run, complete with budget and predicted peak; what it came from; and in words."""

    plan: Plan
    footprint: Footprint
    predicted: Footprint
    explanation: str


def plan_step(training: Training, given: Plan | None = None) -> Planned:
    """The step of ``training`` planned: by ``given``, by the budget on the command line, or as it was declared.

    Raises BudgetTooSmall or CannotSplit when nothing exact fits, UsageError when the step's own pins contradict.
    """
    if given is not None or training.budget is not None:
        declare_again(training, given)
    step, batch = training.step, training.batch
    plan = step.prepare(batch)
    footprint = step.footprint or sg.measure_step(step, batch)
    predicted = _predicted(step, batch, plan, footprint)
    plan = dataclasses.replace(
        plan,
        budget=plan.budget or step.budget or read_budget(None, step.declared.device),
        predicted_peak_bytes=predicted.peak_allocated_bytes,
        # A settled plan's time was measured at its own rows; the footprint's is drawn out from a few rows.
        predicted_seconds=predicted.seconds if plan.predicted_seconds is None else plan.predicted_seconds,
    )
    if plan.budget is not None and plan.budget.counting is footprint.counting:
        _check_fits(training, plan, plan.budget)
    return Planned(plan=plan, footprint=footprint, predicted=predicted, explanation=explain_plan(plan, footprint))


def declare_again(training: Training, given: Plan | None) -> None:
    """Puts the same step in place, declared with the plan or the budget of the command line."""
    step = training.step
    pinned, declared = step.rows, step.declared
    if pinned is not None and given is None:
        raise UsageError(
            asked=f"--budget {training.budget} for {training.title}",
            found=f"the step was declared with rows={pinned if isinstance(pinned, int) else list(pinned)}",
            do="leave rows= out of samegrad.Step, or leave the option out",
            option="budget",
        )
    step.close()
    training.step = sg.Step(
        declared.model,
        declared.loss_fn,
        plan=given,
        budget=training.budget if given is None else None,
        optimizer=declared.optimizer,
        forward=declared.forward,
        normalise=declared.normalise,
        batch_axes=declared.batch_axes,
        segments=declared.segments,
        head=declared.head,
        expected_steps=step.expected_steps,
        device=declared.device,
        allow=step.allow,
    )


def _predicted(step: sg.Step, batch: Any, plan: Plan, footprint: Footprint) -> Footprint:
    """What the plan is predicted to need: by laws, and by following it where a given plan brings what has none."""
    try:
        return predict_plan(footprint, plan.levers)
    except BadInput:
        return followed_footprint(step, batch, footprint)


def _check_fits(training: Training, plan: Plan, budget: Budget) -> None:
    """A pinned or given plan is not believed to fit because somebody asked for it."""
    if plan.predicted_peak_bytes is None or plan.predicted_peak_bytes <= budget.total_bytes:
        return
    raise BudgetTooSmall(
        asked=f"run {training.title} within {format_bytes(budget.total_bytes)} ({budget.source})",
        found=f"as pinned, {_rows_at_a_time(plan)} rows at a time, it is predicted to "
        f"need {format_bytes(plan.predicted_peak_bytes)}",
        do="take fewer rows at a time, drop the pin and let the plan choose, or raise the budget",
    )


def _rows_at_a_time(plan: Plan) -> Any:
    # The rows of chunk_loss are positions, not rows of the batch.
    split = {name: knobs for name, knobs in plan.levers.items() if name != "chunk_loss"}
    return next((knobs["rows"] for knobs in split.values() if "rows" in knobs), "all")
