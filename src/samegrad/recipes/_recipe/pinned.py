"""Rows at a time that somebody pinned, within a budget."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import samegrad as sg


def pinned_step(
    declare: Callable[..., sg.Step],
    batch: Any,
    *,
    budget: str,
    rows: int | list[int],
    asked: str,
    do: str,
    option: str,
) -> sg.Step:
    """The step that ``declare(plan=...)`` makes of a plan with ``rows`` at a time that was measured to fit.

    Raises BudgetTooSmall with ``asked``, ``do`` and ``option``, in the words of what was pinned.
    """
    with declare(budget=budget) as step:
        try:
            plan, footprint = sg.settle_plan(step, batch, budget=budget, rows=rows)
        except sg.BudgetTooSmall as refusal:
            raise sg.BudgetTooSmall(asked=asked, found=refusal.found, do=do, option=option) from None
    pinned = declare(plan=plan)
    pinned.footprint = footprint
    return pinned
