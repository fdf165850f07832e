"""Where the driver puts a segment: addresses decide which of two free blocks of one size is taken.

The driver's rule is not published; this one was read off recorded histories (one H200, CUDA 13.0). It reserves
addresses in ranges of whole 32 MiB, each below the last, and puts a segment at the start of a new range only when no
gap in the ranges so far holds it; of the gaps that do, the lowest is taken. A replay of a recorded run can give the
addresses that were seen instead.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator

from samegrad.measure.allocator_rules import SEGMENT_ROUNDING_BYTES

_RANGE_ROUNDING_BYTES = 32 * 2**20
# Below this all ranges lie; any number would do.
_HIGHEST_ADDRESS = 1 << 46


class DeviceAddresses:
    """The gaps between segments. ``seen``: addresses of a recorded run, in order, used before the rule is."""

    def __init__(self, seen: Iterator[int] | None = None) -> None:
        self._seen = iter(()) if seen is None else seen
        self._lowest = _HIGHEST_ADDRESS
        self._gap_starts: list[int] = []
        self._gap_ends: list[int] = []
        # The end of the range that begins where the key says: segments do not reach across ranges.
        self._sizes: dict[int, int] = {}

    def take(self, size_bytes: int) -> int:
        """The address of a new segment."""
        size_bytes = _rounded_up(size_bytes, SEGMENT_ROUNDING_BYTES)
        seen = next(self._seen, None)
        if seen is not None:
            return seen
        for position, (start, end) in enumerate(zip(self._gap_starts, self._gap_ends)):
            if end - start >= size_bytes:
                self._gap_starts[position] = start + size_bytes
                if self._gap_starts[position] == end:
                    del self._gap_starts[position], self._gap_ends[position]
                self._sizes[start] = size_bytes
                return start
        range_bytes = _rounded_up(size_bytes, _RANGE_ROUNDING_BYTES)
        self._lowest -= range_bytes
        if range_bytes > size_bytes:
            self._gap_starts.insert(0, self._lowest + size_bytes)
            self._gap_ends.insert(0, self._lowest + range_bytes)
        self._sizes[self._lowest] = size_bytes
        return self._lowest

    def give_back(self, address: int) -> None:
        size_bytes = self._sizes.pop(address, None)
        if size_bytes is None:
            # It was seen, not chosen here.
            return
        start, end = address, address + size_bytes
        position = bisect.bisect_left(self._gap_starts, start)
        if position < len(self._gap_starts) and self._gap_starts[position] == end:
            end = self._gap_ends[position]
            del self._gap_starts[position], self._gap_ends[position]
        if position and self._gap_ends[position - 1] == start:
            self._gap_ends[position - 1] = end
        else:
            self._gap_starts.insert(position, start)
            self._gap_ends.insert(position, end)


def _rounded_up(size_bytes: int, step_bytes: int) -> int:
    return -(-size_bytes // step_bytes) * step_bytes
