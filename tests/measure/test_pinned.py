"""Pinned host memory: rounded to powers of two, kept by size, never shared between sizes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from samegrad.errors import UsageError
from samegrad.measure.pinned import PinnedAllocator, PinnedRules

MIB = 2**20


@given(st.integers(1, 2**40))
def test_a_block_is_the_next_power_of_two(requested: int) -> None:
    block = PinnedRules().block_bytes(requested)
    assert block.bit_count() == 1
    assert requested <= block < 2 * requested


def test_nothing_takes_nothing() -> None:
    assert PinnedRules().block_bytes(0) == 0


def test_a_block_serves_its_own_size_only() -> None:
    pinned = PinnedAllocator()
    pinned.take(0, 5 * MIB)
    pinned.give_back(0)
    pinned.take(1, 8 * MIB)
    assert pinned.reserved_bytes == 8 * MIB
    pinned.take(2, 4 * MIB)
    pinned.give_back(1)
    pinned.take(3, 3 * MIB)
    assert (pinned.reserved_bytes, pinned.requested_bytes) == (16 * MIB, 7 * MIB)
    assert pinned.peak_reserved_bytes == 16 * MIB


def test_emptying_gives_back_what_is_free() -> None:
    pinned = PinnedAllocator()
    for buffer, size in enumerate((3 * MIB, 3 * MIB, 9 * MIB)):
        pinned.take(buffer, size)
    pinned.give_back(0)
    pinned.give_back(2)
    pinned.empty_cache()
    assert pinned.reserved_bytes == 4 * MIB


def test_thresholds_of_later_torch() -> None:
    rules = PinnedRules(largest_rounded_bytes=4 * MIB, largest_cached_bytes=6 * MIB)
    pinned = PinnedAllocator(rules)
    pinned.take(0, 3 * MIB)
    pinned.take(1, 5 * MIB)
    pinned.take(2, 7 * MIB)
    assert pinned.reserved_bytes == (4 + 5 + 7) * MIB
    for buffer in range(3):
        pinned.give_back(buffer)
    assert pinned.reserved_bytes == (4 + 5) * MIB


def test_a_buffer_is_taken_once() -> None:
    pinned = PinnedAllocator()
    pinned.take(0, 1)
    with pytest.raises(UsageError, match="buffer 0"):
        pinned.take(0, 1)
