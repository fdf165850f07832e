"""Pieces of an optimizer's state: tensors that travel between device and host together, in one memory.

Hundreds of small copies take longer to launch than to run.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence, Set
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack, to_dlpack  # type: ignore[attr-defined]  # documented, not in its __all__

from samegrad.exact.dataless import computing, has_data

Leaf = TypeVar("Leaf")

# The most that travels at once, larger tensors apart, and what each tensor of a piece begins at a multiple of.
_PIECE_BYTES = 64 << 20
_ALIGNED_BYTES = 64
# DLPack does not know all of torch's dtypes; others go by way of bytes.
_EXCHANGED = frozenset((torch.float64, torch.float32, torch.bfloat16, torch.float16))


@dataclasses.dataclass(frozen=True)
class Piece:
    """State tensors that travel together: parts of one ``memory``, which belong on the device ``home``.

    ``starts``: where in the memory each of ``parts`` begins, in entries.
    """

    home: torch.device
    memory: Tensor
    starts: tuple[int, ...]
    parts: tuple[Tensor, ...]

    @classmethod
    def packed(cls, leaves: Sequence[Tensor]) -> Piece:
        """Copies of ``leaves``, which are of one dtype and device, on the host."""
        aligned = max(1, _ALIGNED_BYTES // leaves[0].element_size())
        starts = [0, *itertools.accumulate(-(-leaf.numel() // aligned) * aligned for leaf in leaves)]
        memory = _host_memory(leaves[0], starts.pop())
        # As dense as they are, whatever the order of their axes.
        strides = [torch.empty_like(leaf, device="meta").stride() for leaf in leaves]
        parts = _parts_of(memory, starts, [leaf.shape for leaf in leaves], strides)
        for part, leaf in zip(parts, leaves):
            part.copy_(leaf, non_blocking=True)
        return cls(leaves[0].device, memory, tuple(starts), tuple(parts))

    def sent(self) -> Piece:
        """A copy on the host, in memory that nobody has."""
        return self._in(_host_memory(self.memory, self.memory.numel()).copy_(self.memory, non_blocking=True))

    def returned(self) -> Piece:
        """A copy on its device."""
        return self._in(torch.empty_like(self.memory, device=self.home).copy_(self.memory, non_blocking=True))

    def _in(self, memory: Tensor) -> Piece:
        """The same parts of ``memory``, which holds what this one's does."""
        shapes, strides = [part.shape for part in self.parts], [part.stride() for part in self.parts]
        return Piece(self.home, memory, self.starts, tuple(_parts_of(memory, self.starts, shapes, strides)))

    def freed(self) -> list[Tensor]:
        """Copies of its parts on its device, each in memory of its own."""
        # Waited for: pinned memory knows only of copies from its beginning, and is soon somebody else's.
        return [torch.empty_like(part, device=self.home).copy_(part) for part in self.parts]

    def is_whole(self, ids: Set[int]) -> bool:
        """Whether all its parts are of ``ids``, and lie where they did: ``part.data = ...`` lays one elsewhere."""
        size = self.memory.element_size()
        places = [self.memory.data_ptr() + start * size for start in self.starts] if computing() else None
        return all(id(part) in ids and part.dtype == self.memory.dtype for part in self.parts) and (
            places is None or places == [part.data_ptr() for part in self.parts]
        )

    def has_any_of(self, ids: Set[int]) -> bool:
        return any(id(part) in ids for part in self.parts)


def in_pieces(leaves: Sequence[Leaf], bytes_of: Callable[[Leaf], int]) -> Iterator[list[Leaf]]:
    """As many together as a piece holds, in order."""
    piece, held_bytes = list[Leaf](), 0
    for leaf in leaves:
        if piece and held_bytes + bytes_of(leaf) > _PIECE_BYTES:
            yield piece
            piece, held_bytes = [], 0
        piece.append(leaf)
        held_bytes += bytes_of(leaf)
    if piece:
        yield piece


def _host_memory(like: Tensor, entries: int) -> Tensor:
    pinned = like.device.type == "cuda" and has_data(like)
    return torch.empty(entries, dtype=like.dtype, device="cpu", pin_memory=pinned)


def _parts_of(
    memory: Tensor, starts: Sequence[int], shapes: Sequence[torch.Size], strides: Sequence[tuple[int, ...]]
) -> list[Tensor]:
    """The tensors that lie in ``memory``, each from one of ``starts`` on and of a storage of its own.

    A checkpoint writes storages whole, and what is loaded from it shares them as they were shared.
    """
    if not computing():
        return [memory.as_strided(*where) for where in zip(shapes, strides, starts)]
    # As capsules: between tensors themselves it takes twice as long, and there are hundreds in every step.
    if memory.dtype in _EXCHANGED:
        return [from_dlpack(to_dlpack(memory.as_strided(*where))) for where in zip(shapes, strides, starts)]
    size, by_bytes = memory.element_size(), memory.view(torch.uint8)
    views = [by_bytes[start * size : (start + shape.numel()) * size] for start, shape in zip(starts, shapes)]
    alone = [from_dlpack(to_dlpack(view)).view(memory.dtype) for view in views]
    return [one.as_strided(shape, stride) for one, shape, stride in zip(alone, shapes, strides)]
