"""The allocator's model: small cases worked out by hand from the source, and what must hold of any requests."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from samegrad.errors import UsageError
from samegrad.measure import allocator as allocator_module
from samegrad.measure.allocator import CachingAllocator
from samegrad.measure.allocator_rules import AllocatorRules
from samegrad.measure.blocks import Block, FreeBlocks

from .histories import random_requests

MIB = 2**20
ORDINARY, EXPANDABLE = AllocatorRules(), AllocatorRules(expandable_segments=True)


def taken(*sizes: int, rules: AllocatorRules = ORDINARY, cap: int | None = None) -> CachingAllocator:
    """An allocator that holds storages 0, 1, ... of ``sizes``."""
    allocator = CachingAllocator(rules, cap_bytes=cap)
    for storage, size in enumerate(sizes):
        assert allocator.take(storage, size)
    return allocator


def test_small_and_large_requests_share_no_segment() -> None:
    allocator = taken(1, MIB + 1)
    assert allocator.allocated_bytes == 512 + MIB + 512
    assert allocator.requested_bytes == 1 + MIB + 1
    assert allocator.reserved_bytes == 2 * MIB + 20 * MIB


def test_nothing_asked_for_is_nothing_taken() -> None:
    allocator = taken(0)
    allocator.give_back(0)
    assert allocator.reserved_bytes == 0


@pytest.mark.parametrize(("asked", "allocated"), [(19 * MIB, 20 * MIB), (19 * MIB - 512, 19 * MIB - 512)])
def test_a_large_block_is_split_where_more_than_a_mebibyte_is_left(asked: int, allocated: int) -> None:
    allocator = taken(20 * MIB)
    allocator.give_back(0)
    allocator.take(1, asked)
    assert allocator.allocated_bytes == allocated
    assert allocator.reserved_bytes == 20 * MIB


def test_the_wrong_split_threshold_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_small(self: AllocatorRules, block_bytes: int, *, small: bool) -> int:
        return 512 if small else MIB

    monkeypatch.setattr(AllocatorRules, "smallest_remainder_bytes", too_small)
    with pytest.raises(AssertionError):
        test_a_large_block_is_split_where_more_than_a_mebibyte_is_left(19 * MIB, 20 * MIB)


def test_of_equal_blocks_the_lower_address_is_taken() -> None:
    allocator = taken(12 * MIB, 12 * MIB, 12 * MIB)
    places = sorted(allocator.address_of(storage) for storage in range(3))
    # Given back in every order, they are taken again from the lowest up.
    for order in itertools.permutations(range(3)):
        for storage in order:
            allocator.give_back(storage)
        for storage in range(3):
            allocator.take(storage, 12 * MIB)
        assert [allocator.address_of(storage) for storage in range(3)] == places


def test_ties_by_age_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    ages = itertools.count()

    class ByAge(FreeBlocks):
        def smallest_from(self, size_bytes: int) -> Block | None:
            fitting = [block for block in self.in_order() if block.size_bytes >= size_bytes]
            return min(fitting, key=lambda block: (block.size_bytes, block.free_since), default=None)

        def add(self, block: Block) -> None:
            super().add(block)
            block.free_since = next(ages)

    monkeypatch.setattr(allocator_module, "FreeBlocks", ByAge)
    with pytest.raises(AssertionError):
        test_of_equal_blocks_the_lower_address_is_taken()


def test_the_smallest_block_that_fits_is_taken() -> None:
    allocator = taken(40 * MIB, 12 * MIB, 30 * MIB)
    place = allocator.address_of(2)
    for storage in range(3):
        allocator.give_back(storage)
    allocator.take(3, 13 * MIB)
    assert allocator.address_of(3) == place
    assert allocator.reserved_bytes == 82 * MIB


def test_neighbours_that_are_free_become_one() -> None:
    allocator = taken(6 * MIB, 6 * MIB, 6 * MIB)
    assert allocator.reserved_bytes == 20 * MIB
    for storage in (0, 2, 1):
        allocator.give_back(storage)
    [block] = allocator.free_blocks()
    assert block.size_bytes == 20 * MIB


def test_the_cap_counts_whole_segments_and_may_be_met() -> None:
    assert taken(MIB + 1, cap=20 * MIB).retries == 0
    allocator = CachingAllocator(cap_bytes=20 * MIB - 1)
    assert not allocator.take(0, MIB + 1)
    assert allocator.retries == 1


def test_at_the_cap_segments_go_back_when_all_of_them_is_free() -> None:
    allocator = taken(12 * MIB, 12 * MIB, 3 * MIB, 3 * MIB, cap=44 * MIB)
    for storage in (0, 1, 2):
        allocator.give_back(storage)
    # The segment of 20 MiB is in use by a part of it and stays; the two others make room.
    assert allocator.take(4, 24 * MIB)
    assert (allocator.retries, allocator.segments_returned, allocator.reserved_bytes) == (1, 2, 44 * MIB)
    assert not allocator.take(5, 18 * MIB)
    assert allocator.retries == 2


def test_streams_have_blocks_of_their_own() -> None:
    allocator = taken(12 * MIB)
    allocator.give_back(0)
    allocator.take(1, 12 * MIB, stream=1)
    assert allocator.reserved_bytes == 24 * MIB
    allocator.take(2, 12 * MIB, stream=0)
    assert allocator.reserved_bytes == 24 * MIB


def test_a_graph_has_segments_of_its_own_and_frees_none_for_itself() -> None:
    allocator = taken(12 * MIB, cap=30 * MIB)
    allocator.give_back(0)
    assert not allocator.take(1, 24 * MIB, private=1)
    assert (allocator.retries, allocator.reserved_bytes) == (0, 12 * MIB)
    assert allocator.take(2, 16 * MIB, private=1)
    allocator.give_back(2)
    allocator.empty_cache()
    assert allocator.reserved_bytes == 16 * MIB


def test_blocks_above_the_split_limit_stay_whole_and_serve_only_their_like() -> None:
    rules = dataclasses.replace(ORDINARY, largest_split_bytes=32 * MIB)
    allocator = taken(64 * MIB, rules=rules, cap=120 * MIB)
    allocator.give_back(0)
    # Neither small requests nor much smaller large ones get it.
    allocator.take(1, 3 * MIB)
    allocator.take(2, 40 * MIB)
    # The cap was met: the oversize block went back on its own, which is no retry.
    assert allocator.reserved_bytes == (20 + 40) * MIB
    assert (allocator.retries, allocator.segments_returned) == (0, 1)
    allocator.give_back(2)
    allocator.take(3, 33 * MIB)
    assert allocator.allocated_bytes == (3 + 40) * MIB


def test_old_segments_are_collected_above_the_threshold() -> None:
    rules = dataclasses.replace(ORDINARY, garbage_collection_threshold=0.5)
    allocator = taken(30 * MIB, 20 * MIB, rules=rules, cap=100 * MIB)
    allocator.give_back(0)
    allocator.give_back(1)
    for storage in range(2, 6):
        allocator.take(storage, 20 * MIB)
        allocator.give_back(storage)
    # 50 MiB are not above half of the cap.
    allocator.take(6, 40 * MIB)
    assert allocator.reserved_bytes == 90 * MIB
    allocator.take(7, 12 * MIB)
    # 90 are, and the segment of 30 MiB is the only one that is wholly free.
    allocator.take(8, 32 * MIB)
    assert allocator.reserved_bytes == (40 + 20 + 32) * MIB
    assert allocator.retries == 0


def test_a_storage_is_taken_once() -> None:
    with pytest.raises(UsageError, match="storage 0"):
        taken(5).take(0, 5)


def segments_and_blocks(allocator: CachingAllocator) -> list[tuple[int, int, bool]]:
    blocks = [(b.address, b.size_bytes, False) for b in allocator.free_blocks()]
    return sorted(blocks + [(b.address, b.size_bytes, True) for b in allocator.taken_blocks()])


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([ORDINARY, EXPANDABLE]), st.sampled_from([None, 100 * MIB, 220 * MIB]))
def test_blocks_tile_what_is_reserved(seed: int, rules: AllocatorRules, cap: int | None) -> None:
    allocator = CachingAllocator(rules, cap_bytes=cap)
    for storage, size, *_ in random_requests(seed, count=120):
        if size:
            allocator.take(storage, size)
        else:
            allocator.give_back(storage)
        assert allocator.requested_bytes <= allocator.allocated_bytes <= allocator.reserved_bytes
        # The cap is told the size of an ordinary segment; whole pages of an expandable one may pass it by one page.
        assert cap is None or allocator.reserved_bytes <= cap + (20 * MIB if rules.expandable_segments else 0)
        blocks = segments_and_blocks(allocator)
        assert sum(size for _, size, _ in blocks) == allocator.reserved_bytes
        for (start, size, _), (following, _, _) in itertools.pairwise(blocks):
            assert start + size <= following
        for block in (*allocator.free_blocks(), *allocator.taken_blocks()):
            neighbour = block.following
            if neighbour is not None:
                assert neighbour.previous is block
                assert neighbour.address == block.address + block.size_bytes
                assert block.taken or neighbour.taken or block.mapped != neighbour.mapped, "two free neighbours"


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([ORDINARY, EXPANDABLE]))
def test_all_given_back_and_released_is_nothing_reserved(seed: int, rules: AllocatorRules) -> None:
    allocator = CachingAllocator(rules)
    live = set()
    for storage, size, *_ in random_requests(seed):
        if size:
            allocator.take(storage, size)
            live.add(storage)
        else:
            allocator.give_back(storage)
            live.remove(storage)
    for storage in sorted(live):
        allocator.give_back(storage)
    allocator.empty_cache()
    assert (allocator.reserved_bytes, allocator.allocated_bytes, allocator.requested_bytes) == (0, 0, 0)
    assert segments_and_blocks(allocator) == []


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([ORDINARY, EXPANDABLE]), st.integers(60, 300))
def test_a_replay_speaks_for_all_caps_that_it_says(seed: int, rules: AllocatorRules, cap_mib: int) -> None:
    requests = random_requests(seed, count=80)

    def run(cap: int) -> tuple[list[object], CachingAllocator]:
        allocator = CachingAllocator(rules, cap_bytes=cap)
        seen: list[object] = []
        for storage, size, *_ in requests:
            found = allocator.take(storage, size) if size else allocator.give_back(storage)
            seen.append((found, allocator.reserved_bytes, allocator.retries))
        return seen, allocator

    seen, allocator = run(cap_mib * MIB)
    assert run(max(0, allocator.lowest_equal_cap_bytes))[0] == seen
    if allocator.highest_equal_cap_bytes is not None:
        assert run(allocator.highest_equal_cap_bytes)[0] == seen
        assert run(allocator.highest_equal_cap_bytes + 1)[0] != seen
