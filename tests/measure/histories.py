"""Random requests, and the history that a real allocator would have recorded of them if it were the model."""

from __future__ import annotations

import random
from typing import Any

from samegrad.measure.allocator import CachingAllocator
from samegrad.measure.allocator_rules import AllocatorRules
from samegrad.measure.replay import Request

SIZES_BYTES = (1, 511, 513, 100_000, 2**20 - 511, 2**20, 2**20 + 1, 3_000_001, 9 * 2**20, 10 * 2**20 - 512, 10 * 2**20,
               23_000_003, 41 * 2**20)  # fmt: skip


def random_requests(seed: int, *, count: int = 300) -> list[Request]:
    """Storages of very different sizes that live for very different times; all but a few are given back."""
    rng = random.Random(seed)
    live: list[int] = []
    requests = []
    for storage in range(count):
        requests.append(Request(storage, rng.choice(SIZES_BYTES) + rng.randrange(2000), -1, 0))
        live.append(storage)
        while len(live) > 12 or (live and rng.random() < 0.45):
            requests.append(Request(live.pop(rng.randrange(len(live))), 0, -1, 0))
    return requests


def history_of(requests: list[Request], rules: AllocatorRules, cap_bytes: int | None = None) -> list[dict[str, Any]]:
    """Entries as ``torch.cuda.memory._snapshot()["device_traces"][0]`` has them; ends when there is no room."""
    allocator = CachingAllocator(rules, cap_bytes=cap_bytes)
    sizes = {request.storage: request.size_bytes for request in requests if request.size_bytes}
    reserve, back = ("segment_map", "segment_unmap") if rules.expandable_segments else ("segment_alloc", "segment_free")
    entries = []

    def entry(action: str, address: int, size_bytes: int) -> None:
        entries.append({"action": action, "addr": address, "size": size_bytes, "stream": 0})

    for storage, size_bytes, _, _ in requests:
        if not size_bytes:
            entry("free_requested", allocator.address_of(storage), sizes[storage])
            entry("free_completed", allocator.address_of(storage), sizes[storage])
            allocator.give_back(storage)
            continue
        before = allocator.reserved_bytes
        found = allocator.take(storage, size_bytes)
        change = allocator.reserved_bytes - before
        place = allocator.address_of(storage) if found else 0
        if change:
            entry(reserve if change > 0 else back, place, abs(change))
        if not found:
            entry("oom", 0, rules.rounded_bytes(size_bytes))
            break
        entry("alloc", place, size_bytes)
    return entries
