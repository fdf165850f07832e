"""``cross_entropy_over`` on CUDA: one Triton program a position, which reads its row of scores twice.

The second time they come from the cache. A block is as long as one program's registers hold.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_jit: Callable[..., Any] = triton.jit

_BLOCK = 4096
_WARPS = 16


@_jit
def _kernel(
    scores_at, targets_at, cotangents_at, losses_at, row_stride, classes, padded, ignore_index, smoothing,
    SMOOTHED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    position = tl.program_id(0).to(tl.int64)
    row_at = scores_at + position * row_stride
    target = tl.load(targets_at + position)
    within = tl.arange(0, BLOCK)
    if target == ignore_index:
        for start in range(0, padded, BLOCK):
            tl.store(row_at + start + within, tl.zeros((BLOCK,), scores_at.dtype.element_ty), start + within < padded)
        tl.store(losses_at + position, 0.0)
        return
    of_target = tl.load(row_at + target).to(tl.float32)
    highest = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    plain_sum = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, classes, BLOCK):
        there = start + within < classes
        scores = tl.load(row_at + start + within, there, float("-inf")).to(tl.float32)
        # One exponential for both cases. What is no number stays in the total; two that are -inf differ by none.
        apart = tl.where(scores == highest, 1.0, tl.exp(-tl.abs(scores - highest)))
        total = tl.where(scores > highest, total * apart + 1, total + apart)
        highest = tl.maximum(highest, scores)
        if SMOOTHED:
            plain_sum += tl.where(there, scores, 0.0)
    most = tl.max(highest, 0)
    normal = tl.sum(tl.where(highest == float("-inf"), 0.0, total * tl.exp(highest - most)), 0)
    logarithm, share = tl.log(normal), 1 / normal
    loss = logarithm - (of_target - most)
    if SMOOTHED:
        loss = (1 - smoothing) * loss + smoothing * (logarithm + most - tl.sum(plain_sum, 0) / classes)
    tl.store(losses_at + position, loss)
    cotangent = tl.load(cotangents_at + position).to(tl.float32)
    for start in range(0, padded, BLOCK):
        place = start + within
        scores = tl.load(row_at + place, place < classes, float("-inf")).to(tl.float32)
        gradient = tl.exp(scores - most) * share
        if SMOOTHED:
            gradient -= smoothing / classes + tl.where(place == target, 1 - smoothing, 0.0)
        else:
            gradient -= tl.where(place == target, 1.0, 0.0)
        gradient = tl.where(place < classes, gradient * cotangent, 0.0)
        tl.store(row_at + place, gradient.to(scores_at.dtype.element_ty), place < padded)


def cross_entropy_over(
    scores: Tensor, classes: int, targets: Tensor, cotangents: Tensor, ignore_index: int, smoothing: float
) -> Tensor:
    losses = torch.empty(len(scores), dtype=torch.float32, device=scores.device)
    if not len(scores):
        return losses
    # What torch's own kernels do with a target that is no class.
    torch._assert_async((((targets >= 0) & (targets < classes)) | (targets == ignore_index)).all())
    with torch.cuda.device(scores.device):
        _kernel[(len(scores),)](
            scores, targets.contiguous(), cotangents.contiguous(), losses, scores.stride(0), classes, scores.shape[1],
            ignore_index, smoothing, smoothing != 0, _BLOCK, num_warps=_WARPS,
        )  # fmt: skip
    return losses
