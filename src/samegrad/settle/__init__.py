"""Measure, choose, measure again: from a declared step and a budget to a plan that is believed.

``measure_step`` probes the real step at a few rows; ``settle_plan`` walks down the ladder until a rung's measured
peak is within the budget.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from samegrad.declared import DeclaredStep, check_step
from samegrad.errors import EnvironmentProblem, UsageError
from samegrad.exact.aliases import ParameterAliases
from samegrad.measure import counters
from samegrad.measure.child_signals import children_heard_later
from samegrad.measure.target import Target
from samegrad.plan.margin import usable_bytes
from samegrad.plan.options import Options
from samegrad.records import Budget, Exactness, Footprint, KnobOrigin, Plan
from samegrad.settle.again_ways import with_blocks_again
from samegrad.settle.beside import followed_beside
from samegrad.settle.following import follow
from samegrad.settle.further import smaller_plans
from samegrad.settle.ladder import settle
from samegrad.settle.on_card import footprint_of, settle_on_card, with_levers_on_card
from samegrad.settle.probed_ways import with_probed_ways
from samegrad.settle.probing import Measurement, aliases_for, measure
from samegrad.settle.quicker import quicker_plan
from samegrad.settle.untried_ways import with_untried_ways, with_ways_needed

__all__ = [
    "Ahead",
    "Measurement",
    "aliases_for",
    "check_kinds",
    "check_one_of",
    "measure",
    "measure_for",
    "measure_step",
    "plan_ahead",
    "plan_followed",
    "plan_here",
    "settle",
    "settle_plan",
    "smaller_plans",
]


class Declares(Protocol):
    """Anything that carries a declared step: a ``Step``, for one."""

    @property
    def declared(self) -> DeclaredStep: ...


@children_heard_later()
def measure_step(step: Declares, batch: Any, device: torch.device | str | None = None) -> Footprint:
    """The footprint of the plain ``step`` on all rows of ``batch``, predicted by probes of the real step at a few rows.

    ``peak_allocated_bytes`` is what the whole step would hold, optimizer state that does not exist yet included, and
    ``predicted_peak_bytes(rows=...)`` the same at fewer rows at a time. Where the step was followed (below), what lived
    at the peak and the course of the step are in it too; ``count_bytes`` counts those of steps that run.
    ``device``: None, the device the model is on, or a card's name ("NVIDIA H200", "RTX 4070 Laptop"), at hand or not:
    then the step is followed without running it, and every number is predicted. Nothing of the user's changes. Raises
    CannotSplit only where even the plain step cannot run, and CannotTrace where it cannot be followed.
    """
    check_step(step, asked="measure_step(step, batch)")
    declared = step.declared
    if _is_card(device, declared):
        return follow(declared, aliases_for(declared), batch, Target.named(str(device)))[1]
    aliases = aliases_for(declared)
    return with_untried_ways(declared, aliases, measure(declared, batch, aliases), batch).footprint


def _is_card(device: torch.device | str | None, declared: DeclaredStep) -> bool:
    """Whether ``device`` names a card of the catalogue. Raises EnvironmentProblem for another device of torch's."""
    if device is None and declared.device.type == "meta":
        raise UsageError(
            asked="measure or plan a step on its own device",
            found="the model is on meta, which has no memory",
            do="name the card that it is planned for: device='H200'",
        )
    if device is None:
        return False
    try:
        own = torch.device(device)
    except RuntimeError:
        return True
    if own.type == declared.device.type and own.index in (None, declared.device.index):
        return False
    raise EnvironmentProblem(
        asked=f"a footprint for {device}",
        found=f"the model is on {declared.device}, and a step is measured where its model is",
        do="move the model there, leave device= out, or name a card: device='H200'",
    )


def measure_for(
    declared: DeclaredStep, batch: Any, aliases: ParameterAliases, budget: Budget, options: Options
) -> Measurement:
    """The measurement that a plan within ``budget`` is chosen from: where the plain step is too much, the step is also
    probed under levers that leave its chunks as they are, and followed; ways that keep least, where the others do not
    do."""
    measurement = measure(declared, batch, aliases)
    footprint = measurement.footprint
    if footprint.predicted_peak_bytes(rows=footprint.batch_rows) <= usable_bytes(budget):
        return measurement
    measurement = with_probed_ways(declared, aliases, measurement, batch, budget, options)
    measurement = followed_beside(declared, aliases, measurement, batch, budget, options)
    measurement = with_blocks_again(declared, aliases, measurement, batch)
    return with_ways_needed(declared, aliases, measurement, batch, budget, options)


