"""A cross-entropy over many classes and its gradient as one torch operation, which writes over its scores.

Logits of a large vocabulary are most of what its loss reads and writes, and a gradient has their shape. Read twice and
written once, they need no memory beside their own. Registered when this module is imported, as torch asks.

    samegrad::cross_entropy_over(scores!, classes, targets, cotangents, ignore_index, smoothing) -> losses

``scores`` (positions, at least ``classes``) float32 or narrower: afterwards what ``cotangents`` (positions,) give of
them, zero beyond ``classes``. ``targets`` (positions,) int64. Losses (positions,) float32: each that of torch's own
likelihood of float32 scores, whose steps these are: the maximum first, then sums of exponentials in float32.

Source: Milakov, Gimelshein 2018, "Online normalizer calculation for softmax", arXiv:1805.02867; Hsu et al. 2024, "Liger
Kernel", arXiv:2410.10989, for gradients in the place of logits.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

_library: Any = cast(Any, torch.library.Library)("samegrad", "FRAGMENT")


def cross_entropy_over(
    scores: Tensor, classes: int, targets: Tensor, cotangents: Tensor, ignore_index: int, smoothing: float
) -> Tensor:
    """Losses (positions,) float32; ``scores`` become their gradient. A target that is no class fails as torch's do."""
    operation = torch.ops.samegrad.cross_entropy_over
    found: Tensor = operation(scores, classes, targets, cotangents, ignore_index, smoothing)
    return found


def _plain(
    scores: Tensor, classes: int, targets: Tensor, cotangents: Tensor, ignore_index: int, smoothing: float
) -> Tensor:
    """By torch's own softmax; what the kernel computes."""
    wide = scores[:, :classes].to(torch.promote_types(scores.dtype, torch.float32))
    losses = F.cross_entropy(wide, targets, ignore_index=ignore_index, reduction="none", label_smoothing=smoothing)
    counted = targets != ignore_index
    given = (cotangents * counted).unsqueeze(1)
    gradient = torch.softmax(wide, 1).mul_(given)
    gradient.sub_(given * smoothing / classes)
    gradient.scatter_add_(1, (targets * counted).unsqueeze(1), given * (smoothing - 1))
    scores[:, :classes] = gradient
    scores[:, classes:] = 0
    return losses


def _by_kernel(
    scores: Tensor, classes: int, targets: Tensor, cotangents: Tensor, ignore_index: int, smoothing: float
) -> Tensor:
    # Triton is there where CUDA is, and is slow to import.
    from samegrad.exact import cross_entropy_triton

    losses: Tensor = cross_entropy_triton.cross_entropy_over(
        scores, classes, targets, cotangents, ignore_index, smoothing
    )
    return losses


def _shapes(scores: Tensor, *_: Any) -> Tensor:
    return scores.new_empty(len(scores), dtype=torch.promote_types(scores.dtype, torch.float32))


def _register() -> None:
    _library.define(
        "cross_entropy_over(Tensor(a!) scores, SymInt classes, Tensor targets, Tensor cotangents, int ignore_index, "
        "float smoothing) -> Tensor"
    )
    _library.impl("cross_entropy_over", _plain, "CPU")
    _library.impl("cross_entropy_over", _by_kernel, "CUDA")
    torch.library.register_fake("samegrad::cross_entropy_over", _shapes, lib=_library)


_register()
