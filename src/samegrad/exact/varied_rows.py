"""The rows that are tried with other masks and weights, such as other batches may have.

Rows that are alike hide what is taken over them. Nothing is invented that a model or a loss was not made for: a mask
has fewer entries, a weight is smaller, an index is what it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from samegrad import trees
from samegrad.trees import RowLayout


def with_fewer_in_masks(few: Any, layout: RowLayout) -> Any | None:
    """``few`` with every third row of its masks off, its later half where a row has many; None without masks."""
    leaves, found = [], False
    for leaf, axis in zip(trees.leaves_of(few), layout.axes):
        masks = axis is not None and isinstance(leaf, Tensor) and is_mask(leaf)
        leaves.append(_with_fewer(leaf, axis) if masks and axis is not None else leaf)
        found = found or masks
    return trees.unflatten(leaves, layout.spec) if found else None


def with_other_numbers(few: Any, layout: RowLayout, rows: Sequence[int] | None = None) -> Any:
    """``few`` with other masks and numbers in ``rows`` (all of them): halves, so that an index stays one."""
    leaves = []
    for leaf, axis in zip(trees.leaves_of(few), layout.axes):
        if axis is not None and isinstance(leaf, Tensor):
            changed = _other(leaf, axis)
            if rows is not None:
                index = torch.tensor(list(rows), dtype=torch.int64, device=leaf.device)
                changed = leaf.index_copy(axis, index, changed.index_select(axis, index))
            leaf = changed
        leaves.append(leaf)
    return trees.unflatten(leaves, layout.spec)


def pairs_of_other_rows(few: Any, layout: RowLayout, kept: Sequence[int]) -> Iterator[tuple[Any, Any]]:
    """Pairs in which the rows ``kept`` are the same and the others are not, so that what is taken over all of them is
    larger in one and smaller in the other."""
    others = [row for row in range(layout.rows) if row not in kept]
    yield few, with_other_numbers(few, layout, others)
    yield with_other_numbers(few, layout), with_other_numbers(few, layout, kept)


def _other(leaf: Tensor, axis: int) -> Tensor:
    if not is_mask(leaf):
        if leaf.is_floating_point() or leaf.is_complex():
            return leaf / 2
        return torch.where(leaf > 1, leaf // 2, leaf)
    # Of many entries in a row the later half: one without any may have no result at all.
    turned = leaf.logical_not().to(leaf.dtype)
    if leaf.dtype != torch.bool and not leaf.is_floating_point():
        # An index of one may be out of range where all are zero.
        turned = torch.zeros_like(leaf)
    if axis == leaf.dim() - 1:
        return turned
    later = torch.arange(leaf.shape[-1], device=leaf.device) >= leaf.shape[-1] // 2
    return torch.where(later, turned, leaf)


def with_smaller_numbers(few: Any, layout: RowLayout, *, masks: bool) -> Any:
    """``few`` with every row times a factor of its own, in [1/4, 1]: what is in [0, 1] stays there. ``masks``: too."""
    leaves = []
    for leaf, axis in zip(trees.leaves_of(few), layout.axes):
        if axis is not None and isinstance(leaf, Tensor) and leaf.is_floating_point() and (masks or not is_mask(leaf)):
            rows = torch.arange(leaf.shape[axis], device=leaf.device, dtype=leaf.dtype)
            leaf = leaf * _along(1 - rows.mul(5).remainder(7) / 9.5, leaf, axis)
        leaves.append(leaf)
    return trees.unflatten(leaves, layout.spec)


def is_mask(leaf: Tensor) -> bool:
    """Whether it holds nothing but zeros and ones."""
    return leaf.dtype == torch.bool or (not leaf.is_complex() and bool(((leaf == 0) | (leaf == 1)).all()))


def _with_fewer(leaf: Tensor, axis: int) -> Tensor:
    rows = torch.arange(leaf.shape[axis], device=leaf.device)
    # Not one of the first two, each of which is a part by itself (``audit.splits_of``).
    off = _along(rows % 3 == 2, leaf, axis)
    if axis < leaf.dim() - 1:
        # A row without any entry may have no result at all.
        off = off & (torch.arange(leaf.shape[-1], device=leaf.device) >= leaf.shape[-1] // 2)
    return leaf.masked_fill(off, 0)


def _along(values: Tensor, leaf: Tensor, axis: int) -> Tensor:
    return values.view(-1, *[1] * (leaf.dim() - axis - 1))
