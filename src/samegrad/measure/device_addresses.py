"""Where the driver puts a segment: addresses decide which of two free blocks of one size is taken.

The driver's own rule is not published. The model takes the lowest gap that fits, in steps of 2 MiB; a replay of a
recorded run can give the addresses that were seen instead.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator

from samegrad.measure.allocator_rules import SEGMENT_ROUNDING_BYTES

_LOWEST_ADDRESS = 1 << 32


class DeviceAddresses:
    """The address ranges in use. ``seen``: addresses of a recorded run, in order, used before the rule is."""

    def __init__(self, seen: Iterator[int] | None = None) -> None:
        self._seen = iter(()) if seen is None else seen
        self._starts: list[int] = []
        self._sizes: list[int] = []

    def take(self, size_bytes: int) -> int:
        size_bytes = -(-size_bytes // SEGMENT_ROUNDING_BYTES) * SEGMENT_ROUNDING_BYTES
        address = next(self._seen, None)
        if address is None:
            address = self._lowest_gap(size_bytes)
        position = bisect.bisect_left(self._starts, address)
        self._starts.insert(position, address)
        self._sizes.insert(position, size_bytes)
        return address

    def give_back(self, address: int) -> None:
        position = bisect.bisect_left(self._starts, address)
        del self._starts[position], self._sizes[position]

    def _lowest_gap(self, size_bytes: int) -> int:
        end = _LOWEST_ADDRESS
        for start, size in zip(self._starts, self._sizes):
            if start - end >= size_bytes:
                return end
            end = start + size
        return end
