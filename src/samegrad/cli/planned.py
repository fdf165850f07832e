"""A program's step, planned: the plan in force, and its footprints as predicted and as measured."""

from __future__ import annotations

import dataclasses
from typing import Any

import samegrad as sg
from samegrad.cli.measured import followed_footprint, measured_footprint
from samegrad.cli.training import Training
from samegrad.errors import IN_THE_DECLARATION, BudgetTooSmall, CannotTrace, NotMeasured, UsageError
from samegrad.measure.counters import read_budget
from samegrad.plan.explain import explain_plan
from samegrad.plan.predict import predict_plan
from samegrad.records import Footprint, KnobOrigin, Origin, Plan
from samegrad.units import format_bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Planned:
    """The plan that will run, complete with budget and predicted peak; what it came from; and in words.

    ``predicted`` is of measured origin where nothing predicts a lever of the plan. ``told``: what the program itself
    has to say of the plan, which is the end of ``explanation``.
    """

    plan: Plan
    footprint: Footprint
    predicted: Footprint
    explanation: str
    told: str = ""


def plan_step(training: Training, given: Plan | None = None, *, resumed: bool = False) -> Planned:
    """The step of ``training`` planned: by ``given``, by the budget on the command line, or as it was declared.

    ``resumed``: the plan is that of the run that goes on. Where nobody pinned a knob of it, it is no pin here either:
    where memory runs out a smaller one is taken, as in the run before.
    Raises BudgetTooSmall or CannotSplit when nothing exact fits, UsageError when the step's own pins contradict.
    """
    if given is not None or training.budget is not None:
        chosen = resumed and given is not None and KnobOrigin.PINNED not in given.knob_origins.values()
        declare_again(training, given, _measured(training) if chosen else None)
    step, batch = training.step, training.batch
    plan = step.prepare(batch)
    footprint = _measured(training)
    predicted, note = _predicted(step, batch, plan, footprint)
    known = predicted.origin is Origin.PREDICTED
    plan = dataclasses.replace(
        plan,
        budget=plan.budget or step.budget or read_budget(None, step.declared.device),
        predicted_peak_bytes=predicted.peak_allocated_bytes if known else plan.predicted_peak_bytes,
        # A settled plan's time was measured at its own rows; the footprint's is drawn out from a few rows.
        predicted_seconds=predicted.seconds if known and plan.predicted_seconds is None else plan.predicted_seconds,
    )
    _check_fits(training, plan, predicted)
    told = "\n".join([*training.told_of_pins(), *training.told_of(plan, footprint)])
    explanation = "\n".join(filter(None, (explain_plan(plan, footprint), note, told)))
    return Planned(plan=plan, footprint=footprint, predicted=predicted, explanation=explanation, told=told)


def _measured(training: Training) -> Footprint:
    return facts_for(training, training.step.footprint or sg.measure_step(training.step, training.batch))


def facts_for(training: Training, footprint: Footprint) -> Footprint:
    """``footprint`` without advice that whoever runs ``training`` cannot follow."""
    if training.declared_here or IN_THE_DECLARATION not in footprint.facts:
        return footprint
    facts = {topic: fact for topic, fact in footprint.facts.items() if topic != IN_THE_DECLARATION}
    return dataclasses.replace(footprint, facts=facts)


def declare_again(training: Training, given: Plan | None, footprint: Footprint | None = None) -> None:
    """Puts the same step in place, declared with the plan or the budget of the command line.

    ``footprint``: what smaller plans than ``given`` are chosen from; without it the plan is a pin.
    """
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
        footprint=footprint,
        budget=training.budget if given is None else None,
        host_budget=step.asked_host_budget,
        optimizer=declared.optimizer,
        forward=declared.forward,
        normalise=declared.normalise,
        batch_axes=declared.batch_axes,
        segments=declared.segments,
        head=declared.head,
        plain_forward=declared.plain_forward,
        expected_steps=step.expected_steps,
        device=declared.device,
        allow=step.allow,
    )


def _predicted(step: sg.Step, batch: Any, plan: Plan, footprint: Footprint) -> tuple[Footprint, str]:
    """What the plan needs by laws, by following it where a lever of it has none, or measured; and words for that."""
    try:
        return predict_plan(footprint, plan.levers), ""
    except NotMeasured as unknown:
        why = f"Not predicted by laws ({unknown.asked}: {unknown.found}), so"
        try:
            found = followed_footprint(step, batch, footprint)
            return found, f"{why} followed: {found.basis} peaks at {format_bytes(found.peak_allocated_bytes)}."
        except CannotTrace as unseen:
            found = measured_footprint(step, batch, footprint)
            peak = format_bytes(found.peak_allocated_bytes)
            return found, (
                f"{why} measured, since it cannot be followed ({unseen.found}): {found.basis} peaks at {peak}, "
                "optimizer state that does not exist yet left out."
            )


def _check_fits(training: Training, plan: Plan, footprint: Footprint) -> None:
    """A pinned or given plan is not believed to fit because somebody asked for it."""
    if plan.budget is None or plan.budget.counting is not footprint.counting:
        return
    if footprint.peak_allocated_bytes <= plan.budget.total_bytes:
        return
    raise BudgetTooSmall(
        asked=f"run {training.title} within {format_bytes(plan.budget.total_bytes)} ({plan.budget.source})",
        found=f"as pinned, {_rows_at_a_time(plan)} rows at a time, it is {footprint.origin.value} to "
        f"need {format_bytes(footprint.peak_allocated_bytes)}",
        do="take fewer rows at a time, drop the pin and let the plan choose, or raise the budget",
    )


def _rows_at_a_time(plan: Plan) -> Any:
    # The rows of chunk_loss are positions, not rows of the batch.
    split = {name: knobs for name, knobs in plan.levers.items() if name != "chunk_loss"}
    return next((knobs["rows"] for knobs in split.values() if "rows" in knobs), "all")
