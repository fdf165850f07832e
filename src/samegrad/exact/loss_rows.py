"""The loss of a few rows, seen by itself: rows of outputs as leaves of a new graph, and what it takes over rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from samegrad import trees
from samegrad.declared import DeclaredStep
from samegrad.exact.across_rows import Across, Followed
from samegrad.trees import RowLayout


def with_grad(outputs: Any) -> tuple[list[Tensor], Any]:
    """The outputs as leaves of a new graph, and nested as before."""
    leaves, spec = trees.flatten(outputs)
    leaves = [
        leaf.detach().requires_grad_() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf
        for leaf in leaves
    ]
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)], trees.unflatten(leaves, spec)


def taken_over_rows(
    declared: DeclaredStep, outputs: Any, few: Any, layout: RowLayout, *, strict: bool = True
) -> Across | None:
    """What the loss of the rows ``few`` takes over rows without a gradient, and uses. strict: or may take."""
    runs = []
    for _ in range(2):
        leaves, rows = with_grad(outputs)
        sources = [(leaf, 0) for leaf in leaves]
        sources += sources_of(few, layout)
        with torch.enable_grad(), Followed(sources, layout.rows, strict=strict) as followed:
            declared.loss_fn(rows, few)
        taken: Across | None = followed.taken
        if taken is not None:
            return taken
        runs.append(followed.strangers)
    # A constant is the same object in both runs; what is made anew was made where nobody sees it, of the rows perhaps.
    first, second = runs
    if len(first) != len(second) or any(a is not b for a, b in zip(first, second)):
        return Across("code that cannot be followed", "its graph", "")
    return None


def sources_of(batch: Any, layout: RowLayout) -> list[tuple[Tensor, int]]:
    """The tensors of ``batch`` that have rows, with the axis that they are on."""
    leaves = zip(trees.leaves_of(batch), layout.axes)
    return [(leaf, axis) for leaf, axis in leaves if axis is not None and isinstance(leaf, Tensor)]
