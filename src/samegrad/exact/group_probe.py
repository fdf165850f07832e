"""Whether groups of rows are apart: a function of groups gives one alone what it gives it among others."""

from __future__ import annotations

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


def check_alone(
    declared: DeclaredStep, alone: Any, among: Any, rows: int, generators: Generators, state: ModuleState
) -> None:
    """Raises CannotSplit unless the first ``rows`` rows give ``alone`` what they give ``among`` others."""
    refuse_known_layers(declared.network)
    with torch.no_grad():
        outputs = [declared.forward(declared.network, batch) for batch in (alone, among)]
    drew, changed = generators.advanced(), state.changed()
    if drew or changed:
        raise CannotSplit(
            asked="split groups of rows",
            found=f"the forward draws random numbers ({', '.join(drew)})" if drew else f"it changes {changed[:3]}",
            do=WAYS_OUT,
        )
    for (path, mine), whole in zip(trees.flatten_with_paths(outputs[0], "outputs"), trees.leaves_of(outputs[1])):
        if not isinstance(mine, Tensor) and mine != whole:
            raise CannotSplit(
                asked="split groups of rows",
                found=f"{path} is {mine!r} for one group and {whole!r} for two, so no chunk has the batch's",
                do=f"{WAYS_OUT}, or compute it outside the function",
            )
    for path, mine, whole in row_pairs(outputs[0], outputs[1]):
        program.check_row_output(path, mine, rows)
        if mine.is_floating_point() and not close(whole[:rows], mine):
            raise CannotSplit(
                asked="split groups of rows",
                found=f"{path} of a group depends on the groups that run with it",
                do=f"{WAYS_OUT}, or put what must see each other into one group",
            )
