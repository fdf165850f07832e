"""A program's step planned for a card that may be elsewhere: followed, never run; every number is predicted."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import samegrad as sg
from samegrad.cli.planned import declare_again, facts_for
from samegrad.cli.training import Training
from samegrad.measure.cards import Card
from samegrad.measure.target import Target
from samegrad.records import Budget, Counting, Footprint, KnobOrigin, Origin, Plan
from samegrad.settle import Ahead, plan_ahead, plan_followed


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlannedAhead:
    """The plan for ``target``, the plain step's footprint there, and the planned step's.

    ``fits``: the predicted steady cap is within the plan's budget.
    """

    target: Target
    plan: Plan
    plain: Footprint
    predicted: Footprint

    @property
    def fits(self) -> bool:
        assert self.plan.budget is not None and self.predicted.steady_cap_bytes is not None
        return self.predicted.steady_cap_bytes <= self.plan.budget.total_bytes

    def to_dict(self) -> dict[str, Any]:
        return {
            "origin": Origin.PREDICTED.value,
            "card": describe_target(self.target),
            "plan": self.plan.to_dict(),
            "footprint": self.predicted.to_dict(),
            "plain_predicted_peak_bytes": self.plain.steady_cap_bytes,
        }


def plan_for_card(training: Training, card: Card, given: Plan | None = None) -> PlannedAhead:
    """The step of ``training`` planned for ``card``: by its budget, as it was pinned, or by the ``given`` plan.

    Raises BudgetTooSmall or CannotSplit when nothing exact fits or the given plan was made for another batch or model,
    CannotTrace where the step cannot be followed.
    """
    target = Target.named(card.name)
    if given is not None:
        declare_again(training, given)
        # Refuses a plan for another batch or model; nothing is run.
        training.step.prepare(training.batch)
        ahead = plan_followed(training.step, training.batch, card.name, given)
        plan = dataclasses.replace(
            given,
            budget=_budget_of(given, target),
            predicted_peak_bytes=ahead.predicted.steady_cap_bytes,
            predicted_seconds=ahead.predicted.seconds,
        )
        return _planned(training, target, plan, ahead)
    step = training.step
    budget = training.budget if training.budget is not None else step.asked_budget
    ahead = plan_ahead(
        step, training.batch, card.name, budget=budget, host_budget=step.asked_host_budget, rows=_pinned_rows(step),
        allow=step.allow,
    )  # fmt: skip
    return _planned(training, target, ahead.plan, ahead)


def _pinned_rows(step: sg.Step) -> int | Sequence[int] | None:
    """Rows at a time that the step's declaration pins, by themselves or by a plan; None where it leaves them open."""
    if step.rows is not None or step.plan is None:
        return step.rows
    if step.plan.knob_origins.get("split_rows.rows") is not KnobOrigin.PINNED:
        return None
    rows: int | Sequence[int] = step.plan.levers.get("split_rows", {}).get("rows", step.plan.batch_rows)
    return rows


def _planned(training: Training, target: Target, plan: Plan, ahead: Ahead) -> PlannedAhead:
    plain, predicted = facts_for(training, ahead.footprint), facts_for(training, ahead.predicted)
    return PlannedAhead(target=target, plan=plan, plain=plain, predicted=predicted)


def _budget_of(plan: Plan, target: Target) -> Budget:
    """The plan's own, where it counts what a card counts; else all of an empty card."""
    if plan.budget is not None and plan.budget.counting is Counting.CUDA_ALLOCATOR:
        return plan.budget
    return target.budget(None)


def describe_target(target: Target) -> Mapping[str, Any]:
    """The card and what predictions for it rest on, as JSON takes them."""
    return {
        "name": target.card.name,
        "memory_bytes": target.card.memory_bytes,
        "memory_basis": target.card.memory_basis,
        "calibrated": target.calibration.origin is Origin.MEASURED,
        "basis": target.in_words(),
        "context_bytes": target.context_bytes,
        "context_basis": target.context_basis,
        "torch_version": target.torch_version,
    }
