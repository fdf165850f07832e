"""Which kernel ``scaled_dot_product_attention`` takes on CUDA.

The choice is that of ``aten/src/ATen/native/transformers/cuda/sdp_utils.cpp`` on sm80 and later: flash for 16-bit
numbers without a mask, memory-efficient otherwise, plain products where neither can. cuDNN's own attention, which newer
torch prefers on Hopper, keeps the same tensors as flash does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_NARROW = (torch.float16, torch.bfloat16)
_WIDEST_FLASH_HEAD = 256
# The efficient kernel reads masks in runs of so many entries.
_MASK_ALIGNMENT = 16
# Rows and columns of a tile of the memory-efficient backward.
_TILE = 64


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``aten::scaled_dot_product_attention`` for CUDA: (..., heads, length, head) each, 4 axes where it is fused."""
    operations = torch.ops.aten
    if scale is None:
        scale = query.shape[-1] ** -0.5
    if _takes_flash(query, key, value, attn_mask, is_causal):
        head = query.shape[-1]
        padded = [_padded(tensor, 8) for tensor in (query, key, value)]
        rows: Tensor = operations._scaled_dot_product_flash_attention(
            *padded, dropout_p, is_causal, False, scale=scale
        )[0]
        return rows[..., :head] if padded[0].shape[-1] != head else rows
    if not enable_gqa and _takes_efficient(query, key, value):
        keeps = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value))
        mask = None if attn_mask is None else _additive(attn_mask, query, key)
        made: Tensor = operations._scaled_dot_product_efficient_attention(
            query, key, value, mask, keeps, dropout_p, is_causal, scale=scale
        )[0]
        return made
    plain: Tensor = operations._scaled_dot_product_attention_math(
        query, key, value, attn_mask, dropout_p, is_causal, None, scale=scale, enable_gqa=enable_gqa
    )[0]
    return plain


def _takes_flash(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool) -> bool:
    heads = {tensor.shape[-1] for tensor in (query, key, value)}
    return (
        _enabled("flash")
        and mask is None
        and query.dim() == 4
        and query.dtype in _NARROW
        and len(heads) == 1
        and heads.pop() <= _WIDEST_FLASH_HEAD
        and not (is_causal and query.shape[-2] != key.shape[-2])
        and _dense_last(query, key, value)
    )


def _takes_efficient(query: Tensor, key: Tensor, value: Tensor) -> bool:
    alignment = 8 if query.dtype in _NARROW else 4
    return (
        _enabled("mem_efficient")
        and query.dim() == 4
        and query.dtype in (*_NARROW, torch.float32)
        and query.shape[-1] == key.shape[-1]
        and query.shape[-3] == key.shape[-3]
        and query.shape[-1] % alignment == 0
        and value.shape[-1] % alignment == 0
        and _dense_last(query, key, value)
    )


def _enabled(kernel: str) -> bool:
    """Whether the user left this kernel on (``torch.nn.attention.sdpa_kernel``)."""
    return bool(getattr(torch.backends.cuda, f"{kernel}_sdp_enabled")())


def _dense_last(*tensors: Tensor) -> bool:
    return all(tensor.stride(-1) == 1 and tensor.shape[-2] > 0 for tensor in tensors)


def _padded(tensor: Tensor, multiple: int) -> Tensor:
    rest = -tensor.shape[-1] % multiple
    return torch.nn.functional.pad(tensor, (0, rest)) if rest else tensor


def _additive(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """The mask as numbers to add, in memory that the kernel can read, (batch, heads, query rows, key rows)."""
    if mask.dtype is torch.bool:
        nothing = torch.zeros((), dtype=query.dtype, device=query.device)
        mask = torch.where(mask.logical_not(), float("-inf"), nothing)
    columns = mask.shape[-1]
    if columns % _MASK_ALIGNMENT and columns > 1:
        mask = _padded(mask, _MASK_ALIGNMENT)[..., :columns]
    return mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])


def _efficient_results(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, keeps: bool, dropout_p: float = 0.0, *_: Any,
    **__: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Where nothing is dropped, seed and offset stay on the host. Source: ``attention.cu``."""
    batch, heads, length = query.shape[:3]
    rows = query.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)
    # Row sums in whole runs of 32 for the backward's kernel.
    sums = query.new_empty(batch, heads, -(-length // 32) * 32 if keeps else 0, dtype=torch.float32)
    place = query.device if dropout_p else torch.device("cpu")
    seed, offset = (torch.empty((), dtype=torch.int64, device=place) for _ in range(2))
    return rows, sums, seed, offset


STAND_INS = {"_scaled_dot_product_efficient_attention": _efficient_results}


def efficient_scratch_changes(args: tuple[Any, ...]) -> tuple[int, ...]:
    """What the memory-efficient backward takes for itself and gives back, as ``kernel_scratch`` has it.

    Row sums of gradient times output, made of that product, and float32 tiles of the query's gradient, each with a lock
    of 16 bytes.

    ``args``: of ``aten::_scaled_dot_product_efficient_attention_backward``. Source: ``attention_backward.cu`` and
    ``mem_eff_attention/kernel_backward.h``.
    """
    query = args[1]
    batch, heads, length, head = query.shape
    sums_bytes = batch * heads * length * 4
    tiles = -(-length // _TILE) * -(-head // _TILE)
    workspace_bytes = batch * heads * tiles * (_TILE * _TILE * 4 + 16)
    if query.dtype in _NARROW:
        # Kernels of halves make the row sums themselves.
        return sums_bytes, workspace_bytes, -sums_bytes, -workspace_bytes
    product_bytes = query.numel() * 4
    sums = product_bytes, sums_bytes, sums_bytes, -sums_bytes, -product_bytes
    return *sums, workspace_bytes, -sums_bytes, -workspace_bytes


def backward_scratch_bytes(args: tuple[Any, ...]) -> int:
    """Bytes that flash attention's backward takes for itself: query gradients summed in float32, and row sums.

    ``args``: of the backward operation. Source: ``flash_attn/flash_api.cpp``, mha_bwd.
    """
    batch, heads, length, head = args[1].shape
    length, head = -(-length // 128) * 128, -(-head // 32) * 32
    return int(batch * heads * length * (head + 1) * 4)
