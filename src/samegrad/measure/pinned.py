"""Pinned host memory as torch's caching allocator takes it: each request rounded to a power of two, kept for the next.

A block serves requests of its own rounded size only, is never split, and goes back to the host only when the cache is
emptied; so a ring of buffers costs up to twice its bytes. Source: aten/src/ATen/core/CachingHostAllocator.h: torch
2.11 rounds every request; 2.13 and later leave those above ``pinned_max_round_threshold`` as they are and give those
above ``pinned_max_cached_size`` back at once, where these are set.
"""

from __future__ import annotations

import collections
import dataclasses

from samegrad.errors import UsageError


@dataclasses.dataclass(frozen=True)
class PinnedRules:
    """Thresholds of the settings; None where they are not set, as by default."""

    largest_rounded_bytes: int | None = None
    largest_cached_bytes: int | None = None

    def block_bytes(self, requested_bytes: int) -> int:
        """The pinned memory that a request of ``requested_bytes`` takes when no block is cached for it."""
        if requested_bytes <= 0:
            return 0
        for threshold in (self.largest_rounded_bytes, self.largest_cached_bytes):
            if threshold is not None and requested_bytes > threshold:
                return requested_bytes
        return 1 << (requested_bytes - 1).bit_length()

    def keeps(self, block_bytes: int) -> bool:
        return self.largest_cached_bytes is None or block_bytes <= self.largest_cached_bytes


class PinnedAllocator:
    """Pinned memory of a process, empty at first. A block given back is free at once: transfers are not modelled."""

    def __init__(self, rules: PinnedRules = PinnedRules()) -> None:
        self.rules = rules
        self.requested_bytes = self.reserved_bytes = self.peak_reserved_bytes = 0
        self._taken: dict[int, tuple[int, int]] = {}
        self._cached: collections.Counter[int] = collections.Counter()

    def take(self, buffer: int, size_bytes: int) -> None:
        """Pinned memory for ``buffer``, a number that has none yet."""
        if buffer in self._taken:
            raise UsageError(
                asked=f"pinned memory for buffer {buffer}", found="it has some", do="give each buffer its own number"
            )
        block_bytes = self.rules.block_bytes(size_bytes)
        if self._cached[block_bytes]:
            self._cached[block_bytes] -= 1
        else:
            self.reserved_bytes += block_bytes
            self.peak_reserved_bytes = max(self.peak_reserved_bytes, self.reserved_bytes)
        self._taken[buffer] = size_bytes, block_bytes
        self.requested_bytes += size_bytes

    def give_back(self, buffer: int) -> None:
        size_bytes, block_bytes = self._taken.pop(buffer)
        self.requested_bytes -= size_bytes
        if self.rules.keeps(block_bytes):
            self._cached[block_bytes] += 1
        else:
            self.reserved_bytes -= block_bytes

    def empty_cache(self) -> None:
        self.reserved_bytes -= sum(size_bytes * count for size_bytes, count in self._cached.items())
        self._cached.clear()
