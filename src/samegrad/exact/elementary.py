"""log, exp, and sine and cosine of a turn in float64, the same bits on every device and for every chunk.

Library functions differ in the last bit between devices, and between the vector body and the tail of a chunk. These
use additions, multiplications, divisions and square roots only, which IEEE 754 rounds in one way, and each is a kernel
of its own, so that nothing is contracted into a fused multiply-add. Good to about 2 units in the last place.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# ln 2 in two parts; the first has trailing zeros, so that its product with an exponent is exact.
_LN2_HIGH = float.fromhex("0x1.62e42fee00000p-1")
_LN2_LOW = float.fromhex("0x1.a39ef35793c76p-33")

_ATANH = [1.0 / (2 * k + 1) for k in range(12)]
_EXP = [1.0 / math.factorial(k) for k in range(15)]
_SIN = [(-1) ** k / math.factorial(2 * k + 1) for k in range(9)]
_COS = [(-1) ** k / math.factorial(2 * k) for k in range(10)]


def log(values: Tensor) -> Tensor:
    """Natural logarithm of positive float64."""
    mantissa, exponent = torch.frexp(values)
    small = mantissa < math.sqrt(0.5)
    mantissa = torch.where(small, mantissa * 2, mantissa)
    power = (exponent - small.to(exponent.dtype)).to(values.dtype)
    # log m = 2 artanh((m - 1) / (m + 1)), whose series is short for m near 1.
    ratio = (mantissa - 1) / (mantissa + 1)
    series = _polynomial(ratio * ratio, _ATANH).mul_(ratio).mul_(2)
    return series.add_(power * _LN2_LOW).add_(power * _LN2_HIGH)


def exp(values: Tensor) -> Tensor:
    """Exponential of float64 whose result is a normal number."""
    power = (values * (1 / math.log(2))).round_()
    rest = values - power * _LN2_HIGH
    rest = rest - power * _LN2_LOW
    # The power of two is put together from its bits: a library's pow may round.
    scale = ((power.to(torch.int64) + 1023) << 52).view(torch.float64)
    return _polynomial(rest, _EXP).mul_(scale)


def sine_and_cosine(turns: Tensor) -> tuple[Tensor, Tensor]:
    """Sine and cosine of ``turns`` full turns, float64 in [0, 1]."""
    quarter = (turns * 4).round_()
    angle = (turns - quarter * 0.25).mul_(2 * math.pi)
    square = angle * angle
    sine, cosine = _polynomial(square, _SIN).mul_(angle), _polynomial(square, _COS)
    odd = torch.remainder(quarter, 2) == 1
    turned = torch.where(odd, cosine, sine), torch.where(odd, sine, cosine)
    return (
        torch.where(quarter.eq(2) | quarter.eq(3), -turned[0], turned[0]),
        torch.where(quarter.eq(1) | quarter.eq(2), -turned[1], turned[1]),
    )


def _polynomial(values: Tensor, coefficients: list[float]) -> Tensor:
    total = torch.full_like(values, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        total.mul_(values).add_(coefficient)
    return total
