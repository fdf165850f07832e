"""PyTorch's CUDA caching allocator as a model: which requests it serves from its cache, and what it reserves.

What a budget bounds is what the allocator reserves, which is more than what is live: small and large requests come
from different segments, a block is split only where enough is left, and a segment goes back to the driver only when
all of it is free and the cap is reached. The model follows the allocator rule by rule, so that both can be told from
the requests of a step alone, without a device.

Source: c10/cuda/CUDACachingAllocator.cpp, torch 2.11 to 2.15. Not modelled: memory that other processes take, and the
delay of ``record_stream`` (a block is free when its owner gives it back).
"""

from __future__ import annotations

from collections.abc import Iterator

from samegrad.errors import UsageError
from samegrad.measure.allocator_rules import DEFAULT_RULES, LARGEST_SMALL_REQUEST_BYTES, AllocatorRules
from samegrad.measure.blocks import Block, FreeBlocks, merge_with_neighbours
from samegrad.measure.device_addresses import DeviceAddresses
from samegrad.measure.expandable import (
    ADDRESS_SPACE_BYTES,
    best_expandable_fit,
    grow,
    new_segment,
    room_for,
    shrink,
)


class CachingAllocator:
    """The allocator of one device, empty at first. All counts are bytes; requests that ask for none take none.

    ``cap_bytes``: what ``set_per_process_memory_fraction`` allows, None for no cap. ``requested_bytes`` are as asked
    for, ``allocated_bytes`` in whole blocks, ``reserved_bytes`` in segments. ``lowest_equal_cap_bytes`` and
    ``highest_equal_cap_bytes``: the caps under which everything so far would have gone the same way.
    """

    def __init__(
        self,
        rules: AllocatorRules = DEFAULT_RULES,
        *,
        cap_bytes: int | None = None,
        segment_addresses: Iterator[int] | None = None,
    ) -> None:
        self.rules = rules
        self.cap_bytes = cap_bytes
        self.requested_bytes = self.peak_requested_bytes = 0
        self.allocated_bytes = self.peak_allocated_bytes = 0
        self.reserved_bytes = self.peak_reserved_bytes = 0
        self.retries = self.segments_taken = self.segments_returned = 0
        self.lowest_equal_cap_bytes = 0
        self.highest_equal_cap_bytes: int | None = None
        self._collects = cap_bytes is not None and rules.garbage_collection_threshold > 0
        self._addresses = DeviceAddresses(segment_addresses)
        self._free: dict[tuple[int, bool, int], FreeBlocks] = {}
        self._taken: dict[int, Block] = {}

    def take(self, storage: int, size_bytes: int, *, stream: int = 0, private: int = 0) -> bool:
        """Takes memory for ``storage``, a number that has none yet; False when there is none under the cap.

        ``private``: the pool of a graph that is being captured, which shares no segments with others.
        """
        if size_bytes <= 0:
            return True
        if storage in self._taken:
            raise UsageError(
                asked=f"memory for storage {storage}", found="it has some", do="give each storage its own number"
            )
        rounded = self.rules.rounded_bytes(size_bytes)
        small = rounded <= LARGEST_SMALL_REQUEST_BYTES
        free = self._free_blocks(private, small, stream)
        block = self._cached(free, rounded) or self._fresh(free, rounded)
        if block is None:
            return False
        remainder = self.rules.smallest_remainder_bytes(rounded, small=small)
        if remainder is not None and block.size_bytes - rounded >= remainder:
            rest = block
            block = rest.split_front(rounded)
            free.add(rest)
        block.taken = True
        block.requested_bytes = size_bytes
        self._taken[storage] = block
        self.requested_bytes += size_bytes
        self.allocated_bytes += block.size_bytes
        self.peak_requested_bytes = max(self.peak_requested_bytes, self.requested_bytes)
        self.peak_allocated_bytes = max(self.peak_allocated_bytes, self.allocated_bytes)
        return True

    def give_back(self, storage: int) -> None:
        """Frees the memory of ``storage``; one that asked for none has none."""
        block = self._taken.pop(storage, None)
        if block is None:
            return
        block.taken = False
        self.requested_bytes -= block.requested_bytes
        self.allocated_bytes -= block.size_bytes
        merge_with_neighbours(block)
        block.pool.add(block)

    def empty_cache(self) -> None:
        """Gives all wholly free segments (whole free pages of expandable ones) back to the driver."""
        for small in (False, True):
            for free in self._pools(private=0, small=small):
                blocks = free.in_order()
                for block in blocks:
                    if not block.expandable and block.fills_its_segment:
                        self._return_segment(block)
                for block in blocks:
                    if block.expandable:
                        self._return_pages(block)

    def begin(self, cap_bytes: int | None) -> None:
        """Under ``cap_bytes`` from here on, and counted from here on: what came before was no part of it."""
        self.cap_bytes = cap_bytes
        self._collects = cap_bytes is not None and self.rules.garbage_collection_threshold > 0
        self.peak_requested_bytes, self.peak_allocated_bytes = self.requested_bytes, self.allocated_bytes
        self.peak_reserved_bytes = self.lowest_equal_cap_bytes = self.reserved_bytes
        self.highest_equal_cap_bytes = None
        self.retries = self.segments_taken = self.segments_returned = 0

    def address_of(self, storage: int) -> int:
        """Where ``storage``, which has memory, lies."""
        return self._taken[storage].address

    def taken_blocks(self) -> list[Block]:
        return list(self._taken.values())

    def free_blocks(self) -> list[Block]:
        """All free blocks that have memory."""
        return [block for free in self._free.values() for block in free.in_order()]

    def _cached(self, free: FreeBlocks, size_bytes: int) -> Block | None:
        """The free block of best fit, taken out of its list."""
        if self._collects:
            for pool in self._pools(private=free.private, small=free.small):
                pool.searches += 1
        found = free.smallest_from(size_bytes)
        if found is None:
            return None
        if found.expandable:
            found = best_expandable_fit(free, found)
        limit = self.rules.largest_split_bytes
        if limit is not None:
            if size_bytes < limit <= found.size_bytes:
                return None
            if size_bytes >= limit and found.size_bytes >= size_bytes + self.rules.largest_unsplit_rounding_bytes:
                return None
        free.remove(found)
        return found

    def _fresh(self, free: FreeBlocks, size_bytes: int) -> Block | None:
        """A block with new memory, giving cached memory back where the cap asks for it."""
        if self._collects:
            self._collect_old_segments()
        block = self._reserve(free, size_bytes)
        if block is None and self._returned_oversize(free, size_bytes):
            block = self._reserve(free, size_bytes)
        # During a capture nothing can be given back.
        if block is None and free.private == 0:
            self.empty_cache()
            self.retries += 1
            block = self._reserve(free, size_bytes)
        return block

    def _reserve(self, free: FreeBlocks, size_bytes: int) -> Block | None:
        # The cap is told the size of an ordinary segment even where only some pages of one will be mapped.
        segment_bytes = self.rules.segment_bytes(size_bytes)
        if not self._within_cap(self.reserved_bytes + segment_bytes):
            return None
        if self.rules.expandable_segments:
            start = room_for(free, size_bytes) or new_segment(free, self._addresses.take(ADDRESS_SPACE_BYTES))
            block, segment_bytes = grow(start, size_bytes, self.rules.page_bytes(small=free.small))
        else:
            address = self._addresses.take(segment_bytes)
            block = Block(free, address, segment_bytes, address, expandable=False)
            self.segments_taken += 1
        self.reserved_bytes += segment_bytes
        self.peak_reserved_bytes = max(self.peak_reserved_bytes, self.reserved_bytes)
        return block

    def _within_cap(self, needed_bytes: int) -> bool:
        if self.cap_bytes is None or needed_bytes <= self.cap_bytes:
            self.lowest_equal_cap_bytes = max(self.lowest_equal_cap_bytes, needed_bytes)
            return True
        highest = self.highest_equal_cap_bytes
        self.highest_equal_cap_bytes = needed_bytes - 1 if highest is None else min(highest, needed_bytes - 1)
        return False

    def _returned_oversize(self, free: FreeBlocks, size_bytes: int) -> bool:
        """Gives back enough blocks that are too large to be split, where ``max_split_size_mb`` makes such blocks."""
        limit = self.rules.largest_split_bytes
        if limit is None:
            return False
        wanted_bytes = max(size_bytes, limit)
        found = free.smallest_from(wanted_bytes)
        if found is not None and not found.expandable:
            self._return_segment(found)
            return True
        returned_bytes = 0
        for block in reversed(free.in_order()):
            if returned_bytes >= wanted_bytes or block.size_bytes < limit:
                break
            if not block.expandable and block.size_bytes <= wanted_bytes:
                returned_bytes += block.size_bytes
                self._return_segment(block)
        return returned_bytes >= wanted_bytes

    def _collect_old_segments(self) -> None:
        """Gives back wholly free large segments, the longest unused first, above the collection threshold."""
        assert self.cap_bytes is not None
        self.lowest_equal_cap_bytes = self.highest_equal_cap_bytes = self.cap_bytes
        threshold_bytes = int(self.rules.garbage_collection_threshold * self.cap_bytes)
        target_bytes = self.reserved_bytes - threshold_bytes
        blocks = [
            block
            for free in self._pools(private=0, small=False)
            for block in free.in_order()
            if block.fills_its_segment and not block.expandable
        ]
        ages = [block.pool.searches - block.free_since for block in blocks]
        while target_bytes > 0 and blocks:
            average = sum(ages) / len(ages)
            old = [age >= average for age in ages]
            for block, is_old in zip(blocks, old):
                if is_old:
                    target_bytes -= block.size_bytes
                    self._return_segment(block)
            blocks = [block for block, is_old in zip(blocks, old) if not is_old]
            ages = [age for age, is_old in zip(ages, old) if not is_old]

    def _return_segment(self, block: Block) -> None:
        block.pool.remove(block)
        self._addresses.give_back(block.segment_start)
        self.reserved_bytes -= block.size_bytes
        self.segments_returned += 1

    def _return_pages(self, block: Block) -> None:
        self.reserved_bytes -= shrink(block, self.rules.page_bytes(small=block.pool.small))
        for unmapped in list(block.pool.unmapped):
            if unmapped.fills_its_segment:
                unmapped.pool.remove_unmapped(unmapped)
                self._addresses.give_back(unmapped.segment_start)

    def _free_blocks(self, private: int, small: bool, stream: int) -> FreeBlocks:
        key = (private, small, stream)
        free = self._free.get(key)
        if free is None:
            free = self._free[key] = FreeBlocks(private=private, small=small, stream=stream)
        return free

    def _pools(self, *, private: int, small: bool) -> list[FreeBlocks]:
        """The lists of a pool, in the order of their streams."""
        return [self._free[key] for key in sorted(self._free) if key[:2] == (private, small)]
