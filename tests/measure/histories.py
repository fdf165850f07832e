"""Histories to replay: of random requests, as a real allocator would have recorded them, and recorded ones.

``h200_histories.npz`` are runs of benchmarks/allocator_gpu.py on one H200 (torch 2.11.0+cu130).
"""

from __future__ import annotations

import functools
import json
import random
from pathlib import Path
from typing import Any

import numpy as np

from samegrad.measure.allocator import CachingAllocator
from samegrad.measure.allocator_rules import AllocatorRules
from samegrad.measure.recorded_history import HistoryEntry
from samegrad.measure.replay import Request

RECORDED = Path(__file__).parent / "h200_histories.npz"

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

    for storage, size_bytes, *_ in requests:
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


@functools.cache
def recorded_names() -> tuple[str, ...]:
    with np.load(RECORDED) as arrays:
        return tuple(sorted({key.split("/")[0] for key in arrays.files if "/" in key}))


def recorded_history(name: str) -> tuple[tuple[HistoryEntry, ...], dict[str, Any]]:
    """The history of that name and what torch counted in it."""
    with np.load(RECORDED) as arrays:
        actions = [str(action) for action in arrays["action_names"]]
        columns = [arrays[f"{name}/{key}"].tolist() for key in ("actions", "addresses", "sizes", "streams")]
        facts = json.loads(arrays[f"{name}/facts"].tobytes())
    return tuple(HistoryEntry(actions[a], place, size, s) for a, place, size, s in zip(*columns)), facts
