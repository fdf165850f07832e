"""Chunks of a step whose parameters are sharded: real parameters, real hooks, as many chunks on every rank.

Every forward and every backward of a chunk is a collective, so ranks agree on one chunk count before anything runs:
the largest. A rank with fewer chunks cuts its rows into that many, none larger than before; one with fewer rows than
that runs its first row again, with weight exactly zero, until the others are done.

Gradients are reduced after every chunk: waiting for the last one would keep them gathered, a model size more on every
rank. What fails before chunks run is raised on every rank. A rank that fails between collectives, out of memory say,
leaves the others waiting until their process group's time-out.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from samegrad import trees
from samegrad.exact.ranks import Ranks
from samegrad.trees import RowLayout

_log = logging.getLogger("samegrad")

Sizes = tuple[int, ...]
Cut = tuple[RowLayout, Sizes | None]


def agreed_cut(ranks: Ranks, cut: Callable[[], Cut]) -> Cut:
    """What ``cut()`` returns, with as many chunks on every rank; sizes None when every rank runs whole.

    A size of 0 is a chunk of zero weight.
    """

    def counted() -> tuple[Cut, int]:
        layout, sizes = cut()
        return (layout, sizes), 1 if sizes is None else len(sizes)

    (layout, sizes), count = ranks.together(counted)
    if count < 2:
        return layout, None
    agreed = equal_count(layout.rows, sizes or (layout.rows,), count)
    if agreed.count(0):
        _log.info("samegrad: %d of %d chunks on this rank have zero weight", agreed.count(0), count)
    return layout, agreed


def equal_count(rows: int, sizes: Sizes, count: int) -> Sizes:
    """``count`` chunks of ``rows`` rows, none larger than the largest of ``sizes``; ``count`` >= len(sizes)."""
    if len(sizes) == count:
        return sizes
    if rows < count:
        return (1,) * rows + (0,) * (count - rows)
    least, more = divmod(rows, count)
    return (least + 1,) * more + (least,) * (count - more)


def with_idle_chunks(
    chunks: Callable[[Any, RowLayout, Sequence[int], torch.device], Iterable[Any]],
    batch: Any,
    layout: RowLayout,
    sizes: Sequence[int],
    device: torch.device,
) -> Iterator[Any]:
    """The chunks of ``sizes``, and the first row again for every size of 0."""
    working = [size for size in sizes if size]
    yield from chunks(batch, layout, working, device)
    for _ in range(len(sizes) - len(working)):
        yield trees.move(trees.slice_rows(batch, layout, 0, 1), device)
