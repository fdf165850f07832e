"""Chunks of a batch on the host as they arrive on a device: through two places in turn, kept from step to step.

This stands in a trace for what streams rows when a step runs: the same memory, no streams and no threads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from samegrad import trees
from samegrad.exact.split import sliced_chunks
from samegrad.measure import known_values
from samegrad.trees import RowLayout, RowLeaf


class ArrivingRows:
    """``split.Chunks`` for a traced step. On the CPU rows are where they are used, and are cut as views."""

    def __init__(self) -> None:
        self._places: tuple[dict[int, Tensor], dict[int, Tensor]] = ({}, {})

    def __call__(
        self, batch: Any, layout: RowLayout, sizes: Sequence[int], device: torch.device
    ) -> Iterator[Any]:
        leaves = trees.leaves_of(batch)
        travels = [
            axis is not None and not (isinstance(leaf, Tensor) and leaf.device == device)
            for leaf, axis in zip(leaves, layout.axes)
        ]
        if device.type == "cpu" or not any(travels):
            yield from sliced_chunks(batch, layout, sizes, device)
            return
        here = [trees.move(leaf, device) if axis is None else leaf for leaf, axis in zip(leaves, layout.axes)]
        start = 0
        for number, size in enumerate(sizes):
            place = self._places[number % 2]
            yield trees.unflatten(
                [
                    _arrived(place, index, leaf, axis, start, size, max(sizes), device)
                    if axis is not None and travels[index]
                    else leaf if axis is None else leaf.detach().narrow(axis, start, size)
                    for index, (leaf, axis) in enumerate(zip(here, layout.axes))
                ],
                layout.spec,
            )  # fmt: skip
            start += size


def _arrived(
    place: dict[int, Tensor],
    index: int,
    leaf: RowLeaf,
    axis: int,
    start: int,
    rows: int,
    most_rows: int,
    device: torch.device,
) -> Tensor:
    """The leaf's rows in its buffer of ``place``, which grows where they do not fit."""
    shape = [rows if at == axis else size for at, size in enumerate(leaf.shape)]
    row_elements = math.prod(size for at, size in enumerate(leaf.shape) if at != axis)
    buffer = place.get(index)
    if buffer is None or buffer.numel() < most_rows * row_elements:
        place.pop(index, None)
        place[index] = buffer = torch.empty(most_rows * row_elements, dtype=leaf.dtype, device=device)
    chunk = buffer[: rows * row_elements].view(shape)
    if isinstance(leaf, Tensor):
        known_values.carry(leaf.detach().narrow(axis, start, rows), chunk)
    return chunk
