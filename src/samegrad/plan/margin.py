"""How much of a budget a prediction may come to: a margin is left for what small probes cannot see."""

from __future__ import annotations

import math

from samegrad.records import Budget, Counting

# Small probes do not see how a full-sized step fragments the allocator's segments, nor late library workspaces.
_RESERVED_FRACTION = 0.06
_RESERVED_BYTES = 64 * 2**20
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
