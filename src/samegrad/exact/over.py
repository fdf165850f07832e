"""``over``: a function of items (centers, projections, tiles), run a few items at a time, joined or reduced.

    density = sg.over(score, centers, shared=(x, network), reduce="logsumexp", rows=100)

Derivatives of any order hold one chunk of items at a time; "softmax_mean" is a closed form with a first one only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from samegrad import trees
from samegrad.errors import UsageError
from samegrad.exact.item_checks import check_items
from samegrad.exact.item_map import ItemMap
from samegrad.exact.ranks import Ranks

Reduce = Literal["cat", "sum", "logsumexp", "softmax_mean"]


def over(
    fn: Callable[[Any, Any], Any],
    items: Any,
    *,
    shared: Any = None,
    reduce: Reduce = "cat",
    rows: int,
    process_group: Any = None,
) -> Any:
    """``fn(items, shared)`` with ``rows`` items at a time.

    ``fn`` returns tensors whose first axis is the items: "cat" keeps that axis, "sum" and "logsumexp" reduce it, the
    latter without ever holding all terms. "softmax_mean": ``fn`` returns ``(scores, values)``, scores (items, B) and
    values (items, B, ...), nested as you like; the result is ``(lse, means)``, the scores' log-sum-exp (B,) and the
    values averaged with their softmax (B, ...), with a first derivative only, at 2F + B; values () give lse alone.

    ``items``: tensors, nested as you like, items on their first axis. ``shared``: what every chunk sees, nested;
    tensors and modules in it receive gradients. Raises CannotSplit when ``fn`` uses parameters that are not in
    ``shared``, draws random numbers or changes state.

    ``process_group``: every rank of it holds items of its own, any number of them, and the same ``shared``; the
    reductions are over the ranks too. Every rank is to compute the same loss from the result: then each holds the
    whole gradient of what is shared (summed over ranks, not averaged) and that of its own items, to any order but for
    "softmax_mean".
    """
    if reduce not in get_args(Reduce):
        raise UsageError(asked=f"reduce={reduce!r}", found="not a reduction", do=f"use one of {get_args(Reduce)}")
    if process_group is not None and reduce == "cat":
        raise UsageError(
            asked="reduce='cat' with process_group=",
            found="it is no sum over the items of all ranks",
            do="use a reduction, or leave process_group out: each rank keeps what its own items give",
        )
    if not isinstance(rows, int) or isinstance(rows, bool) or rows < 1:
        raise UsageError(asked=f"rows={rows!r}", found="not a positive whole number", do="give items at a time")

    def made() -> tuple[ItemMap, list[bool]]:
        mapped = ItemMap(items, shared, rows)
        return mapped, check_items(mapped, fn)

    mapped = made()[0] if process_group is None else _on_ranks(made, (items, shared), process_group)
    if reduce == "softmax_mean":
        return mapped.softmax_mean(fn)
    if reduce == "cat":
        return mapped.mapped(fn, 0)
    if reduce == "sum":
        return mapped.mapped(lambda i, s: trees.map_tensors(fn(i, s), lambda t: t.sum(0)), None)
    return _log_sum_exp(mapped, fn)


def _on_ranks(make: Callable[[], tuple[ItemMap, list[bool]]], inputs: Any, process_group: Any) -> ItemMap:
    tensors = [leaf for leaf in trees.leaves_of(inputs) if isinstance(leaf, Tensor)]
    ranks = Ranks((process_group,), tensors[0].device if tensors else torch.device("cpu"))
    (mapped, reached), _ = ranks.together(lambda: (make(), 0))
    mapped.split_over(ranks, reached)
    return mapped


def _log_sum_exp(mapped: ItemMap, fn: Callable[[Any, Any], Any]) -> Any:
    """max + log Σ exp(s - max): the maximum is found first and is a constant, so every order follows by composition."""
    with torch.no_grad():
        tops, spec = trees.flatten(mapped.maximum(fn))
    # Where every term is -inf the shift must not make it -inf - -inf.
    tops = [torch.where(top.isfinite(), top, torch.zeros_like(top)) for top in tops]

    def shifted(items: Any, shared: Any) -> Any:
        leaves = trees.flatten(fn(items, shared))[0]
        return trees.unflatten([(leaf - top).exp().sum(0) for leaf, top in zip(leaves, tops, strict=True)], spec)

    sums = trees.flatten(mapped.mapped(shifted, None))[0]
    return trees.unflatten([total.log() + top for total, top in zip(sums, tops)], spec)
