"""Batches of which no target counts: the loss is zero over zero there, and no step can be made of it.

A likelihood leaves out targets of one number (``ignore_index``), -100 where nothing else is said.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from samegrad import trees
from samegrad.declared import DeclaredStep, plain_loss
from samegrad.errors import BadInput
from samegrad.exact import losses
from samegrad.exact.examine import chosen_rows
from samegrad.exact.few_rows import on_few_rows
from samegrad.exact.left_out import IGNORED, targets_in
from samegrad.exact.undisturbed import FailsOnFewRows, step_undisturbed

_FEW_ROWS = 8
_WAY_OUT = (
    "leave out batches of which no target counts, or let the loss be a sum divided by max(count, 1), whose gradient "
    "is zero there"
)


def refuse_without_targets(declared: DeclaredStep, batch: Any, *, asked: str, found: str = "") -> None:
    """Raises BadInput where a few rows have no loss and no target of ``batch`` counts. ``found``: what else is told."""
    left_out, loss = _left_out(declared, batch)
    for index in sorted({IGNORED, *left_out}) if math.isnan(loss) else ():
        for path in _all_of(batch, declared, index):
            raise BadInput(
                asked=asked,
                found=f"{path} is {index} in every row, which the loss leaves out: no target counts, and its mean is "
                f"zero over zero{found}",
                do=_WAY_OUT,
            )


def refuse_without_targets_at_sight(declared: DeclaredStep, batch: Any, *, asked: str) -> None:
    """The same before a step has run: nothing is run where no target looks like it."""
    if _all_of(batch, declared, IGNORED):
        refuse_without_targets(declared, batch, asked=asked)


def _all_of(batch: Any, declared: DeclaredStep, index: int) -> list[str]:
    """The leaves with rows that hold nothing but ``index``."""
    return [path for path, leaf, _ in targets_in(batch, declared.layout(batch)) if bool((leaf == index).all())]


def _left_out(declared: DeclaredStep, batch: Any) -> tuple[set[int], float]:
    """The numbers that the loss leaves out, as the plain step on a few rows shows them, and those rows' loss.

    NaN where they cannot be run alone.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        # Other ranks may wait in the model, or would not come to it.
        return set(), math.nan
    layout = declared.layout(batch)
    rows = min(_FEW_ROWS, layout.rows)
    few = trees.move(trees.take_rows(batch, layout, chosen_rows(layout.rows, rows)[0]), declared.device)
    try:
        with step_undisturbed(declared), torch.enable_grad(), on_few_rows(rows, ()):
            loss = plain_loss(declared, few)
            return losses.ignored_by(loss), float(loss.detach())
    except FailsOnFewRows:
        # What the whole batch shows of itself is left.
        return set(), math.nan
