"""Graphs of several chunks, joined by statistics of all their rows, and the sums of what they share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from samegrad.exact import batchnorm
from samegrad.exact.aliases import NARROW
from samegrad.exact.batchnorm import Statistics


@dataclasses.dataclass
class ChunkGraph:
    """Leaves of one chunk's graph: what all chunks share, and its rows. ``outputs`` are at the other end."""

    shared: list[Tensor]
    rows: list[Tensor]
    outputs: list[Tensor] = dataclasses.field(default_factory=list)


class JoinedStatistics(torch.autograd.Function):
    """Statistics of all chunks' rows ``xs``, whose gradient is spread over the rows of all of them.

    ``token`` chains these nodes, so that their backward has the reverse order of their forward on every rank.
    """

    @staticmethod
    def forward(ctx: Any, layer: _BatchNorm, statistics: Statistics, token: Tensor, *xs: Tensor) -> tuple[Tensor, ...]:
        ctx.layer, ctx.statistics = layer, statistics
        ctx.save_for_backward(*xs)
        ctx.set_materialize_grads(False)
        return statistics.mean.clone(), statistics.variance.clone(), token.clone()

    @staticmethod
    def backward(ctx: Any, g_mean: Tensor | None, g_variance: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        statistics: Statistics = ctx.statistics
        count = len(ctx.needs_input_grad) - 3
        if g_mean is None and g_variance is None:
            return (None,) * (3 + count)
        both = [torch.zeros_like(statistics.mean) if g is None else g for g in (g_mean, g_variance)]
        g_mean, g_variance = batchnorm.summed_over_ranks(both, batchnorm.group_of(ctx.layer))
        gradients: list[Tensor | None] = []
        for x, needed in zip(ctx.saved_tensors, ctx.needs_input_grad[3:]):
            if not needed:
                gradients.append(None)
                continue
            centred = batchnorm.widened(x) - batchnorm.along_channels(statistics.mean, x)
            spread = centred * batchnorm.along_channels(2 * g_variance / statistics.count, x)
            gradients.append((spread + batchnorm.along_channels(g_mean / statistics.count, x)).to(x.dtype))
        return (None, None, None, *gradients)


class SharedTotals:
    """Gradients of what all chunks share, added up as chunks give them, float32 where they are narrower."""

    def __init__(self, chunks: Sequence[ChunkGraph]) -> None:
        self._dtypes = [leaf.dtype for leaf in chunks[0].shared]
        self._sums: list[Tensor | None] = [None] * len(self._dtypes)
        for chunk in chunks:
            for index, leaf in enumerate(chunk.shared):
                if leaf.requires_grad:
                    # torch has no types here.
                    cast(Any, leaf).register_post_accumulate_grad_hook(self._fold(index))

    def _fold(self, index: int) -> Callable[[Tensor], None]:
        def fold(leaf: Tensor) -> None:
            gradient, leaf.grad = leaf.grad, None
            if gradient is None:
                # Backward came by, along the chain of statistics, with nothing to add.
                return
            before = self._sums[index]
            if before is None:
                self._sums[index] = gradient.float() if gradient.dtype in NARROW else gradient
            else:
                before.add_(gradient)

        return fold

    def taken(self) -> list[Tensor | None]:
        return [None if s is None else s.to(dtype) for s, dtype in zip(self._sums, self._dtypes)]


def joined_rows(chunks: Sequence[ChunkGraph]) -> list[Tensor | None]:
    """The gradients of row inputs, of all chunks."""
    joined: list[Tensor | None] = []
    for index in range(len(chunks[0].rows)):
        leaves = [chunk.rows[index] for chunk in chunks]
        if all(leaf.grad is None for leaf in leaves):
            joined.append(None)
            continue
        joined.append(torch.cat([torch.zeros_like(x) if x.grad is None else x.grad for x in leaves]))
        for leaf in leaves:
            leaf.grad = None
    return joined
