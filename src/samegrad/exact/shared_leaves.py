"""Batch leaves that all rows share and that require grad, such as prototypes computed from a support set.

Chunks run on a stand-in, a leaf that is in no other graph, and their gradients add up there. The total goes to the
leaf with the parameters' totals, in the same backward: into its ``.grad``, or once through the graph it came from,
so that a support set runs once forward and once backward however many chunks the queries make.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from samegrad import trees
from samegrad.exact.aliases import ParameterAliases
from samegrad.trees import RowLayout


def stood_in(batch: Any, layout: RowLayout, aliases: ParameterAliases) -> tuple[Any, ParameterAliases]:
    """``batch`` with stand-ins for its shared leaves that require grad, and ``aliases`` that know them."""
    leaves = trees.leaves_of(batch)
    shared = {
        id(leaf): leaf
        for leaf, axis in zip(leaves, layout.axes)
        if axis is None and isinstance(leaf, Tensor) and leaf.requires_grad
    }
    if not shared:
        return batch, aliases
    stand_ins = {key: nn.Parameter(leaf.detach()) for key, leaf in shared.items()}
    standing = [stand_ins.get(id(leaf), leaf) for leaf in leaves]
    return trees.unflatten(standing, layout.spec), aliases.beside(list(shared.values()), list(stand_ins.values()))


def cut_loose(batch: Any) -> Any:
    """``batch`` with every tensor that requires grad as a leaf of its own: trial runs must not spend its graph."""
    return trees.map_tensors(batch, lambda leaf: leaf.detach().requires_grad_() if leaf.requires_grad else leaf)
