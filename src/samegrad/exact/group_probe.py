"""Whether groups of rows are apart: a function of groups gives one alone what it gives it among others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from samegrad import trees
from samegrad.declared import DeclaredStep
from samegrad.errors import CannotSplit
from samegrad.exact import program
from samegrad.exact.across_rows import Followed
from samegrad.exact.loss_rows import sources_of
from samegrad.exact.module_names import entered
from samegrad.exact.row_comparisons import close, row_pairs
from samegrad.exact.row_refusals import WAYS_OUT, refuse_known_layers
from samegrad.exact.undisturbed import Generators, ModuleState
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
    among, followed = _run(declared, batch, layout, range(sum(together)), len(together))
    if len(set(together)) > 1:
        # Groups of several lengths are no multiples of one another: the first one in their place.
        _, followed = _run(declared, batch, layout, list(range(together[0])) * len(together), len(together))
    for start, stop in {(0, together[0]), (sum(together[:-1]), sum(together))}:
        alone, _ = _run(declared, batch, layout, range(start, stop), 1)
        drew, changed = generators.advanced(), state.changed()
        if drew or changed:
            raise CannotSplit(
                asked="split groups of rows",
                found=f"the forward draws random numbers ({', '.join(drew)})" if drew else f"it changes {changed[:3]}",
                do=WAYS_OUT,
            )
        _compare(alone, among, slice(start, stop))
    found = followed.taken
    if found is not None and len(together) > 1:
        raise CannotSplit(
            asked="split groups of rows",
            found=f"{found.module or 'the function'} uses in {found.used} what {found.made} takes over groups",
            do=f"{WAYS_OUT}, or compute it outside the function and pass it in, for each row",
        )


def _run(
    declared: DeclaredStep, batch: Any, layout: RowLayout, rows: Sequence[int], groups: int
) -> tuple[Any, Followed]:
    """The outputs of these rows, and what was made of them on the way."""
    some = trees.take_rows(batch, layout, list(rows))
    with (
        torch.enable_grad(),
        entered(declared.network) as running,
        Followed(sources_of(some, layout), groups, running, strict=True) as followed,
    ):
        outputs = declared.forward(declared.network, some)
    followed.returns(program.tensors_in(outputs))
    return trees.map_tensors(outputs, Tensor.detach), followed


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
