"""The loss of a few rows, seen by itself: rows of outputs as leaves of a new graph, and what it takes over rows."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from samegrad import trees
from samegrad.declared import DeclaredStep
from samegrad.exact import program
from samegrad.exact.across_rows import Across, Followed, across
from samegrad.trees import RowLayout


def with_grad(outputs: Any) -> tuple[list[Tensor], Any]:
    """The outputs as leaves of a new graph, and nested as before."""
    leaves, spec = trees.flatten(outputs)
    leaves = [
        leaf.detach().requires_grad_() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf
        for leaf in leaves
    ]
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)], trees.unflatten(leaves, spec)


def taken_over_rows(declared: DeclaredStep, outputs: Any, few: Any, layout: RowLayout) -> Across | None:
    """What the loss of the rows ``few`` takes over rows without a gradient, and uses."""
    runs = []
    for rows in (layout.rows, max(1, 5 * layout.rows // 8)):
        batch = few if rows == layout.rows else trees.slice_rows(few, layout, 0, rows)
        leaves, mine = with_grad(trees.map_tensors(outputs, partial(_first, rows=rows)))
        of_rows = [leaf for leaf, axis in zip(trees.leaves_of(batch), layout.axes) if axis is not None]
        with torch.enable_grad(), Followed(program.tensors_in((leaves, of_rows))) as followed:
            declared.loss_fn(mine, batch)
        runs.append(followed)
    return across(*runs, strict=True)


def _first(leaf: Tensor, rows: int) -> Tensor:
    return leaf[:rows]
