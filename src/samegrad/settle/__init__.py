"""Measure, choose, measure again: from a declared step and a budget to a plan that is believed.

``measure_step`` probes the real step at a few rows; ``settle_plan`` walks down the ladder until a rung's measured
peak is within the budget.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from samegrad.declared import DeclaredStep
from samegrad.errors import EnvironmentProblem, UsageError
from samegrad.measure import counters
from samegrad.plan.options import Options
from samegrad.records import Budget, Exactness, Footprint, KnobOrigin, Plan
from samegrad.settle.ladder import settle
from samegrad.settle.probing import Measurement, aliases_for, measure

__all__ = ["Measurement", "aliases_for", "check_one_of", "measure", "measure_step", "settle", "settle_plan"]


class Declares(Protocol):
    """Anything that carries a declared step: a ``Step``, for one."""

    @property
    def declared(self) -> DeclaredStep: ...


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
    plan, footprint, _ = settle(declared, aliases_for(declared), measurement, batch, budget=limit, options=options)
    return plan, footprint


def check_one_of(*, budget: Any, rows: Any, plan: Any) -> None:
    """Raises UsageError when more than one of the three ways to say how a step runs is given."""
    given = [name for name, value in (("budget", budget), ("rows", rows), ("plan", plan)) if value is not None]
    if len(given) > 1:
        raise UsageError(
            asked=" and ".join(f"{name}=" for name in given),
            found="each of them decides how many rows run at a time",
            do="give one of budget, rows and plan (or none: then the budget is what is free now)",
        )

