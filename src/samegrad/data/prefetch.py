"""Chunks of a batch on the device, in order and ahead of use."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from samegrad import trees
from samegrad.data.places import TwoPlaces
from samegrad.errors import EnvironmentProblem, UsageError
from samegrad.trees import RowLayout, RowLeaf


def stream_chunks(
    batch: Any, layout: RowLayout, sizes: Sequence[int], device: torch.device | str
) -> Generator[Any, None, None]:
    """The chunks of ``batch`` on ``device``: consecutive rows, as many as ``sizes`` say, nested as the batch is.

    On the CPU tensors are cut as views, and rows that are no tensor yet are read when their chunk is asked for. On
    CUDA, leaves on the host travel through two places in turn: **a chunk is valid until the next one is asked for**;
    clone what must live longer (a chunk that is found alive when its place was needed again is a UsageError).
    Leaves without rows are moved once. Closing the iterator stops the reader and frees the places; use a Prefetcher
    to keep them from batch to batch. Raises UsageError when the sizes do not add up to the batch, and what the
    reader of a row source raises as it is.
    """
    with Prefetcher(device) as prefetcher:
        yield from prefetcher.stream(batch, layout, sizes)


class Prefetcher:
    """``stream_chunks`` for many batches: the pinned and the device memory is kept between them.

    ``close()``, or leaving it as a context, frees both. One stream at a time. Raises EnvironmentProblem where there
    is no such device.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self._places: TwoPlaces | None = None
        if self.device.type == "cuda":
            if not torch.cuda.is_available():
                raise EnvironmentProblem(
                    asked=f"chunks on {self.device}",
                    found=f"no CUDA device (torch {torch.__version__})",
                    do="use device='cpu'",
                )
            index = torch.cuda.current_device() if self.device.index is None else self.device.index
            self.device = torch.device("cuda", index)
            self._places = TwoPlaces(self.device)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def pinned_bytes(self) -> int:
        """Host bytes pinned now; torch's pinned allocator rounds each buffer up to a power of two."""
        return 0 if self._places is None else self._places.host_bytes

    @property
    def device_bytes(self) -> int:
        """Device bytes held now: two of the largest chunk of the leaves that come from the host."""
        return 0 if self._places is None else self._places.device_bytes

    def stream(self, batch: Any, layout: RowLayout, sizes: Sequence[int]) -> Generator[Any, None, None]:
        """The chunks of one batch, as ``stream_chunks`` describes them."""
        if sum(sizes) != layout.rows or min(sizes, default=0) < 1:
            raise UsageError(
                asked=f"chunks of {list(sizes)} rows",
                found=f"they add up to {sum(sizes)}, the batch has {layout.rows} rows",
                do="give positive sizes that add up to the batch",
            )
        spans, start = [], 0
        for size in sizes:
            spans.append((start, start + size))
            start += size
        leaves = trees.leaves_of(batch)
        shared = [trees.move(leaf, self.device) if axis is None else leaf for leaf, axis in zip(leaves, layout.axes)]
        ahead = {
            i: (leaf, axis)
            for i, (leaf, axis) in enumerate(zip(shared, layout.axes))
            if axis is not None and not (isinstance(leaf, Tensor) and leaf.device.type != "cpu")
        }
        if self._places is None or not ahead:
            return self._cut(trees.unflatten(shared, layout.spec), layout, spans)
        return self._ahead(self._places, shared, layout, spans, ahead)

    def close(self) -> None:
        """Stop the reader and free the memory; the next stream would start both again."""
        if self._places is not None:
            self._places.close()

    def _cut(self, batch: Any, layout: RowLayout, spans: Sequence[tuple[int, int]]) -> Generator[Any, None, None]:
        for start, stop in spans:
            # No name for the chunk here: beside the one being read only the consumer's is alive.
            yield trees.move(trees.slice_rows(batch, layout, start, stop), self.device)

    def _ahead(
        self,
        places: TwoPlaces,
        leaves: list[Any],
        layout: RowLayout,
        spans: Sequence[tuple[int, int]],
        ahead: Mapping[int, tuple[RowLeaf, int]],
    ) -> Generator[Any, None, None]:
        """Chunks of the leaves that are on the device already, completed by those that arrive."""
        kept = [None if i in ahead else leaf for i, leaf in enumerate(leaves)]
        here = dataclasses.replace(layout, axes=tuple(None if i in ahead else a for i, a in enumerate(layout.axes)))
        rest = trees.unflatten(kept, layout.spec)

        def completed(start: int, stop: int, arrived: Mapping[int, Tensor]) -> Any:
            cut = trees.leaves_of(trees.move(trees.slice_rows(rest, here, start, stop), self.device))
            return trees.unflatten([arrived.get(i, leaf) for i, leaf in enumerate(cut)], layout.spec)

        stream = places.stream(ahead, spans)
        try:
            for start, stop in spans:
                yield completed(start, stop, next(stream))
        finally:
            stream.close()
