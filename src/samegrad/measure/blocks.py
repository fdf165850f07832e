"""Blocks of a modelled CUDA allocator: ranges of addresses, taken or free, and the free ones in the order of best fit.

The allocator keeps its free blocks ordered by stream, size and address, and takes the first that is large enough. Here
each stream of a pool has a list of its own, and size and address make one whole number, so that the order is exactly
that one and a search is one bisection.
"""

from __future__ import annotations

import bisect

# Addresses lie below 2**48 on every platform that CUDA runs on.
ADDRESS_BITS = 48


class Block:
    """A range of addresses within a segment, between its neighbours ``previous`` and ``following``.

    ``segment_start``: where its segment begins. ``mapped`` is False for the part of an expandable segment that has no
    memory yet. ``free_since``: the count of the pool's searches when it became free.
    """

    __slots__ = (
        "address", "expandable", "following", "free_since", "mapped", "pool", "previous", "requested_bytes",
        "segment_start", "size_bytes", "taken",
    )  # fmt: skip

    def __init__(self, pool: FreeBlocks, address: int, size_bytes: int, segment_start: int, expandable: bool) -> None:
        self.pool = pool
        self.address = address
        self.size_bytes = size_bytes
        self.segment_start = segment_start
        self.expandable = expandable
        self.previous: Block | None = None
        self.following: Block | None = None
        self.taken = False
        self.mapped = True
        self.free_since = 0
        self.requested_bytes = 0

    @property
    def fills_its_segment(self) -> bool:
        return self.previous is None and self.following is None

    def split_front(self, size_bytes: int) -> Block:
        """Cuts the first ``size_bytes`` off into a block of their own; this one keeps the rest."""
        front = Block(self.pool, self.address, size_bytes, self.segment_start, self.expandable)
        front.mapped = self.mapped
        front.previous = self.previous
        front.following = self
        if self.previous is not None:
            self.previous.following = front
        self.previous = front
        self.address += size_bytes
        self.size_bytes -= size_bytes
        return front

    def absorb_previous(self, previous: Block) -> None:
        self.address = previous.address
        self.size_bytes += previous.size_bytes
        self.previous = previous.previous
        if self.previous is not None:
            self.previous.following = self

    def absorb_following(self, following: Block) -> None:
        self.size_bytes += following.size_bytes
        self.following = following.following
        if self.following is not None:
            self.following.previous = self


class FreeBlocks:
    """The free blocks of one pool and stream, smallest first and lower addresses first among equals.

    ``private``: number of a private pool (a graph's), 0 for the pool that all share. ``unmapped``: the ranges of
    expandable segments that have no memory, by address.
    """

    __slots__ = ("_blocks", "_keys", "private", "searches", "small", "stream", "unmapped")

    def __init__(self, *, private: int, small: bool, stream: int) -> None:
        self.private = private
        self.small = small
        self.stream = stream
        self.searches = 0
        self.unmapped: list[Block] = []
        self._keys: list[int] = []
        self._blocks: dict[int, Block] = {}

    def add(self, block: Block) -> None:
        key = block.size_bytes << ADDRESS_BITS | block.address
        bisect.insort(self._keys, key)
        self._blocks[key] = block
        block.free_since = self.searches

    def remove(self, block: Block) -> None:
        key = block.size_bytes << ADDRESS_BITS | block.address
        del self._keys[bisect.bisect_left(self._keys, key)]
        del self._blocks[key]

    def smallest_from(self, size_bytes: int) -> Block | None:
        """The first block of at least ``size_bytes``, which stays in the list."""
        position = bisect.bisect_left(self._keys, size_bytes << ADDRESS_BITS)
        return self._blocks[self._keys[position]] if position < len(self._keys) else None

    def after(self, block: Block) -> Block | None:
        """The block that follows ``block`` in the order."""
        position = bisect.bisect_right(self._keys, block.size_bytes << ADDRESS_BITS | block.address)
        return self._blocks[self._keys[position]] if position < len(self._keys) else None

    def in_order(self) -> list[Block]:
        return [self._blocks[key] for key in self._keys]

    def add_unmapped(self, block: Block) -> None:
        bisect.insort(self.unmapped, block, key=_address_of)

    def remove_unmapped(self, block: Block) -> None:
        del self.unmapped[bisect.bisect_left(self.unmapped, block.address, key=_address_of)]


def merge_with_neighbours(block: Block) -> None:
    """Joins ``block``, which is free and in no list, with the free blocks on either side that are mapped as it is."""
    pool = block.pool
    previous = block.previous
    if previous is not None and not previous.taken and previous.mapped == block.mapped:
        _take_out(pool, previous)
        block.absorb_previous(previous)
    following = block.following
    if following is not None and not following.taken and following.mapped == block.mapped:
        _take_out(pool, following)
        block.absorb_following(following)


def _take_out(pool: FreeBlocks, block: Block) -> None:
    if block.mapped:
        pool.remove(block)
    else:
        pool.remove_unmapped(block)


def _address_of(block: Block) -> int:
    return block.address
