"""A loss that sees its rows only through their softmax: log-sum-exp of scores, and values averaged with its shares.

Rows are centers, negatives or experts then, as many as there are; what the loss needs of all of them together is as
large as for one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from samegrad import trees
from samegrad.errors import UsageError


@dataclasses.dataclass(frozen=True, eq=False)
class SoftmaxLoss:
    """``function((lse, means), batch)`` of outputs ``(scores, values)``, written out in plain PyTorch.

    Scores (rows, B) and values (rows, B, ...), nested as you like; lse (B,) and means (B, ...) nested as the values.
    An object and not a closure, so that a split step finds the function and need not keep the rows.
    """

    function: Callable[[Any, Any], Tensor]

    def __call__(self, outputs: Any, batch: Any) -> Tensor:
        scores, values = checked(outputs)
        shares = scores.softmax(0)
        means = trees.map_tensors(values, lambda v: (beside(shares, v) * v).sum(0))
        return self.function((scores.logsumexp(0), means), batch)


def reduced_loss(loss_fn: Any, *, reduce: str | None, normalise: Any) -> Any:
    """``loss_fn`` of what ``reduce`` makes of the model's rows. Raises UsageError for what does not go together."""
    if reduce is None:
        return loss_fn
    if reduce != "softmax_mean":
        raise UsageError(
            asked=f"reduce={reduce!r}", found="not a reduction of rows", do="give 'softmax_mean' or leave it out"
        )
    if normalise is not None:
        raise UsageError(
            asked="reduce='softmax_mean' and normalise=",
            found="a softmax over the rows is no sum over them",
            do="leave normalise= out",
        )
    if isinstance(loss_fn, nn.Module):
        raise UsageError(
            asked=f"reduce='softmax_mean' with a {type(loss_fn).__name__} as loss_fn",
            found="a loss that is a module is copied with its parameters, and the reduction is none of them",
            do="give a function loss_fn((lse, means), batch); parameters belong to the model",
        )
    return SoftmaxLoss(loss_fn)


def checked(result: Any) -> tuple[Tensor, Any]:
    """``result`` if it is ``(scores, values)`` as the reduction needs them; raises UsageError otherwise."""
    asked = 'reduce="softmax_mean" of a function that returns (scores, values)'
    do = "return scores (items, B) and values, nested as you like, of shape (items, B, ...)"
    if not isinstance(result, (tuple, list)) or len(result) != 2 or not isinstance(result[0], Tensor):
        raise UsageError(asked=asked, found=f"it returned a {type(result).__name__}", do=do)
    scores, values = result
    for path, leaf in trees.flatten_with_paths(values, "values"):
        if not isinstance(leaf, Tensor) or leaf.shape[: scores.dim()] != scores.shape:
            found = tuple(leaf.shape) if isinstance(leaf, Tensor) else type(leaf).__name__
            raise UsageError(asked=asked, found=f"{path} is {found}, scores are {tuple(scores.shape)}", do=do)
    whole = [leaf.dtype for leaf in (scores, *trees.leaves_of(values)) if not leaf.is_floating_point()]
    if whole:
        raise UsageError(asked=asked, found=f"one of them is {whole[0]}, which has no mean", do="make it float")
    return scores, values


def beside(weights: Tensor, values: Tensor) -> Tensor:
    """``weights`` with as many axes as ``values``, to be multiplied with."""
    return weights.reshape(*weights.shape, *(1 for _ in range(values.dim() - weights.dim())))


def wide(dtype: torch.dtype) -> torch.dtype:
    """What sums of ``dtype`` are kept in."""
    return torch.promote_types(dtype, torch.float32)
