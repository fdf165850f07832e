"""Expandable segments: memory comes page by page, whole free pages go back, and one range is all there is."""

from __future__ import annotations

import pytest

from samegrad.measure import expandable
from samegrad.measure.allocator import CachingAllocator
from samegrad.measure.allocator_rules import AllocatorRules
from samegrad.measure.blocks import Block

MIB = 2**20
RULES = AllocatorRules(expandable_segments=True)


def held(*sizes: int, cap: int | None = None) -> CachingAllocator:
    allocator = CachingAllocator(RULES, cap_bytes=cap)
    for storage, size in enumerate(sizes):
        assert allocator.take(storage, size)
    return allocator


def test_pages_are_of_20_mebibytes_and_small_ones_of_2() -> None:
    assert held(MIB + 1).reserved_bytes == 20 * MIB
    assert held(21 * MIB).reserved_bytes == 40 * MIB
    assert held(1).reserved_bytes == 2 * MIB


def test_the_next_request_fills_the_page_and_goes_on_behind_it() -> None:
    allocator = held(12 * MIB, 12 * MIB)
    assert allocator.reserved_bytes == 40 * MIB
    assert allocator.address_of(1) == allocator.address_of(0) + 12 * MIB


def test_a_free_end_grows_with_the_pages_behind_it() -> None:
    allocator = held(15 * MIB, 4 * MIB)
    allocator.give_back(1)
    allocator.take(2, 30 * MIB)
    assert allocator.address_of(2) == allocator.address_of(0) + 15 * MIB
    assert allocator.reserved_bytes == 60 * MIB


def test_blocks_are_split_down_to_512_bytes() -> None:
    allocator = held(20 * MIB)
    allocator.give_back(0)
    allocator.take(1, 20 * MIB - 512)
    assert allocator.allocated_bytes == 20 * MIB - 512


def test_whole_free_pages_go_back_and_are_taken_again_where_they_were() -> None:
    allocator = held(10 * MIB, 50 * MIB, 10 * MIB)
    middle, end = allocator.address_of(1), allocator.address_of(2)
    allocator.give_back(1)
    allocator.empty_cache()
    # 10 to 60 MiB are free: the pages of 20 to 40 and 40 to 60 go, the ends of their neighbours stay.
    assert allocator.reserved_bytes == 40 * MIB
    allocator.take(3, 45 * MIB)
    assert allocator.address_of(3) == middle
    assert allocator.address_of(2) == end
    assert allocator.reserved_bytes == 80 * MIB


def test_the_cap_is_told_an_ordinary_segment_and_passed_by_the_page() -> None:
    allocator = held(11 * MIB, cap=12 * MIB)
    assert allocator.reserved_bytes == 20 * MIB
    assert not allocator.take(1, 11 * MIB)


def test_a_block_that_can_grow_is_the_last_choice() -> None:
    # Free are 20 MiB between two others and, nearer in size, the 16 MiB at the end, behind which more can be mapped.
    allocator = held(4 * MIB, 20 * MIB, 20 * MIB)
    place = allocator.address_of(1)
    allocator.give_back(1)
    assert allocator.free_blocks()[0].size_bytes == 16 * MIB
    allocator.take(3, 12 * MIB)
    assert allocator.address_of(3) == place


def test_nearest_size_alone_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def size_alone(block: Block) -> int:
        return block.size_bytes

    monkeypatch.setattr(expandable, "_size_if_grown", size_alone)
    with pytest.raises(AssertionError):
        test_a_block_that_can_grow_is_the_last_choice()


def test_an_empty_segment_is_given_up() -> None:
    allocator = held(3 * MIB, 30 * MIB)
    start = allocator.address_of(0)
    for storage in (0, 1):
        allocator.give_back(storage)
    allocator.empty_cache()
    assert allocator.reserved_bytes == 0
    allocator.take(2, 5 * MIB)
    assert (allocator.address_of(2), allocator.reserved_bytes) == (start, 20 * MIB)
