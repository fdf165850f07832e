"""A recorded history of a real CUDA allocator, replayed through the model and compared event by event.

The history is torch's own (``torch.cuda.memory._record_memory_history`` and ``_snapshot``): each request with its
address, and each segment taken from the driver or given back. It must begin with an empty allocator. No torch here.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from samegrad.errors import BadInput
from samegrad.measure.allocator import CachingAllocator
from samegrad.measure.allocator_rules import AllocatorRules
from samegrad.measure.replay import Request

_RESERVES = ("segment_alloc", "segment_map")
_RETURNS = ("segment_free", "segment_unmap")
_REQUESTS = ("alloc", "free_completed", "oom")
# Parts of one expandable segment lie closer together than this, since each reserves more addresses than the card has.
_SEGMENTS_APART_BYTES = 2**34


class HistoryEntry(NamedTuple):
    """One entry: ``action`` by torch's name; ``stream`` is a number of the recording's own."""

    action: str
    address: int
    size_bytes: int
    stream: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Disagreement:
    """The first request after which model and recording differ. ``request`` counts requests, frees included."""

    request: int
    entry: HistoryEntry
    recorded_reserved_bytes: int
    modelled_reserved_bytes: int
    why: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class HistoryComparison:
    """How far the model followed the recording.

    ``same_addresses`` of ``takes`` requests landed where they were recorded to. ``first``: where what is reserved
    first differed, None where it never did.
    """

    requests: int
    takes: int
    same_addresses: int
    recorded_peak_reserved_bytes: int
    modelled_peak_reserved_bytes: int
    retries: int
    first: Disagreement | None


def read_history(entries: Iterable[Mapping[str, Any]]) -> tuple[HistoryEntry, ...]:
    """The entries of ``_snapshot()["device_traces"][device]`` that change memory. Raises BadInput."""
    known = {*_RESERVES, *_RETURNS, *_REQUESTS}
    streams: dict[Any, int] = {}
    history = []
    for entry in entries:
        if entry["action"] not in known:
            continue
        stream = streams.setdefault(entry["stream"], len(streams))
        address = entry.get("addr", 0) if entry["action"] != "oom" else 0
        history.append(HistoryEntry(entry["action"], address, entry["size"], stream))
    if not history:
        raise BadInput(
            asked="the recorded history of a CUDA allocator",
            found="no requests in it",
            do="record with torch.cuda.memory._record_memory_history(context=None) before the first allocation",
        )
    return tuple(history)


def requests_of(history: Sequence[HistoryEntry], step_starts: Sequence[int] = ()) -> tuple[Request, ...]:
    """The requests of a history, each storage with a number of its own.

    ``step_starts``: how many requests to take memory came before each step but the first.
    """
    requests: list[Request] = []
    at: dict[int, int] = {}
    takes = 0
    for entry in history:
        if entry.action == "alloc":
            at[entry.address] = takes
            step = _step(takes, step_starts)
            requests.append(Request(takes, entry.size_bytes, -1, step, entry.stream))
            takes += 1
        elif entry.action == "free_completed":
            requests.append(Request(_storage(at, entry), 0, -1, _step(takes, step_starts)))
    return tuple(requests)


def compare_history(
    history: Sequence[HistoryEntry],
    rules: AllocatorRules,
    *,
    cap_bytes: int | None = None,
    recorded_segments: bool = True,
) -> HistoryComparison:
    """Replays the requests of ``history`` and compares what is reserved after each of them.

    ``recorded_segments``: put segments where the driver was seen to put them, which leaves the allocator's own rules
    to be judged; otherwise the model's rule for the driver is judged as well.
    """
    addresses = iter(_segment_starts(history)) if recorded_segments else None
    allocator = CachingAllocator(rules, cap_bytes=cap_bytes, segment_addresses=addresses)
    at: dict[int, int] = {}
    reserved = peak = takes = same = 0
    count = itertools.count()
    request, first = -1, None
    for entry in history:
        if entry.action in _RESERVES:
            reserved += entry.size_bytes
            peak = max(peak, reserved)
            continue
        if entry.action in _RETURNS:
            reserved -= entry.size_bytes
            continue
        request = next(count)
        found, why = True, "another amount is reserved"
        if entry.action == "free_completed":
            allocator.give_back(_storage(at, entry))
            # What the program itself gave back to the driver is not a request, and is seen before the next one.
            continue
        if entry.action == "alloc":
            at[entry.address] = takes
            found = allocator.take(takes, entry.size_bytes, stream=entry.stream)
            if found:
                same += allocator.address_of(takes) == entry.address
            else:
                why = "the model runs out of memory"
            takes += 1
        elif allocator.take(-1, entry.size_bytes, stream=entry.stream):
            allocator.give_back(-1)
            found, why = False, "the recording runs out of memory, the model does not"
        if first is None and (allocator.reserved_bytes != reserved or not found):
            first = Disagreement(
                request=request,
                entry=entry,
                recorded_reserved_bytes=reserved,
                modelled_reserved_bytes=allocator.reserved_bytes,
                why=why,
            )
        if not found:
            break
    return HistoryComparison(
        requests=request + 1,
        takes=takes,
        same_addresses=same,
        recorded_peak_reserved_bytes=peak,
        modelled_peak_reserved_bytes=allocator.peak_reserved_bytes,
        retries=allocator.retries,
        first=first,
    )


def _segment_starts(history: Sequence[HistoryEntry]) -> list[int]:
    """Where segments begin, in the order they were taken; an expandable one begins with the first page it mapped."""
    starts: list[int] = []
    expandable: list[int] = []
    for entry in history:
        if entry.action == "segment_alloc":
            starts.append(entry.address)
        elif entry.action == "segment_map" and not any(
            abs(entry.address - start) < _SEGMENTS_APART_BYTES for start in expandable
        ):
            starts.append(entry.address)
            expandable.append(entry.address)
    return starts


def _storage(at: dict[int, int], entry: HistoryEntry) -> int:
    storage = at.pop(entry.address, None)
    if storage is None:
        raise BadInput(
            asked="the recorded history of a CUDA allocator",
            found=f"memory at {entry.address:#x} is freed that was not taken in it",
            do="begin to record before the first allocation of the process",
        )
    return storage


def _step(takes: int, step_starts: Sequence[int]) -> int:
    return sum(start <= takes for start in step_starts)
