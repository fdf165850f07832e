"""What torch's own CUDA kernels take for themselves and give back, beside their results.

As changes in bytes, in order: a negative one gives back one that was taken with that size. Library workspaces are not
here: they depend on the card (``workspaces``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from samegrad.exact import keyed_ops
from samegrad.measure import fused_attention, wide_results

Changes = tuple[int, ...]

_OPERATIONS: Any = torch.ops.aten
_NARROW = (torch.float16, torch.bfloat16)


def scratch_changes(func: Any, args: tuple[Any, ...]) -> Changes:
    """What ``func`` takes for itself on CUDA and gives back, () for most."""
    found = _FOUND.get(func)
    if found is not None:
        return found(args)
    if func._schema.name == "samegrad::keyed_numbers":
        _, ids, _, _, before, inner, distribution, scale, shift, _ = args
        return _one(keyed_ops.cuda_scratch_bytes(ids, before, inner, distribution, scale, shift))
    return ()


def _one(size_bytes: int) -> Changes:
    return (size_bytes, -size_bytes) if size_bytes else ()


def _group_norm(args: tuple[Any, ...]) -> Changes:
    """Scale and shift of every row and channel."""
    values, rows, channels = args[0], args[3], args[4]
    size_bytes = rows * channels * _wide_bytes(values)
    return size_bytes, size_bytes, -size_bytes, -size_bytes


def _group_norm_backward(args: tuple[Any, ...]) -> Changes:
    """Sums of every row and channel, three of them, and of every row and group, two. Source: group_norm_kernel.cu."""
    values, rows, channels, groups = args[1], args[5], args[6], args[8]
    by_channel, by_group = (rows * count * _wide_bytes(values) for count in (channels, groups))
    taken = by_channel, by_channel, by_group, by_group, by_channel
    return *taken, *(-size_bytes for size_bytes in reversed(taken))


def _wide_bytes(values: Tensor) -> int:
    return 4 if values.dtype in _NARROW else values.itemsize


def _copy_of_first(args: tuple[Any, ...]) -> Changes:
    """Kernels that read a gradient as one piece copy it where it is not: a slice of a concatenation's, say."""
    cotangent: Tensor = args[0]
    lies_well = cotangent.is_contiguous() or (
        cotangent.dim() == 4 and cotangent.is_contiguous(memory_format=torch.channels_last)
    )
    return () if lies_well else _one(cotangent.numel() * cotangent.itemsize)


_FOUND: dict[Any, Callable[[tuple[Any, ...]], Changes]] = {
    _OPERATIONS._scaled_dot_product_flash_attention_backward.default: lambda args: _one(
        fused_attention.backward_scratch_bytes(args)
    ),
    _OPERATIONS._scaled_dot_product_efficient_attention_backward.default: fused_attention.efficient_scratch_changes,
    _OPERATIONS.mse_loss.default: lambda args: _one(wide_results.scratch_bytes(args)),
    _OPERATIONS.smooth_l1_loss.default: lambda args: _one(wide_results.scratch_bytes(args)),
    _OPERATIONS.native_group_norm.default: _group_norm,
    _OPERATIONS.native_group_norm_backward.default: _group_norm_backward,
    _OPERATIONS.upsample_nearest2d_backward.default: _copy_of_first,
    _OPERATIONS.upsample_bilinear2d_backward.default: _copy_of_first,
    _OPERATIONS.avg_pool2d_backward.default: _copy_of_first,
    _OPERATIONS.max_pool2d_with_indices_backward.default: _copy_of_first,
}
