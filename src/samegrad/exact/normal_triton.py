"""Keyed normal numbers on CUDA in one Triton kernel, the bits of ``keyed_ops`` with ``elementary``.

float64 and the operations that IEEE 754 rounds in one way, in the order that ``elementary`` has them. The kernel is
compiled without contraction: a product and a sum fused into one instruction would be rounded once where the CPU
rounds twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from samegrad.exact import elementary
from samegrad.exact.philox_triton import ANYWHERE, PLAIN, launch, tile_of_words

_jit: Callable[..., Callable[..., Any]] = triton.jit

_ROOT_HALF = tl.constexpr(math.sqrt(0.5))
_TURN = tl.constexpr(2 * math.pi)
_LN2_HIGH = tl.constexpr(elementary.LN2_HIGH)
_LN2_LOW = tl.constexpr(elementary.LN2_LOW)
_ATANH = tl.constexpr(tuple(elementary.ATANH))
_SIN = tl.constexpr(tuple(elementary.SIN))
_COS = tl.constexpr(tuple(elementary.COS))
# What the kernel rounds to; a half or bfloat16 by way of float32, as torch does.
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@_jit
def _polynomial(values, COEFFICIENTS: tl.constexpr, LAST: tl.constexpr):
    total = tl.full(values.shape, COEFFICIENTS[LAST], tl.float64)
    for k in tl.static_range(LAST):
        total = total * values + tl.full(values.shape, COEFFICIENTS[LAST - 1 - k], tl.float64)
    return total


@_jit
def _log(values):
    """Of positive normal numbers."""
    bits = values.to(tl.int64, bitcast=True)
    exponent = ((bits >> 52) & 0x7FF) - 1022
    mantissa = ((bits & 0xFFFFFFFFFFFFF) | 0x3FE0000000000000).to(tl.float64, bitcast=True)
    small = mantissa < tl.full(values.shape, _ROOT_HALF, tl.float64)
    mantissa = tl.where(small, mantissa * 2, mantissa)
    power = (exponent - small.to(tl.int64)).to(tl.float64)
    ratio = (mantissa - 1) / (mantissa + 1)
    series = _polynomial(ratio * ratio, _ATANH, 11) * ratio * 2
    series = series + power * tl.full(values.shape, _LN2_LOW, tl.float64)
    return series + power * tl.full(values.shape, _LN2_HIGH, tl.float64)


@_jit
def _cosine(bits):
    """Of ``bits * 2**-53`` full turns; int64 in [0, 2**53)."""
    turns = bits.to(tl.float64) * tl.full(bits.shape, 2.0**-53, tl.float64)
    # The nearest quarter, the even one of two that are as near.
    quarter = (bits + ((1 << 50) - 1) + ((bits >> 51) & 1)) >> 51
    angle = (turns - quarter.to(tl.float64) * 0.25) * tl.full(bits.shape, _TURN, tl.float64)
    square = angle * angle
    odd = (quarter == 1) | (quarter == 3)
    cosine = tl.where(odd, _polynomial(square, _SIN, 8) * angle, _polynomial(square, _COS, 9))
    return tl.where((quarter == 1) | (quarter == 2), cosine * -1.0, cosine)


@_jit(do_not_specialize=PLAIN, do_not_specialize_on_alignment=ANYWHERE)
def _normal_kernel(
    out_at, key_at, ids_at, place, call, rows, elements, inner, FLAT: tl.constexpr, TILE: tl.constexpr
):
    w0, offset, valid = tile_of_words(key_at, ids_at, place, call, rows, elements, inner, FLAT, TILE)
    w1, _, _ = tile_of_words(key_at, ids_at, place + 1, call, rows, elements, inner, FLAT, TILE)
    w2, _, _ = tile_of_words(key_at, ids_at, place + 2, call, rows, elements, inner, FLAT, TILE)
    w3, _, _ = tile_of_words(key_at, ids_at, place + 3, call, rows, elements, inner, FLAT, TILE)
    bits = (w0.to(tl.int64) << 20) | (w1.to(tl.int64) >> 12)
    uniform = (bits.to(tl.float64) + 0.5) * tl.full(bits.shape, 2.0**-52, tl.float64)
    turns = (w2.to(tl.int64) << 21) | (w3.to(tl.int64) >> 11)
    # A sum with zero, as there: what is zero is so without a sign.
    normal = tl.sqrt(_log(uniform) * -2.0) * _cosine(turns) + 0.0
    if out_at.dtype.element_ty != tl.float64:
        normal = normal.to(tl.float32)
    tl.store(out_at + offset, normal.to(out_at.dtype.element_ty), mask=valid)


def keyed_normal(
    key: Tensor, ids: Tensor, stream: int, call: int, before: int, inner: int, dtype: torch.dtype
) -> Tensor:
    """Standard normal numbers (before, n, inner) of ``dtype``, one of ``DTYPES``, on the device of ``ids``."""
    numbers = torch.empty((before, ids.shape[0], inner), dtype=dtype, device=ids.device)
    launch(
        _normal_kernel, (numbers,), key, ids, (256 * stream, call), (before, inner), (), enable_fp_fusion=False
    )  # fmt: skip
    return numbers
