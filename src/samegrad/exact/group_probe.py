"""Whether groups of rows are apart: a function of groups gives one alone what it gives it among others."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from samegrad import trees
from samegrad.declared import DeclaredStep
from samegrad.errors import CannotSplit
from samegrad.exact import program
from samegrad.exact.row_comparisons import close, row_pairs
from samegrad.exact.row_refusals import WAYS_OUT, refuse_known_layers
from samegrad.exact.undisturbed import Generators, ModuleState
from samegrad.exact.varied_rows import with_other_numbers
from samegrad.trees import RowLayout

# Groups that run together: what the last one sees of those before it, the first does not see.
_TRIED = 3


def check_alone(
    declared: DeclaredStep,
    batch: Any,
    layout: RowLayout,
    groups: Sequence[int],
    generators: Generators,
    state: ModuleState,
) -> None:
    """Raises CannotSplit unless the first group and the third one give alone what they give among the first three.

    groups: the lengths of consecutive rows of ``batch`` that belong together.
    """
    refuse_known_layers(declared.network)
    together = groups[:_TRIED]
    total = sum(together)
    base = trees.take_rows(batch, layout, list(range(total)))
    rows = dataclasses.replace(layout, rows=total)
    among = _outputs(declared, base)
    for start, stop in {(0, together[0]), (sum(together[:-1]), sum(together))}:
        alone = _outputs(declared, trees.take_rows(base, rows, list(range(start, stop))))
        drew, changed = generators.advanced(), state.changed()
        if drew or changed:
            raise CannotSplit(
                asked="split groups of rows",
                found=f"the forward draws random numbers ({', '.join(drew)})" if drew else f"it changes {changed[:3]}",
                do=WAYS_OUT,
            )
        _compare(alone, among, slice(start, stop))
    # Groups that are alike hide what is taken over them: beside others, and changed beside others.
    mine = list(range(together[0]))
    others = list(range(together[0], total))
    for replaced in [others, mine] if others else []:
        some = with_other_numbers(base, rows, replaced)
        _compare(_outputs(declared, trees.take_rows(some, rows, mine)), _outputs(declared, some), slice(0, len(mine)))


def _outputs(declared: DeclaredStep, batch: Any) -> Any:
    with torch.no_grad():
        return declared.forward(declared.network, batch)


def _compare(alone: Any, among: Any, rows: slice) -> None:
    for (path, mine), whole in zip(trees.flatten_with_paths(alone, "outputs"), trees.leaves_of(among)):
        if not isinstance(mine, Tensor) and mine != whole:
            raise CannotSplit(
                asked="split groups of rows",
                found=f"{path} is {mine!r} for one group and {whole!r} for more, so no chunk has the batch's",
                do=f"{WAYS_OUT}, or compute it outside the function",
            )
    for path, mine, whole in row_pairs(alone, among):
        program.check_row_output(path, mine, rows.stop - rows.start)
        if mine.is_floating_point() and not close(whole[rows], mine):
            raise CannotSplit(
                asked="split groups of rows",
                found=f"{path} of a group depends on the groups that run with it",
                do=f"{WAYS_OUT}, or put what must see each other into one group",
            )
