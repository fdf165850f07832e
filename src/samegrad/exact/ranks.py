"""What ranks decide together before any of them computes, and sums over ranks that autograd sees through.

A collective that one rank enters and another does not ends in a time-out. So ranks agree on numbers, and that all of
them are ready, before the first one that depends on it.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from samegrad.errors import CannotSplit
from samegrad.exact.out_of_memory import OutOfMemory

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
            _refuse_alone(failed - 1)
        return value, largest


class Outcome(enum.IntEnum):
    """How an attempt ended on one rank; the largest over the ranks is how it ended."""

    READY = 0
    OUT_OF_MEMORY = 1
    RAISED = 2


class OutOfMemoryElsewhere(OutOfMemory):
    """This rank was ready to hand its gradients over; another one ran out of memory."""


class Agreement:
    """What the ranks of one step tell each other before gradients are reduced: exactly once an attempt, on every rank.

    Its few bytes are taken when it is made, since there may be none when they are needed. It waits for the slowest
    rank, at most for the time-out of the process group.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._told = torch.zeros((), dtype=torch.int64, device=ranks.device)
        self.spoken = False
        self.worst: tuple[Outcome, int] | None = None

    @property
    def agreed(self) -> bool:
        """Whether all ranks were ready: then gradients are being reduced."""
        return self.worst is not None and self.worst[0] is Outcome.READY

    def ready(self) -> None:
        """To be called where all that may still fail is the hand-over. Raises on every rank when one failed."""
        outcome, rank = self.tell(Outcome.READY)
        if outcome is Outcome.OUT_OF_MEMORY:
            raise OutOfMemoryElsewhere(
                asked="a step that every rank takes",
                found=f"rank {rank} ran out of memory",
                do=f"see the message of rank {rank}; no gradient was handed over",
            )
        if outcome is Outcome.RAISED:
            _refuse_alone(rank)

    def tell(self, outcome: Outcome) -> tuple[Outcome, int]:
        """The worst outcome over the ranks and a rank that had it; ``outcome`` is this one's."""
        self.spoken = True
        self._told.fill_((int(outcome) << 32) + dist.get_rank())
        for group in self._ranks.groups:
            dist.all_reduce(self._told, op=dist.ReduceOp.MAX, group=group)
        worst, rank = divmod(int(self._told), 1 << 32)
        self.worst = Outcome(worst), rank
        return self.worst


def _refuse_alone(rank: int) -> NoReturn:
    raise CannotSplit(
        asked="a step that every rank takes",
        found=f"rank {rank} raised an error, and this rank did not",
        do=f"see the message of rank {rank}; no gradient was handed over",
    )


class _SumOverRanks(torch.autograd.Function):
    """Parts in, their sum over the ranks out, the same on every rank. Its gradient is that of each part: the same."""

    @staticmethod
    def forward(ctx: Any, group: Any, *parts: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        sums = tuple(_reduced(part, dist.ReduceOp.SUM, group) for part in parts)
        ctx.mark_non_differentiable(*(total for total in sums if not total.is_floating_point()))
        return sums

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
        return (None, *_apply(_SameOnRanks, ctx.group, cotangents))


class _SameOnRanks(torch.autograd.Function):
    """Values that are the same on every rank, each rank using its own copy. Their gradient is summed over the ranks."""

    @staticmethod
    def forward(ctx: Any, group: Any, *values: Tensor) -> tuple[Tensor, ...]:
        # Gradients that this rank does not have come as zeros: others may have them, and every rank enters the sum.
        ctx.group = group
        return tuple(value.view_as(value) for value in values)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
        # Those of every rank's same question: a derivative by x alone reduces nothing of the weights.
        needed = ctx.needs_input_grad[1:]
        sums = iter(_apply(_SumOverRanks, ctx.group, [c for c, here in zip(cotangents, needed) if here]))
        return (None, *(next(sums) if here else None for here in needed))


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


@dataclasses.dataclass(frozen=True)
class SplitItems:
    """Items of ``over`` that are split over the ranks of ``group``, and what all ranks share.

    Every rank computes the same loss from the same shared values. What the items are reduced to is then the same on
    every rank, and the gradient of a shared value is summed over the ranks inside the graph: each rank holds all of it,
    for gradients of any order. Items have their gradient on their own rank.
    ``summed[i]``: whether shared value i receives a gradient, which is agreed.
    """

    group: Any
    summed: tuple[bool, ...]

    @classmethod
    def agreed(cls, ranks: Ranks, shared: Sequence[Tensor], reached: Sequence[bool]) -> SplitItems:
        """Raises CannotSplit, on all ranks, when they share other numbers of values or want other gradients."""
        most, fewest = ranks.largest(len(shared), -len(shared))
        if most != -fewest:
            _refuse_unequal(f"ranks share other numbers of tensors and trainable parameters: {-fewest} to {most}")
        wanted = [int(value.requires_grad and torch.is_grad_enabled()) for value in shared]
        agreed = ranks.largest(*map(int, reached), *wanted, *(-w for w in wanted))
        used, some, none = (agreed[i * most : (i + 1) * most] for i in range(3))
        for place, (here, there) in enumerate(zip(some, none)):
            if here != -there:
                _refuse_unequal(f"shared value {place} requires grad on some ranks and not on others")
        return cls(ranks.groups[0], tuple(bool(u and w) for u, w in zip(used, some)))

    def entering(self, shared: Sequence[Tensor]) -> list[Tensor]:
        """``shared``, on their way to this rank's items."""
        summed = iter(same_on_ranks([v for v, here in zip(shared, self.summed) if here], self.group))
        return [next(summed) if here else value for value, here in zip(shared, self.summed)]


def _refuse_unequal(found: str) -> NoReturn:
    raise CannotSplit(
        asked="items split over ranks (process_group=)",
        found=found,
        do="give every rank the same shared values, modules and requires_grad; only the items may differ",
    )
