"""The two places a chunk can be in on its way to the device.

1. Only the thread that asks for chunks calls the device. The reader thread touches host memory alone, so a graph
   may be captured while it works.
2. A place is a host buffer (pinned) and a device buffer for each leaf. Chunk k goes through place k % 2.
3. A host buffer is refilled when its copy to the device has ended. A device buffer is overwritten after what the
   consumer had enqueued when it asked for the next chunk. Events carry both.
4. When the last chunk is handed out, the batch's host memory is not read any more.
"""

from __future__ import annotations

import dataclasses
import gc
import math
import weakref
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import torch
from torch import Tensor

from samegrad.errors import UsageError
from samegrad.trees import RowLeaf


@dataclasses.dataclass(kw_only=True)
class _Place:
    """Flat buffers by leaf number, and when they may be used again."""

    copied: Any  # event: the chunk has arrived on the device
    free: Any  # event: the consumer's last use of the chunk
    host: dict[int, Tensor] = dataclasses.field(default_factory=dict)
    device: dict[int, Tensor] = dataclasses.field(default_factory=dict)
    handed: list[weakref.ref[Tensor]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(kw_only=True)
class _Trip:
    """One batch on its way: ``leaves`` by number with their row axis, ``direct`` those that need no host buffer."""

    leaves: Mapping[int, tuple[RowLeaf, int]]
    spans: Sequence[tuple[int, int]]
    direct: frozenset[int]
    fills: list[Future[None]] = dataclasses.field(default_factory=list)
    copies: int = 0

    def shape(self, leaf: int, span: tuple[int, int]) -> tuple[int, ...]:
        source, axis = self.leaves[leaf]
        return (*source.shape[:axis], span[1] - span[0], *source.shape[axis + 1 :])

    def fits(self, leaf: int, buffer: Tensor, elements: int) -> bool:
        return leaf in self.leaves and buffer.dtype == self.leaves[leaf][0].dtype and buffer.numel() >= elements


class TwoPlaces:
    """Chunks of host leaves on ``device``, gathered and copied ahead of use; buffers are kept between batches."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._module = torch.get_device_module(device)
        self._copies = self._module.Stream(device)
        self._places = [_Place(copied=self._module.Event(), free=self._module.Event()) for _ in range(2)]
        self._reader: ThreadPoolExecutor | None = None
        self._trip: _Trip | None = None

    @property
    def host_bytes(self) -> int:
        """Host bytes held; torch rounds each pinned buffer up to a power of two."""
        sizes = [buffer.nbytes for place in self._places for buffer in place.host.values()]
        return sum(1 << (size - 1).bit_length() for size in sizes) if self._device.type == "cuda" else sum(sizes)

    @property
    def device_bytes(self) -> int:
        return sum(buffer.nbytes for place in self._places for buffer in place.device.values())

    def stream(
        self, leaves: Mapping[int, tuple[RowLeaf, int]], spans: Sequence[tuple[int, int]]
    ) -> Generator[dict[int, Tensor], None, None]:
        """Each span's rows of every leaf, on the device, valid until the next span's are asked for.

        Raises UsageError when another batch is under way, when the buffers were closed meanwhile, and when a chunk
        whose memory was needed again is still alive; a row source's own exception as it is.
        """
        if self._trip is not None:
            raise UsageError(
                asked="chunks of a batch",
                found="another batch of this prefetcher is under way",
                do="finish or close that iterator first, or use a second prefetcher",
            )
        pinned = (i for i, (leaf, axis) in leaves.items() if axis == 0 and _is_pinned(leaf))
        trip = self._trip = _Trip(leaves=leaves, spans=spans, direct=frozenset(pinned))
        try:
            self._make_room(trip)
            for k in range(len(spans)):
                self._advance(trip, k)
                yield self._hand_out(trip, k)
                if self._trip is not trip:
                    raise UsageError(
                        asked=f"chunk {k + 1}", found="the prefetcher was closed", do="close it after the last chunk"
                    )
        finally:
            self._end(trip)

    def close(self) -> None:
        """Stop the reader and free the buffers."""
        if self._trip is not None:
            self._end(self._trip)
        if self._reader is not None:
            self._reader.shutdown(wait=True, cancel_futures=True)
            self._reader = None
        for place in self._places:
            self._drop(place, list(place.device))

    def _advance(self, trip: _Trip, k: int) -> None:
        """Put chunk k on its way to the device, and start what can go on while it is used."""
        place, count = self._places[k % 2], len(trip.spans)
        consumer = self._module.current_stream(self._device)
        if k >= 2:
            self._refuse_kept(trip, k)
        if k >= 1:
            self._places[(k - 1) % 2].free.record(consumer)  # rule 3
        if len(trip.fills) == k:
            self._fill(trip)
        if trip.copies == k:
            self._copy(trip)
        if len(trip.fills) == k + 1 < count:
            self._fill(trip)
        # Where it costs no waiting, one step further: this keeps a consumer that waits for the device fed.
        # A failed gather waits for its turn: the chunk before it is still good.
        if trip.copies == k + 1 < count and _gathered(trip.fills[k + 1]):
            self._copy(trip)
        if len(trip.fills) == k + 2 < count and place.copied.query():
            self._fill(trip)
        consumer.wait_event(place.copied)
        if k == count - 1:
            place.copied.synchronize()  # rule 4

    def _fill(self, trip: _Trip) -> None:
        """Have the reader gather the next chunk into its host buffers."""
        k = len(trip.fills)
        span, place = trip.spans[k], self._places[k % 2]
        place.copied.synchronize()  # rule 3; here, not in the reader: rule 1
        targets = {i: _shaped(buffer, trip.shape(i, span)) for i, buffer in place.host.items()}
        if self._reader is None:
            self._reader = ThreadPoolExecutor(1, thread_name_prefix="samegrad-rows")
        trip.fills.append(self._reader.submit(_gather, trip.leaves, span, targets))

    def _copy(self, trip: _Trip) -> None:
        """Enqueue the copy of the next chunk to the device, once it is gathered."""
        k = trip.copies
        span, place = trip.spans[k], self._places[k % 2]
        trip.fills[k].result()
        with self._module.stream(self._copies):
            self._copies.wait_event(place.free)
            for i, (leaf, axis) in trip.leaves.items():
                shape = trip.shape(i, span)
                if i in trip.direct and isinstance(leaf, Tensor):
                    source = leaf.detach().narrow(axis, span[0], span[1] - span[0])
                else:
                    source = _shaped(place.host[i], shape)
                _shaped(place.device[i], shape).copy_(source, non_blocking=True)
            place.copied.record(self._copies)
        trip.copies += 1

    def _hand_out(self, trip: _Trip, k: int) -> dict[int, Tensor]:
        place = self._places[k % 2]
        chunk = {i: _shaped(place.device[i], trip.shape(i, trip.spans[k])) for i in trip.leaves}
        place.handed = [weakref.ref(tensor) for tensor in chunk.values()]
        return chunk

    def _refuse_kept(self, trip: _Trip, k: int) -> None:
        handed = self._places[k % 2].handed
        if any(tensor() is not None for tensor in handed):
            gc.collect()  # a chunk in a dead reference cycle is nobody's
        if any(tensor() is not None for tensor in handed):
            raise UsageError(
                asked=f"chunk {k} of {len(trip.spans)}",
                found=f"chunk {k - 2} is still in use, but its memory was needed for this one",
                do="let go of each chunk before asking for the next one, or keep chunk.clone()",
            )

    def _make_room(self, trip: _Trip) -> None:
        """Buffers for the largest chunk of every leaf, the ones at hand where they fit."""
        largest = (0, max(stop - start for start, stop in trip.spans))
        need = {i: math.prod(trip.shape(i, largest)) for i in trip.leaves}
        for place in self._places:
            self._drop(place, [i for i, buffer in place.device.items() if not trip.fits(i, buffer, need.get(i, 0))])
            for i in trip.direct & place.host.keys():
                del place.host[i]
            # Buffers outlive this call: made under inference mode they could not be used in a graph later.
            with torch.inference_mode(mode=False):
                for i, (leaf, _) in trip.leaves.items():
                    if i not in place.device:
                        place.device[i] = torch.empty(need[i], dtype=leaf.dtype, device=self._device)
                    if i not in place.host and i not in trip.direct:
                        pin = self._device.type == "cuda"
                        place.host[i] = torch.empty(need[i], dtype=leaf.dtype, device="cpu", pin_memory=pin)
            # New memory may still be in use by what the consumer enqueued before it was freed.
            place.free.record(self._module.current_stream(self._device))
            place.handed = []

    def _drop(self, place: _Place, leaves: Sequence[int]) -> None:
        if not leaves:
            return
        place.copied.synchronize()
        for i in leaves:
            buffer = place.device.pop(i)
            if buffer.device.type == "cuda":
                buffer.record_stream(torch.cuda.current_stream(self._device))
            place.host.pop(i, None)

    def _end(self, trip: _Trip) -> None:
        """Wait until nothing of the batch's memory is read, also when the consumer stopped early."""
        for fill in trip.fills:
            fill.cancel()
        wait(trip.fills)
        if trip.direct:
            for place in self._places:
                place.copied.synchronize()
        if self._trip is trip:
            self._trip = None


def _shaped(buffer: Tensor, shape: tuple[int, ...]) -> Tensor:
    return buffer[: math.prod(shape)].view(shape)


def _gathered(fill: Future[None]) -> bool:
    return fill.done() and fill.exception() is None


def _is_pinned(leaf: RowLeaf) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_contiguous() and leaf.is_pinned()


@torch.no_grad()
def _gather(leaves: Mapping[int, tuple[RowLeaf, int]], span: tuple[int, int], targets: Mapping[int, Tensor]) -> None:
    """Write the rows of ``span`` of every leaf that has a target into it. Runs in the reader thread: rule 1."""
    start, stop = span
    for i, target in targets.items():
        leaf, axis = leaves[i]
        rows = leaf.narrow(axis, start, stop - start) if isinstance(leaf, Tensor) else leaf.read(start, stop, target)
        if rows is not target:
            target.copy_(rows)
