"""Copies of storages on the host, and their way back ahead of backward's asking, beside the computation.

Backward asks for storages about in the reverse of the order in which they were saved. Where one is asked for, those of
what was saved before it begin to come, on a stream of their own, and the computation waits only for the one it needs.
What is ahead so, on its way or held for a next use, has no more bytes than the two largest of the forward: one that is
needed next, and another that keeps the link busy meanwhile. Where backward goes another way, what came in vain is let
go of, and what did not come comes when asked for.

Its memory is taken and given back in the computation's order: the copy begins after all that was computed until the
memory was taken, and nothing is let go of before the computation has waited for its copy.
"""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from samegrad.exact.dataless import has_data

# Saved tensors whose storages may be ahead: with many small ones the link is busy long before there is no room.
MOST_AHEAD = 8
# Backward may ask for the tensors of one operation in any order. One saved so many after that which it asks for was
# passed over: nothing asks for it, or not soon.
_MOST_PASSED_OVER = 8
_NO_BACKWARD = -1


class HostCopy:
    """The bytes of a storage on the host; while somebody else holds it, also the storage or what it came back as."""

    def __init__(self, tensor: Tensor, counted: Tensor, way_back: WayBack) -> None:
        storage = tensor.untyped_storage()
        self.device, self.size_bytes = tensor.device, storage.nbytes()
        # What only stands for CUDA's has no streams and is not pinned.
        self._beside = self.device.type == "cuda" and has_data(tensor)
        self._storage, self._counted = weakref.ref(storage), weakref.ref(counted)
        self._bytes = torch.empty(self.size_bytes, dtype=torch.uint8, device="cpu", pin_memory=self._beside)
        self._left: torch.cuda.Event | None = None
        self._way_back = way_back
        self._arriving: Callable[[], Arriving | None] = lambda: None
        way_back.make_room_for(self.size_bytes)
        self._send(torch.empty(0, dtype=torch.uint8, device=self.device).set_(storage))

    def is_of(self, storage: torch.UntypedStorage, counted: Tensor) -> bool:
        """Whether these are bytes of ``storage`` as ``counted`` counts what is written on it."""
        return self._storage() is storage and self._counted() is counted

    def wait_until_left(self) -> None:
        """What is computed from now on comes after the copy to the host."""
        if self._left is not None:
            torch.cuda.current_stream(self.device).wait_event(self._left)

    def saved_again(self) -> int:
        """The place, in the order of what the forward saved, of a tensor that lies in the storage."""
        return self._way_back.place_of(self)

    def brought_back(self, place: int) -> torch.UntypedStorage:
        """The storage for what is computed from now on; what is likely to be asked for next begins to come."""
        arriving = self._way_back.taken(place)
        if arriving is None or not arriving.is_for_this_stream():
            arriving = self.there() or self.coming()
        arriving.wait()
        self._way_back.look_ahead_of(place)
        return arriving.storage

    def there(self) -> Arriving | None:
        """The storage, or what it came back as, if something holds it for the stream that computes now."""
        storage, arriving = self._storage(), self._arriving()
        if storage is None:
            return None
        if arriving is None:
            # It never left, or was given to the computation.
            return Arriving(storage)
        return arriving if arriving.is_for_this_stream() else None

    def coming(self) -> Arriving:
        """Begins to come back, into memory of the stream that computes now."""
        there = torch.empty(self.size_bytes, dtype=torch.uint8, device=self.device)
        storage = there.untyped_storage()
        if not self._beside:
            there.copy_(self._bytes)
            arriving = Arriving(storage)
        else:
            computing, stream = torch.cuda.current_stream(self.device), _stream_from_host(self.device)
            # Who had the memory before may still compute with it.
            stream.wait_stream(computing)
            if self._left is not None:
                stream.wait_event(self._left)
            with torch.cuda.stream(stream):
                there.copy_(self._bytes, non_blocking=True)
            arriving = Arriving(storage, computing, stream.record_event())
        self._storage, self._arriving = weakref.ref(storage), weakref.ref(arriving)
        return arriving

    def _send(self, there: Tensor) -> None:
        if not self._beside:
            self._bytes.copy_(there)
            return
        stream = _stream_to_host(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            self._bytes.copy_(there, non_blocking=True)
        self._left = stream.record_event()


@dataclasses.dataclass(eq=False)
class Arriving:
    """A storage on its way back. ``computing``: the stream in whose order its memory was taken; None: no streams."""

    storage: torch.UntypedStorage
    computing: torch.cuda.Stream | None = None
    arrived: torch.cuda.Event | None = None

    def is_for_this_stream(self) -> bool:
        return self.computing is None or self.computing == torch.cuda.current_stream(self.computing.device)

    def wait(self) -> None:
        """What is computed from now on comes after the copy."""
        if self.computing is not None and self.arrived is not None:
            self.computing.wait_event(self.arrived)
            self.arrived = None

    def __del__(self) -> None:
        # Nobody asked for it. Others who are given its memory are not to be written upon by its copy.
        self.wait()


class WayBack:
    """What one forward saved on the host of one device, in order, and what of it is ahead of backward.

    It holds copies weakly, as what autograd packed holds them: when a graph goes, so does what was ahead of it.
    """

    def __init__(self) -> None:
        self._saved: list[weakref.ref[HostCopy]] = []
        self._largest_bytes = [0, 0]
        self._ahead: dict[int, Arriving] = {}
        self._backward = self._next = _NO_BACKWARD

    @property
    def ahead_bytes(self) -> int:
        """Bytes of the storages that are on their way or held for their turn."""
        return sum(self._sizes_ahead().values())

    @property
    def most_ahead_bytes(self) -> int:
        return sum(self._largest_bytes)

    def make_room_for(self, size_bytes: int) -> None:
        """A storage of ``size_bytes`` is sent."""
        self._largest_bytes = sorted([*self._largest_bytes, size_bytes])[1:]

    def place_of(self, copy: HostCopy) -> int:
        """The place in the order of a tensor that is saved now and lies in ``copy``."""
        self._saved.append(weakref.ref(copy))
        return len(self._saved) - 1

    def taken(self, place: int) -> Arriving | None:
        """What is ahead for ``place``, which is the caller's from now on."""
        return self._ahead.pop(place, None)

    def look_ahead_of(self, place: int) -> None:
        """What backward is likely to ask for after ``place`` begins to come or is held, as far as there is room."""
        backward = torch._C._current_graph_task_id()
        if backward == _NO_BACKWARD:
            # Somebody looks at the graph, and asks for nothing next.
            return
        if backward != self._backward:
            self._begin(backward)
        for passed in [ahead for ahead in self._ahead if ahead > place + _MOST_PASSED_OVER]:
            del self._ahead[passed]
        self._next = min(self._next, place - 1)
        while self._next >= 0:
            copy = self._saved[self._next]()
            if copy is not None:
                there = copy.there()
                if not self._has_room(copy.size_bytes, there):
                    return
                self._ahead[self._next] = there or copy.coming()
            self._next -= 1

    def _has_room(self, size_bytes: int, there: Arriving | None) -> bool:
        held = self._sizes_ahead()
        if there is not None:
            held.pop(id(there.storage), None)
        return len(self._ahead) < MOST_AHEAD and sum(held.values()) + size_bytes <= self.most_ahead_bytes

    def _sizes_ahead(self) -> dict[int, int]:
        """The bytes of each storage once: several saved tensors may lie in it."""
        return {id(arriving.storage): arriving.storage.nbytes() for arriving in self._ahead.values()}

    def _begin(self, backward: int) -> None:
        self._ahead.clear()
        self._backward, self._next = backward, len(self._saved) - 1
        torch.autograd.Variable._execution_engine.queue_callback(self._end)

    def _end(self) -> None:
        self._ahead.clear()
        self._backward = _NO_BACKWARD


@functools.cache
def _stream_to_host(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch has no types here


@functools.cache
def _stream_from_host(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch has no types here
