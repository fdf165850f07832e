"""Probe rows with others in the place of some: what a row must not notice.

The others are rows of the user's batch, never invented ones: numbers that a model was not made for may be indices out
of range. All of them are copies of one row, the largest or the smallest there is, so that whatever is taken over rows
(a mean, a maximum, how many go to one expert) moves as far as it can, once up and once down.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from samegrad import trees
from samegrad.trees import RowLayout


def replacements(
    batch: Any, others: Any, layout: RowLayout, kept: Sequence[int]
) -> Iterator[tuple[list[int], Any]]:
    """``batch`` twice, each time with the rows that stand in it still: ``kept``, then all but those.

    ``others``: as many rows of the same layout, to choose from as well.
    """
    sizes = torch.cat([_sizes(batch, layout), _sizes(others, layout)])
    rest = [row for row in range(layout.rows) if row not in kept]
    for still, source in ((list(kept), int(sizes.argmax())), (rest, int(sizes.argmin()))):
        yield still, _replaced(batch, others, layout, still, source)


def _sizes(batch: Any, layout: RowLayout) -> Tensor:
    """(rows,) float64 on the host: how large the numbers of each row are, whole ones where there are no others."""
    rows = [
        leaf.detach().movedim(axis, 0).reshape(layout.rows, -1)
        for leaf, axis in zip(trees.leaves_of(batch), layout.axes)
        if axis is not None and leaf.numel()
    ]
    floating = [leaf for leaf in rows if leaf.is_floating_point()]
    sums = [leaf.double().nan_to_num().sum(1).cpu() for leaf in floating or rows if not leaf.is_complex()]
    return sum(sums, torch.zeros(layout.rows, dtype=torch.float64))


def _replaced(batch: Any, others: Any, layout: RowLayout, still: Sequence[int], source: int) -> Any:
    """``batch`` with row ``source`` of it and ``others`` in all places but ``still``."""
    chosen, row = (batch, source) if source < layout.rows else (others, source - layout.rows)
    leaves = []
    for leaf, other, axis in zip(trees.leaves_of(batch), trees.leaves_of(chosen), layout.axes):
        if axis is None:
            leaves.append(leaf)
            continue
        changed = other.detach().narrow(axis, row, 1).expand_as(leaf).clone()
        if torch.equal(changed, leaf) and leaf.is_floating_point():
            # Identical rows would hide a mixture; numbers are shifted, indices cannot be.
            changed = changed * 1.5 + 0.25
        index = torch.tensor(list(still), device=leaf.device)
        leaves.append(changed.index_copy(axis, index, leaf.detach().index_select(axis, index)))
    return trees.unflatten(leaves, layout.spec)


class ShapesSeen(TorchFunctionMode):
    """A block that notes the shapes of what is computed in it: other shapes take other kernels, and round otherwise.

    Rows that are sent to experts, or packed by length, make shapes of what they hold.
    """

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.shapes.append(tuple(result.shape))
        return result
