"""Expandable segments of the CUDA allocator: one range of addresses that gets memory page by page as it is needed.

Source: ``find_expandable_block``, ``map_block`` and ``unmap_block`` of c10/cuda/CUDACachingAllocator.cpp.
"""

from __future__ import annotations

from samegrad.measure.blocks import Block, FreeBlocks, merge_with_neighbours

# More than any card has; the allocator reserves nine eighths of the card's memory, which no step fills.
ADDRESS_SPACE_BYTES = 5 * 2**40


def best_expandable_fit(free: FreeBlocks, found: Block) -> Block:
    """The block to use in place of ``found``: one that can grow counts as large as it could become."""
    following = free.after(found)
    while found.expandable and following is not None and _size_if_grown(following) < _size_if_grown(found):
        found, following = following, free.after(following)
    return found


def room_for(free: FreeBlocks, size_bytes: int) -> Block | None:
    """The lowest free range of ``size_bytes`` that has memory only in part; None where a new segment is needed."""
    for unmapped in free.unmapped:
        start = unmapped
        if unmapped.previous is not None and not unmapped.previous.taken:
            start = unmapped.previous
        reached = 0
        block: Block | None = start
        while reached < size_bytes and block is not None and not block.taken:
            reached += block.size_bytes
            block = block.following
        if reached >= size_bytes:
            return start
    return None


def new_segment(free: FreeBlocks, address: int) -> Block:
    """A range of addresses at ``address`` without memory."""
    block = Block(free, address, ADDRESS_SPACE_BYTES, address, expandable=True)
    block.mapped = False
    free.add_unmapped(block)
    return block


def grow(start: Block, size_bytes: int, page_bytes: int) -> tuple[Block, int]:
    """Gives memory to the range that begins with ``start`` until ``size_bytes`` of it are one block.

    Returns that block, taken out of the list of free ones, and the bytes that got memory.
    """
    mapped_bytes = 0
    block = start
    if not block.mapped:
        mapped_bytes += _map(block, min(block.size_bytes, size_bytes), page_bytes)
    while block.size_bytes < size_bytes:
        following = block.following
        assert following is not None
        mapped_bytes += _map(following, min(size_bytes - block.size_bytes, following.size_bytes), page_bytes)
        block = following
    block.pool.remove(block)
    return block, mapped_bytes


def shrink(block: Block, page_bytes: int) -> int:
    """Takes the memory of all whole pages within the free ``block``; returns the bytes given back.

    The block is then the unmapped part; what is left on either side becomes blocks of their own.
    """
    first = -(-(block.address - block.segment_start) // page_bytes) * page_bytes + block.segment_start
    end = block.address + block.size_bytes
    last = (end - block.segment_start) // page_bytes * page_bytes + block.segment_start
    if first >= last:
        return 0
    pool = block.pool
    pool.remove(block)
    if first > block.address:
        pool.add(block.split_front(first - block.address))
    if end > last:
        # The rest keeps the object, so the pages must be the part that is cut off.
        rest = block
        block = rest.split_front(last - first)
        pool.add(rest)
    block.mapped = False
    merge_with_neighbours(block)
    pool.add_unmapped(block)
    return last - first


def _map(block: Block, size_bytes: int, page_bytes: int) -> int:
    """Gives memory to the pages that hold the first ``size_bytes`` of an unmapped block, and joins it with its like."""
    pool = block.pool
    pool.remove_unmapped(block)
    mapped_bytes = -(-size_bytes // page_bytes) * page_bytes
    if mapped_bytes < block.size_bytes:
        # The object stays the front, which the caller holds.
        rest = Block(
            pool, block.address + mapped_bytes, block.size_bytes - mapped_bytes, block.segment_start, expandable=True
        )
        rest.mapped = False
        rest.previous, rest.following = block, block.following
        if block.following is not None:
            block.following.previous = rest
        block.following = rest
        block.size_bytes = mapped_bytes
        pool.add_unmapped(rest)
    block.mapped = True
    merge_with_neighbours(block)
    pool.add(block)
    return mapped_bytes


def _size_if_grown(block: Block) -> int:
    following = block.following
    return block.size_bytes + (following.size_bytes if following is not None and not following.mapped else 0)
