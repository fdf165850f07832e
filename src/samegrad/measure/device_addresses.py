"""Where the driver puts a segment: addresses decide which of two free blocks of one size is taken.

The driver's rule is not published; this one was read off recorded histories (one H200, CUDA 13.0). It reserves
addresses in ranges of whole 32 MiB, each in the highest hole that has room, and puts a segment at the start of a new
range only when no gap in a range holds it; of the gaps that do, the lowest is taken. A range without segments is given
up. Above them lies a range that the libraries leave behind when they start, free and not given up. What the driver
reserves for itself in between (code of kernels) is not known. A replay of a recorded run can give the addresses that
were seen instead.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from typing import NamedTuple

from samegrad.measure.allocator_rules import SEGMENT_ROUNDING_BYTES

_RANGE_ROUNDING_BYTES = 32 * 2**20
# Below this all ranges lie; any number would do.
_HIGHEST_ADDRESS = 1 << 46
_LEFT_BEHIND_BYTES = 440 * 2**20


class _Gap(NamedTuple):
    """Free addresses of the range that begins at ``range_start``."""

    start: int
    end: int
    range_start: int


class DeviceAddresses:
    """The ranges and the gaps in them. ``seen``: addresses of a recorded run, in order, used before the rule is."""

    def __init__(self, seen: Iterator[int] | None = None) -> None:
        self._seen = iter(()) if seen is None else seen
        left_behind = _HIGHEST_ADDRESS - _LEFT_BEHIND_BYTES
        self._gaps = [_Gap(left_behind, _HIGHEST_ADDRESS, left_behind)]
        self._range_starts = [left_behind]
        self._range_ends = {left_behind: _HIGHEST_ADDRESS}
        self._segments: dict[int, tuple[int, int]] = {}

    def take(self, size_bytes: int) -> int:
        """The address of a new segment."""
        size_bytes = _rounded_up(size_bytes, SEGMENT_ROUNDING_BYTES)
        seen = next(self._seen, None)
        if seen is not None:
            return seen
        fitting = (gap for gap in self._gaps if gap.end - gap.start >= size_bytes)
        gap = next(fitting, None) or self._new_range(size_bytes)
        position = bisect.bisect_left(self._gaps, gap)
        if gap.end - gap.start > size_bytes:
            self._gaps[position] = gap._replace(start=gap.start + size_bytes)
        else:
            del self._gaps[position]
        self._segments[gap.start] = gap.start + size_bytes, gap.range_start
        return gap.start

    def give_back(self, address: int) -> None:
        segment = self._segments.pop(address, None)
        if segment is None:
            # It was seen, not chosen here.
            return
        end, range_start = segment
        freed = _Gap(address, end, range_start)
        position = bisect.bisect_left(self._gaps, freed)
        if position < len(self._gaps):
            following = self._gaps[position]
            if following.start == end and following.range_start == range_start:
                freed = freed._replace(end=following.end)
                del self._gaps[position]
        if position:
            previous = self._gaps[position - 1]
            if previous.end == address and previous.range_start == range_start:
                freed = freed._replace(start=previous.start)
                position -= 1
                del self._gaps[position]
        whole = freed.start == range_start and freed.end == self._range_ends[range_start]
        if whole and freed.end != _HIGHEST_ADDRESS:
            del self._range_ends[range_start]
            self._range_starts.remove(range_start)
        else:
            self._gaps.insert(position, freed)

    def _new_range(self, size_bytes: int) -> _Gap:
        """A range in the highest hole between ranges that holds ``size_bytes``, at its upper end."""
        range_bytes = _rounded_up(size_bytes, _RANGE_ROUNDING_BYTES)
        above = _HIGHEST_ADDRESS
        for start in reversed(self._range_starts):
            if above - self._range_ends[start] >= range_bytes:
                break
            above = start
        start = above - range_bytes
        bisect.insort(self._range_starts, start)
        self._range_ends[start] = above
        gap = _Gap(start, above, start)
        bisect.insort(self._gaps, gap)
        return gap


def _rounded_up(size_bytes: int, step_bytes: int) -> int:
    return -(-size_bytes // step_bytes) * step_bytes