@children_heard_later()
def settle_plan(
    step: Declares,
    batch: Any,
    *,
    budget: Budget | str | int | None = None,
    rows: int | Sequence[int] | None = None,
    rows_origin: KnobOrigin = KnobOrigin.PINNED,
    allow: Exactness = Exactness.SAME_SUM,
    device: torch.device | str | None = None,
    expected_steps: int | None = None,
) -> tuple[Plan, Footprint]:
    """The first plan of the ladder whose measured peak is within ``budget``, and the plain step's footprint, from
    which it was chosen (as ``measure_step`` gives it).

    On a card at hand its chunks may be captured, and compiled where ``expected_steps`` pay for that.

    ``rows`` pins the rows at a time (a number, or the size of every chunk) and the plan works round it. ``device``: a
    card's name as in ``measure_step``; then every plan is followed instead of measured, and judged by its steady cap.
    Hand the plan to ``Step(plan=...)``. Raises BudgetTooSmall or CannotSplit when nothing fits.
    """
    check_step(step, asked="settle_plan(step, batch, ...)")
    declared = step.declared
    if _is_card(device, declared):
        ahead = plan_ahead(step, batch, str(device), budget=budget, rows=rows, rows_origin=rows_origin, allow=allow)
        return ahead.plan, ahead.footprint
    limit = budget if isinstance(budget, Budget) else counters.read_budget(budget, declared.device)
    pinned = rows if rows is None or isinstance(rows, int) else tuple(rows)
    options = Options(rows=pinned, rows_origin=rows_origin, allow=allow, expected_steps=expected_steps)
    plan, footprint, _ = plan_here(declared, aliases_for(declared), batch, limit, options)
    return plan, footprint


def plan_here(
    declared: DeclaredStep, aliases: ParameterAliases, batch: Any, budget: Budget, options: Options
) -> tuple[Plan, Footprint, Measurement]:
    """The plan that is settled on the device at hand, made as quick as it was measured to be; and what it came from."""
    measurement = measure_for(declared, batch, aliases, budget, options)
    given = declared, aliases, measurement, batch
    plan, footprint, _ = settle(*given, budget=budget, options=options)
    plan = quicker_plan(*given, plan, budget=budget, options=options)
    return declared.signed(plan, batch), footprint, measurement


@dataclasses.dataclass(frozen=True)
class Ahead:
    """A plan for a card that is not at hand: what it came from, and what the step holds and takes under it."""

    plan: Plan
    footprint: Footprint
    predicted: Footprint


@children_heard_later()
def plan_ahead(
    step: Declares,
    batch: Any,
    card: str,
    *,
    budget: Budget | str | int | None = None,
    host_budget: str | int | None = None,
    rows: int | Sequence[int] | None = None,
    rows_origin: KnobOrigin = KnobOrigin.PINNED,
    allow: Exactness = Exactness.SAME_SUM,
) -> Ahead:
    """The fastest plan for the card called ``card``, followed whole. Raises as ``settle_plan`` does.

    ``host_budget``: what plans may pin on its host, without a limit where nothing is said.
    """
    declared, target = step.declared, Target.named(card)
    limit = budget if isinstance(budget, Budget) else target.budget(budget, host=host_budget)
    pinned = rows if rows is None or isinstance(rows, int) else tuple(rows)
    options = Options(rows=pinned, rows_origin=rows_origin, allow=allow)
    followed, footprint = follow(declared, aliases_for(declared), batch, target)
    footprint = with_levers_on_card(followed, footprint, budget=limit, options=options)
    plan, predicted = settle_on_card(followed, footprint, budget=limit, options=options)
    return Ahead(declared.signed(plan, batch), footprint, predicted)


@children_heard_later()
def plan_followed(step: Declares, batch: Any, card: str, plan: Plan) -> Ahead:
    """``plan``, which was made before, followed whole for the card called ``card``. Raises CannotTrace.

    That it was made for this batch and model is not looked at: ``Step(plan=...)`` refuses another one.
    """
    declared = step.declared
    followed, footprint = follow(declared, aliases_for(declared), batch, Target.named(card))
    return Ahead(plan, footprint, footprint_of(followed, footprint, plan))


def check_kinds(*, plan: Any, footprint: Any, allow: Any, expected_steps: Any) -> None:
    """Raises UsageError for arguments of another kind, which would fail long after they were given."""
    if footprint is not None and (plan is None or not isinstance(footprint, Footprint)):
        raise UsageError(
            asked="a step with footprint=",
            found="no plan= beside it" if plan is None else f"a {type(footprint).__name__}, not a Footprint",
            do="plan, footprint = settle_plan(...), then Step(..., plan=plan, footprint=footprint)",
        )
    wrong = None
    if plan is not None and not isinstance(plan, Plan):
        wrong = "plan", plan, "a Plan", "Plan.from_json(Path('plan.json').read_text()) reads one"
    elif not isinstance(allow, Exactness):
        wrong = "allow", allow, "an Exactness", f"give one of {', '.join(f'Exactness.{one.name}' for one in Exactness)}"
    elif expected_steps is not None and (type(expected_steps) is not int or expected_steps < 1):
        wrong = "expected_steps", expected_steps, "a positive whole number", "give about how many steps will run"
    if wrong is not None:
        name, value, needed, do = wrong
        raise UsageError(asked=f"{name}={value!r}"[:200], found=f"a {type(value).__name__}, not {needed}", do=do)


def check_one_of(*, budget: Any, rows: Any, plan: Any) -> None:
    """Raises UsageError when more than one of the three ways to say how a step runs is given."""
    given = [name for name, value in (("budget", budget), ("rows", rows), ("plan", plan)) if value is not None]
    if len(given) > 1:
        raise UsageError(
            asked=" and ".join(f"{name}=" for name in given),
            found="each of them decides how many rows run at a time",
            do="give one of budget, rows and plan (or none: then the budget is what is free now)",
        )

