"""What ranks decide together before any of them computes, and sums over ranks that autograd sees through.

A collective that one rank enters and another does not ends in a time-out. So ranks agree on numbers, and that all of
them are ready, before the first one that depends on it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from samegrad.errors import CannotSplit

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Ranks:
    """Ranks that must act together: all those reached through ``groups``, one after the other.

    ``device``: where the groups' collectives take their tensors.
    """

    groups: tuple[dist.ProcessGroup, ...]
    device: torch.device

    def largest(self, *values: int) -> list[int]:
        """The largest of each value over the ranks: one small all-reduce a group, read on the host."""
        agreed = torch.tensor(values, dtype=torch.int64, device=self.device)
        for group in self.groups:
            dist.all_reduce(agreed, op=dist.ReduceOp.MAX, group=group)
        return [int(value) for value in agreed.tolist()]

    def together(self, prepare: Callable[[], tuple[T, int]]) -> tuple[T, int]:
        """What ``prepare()`` returns: a value of this rank's own, and a number whose largest over the ranks it becomes.

        When it raises on one rank it raises on all: there its own error, elsewhere CannotSplit naming that rank.
        """
        try:
            value, number = prepare()
        except BaseException:
            self.largest(dist.get_rank() + 1, -(2**62))
            raise
        failed, largest = self.largest(0, number)
        if failed:
            raise CannotSplit(
                asked="a step that every rank takes",
                found=f"rank {failed - 1} raised an error, and this rank did not",
                do=f"see the message of rank {failed - 1}; nothing was run and no gradient was handed over",
            )
        return value, largest


def ranks_of_group(group: Any, device: torch.device) -> Ranks:
    """The ranks of one process group, whose collectives take tensors on ``device``."""
    return Ranks((group,), device)


class _SumOverRanks(torch.autograd.Function):
    """Parts in, their sum over the ranks out, the same on every rank. Its gradient is that of each part: the same."""

    @staticmethod
    def forward(ctx: Any, group: Any, *parts: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        ctx.set_materialize_grads(True)
        return tuple(_reduced(part, dist.ReduceOp.SUM, group) for part in parts)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
        return (None, *_apply(_SameOnRanks, ctx.group, cotangents))


class _SameOnRanks(torch.autograd.Function):
    """Values that are the same on every rank, each rank using its own copy. Their gradient is summed over the ranks."""

    @staticmethod
    def forward(ctx: Any, group: Any, *values: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        # Zeros where this rank has no gradient: others may have one, and every rank enters the sum.
        ctx.set_materialize_grads(True)
        return tuple(value.view_as(value) for value in values)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
        return (None, *_apply(_SumOverRanks, ctx.group, cotangents))


def _apply(function: Any, group: Any, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    # autograd.Function.apply carries no types.
    return cast(tuple[Tensor, ...], function.apply(group, *tensors))


def sum_over_ranks(parts: Sequence[Tensor], group: Any) -> tuple[Tensor, ...]:
    """Each part summed over the ranks of ``group``: a value that is the same on all of them."""
    return _apply(_SumOverRanks, group, parts)


def same_on_ranks(values: Sequence[Tensor], group: Any) -> tuple[Tensor, ...]:
    """``values``, the same on every rank of ``group``, whose gradients will be summed over the ranks.

    The two functions are each other's transpose, so gradients of gradients follow as on one rank.
    """
    return _apply(_SameOnRanks, group, values)


def largest_over_ranks(values: Sequence[Tensor], group: Any) -> list[Tensor]:
    """The largest of each entry over the ranks; no gradient."""
    return [_reduced(value, dist.ReduceOp.MAX, group) for value in values]


def _reduced(value: Tensor, operation: Any, group: Any) -> Tensor:
    # A sum of bfloat16 partial sums would round once a rank.
    narrow = value.is_floating_point() and value.dtype.itemsize < 4
    wide = (value.detach().float() if narrow else value.detach().clone()).contiguous()
    dist.all_reduce(wide, op=operation, group=group)
    return wide.to(value.dtype)
