"""Whether what ``normalise=`` declares of a loss is true, as far as a few rows and its graph can tell.

A declaration is a claim about every batch. So it is tried on the rows as they are, and where the loss is divided by
what it takes over rows, on rows with other weights and masks as well. Targets that a likelihood leaves out are not
invented; where no row had any, the examination is made again as soon as a batch has.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

from samegrad.declared import DeclaredStep, checked_loss
from samegrad.errors import CannotSplit, FalseNormalise
from samegrad.exact import losses
from samegrad.exact.aliases import ParameterAliases
from samegrad.exact.audit import Residual, audit
from samegrad.exact.findings import Examination
from samegrad.exact.left_out import held_by_rows
from samegrad.exact.loss_rows import taken_over_rows, with_grad
from samegrad.exact.losses import Form
from samegrad.exact.out_of_memory import is_out_of_memory
from samegrad.exact.undisturbed import Generators, ModuleState
from samegrad.exact.varied_rows import with_fewer_in_masks, with_other_numbers, with_smaller_numbers
from samegrad.trees import RowLayout

_REMOVE = "remove normalise= (two passes are exact for every loss)"


def examine_declared(
    declared: DeclaredStep, aliases: ParameterAliases, outputs: Any, few: Any, layout: RowLayout, state: ModuleState
) -> Examination:
    """One pass, as declared. ``outputs``: of the rows ``few``. Raises FalseNormalise, or CannotSplit where the loss
    uses what no chunk may."""
    _check_rows(declared, outputs, few, layout, state)
    leaves, rows = with_grad(outputs)
    with torch.enable_grad():
        loss = checked_loss(declared.loss_fn(rows, few))
    if node := losses.selected_over_rows(loss, layout.rows):
        raise _false(
            declared,
            f"its graph has a {node} over the rows, of which one is taken: no sum over rows has that, whatever these "
            "rows show",
            _REMOVE,
        )
    _check_loss_reach(declared, aliases, outputs, few)
    count = losses.count_below(loss)
    if declared.normalise == "mean" and count is not None and not aliases.sharded:
        form = losses.recognise(loss, leaves, layout.rows)
        if form.form is Form.COUNTED:
            # As many targets as rows count here; where some are left out, its own count is right as well.
            return Examination(form.form, f"declared a mean; {form.reason}", count_per_row=count / layout.rows)
    _check_other_rows(declared, outputs, few, layout)
    unseen = losses.ignored_by(loss) - held_by_rows(few, layout, losses.ignored_by(loss))
    return Examination(Form.ROW_SUM, "declared by normalise=", declared=True, unseen=frozenset(unseen))


def false_for_collectives(declared: DeclaredStep, seen: object) -> FalseNormalise:
    return _false(
        declared,
        f"the loss calls a collective ({seen}): in one pass it would run once a chunk, and ranks with other chunk "
        "counts would wait for each other",
        "remove normalise= (two passes run the loss once a step), or reduce the count before the step, pass it "
        "in the batch as a tensor without axes, divide by it and declare normalise='sum'",
    )


def _false(declared: DeclaredStep, found: str, do: str) -> FalseNormalise:
    name = getattr(declared.normalise, "__qualname__", repr(declared.normalise))
    return FalseNormalise(asked=f"normalise={name}", found=found, do=do)


def _check_rows(
    declared: DeclaredStep, outputs: Any, few: Any, layout: RowLayout, state: ModuleState
) -> None:
    once = "remove normalise=: with two passes the loss is computed once, on all rows"
    generators = Generators(declared.device)
    residual = audit(declared, outputs, few, layout, None)
    if generators.advanced():
        raise _false(declared, "the loss draws random numbers, so the loss of a chunk is another draw", once)
    if changed := state.changed():
        raise _false(
            declared,
            f"the loss changes {', '.join(changed[:3])}, which would happen once a chunk and not once a step",
            once,
        )
    if residual is not None and not residual.passed:
        raise _false(
            declared,
            f"on {layout.rows} rows the loss is not that sum over rows: its gradient differs by "
            f"{residual.gradient:.2g} of the largest entry and its value by {residual.loss:.2g}, rounding explains "
            f"{residual.allowed:.1g}",
            f"{_REMOVE}, or give the count the loss divides by",
        )


def _check_other_rows(declared: DeclaredStep, outputs: Any, few: Any, layout: RowLayout) -> None:
    """The claim on rows with other masks and weights, where the loss uses, or may, what it takes over them."""
    counts = callable(declared.normalise)
    taken = None if counts else taken_over_rows(declared, outputs, few, layout, strict=False)
    if taken is not None:
        raise _false(
            declared,
            f"the loss uses in {taken.used} what {taken.made} takes over rows, which is another number for other rows",
            f"{_REMOVE}, or give the count that the loss divides by",
        )
    found = taken_over_rows(declared, outputs, few, layout)
    for kind, varied in () if found is None else _varied(few, layout, counts=counts):
        residual = _tried(declared, outputs, varied, layout)
        if found is not None and residual is not None and not residual.passed:
            raise _false(
                declared,
                f"the loss uses in {found.used} what {found.made} takes over rows, and on rows with other {kind} it is "
                f"not that sum over rows: its gradient differs by {residual.gradient:.2g} of the largest entry and its "
                f"value by {residual.loss:.2g}",
                f"{_REMOVE}, or give the count that the loss divides by",
            )


def _varied(few: Any, layout: RowLayout, *, counts: bool) -> Iterator[tuple[str, Any]]:
    """``few`` with other masks, then with other weights.

    counts: by the user's function, which may count what is not zero in a mask of numbers.
    """
    fewer = with_fewer_in_masks(few, layout)
    if fewer is not None:
        yield "masks", fewer
    yield "masks or whole numbers", with_other_numbers(few, layout, range(2, layout.rows, 3))
    yield "weights", with_smaller_numbers(few, layout, masks=not counts)


def _tried(declared: DeclaredStep, outputs: Any, batch: Any, layout: RowLayout) -> Residual | None:
    """The residual on rows that are not the user's; None where they tell nothing."""
    try:
        residual = audit(declared, outputs, batch, layout, None)
    except (RuntimeError, ValueError, ArithmeticError, IndexError) as error:
        # What the loss cannot be computed of, as it was not made for such numbers.
        if is_out_of_memory(error):
            raise
        return None
    return None if residual is None or math.isinf(residual.gradient) else residual


def _check_loss_reach(declared: DeclaredStep, aliases: ParameterAliases, outputs: Any, few: Any) -> None:
    """Raises CannotSplit when the loss uses a parameter without an alias: a chunk would write to its ``.grad``."""
    leaves, rows = with_grad(outputs)
    with aliases.swapped() as standing, torch.enable_grad():
        loss = checked_loss(declared.loss_fn(rows, few))
    known = {id(leaf) for leaf in (*leaves, *standing)}
    for leaf in losses.leaves_under(loss):
        if id(leaf) not in known:
            raise CannotSplit(
                asked=f"{_false(declared, '', '').asked}, one pass over the chunks",
                found=f"the loss uses a tensor of shape {tuple(leaf.shape)} that requires grad and is in no module "
                "that samegrad was given",
                do="make the loss an nn.Module that holds it as a parameter, or remove normalise=",
            )
