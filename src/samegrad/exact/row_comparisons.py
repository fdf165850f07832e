"""Whether two outputs of a model are the same rows: bit for bit, up to rounding, or in half their digits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from samegrad import trees
from samegrad.exact.rounding import eps_in_use

_ROUNDING_UNITS = 64


def leaf_pairs(a: Any, b: Any) -> list[tuple[str, Any, Any]]:
    """The leaves of two outputs of the model side by side, each pair with its path."""
    pairs = zip(trees.flatten_with_paths(a, "outputs"), trees.leaves_of(b))
    return [(path, x, y) for (path, x), y in pairs]


def row_pairs(a: Any, b: Any) -> list[tuple[str, Tensor, Tensor]]:
    """Those of ``leaf_pairs`` that are tensors."""
    return [(path, x, y) for path, x, y in leaf_pairs(a, b) if isinstance(x, Tensor)]


def same_rows(a: Any, b: Any) -> bool:
    """Whether two outputs of the model are bit for bit the same."""
    return all(same_bits(x, y) for _, x, y in row_pairs(a, b))


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal, what is no number in the same places too."""
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


def rounded_alike(a: Tensor, b: Tensor) -> bool:
    """Whether rounding explains what differs: a few units in the last place of the largest entry."""
    if not (a.is_floating_point() or a.is_complex()):
        return torch.equal(a, b)
    return close(a, b, _ROUNDING_UNITS * eps_in_use(a))


def alike(a: Tensor, b: Tensor) -> bool:
    """``close``, or whole numbers most of which are equal: rounding decides ties, it does not count rows."""
    if a.is_floating_point() or a.is_complex():
        return close(a, b)
    return bool((a != b).sum() <= a.numel() // 4)


def close(a: Tensor, b: Tensor, allowed: float | None = None) -> bool:
    """Whether ``a`` and ``b`` agree in half their digits: other shapes take other kernels, so bits may differ.

    ``allowed``: the difference that is allowed instead, relative to the largest entry.
    """
    if not (a.is_floating_point() or a.is_complex()):
        return torch.equal(a, b)
    allowed = eps_in_use(a) ** 0.5 if allowed is None else allowed
    finite = a[a.isfinite()]
    scale = max(finite.abs().max().item(), 1e-30) if finite.numel() else 1.0
    near = (a == b) | ((a - b).abs() <= scale * allowed)
    return bool(near.all() | (a != a).any())
