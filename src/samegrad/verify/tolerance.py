"""What rounding may explain, and nothing more. Tolerances come from here, never from a caller or a test.

With u the unit roundoff of the dtype that was compared, G = Σ_k |g_k| the sum of absolute gradients of small parts of
the rows (up to 64 parts, entry by entry; Ĝ its largest entry in a tensor) and κ = ‖G‖ / ‖g*‖:

logic   max |g_split − g_plain| ≤ C u Ĝ in every tensor, and ‖g_split − g_plain‖ ≤ N u κ ‖g*‖, in float64 or float32
noise   ‖g_split − g*‖ ≤ 2 ‖g_plain − g*‖ + N u_a κ ‖g*‖, g* in float64, u_a the accumulator's roundoff
loss    |L_split − L_plain| ≤ 16 u Σ|ℓ_i| / N; Σ|ℓ_i| / N is |L| for losses that are not negative

The scale is G and not |g|, because gradients that are zero by structure (a bias before a translation-invariant loss)
are pure rounding on their own scale. Where even each part's gradient is zero by structure (a convolution's bias
before an instance norm), G is rounding too: what is left there was up to 0.7 u of the largest of all tensors, so a
tensor's scale is at least a tenth of that.

Some steps are worse conditioned than that: near an optimum each row's own gradient is what is left of terms that
cancel. So the plain step is run again with rows and weights moved by one unit in the last place, twice; four times
what its gradient then moves is allowed as well, but never more than a millionth of the scale.

Low precision alone proves nothing: a half-percent weighting error hides in bfloat16, so the same program must pass the
logic test in float64 or float32 first.
"""

from __future__ import annotations

import torch

# Largest values seen over models and splits were 21 (float64) and 47 (float32) for entries, 5.5 u and 15 u for norms.
_ENTRY_CONSTANT = {torch.float64: 64.0, torch.float32: 128.0, torch.bfloat16: 128.0, torch.float16: 128.0}
NORM_CONSTANT = 32.0
LOSS_CONSTANT = 16.0
NOISE_RATIO = 2.0
# Gradients are accumulated in float32 at least.
_ACCUMULATOR = {torch.float64: torch.float64}


STRUCTURAL_SCALE_FRACTION = 0.1
UNREST_RATIO = 4.0
LARGEST_UNREST = 1e-6


def allowed_with_unrest(usual: float, unrest: float) -> float:
    """The allowance ``usual``, widened by how much the plain step itself moves; both relative to the scale."""
    return max(usual, min(UNREST_RATIO * unrest, LARGEST_UNREST))


def entry_scale(largest_here: float, largest_anywhere: float) -> float:
    """What a tensor's entry differences are measured on: its own Ĝ, or a tenth of the largest of all tensors."""
    return max(largest_here, STRUCTURAL_SCALE_FRACTION * largest_anywhere)


def unit_roundoff(dtype: torch.dtype) -> float:
    """Half the distance from 1 to the next number of ``dtype``."""
    return float(torch.finfo(dtype).eps) / 2


def entry_allowed(dtype: torch.dtype) -> float:
    """Allowed largest entry difference, relative to Ĝ of its tensor."""
    return _ENTRY_CONSTANT[dtype] * unit_roundoff(dtype)


def norm_allowed(dtype: torch.dtype) -> float:
    """Allowed norm of the difference, relative to κ ‖g*‖ = ‖G‖."""
    return NORM_CONSTANT * unit_roundoff(dtype)


def loss_allowed(dtype: torch.dtype) -> float:
    return LOSS_CONSTANT * unit_roundoff(dtype)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return _ACCUMULATOR.get(dtype, torch.float32)


def proves_logic(dtype: torch.dtype) -> bool:
    """Whether passing in ``dtype`` says that the same function was computed, and not only something near it."""
    return dtype in (torch.float64, torch.float32)
