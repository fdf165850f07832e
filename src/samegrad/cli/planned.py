"""A program's step, planned: the plan in force, and its footprints as predicted and as measured."""

from __future__ import annotations

import dataclasses
from typing import Any

import samegrad as sg
from samegrad import trees
from samegrad.cli.training import Training
from samegrad.errors import BudgetTooSmall, NotMeasured, UsageError
from samegrad.execute.apply import applied, in_force
from samegrad.measure.counters import read_budget
from samegrad.measure.probe import probe_plain, probe_split
from samegrad.plan.explain import explain_plan
from samegrad.plan.predict import predict_plan
from samegrad.records import Footprint, Origin, Phase, Plan
from samegrad.units import format_bytes

# Enough chunks for the steady state of a long step, few enough to cost less than an epoch.
_MOST_CHUNKS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Planned:
    """The plan that will run, complete with budget and predicted peak; what it came from; and in words.

    ``predicted`` is of measured origin where nothing predicts a lever of the plan.
    """

    plan: Plan
    footprint: Footprint
    predicted: Footprint
    explanation: str


def plan_step(training: Training, given: Plan | None = None) -> Planned:
    """The step of ``training`` planned: by ``given``, by the budget on the command line, or as it was declared.

    Raises BudgetTooSmall or CannotSplit when nothing exact fits, UsageError when the step's own pins contradict.
    """
    if given is not None or training.budget is not None:
        _declare_again(training, given)
    step, batch = training.step, training.batch
    plan = step.prepare(batch)
    footprint = step.footprint or sg.measure_step(step, batch)
    predicted, note = _predicted_or_measured(step, batch, footprint, plan)
    known = predicted.origin is Origin.PREDICTED
    plan = dataclasses.replace(
        plan,
        budget=plan.budget or step.budget or read_budget(None, step.declared.device),
        predicted_peak_bytes=predicted.peak_allocated_bytes if known else plan.predicted_peak_bytes,
        # A settled plan's time was measured at its own rows; the footprint's is drawn out from a few rows.
        predicted_seconds=predicted.seconds if known and plan.predicted_seconds is None else plan.predicted_seconds,
    )
    _check_fits(training, plan, predicted)
    explanation = "\n".join(filter(None, (explain_plan(plan, footprint), note)))
    return Planned(plan=plan, footprint=footprint, predicted=predicted, explanation=explanation)


def _predicted_or_measured(step: sg.Step, batch: Any, footprint: Footprint, plan: Plan) -> tuple[Footprint, str]:
    """What the plan needs, predicted; measured where a lever of it was never measured by itself, and words for that."""
    try:
        return predicted_footprint(footprint, plan), ""
    except NotMeasured as unknown:
        measured = measured_footprint(step, batch, footprint)
        peak = format_bytes(measured.peak_allocated_bytes)
        return measured, (
            f"Not predicted ({unknown.asked}: {unknown.found}), so measured: {measured.basis} peaks at {peak}, "
            "optimizer state that does not exist yet left out."
        )


def _declare_again(training: Training, given: Plan | None) -> None:
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
        device=declared.device,
        allow=step.allow,
    )


def _check_fits(training: Training, plan: Plan, footprint: Footprint) -> None:
    """A pinned or given plan is not believed to fit because somebody asked for it."""
    if plan.budget is None or footprint.peak_allocated_bytes <= plan.budget.total_bytes:
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


def predicted_footprint(footprint: Footprint, plan: Plan) -> Footprint:
    """What is predicted of ``plan``. Raises NotMeasured for a lever that nothing predicts."""
    return predict_plan(footprint, plan.levers)


def measured_footprint(step: sg.Step, batch: Any, footprint: Footprint) -> Footprint:
    """The planned step measured on ``batch`` (at most its first chunks), up to the optimizer's turn.

    Nothing of the user's changes, so optimizer state that does not exist yet is not in it: measure after a step.
    """
    layout = step.declared.layout(batch)
    sizes = step.sizes_for(batch)
    assert step.plan is not None
    with applied(step.plan, step.declared, layout.rows) as execution:
        # What sees the whole batch is measured on it.
        most = layout.rows if execution.scheme is not None else _MOST_CHUNKS * max(sizes)
    measured_rows = min(layout.rows, most)
    whole = measured_rows == layout.rows
    if execution.runs_whole:
        draws = step.draws_for(batch, layout)
        with in_force(step.plan, step.declared, layout.rows) as running:
            probe = probe_plain(running.declared, batch, layout, batch_rows=layout.rows, draws=draws)
    else:
        shown = sizes if whole else trees.even_sizes(measured_rows, max(sizes))
        chunked = step.split_for(batch, layout)
        with in_force(step.plan, step.declared, layout.rows) as running:
            probe = probe_split(dataclasses.replace(chunked, declared=running.declared), batch, layout, shown)
    return dataclasses.replace(
        footprint,
        origin=Origin.MEASURED,
        basis="the planned step on the whole batch" if whole else f"the planned step on {measured_rows} rows",
        rows=max(sizes),
        batch_rows=measured_rows,
        peak_allocated_bytes=probe.peak_bytes,
        peak_reserved_bytes=probe.reserved_bytes,
        seconds=probe.seconds,
        by_category=probe.by_category,
        by_phase=probe.by_phase,
        timeline=probe.timeline,
    )


def measured_after_a_step(step: sg.Step, batch: Any, footprint: Footprint) -> Footprint:
    """The planned step measured with the optimizer's state in place and its turn counted: takes one real step."""
    if step.declared.optimizer is None:
        return measured_footprint(step, batch, footprint)
    counter = sg.count_bytes(step)
    result = next(iter(sg.train(step, [batch], counter=counter)))
    measured = measured_footprint(step, batch, footprint)
    reserved = [n for n in (measured.peak_reserved_bytes, result.peak_reserved_bytes) if n is not None]
    return dataclasses.replace(
        measured,
        peak_allocated_bytes=max(measured.peak_allocated_bytes, result.peak_allocated_bytes or 0),
        peak_reserved_bytes=max(reserved, default=None),
        by_phase=measured.by_phase | {Phase.OPTIMIZER: counter.peak_by_phase.get(Phase.OPTIMIZER, 0)},
    )
