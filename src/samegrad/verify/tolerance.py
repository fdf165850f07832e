"""What rounding may explain, and nothing more. Tolerances come from here, never from a caller or a test.

With u the unit roundoff of the dtype that was compared, G = Σ_k |g_k| the sum of absolute gradients of small parts of
the rows (up to 64 parts, entry by entry; Ĝ its largest entry in a tensor) and κ = ‖G‖ / ‖g*‖:

logic   max |g_split − g_plain| ≤ C u Ĝ in every tensor, and ‖g_split − g_plain‖ ≤ N u κ ‖g*‖, in float64 or float32
direct  the same with the u of the dtype that runs; float16 may lose K 2⁻²⁵ an entry besides, to subnormal numbers
noise   ‖g_split − g*‖ ≤ 2 ‖g_plain − g*‖ + N u_a κ ‖g*‖, g* in float64, u_a the accumulator's roundoff
loss    |L_split − L_plain| ≤ 16 u Σ|ℓ_i| / N; Σ|ℓ_i| / N is |L| for losses that are not negative

The scale is G and not |g|, because gradients that are zero by structure (a bias before a translation-invariant loss)
are pure rounding on their own scale. Where even each part's gradient is zero by structure (a convolution's bias
before an instance norm), G is rounding too: what is left there was up to 0.7 u of the largest of all tensors, so a
tensor's scale is at least a tenth of that.

Some steps are worse conditioned than that: near an optimum each row's own gradient is what is left of terms that
cancel. So the plain step is run again with rows and weights moved by one unit in the last place, twice; four times
what its gradient then moves is allowed as well, but never more than a millionth of the scale. Compared directly in
the dtype that runs, one unit there also turns a ReLU at zero, so a hundredth is the limit; the logic was judged before.

Other kernels (channels last, compiled code, BatchNorm in chunks) add up in an order of their own inside every
operation. Under a plan that takes them, the result of every operation is moved by one unit as well, and
OTHER_KERNELS_RATIO times the answer is allowed: statistics over all rows and places, taken one after another, rounded
up to 18 times what such a move did.

Low precision alone proves nothing: a half-percent weighting error hides in bfloat16, so the same program must pass the
logic test in float64 or float32 first.
"""

from __future__ import annotations

import dataclasses

import torch


@dataclasses.dataclass(frozen=True)
class Precision:
    """How numbers are rounded: a dtype, or float32 whose products are rounded to fewer digits (TF32)."""

    name: str
    dtype: torch.dtype
    roundoff: float


TF32 = Precision("float32 with TF32 products", torch.float32, 2.0**-11)

# Largest values seen over models and splits were 21 (float64) and 47 (float32) for entries, 5.5 u and 15 u for norms.
_ENTRY_CONSTANT = {torch.float64: 64.0, torch.float32: 128.0, torch.bfloat16: 128.0, torch.float16: 128.0}
NORM_CONSTANT = 32.0
# Statistics of all rows stand between layers: their rounding is met again in each. Measured up to 80 u.
BATCH_STATISTICS_NORM_CONSTANT = 256.0
LOSS_CONSTANT = 16.0
NOISE_RATIO = 2.0
# Gradients are accumulated in float32 at least.
_ACCUMULATOR = {torch.float64: torch.float64}


STRUCTURAL_SCALE_FRACTION = 0.1
UNREST_RATIO = 4.0
LARGEST_UNREST = 1e-6
LARGEST_DIRECT_UNREST = 1e-2
OTHER_KERNELS_RATIO = 16.0
# Half the smallest float16, which is what one chunk's entry can lose to it.
_FLOAT16_LOSS = 2.0**-25


def precision_of(dtype: torch.dtype) -> Precision:
    return Precision(str(dtype).removeprefix("torch."), dtype, unit_roundoff(dtype))


def allowed_with_unrest(usual: float, unrest: float, largest: float = LARGEST_UNREST) -> float:
    """The allowance ``usual``, widened by how much the plain step itself moves; both relative to the scale."""
    return max(usual, min(UNREST_RATIO * unrest, largest))


def entry_scale(largest_here: float, largest_anywhere: float) -> float:
    """What a tensor's entry differences are measured on: its own Ĝ, or a tenth of the largest of all tensors."""
    return max(largest_here, STRUCTURAL_SCALE_FRACTION * largest_anywhere)


def unit_roundoff(kind: torch.dtype | Precision) -> float:
    """Half the distance from 1 to the next number of ``kind``."""
    return kind.roundoff if isinstance(kind, Precision) else float(torch.finfo(kind).eps) / 2


def entry_allowed(kind: torch.dtype | Precision) -> float:
    """Allowed largest entry difference, relative to Ĝ of its tensor."""
    dtype = kind.dtype if isinstance(kind, Precision) else kind
    return _ENTRY_CONSTANT[dtype] * unit_roundoff(kind)


def norm_allowed(kind: torch.dtype | Precision, constant: float = NORM_CONSTANT) -> float:
    """Allowed norm of the difference, relative to κ ‖g*‖ = ‖G‖."""
    return constant * unit_roundoff(kind)


def loss_allowed(kind: torch.dtype | Precision) -> float:
    return LOSS_CONSTANT * unit_roundoff(kind)


def subnormal_loss(dtype: torch.dtype, chunks: int, scale: float = 1.0) -> float:
    """What an entry may lose to float16's subnormal numbers in ``chunks`` chunks under a loss scale; else nothing."""
    return chunks * _FLOAT16_LOSS / scale if dtype is torch.float16 else 0.0


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return _ACCUMULATOR.get(dtype, torch.float32)


def proves_logic(kind: torch.dtype | Precision) -> bool:
    """Whether passing in ``kind`` says that the same function was computed, and not only something near it."""
    return unit_roundoff(kind) <= unit_roundoff(torch.float32)
