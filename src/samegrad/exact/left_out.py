"""Targets of one number that a likelihood leaves out (``ignore_index``): which rows of a batch hold some."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from samegrad import trees
from samegrad.trees import RowLayout

# Where nothing else is said.
IGNORED = -100


def targets_in(batch: Any, layout: RowLayout) -> Iterator[tuple[str, Tensor, int]]:
    """The leaves of rows that may be targets, with path and axis: whole numbers whose values can be read."""
    for path, leaf, axis in zip(layout.paths, trees.leaves_of(batch), layout.axes):
        if axis is None or not isinstance(leaf, Tensor) or leaf.dtype != torch.int64:
            continue
        if leaf.numel() and leaf.device.type != "meta":
            yield path, leaf, axis


def held_by_rows(batch: Any, layout: RowLayout, numbers: Iterable[int]) -> set[int]:
    """Those of ``numbers`` that some target of ``batch`` is."""
    wanted = set(numbers)
    if not wanted:
        return set()
    leaves = [leaf for _, leaf, _ in targets_in(batch, layout)]
    return {number for number in wanted if any(bool((leaf == number).any()) for leaf in leaves)}


def rows_with(batch: Any, layout: RowLayout, chosen: list[int], numbers: Iterable[int]) -> list[int]:
    """``chosen`` rows, some exchanged so that each of ``numbers`` that the batch holds is a target of one of them."""
    for number in sorted(set(numbers)):
        for _, leaf, axis in targets_in(batch, layout):
            holds = (leaf == number).movedim(axis, 0).flatten(1).any(1) if leaf.dim() > 1 else leaf == number
            there = holds.nonzero().flatten().tolist()
            if there and not set(there) & set(chosen):
                # In the middle: parts of several sizes are compared, and it is in each of them another one's.
                chosen = sorted({*chosen[: len(chosen) // 2], there[0], *chosen[len(chosen) // 2 + 1 :]})
    return chosen
