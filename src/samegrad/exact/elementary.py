"""log, exp, and sine and cosine of a turn in float64, the same bits on every device and for every chunk.

Library functions differ in the last bit between devices, and between the vector body and the tail of a chunk. These
use additions, multiplications, divisions and square roots only, which IEEE 754 rounds in one way, and each is a kernel
of its own, so that nothing is contracted into a fused multiply-add. Good to about 2 units in the last place.

Arrays are numpy's or torch's: numpy on the CPU, whose small arrays need no threads to wait for, torch on CUDA.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

Array = Any

# ln 2 in two parts; the first has trailing zeros, so that its product with an exponent is exact.
LN2_HIGH = float.fromhex("0x1.62e42fee00000p-1")
LN2_LOW = float.fromhex("0x1.a39ef35793c76p-33")

ATANH = [1.0 / (2 * k + 1) for k in range(12)]
EXP = [1.0 / math.factorial(k) for k in range(15)]
SIN = [(-1) ** k / math.factorial(2 * k + 1) for k in range(9)]
COS = [(-1) ** k / math.factorial(2 * k) for k in range(10)]


def log(values: Array) -> Array:
    """Natural logarithm of positive float64."""
    library = library_of(values)
    mantissa, exponent = library.frexp(values)
    small = mantissa < math.sqrt(0.5)
    mantissa = library.where(small, mantissa * 2, mantissa)
    power = cast(exponent, library.float64) - cast(small, library.float64)
    # log m = 2 artanh((m - 1) / (m + 1)), whose series is short for m near 1.
    ratio = (mantissa - 1) / (mantissa + 1)
    series = _polynomial(ratio * ratio, ATANH)
    series *= ratio
    series *= 2
    series += power * LN2_LOW
    series += power * LN2_HIGH
    return series


def exp(values: Array) -> Array:
    """Exponential of float64 whose result is a normal number."""
    library = library_of(values)
    power = library.round(values * (1 / math.log(2)))
    rest = values - power * LN2_HIGH
    rest -= power * LN2_LOW
    # The power of two is put together from its bits: a library's pow may round.
    scale = ((cast(power, library.int64) + 1023) << 52).view(library.float64)
    return _polynomial(rest, EXP) * scale


def sine_and_cosine(turns: Array) -> tuple[Array, Array]:
    """Sine and cosine of ``turns`` full turns, float64 in [0, 1]."""
    where = library_of(turns).where
    quarter = library_of(turns).round(turns * 4)
    angle = (turns - quarter * 0.25) * (2 * math.pi)
    square = angle * angle
    sine, cosine = _polynomial(square, SIN) * angle, _polynomial(square, COS)
    odd = (quarter == 1) | (quarter == 3)
    sine, cosine = where(odd, cosine, sine), where(odd, sine, cosine)
    return (
        where((quarter == 2) | (quarter == 3), -sine, sine),
        where((quarter == 1) | (quarter == 2), -cosine, cosine),
    )


def library_of(values: Array) -> Any:
    return torch if isinstance(values, Tensor) else np


def cast(values: Array, dtype: Any) -> Array:
    return values.to(dtype) if isinstance(values, Tensor) else values.astype(dtype)


def _polynomial(values: Array, coefficients: list[float]) -> Array:
    total = library_of(values).full_like(values, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        total *= values
        total += coefficient
    return total
