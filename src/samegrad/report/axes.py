"""Where values lie in a picture, and which of them get a label."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

# Beyond this, differences and padding overflow; such a value is no use in a picture and is reported in words.
LARGEST_DRAWN = 1e300


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scale:
    """A map from values between ``low`` and ``high`` to pixels between ``start`` and ``end``."""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    def place(self, value: float) -> float:
        """The pixel of ``value``, kept between ``start`` and ``end``."""
        low, high = self.low, self.high
        if self.logarithmic:
            low, high, value = math.log10(low), math.log10(high), math.log10(value)
        # Dividing first keeps the difference finite for the largest floats.
        largest = max(abs(low), abs(high))
        share = (value / largest - low / largest) / (high / largest - low / largest)
        return self.start + min(max(share, 0.0), 1.0) * (self.end - self.start)


def is_drawable(value: float, *, logarithmic: bool = False) -> bool:
    """Whether ``value`` has a place in a picture: finite, below 1e300, and above 1e-300 on a logarithmic axis."""
    if not math.isfinite(value) or abs(value) > LARGEST_DRAWN:
        return False
    return value >= 1 / LARGEST_DRAWN if logarithmic else True


def padded_range(values: Sequence[float]) -> tuple[float, float]:
    """A range a little larger than that of ``values``, also when they are all equal."""
    low, high = min(values), max(values)
    largest = max(abs(low), abs(high))
    if largest < 1 / LARGEST_DRAWN:
        return -1.0, 1.0
    margin = 0.05 * (high - low)
    if margin <= 1e-9 * largest:
        margin = 0.1 * largest
    return low - margin, high + margin


def padded_log_range(values: Sequence[float]) -> tuple[float, float]:
    """As ``padded_range``, for positive values on a logarithmic axis."""
    low, high = math.log10(min(values)), math.log10(max(values))
    margin = min(max(0.05 * (high - low), 0.1), 1.0)
    return 10 ** (low - margin), 10 ** (high + margin)


def even_ticks(low: float, high: float, *, about: int, whole: bool = False) -> list[float]:
    """Round numbers between ``low`` and ``high``, ``about`` as many as asked; only integers if ``whole``."""
    rough = max((high - low) / max(about, 1), 1 / LARGEST_DRAWN)
    size = 10.0 ** math.floor(math.log10(rough))
    # The nearest by ratio: never so large that no tick is left in the range, never so small that they crowd.
    step = min((size * factor for factor in (1, 2, 5, 10)), key=lambda candidate: abs(math.log(candidate / rough)))
    if whole:
        step = max(step, 1.0)
    first, last = math.ceil(low / step), math.floor(high / step)
    # i * step carries the rounding of step; cutting it below the step's own digit takes that off again.
    decimals = 1 - math.floor(math.log10(step))
    return [round(i * step, decimals) for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten between ``low`` and ``high``, with 2 and 5 between where there are few."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    stride = max(1, (last - first) // 5)
    factors = (1, 2, 5) if math.log10(high) - math.log10(low) <= 2.5 else (1,)
    ticks = [float(f"{factor}e{power}") for power in range(first, last + 1, stride) for factor in factors]
    kept = [tick for tick in ticks if low <= tick <= high]
    if kept:
        return kept
    # Rounding can take the first even tick a last digit below ``low``.
    return [tick for tick in even_ticks(low, high, about=3) if low <= tick <= high]


def byte_ticks(top_bytes: float, *, about: int = 5) -> list[int]:
    """Multiples of a power of two from 0 up to ``top_bytes``, which read well in binary units."""
    step = 2 ** max(0, math.ceil(math.log2(max(top_bytes, 1) / max(about, 1))))
    return list(range(0, math.floor(top_bytes) + 1, step))


def tick_labels(ticks: Sequence[float]) -> list[str]:
    """The shortest labels that keep ``ticks`` apart."""
    if all(tick == round(tick) and abs(tick) < 1e7 for tick in ticks):
        return [f"{tick:.0f}" for tick in ticks]
    labels = [f"{tick:.17g}" for tick in ticks]
    for digits in range(1, 17):
        short = [f"{tick:.{digits}g}" for tick in ticks]
        if len(set(short)) == len(ticks) and all(float(s) == t for s, t in zip(short, ticks, strict=True)):
            return short
    return labels
