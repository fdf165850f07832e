"""Operations that are one kernel on CUDA and several elsewhere: dropout, softmax of halves into floats, RMS norm, and
the gradients of SiLU and Mish.

torch decides so in C++, by asking a tensor whether it is on CUDA; a traced tensor is not. A torch built without CUDA
has no kernel of the last two and takes them apart. Source: torch's ``aten/src/ATen/native/{Dropout,SoftMax,layer_norm}
.cpp`` and ``native_functions.yaml``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

_OPERATIONS: Any = torch.ops.aten
# By the number of axes.
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def _dropout(values: Tensor, p: float, train: bool) -> Tensor:
    """One kernel that keeps a mask of a byte an element."""
    if not train or p == 0 or not values.numel():
        return values
    if p == 1:
        return values * torch.zeros((), dtype=values.dtype, device=values.device)
    dropped: Tensor = _OPERATIONS.native_dropout(values, p, train)[0]
    return dropped


def _softmax(kernel: str) -> Callable[..., Tensor]:
    """``softmax`` or ``log_softmax``, which read halves and write floats without a copy between."""

    def softmax(values: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
        widens = values.dtype is torch.float16 and dtype is torch.float32
        if not widens and dtype is not None:
            values = values.to(dtype)
        made: Tensor = getattr(_OPERATIONS, kernel)(values, dim, widens)
        return made

    return softmax


def _whole(kernel: str) -> Callable[..., Tensor]:
    """The gradient ``kernel`` as one operation. Where it is differentiated itself, torch calls others in its place."""

    def gradient(cotangent: Tensor, values: Tensor) -> Tensor:
        with cast(Any, torch._C)._AutoDispatchBelowAutograd():
            made: Tensor = getattr(_OPERATIONS, kernel)(cotangent, values)
        return made

    return gradient


def _rms_norm(values: Tensor, shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    mixed = weight is not None and weight.dtype is not values.dtype
    if mixed or values.is_complex() or _has_channels_last(values):
        composed: Tensor = _OPERATIONS.rms_norm.default.decompose(values, shape, weight, eps)
        return composed
    return cast(Tensor, _RmsNorm.apply(values, weight, list(shape), eps))  # type: ignore[no-untyped-call]  # torch has no types here


def _has_channels_last(values: Tensor) -> bool:
    layout = _CHANNELS_LAST.get(values.dim())
    return layout is not None and not values.is_contiguous() and values.is_contiguous(memory_format=layout)


class _RmsNorm(torch.autograd.Function):
    """``aten::_fused_rms_norm``, which without its kernel would fall apart above autograd."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: Tensor | None, shape: list[int], eps: float | None) -> Tensor:
        with cast(Any, torch._C)._AutoDispatchBelowAutograd():
            made, scale = _OPERATIONS._fused_rms_norm(values, shape, weight, eps)
        ctx.save_for_backward(values, scale, weight)
        ctx.shape = shape
        return cast(Tensor, made)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        values, scale, weight = ctx.saved_tensors
        mask = [ctx.needs_input_grad[0], weight is not None and ctx.needs_input_grad[1]]
        with cast(Any, torch._C)._AutoDispatchBelowAutograd():
            made = _OPERATIONS._fused_rms_norm_backward(cotangent, values, ctx.shape, scale, weight, mask)
        return made[0], made[1], None, None


def _rms_norm_results(
    values: Tensor, shape: Sequence[int], weight: Tensor | None, eps: float | None
) -> tuple[Tensor, Tensor]:
    rows = [*values.shape[: values.dim() - len(shape)], *[1] * len(shape)]
    wide = torch.float32 if values.dtype in (torch.float16, torch.bfloat16) else values.dtype
    return torch.empty_like(values, memory_format=torch.contiguous_format), values.new_empty(rows, dtype=wide)


def _rms_norm_gradients(
    cotangent: Tensor, values: Tensor, shape: Sequence[int], scale: Tensor, weight: Tensor | None, mask: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    return (
        torch.empty_like(values) if mask[0] else None,
        torch.empty_like(weight) if weight is not None and mask[1] else None,
    )


COMPOSITES: dict[str, Callable[..., Any]] = {
    "dropout": _dropout,
    "softmax.int": _softmax("_softmax"),
    "log_softmax.int": _softmax("_log_softmax"),
    "rms_norm": _rms_norm,
    "silu_backward": _whole("silu_backward"),
    "mish_backward": _whole("mish_backward"),
}
# In the place of kernels that have no shapes of their own.
STAND_INS: dict[str, Callable[..., Any]] = {
    "_fused_rms_norm": _rms_norm_results,
    "_fused_rms_norm_backward": _rms_norm_gradients,
}
