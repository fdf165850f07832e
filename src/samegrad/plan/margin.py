"""How much of a budget a prediction may come to: a margin is left for what small probes cannot see."""

from __future__ import annotations

import math

from samegrad.records import Budget, Counting
from samegrad.units import format_bytes

# Small probes do not see how a full-sized step fragments the allocator's segments, nor late library workspaces.
_RESERVED_FRACTION = 0.06
_RESERVED_BYTES = 64 * 2**20
# What a followed plan's cap may be short by: of 33 steps on one H200 the worst was 5.4 % (benchmarks/prediction.py).
_UNSEEN_FRACTION = 0.055
# Counted bytes are affine in the rows up to the odd scalar.
_COUNTED_FRACTION = 0.01


def usable_bytes(budget: Budget) -> int:
    """What a predicted peak may come to under ``budget``."""
    total = budget.total_bytes
    if budget.counting is Counting.CUDA_ALLOCATOR:
        return int(total - max(_RESERVED_FRACTION * total, _RESERVED_BYTES))
    return int(total - _COUNTED_FRACTION * total)


def budget_for(needed_bytes: int, counting: Counting) -> int:
    """The smallest budget whose usable bytes are ``needed_bytes``, and half a percent more to survive printing."""
    if counting is Counting.CUDA_ALLOCATOR:
        least = max(needed_bytes / (1 - _RESERVED_FRACTION), needed_bytes + _RESERVED_BYTES)
    else:
        least = needed_bytes / (1 - _COUNTED_FRACTION)
    return math.ceil(1.006 * least) + 1


def reserve_sentence(budget: Budget) -> str:
    """What of ``budget`` a prediction may not come to, and why."""
    left = format_bytes(budget.total_bytes - usable_bytes(budget))
    if budget.counting is not Counting.CUDA_ALLOCATOR:
        return f"beside that {left} ({100 * _COUNTED_FRACTION:g} % of the budget) are kept in reserve for odd scalars"
    share = f"{100 * _RESERVED_FRACTION:g} % of a budget, at least {format_bytes(_RESERVED_BYTES)}"
    return f"beside that {left} are kept in reserve ({share}) for gaps between tensors and what libraries take"


def most_followed_bytes(budget: Budget) -> int:
    """What the steady cap of a plan that was followed whole may come to under ``budget``."""
    return int(budget.total_bytes * (1 - _UNSEEN_FRACTION))


def budget_of_cap(cap_bytes: int) -> int:
    """The smallest budget that a plan with this steady cap is believed to keep."""
    return math.ceil(cap_bytes / (1 - _UNSEEN_FRACTION)) + 1


def followed_reserve_sentence(budget: Budget) -> str:
    """What of ``budget`` a followed plan's cap may not come to, and why."""
    left = format_bytes(budget.total_bytes - most_followed_bytes(budget))
    share = f"{100 * _UNSEEN_FRACTION:g} % of the budget"
    return f"beside that {left} ({share}) are kept in reserve, since predictions for a card were short by up to that"
