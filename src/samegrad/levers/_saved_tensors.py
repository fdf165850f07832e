"""Saved tensors of a forward that wait for backward on the host, bit for bit and with their strides.

1. A storage travels whole and once, however many views of it are saved; it comes back once while something holds it.
   What is still on the device when it is asked for is used as it is.
2. torch checks no versions behind hooks, so it is done here, for tensors that stay as well.
3. Hooks see tensors with their graph, which what is saved must not hold: hence detached ones.

On CUDA copies leave on a stream of their own. Two may be on their way while the computation goes on; then it waits, so
that their memory is free for what comes next in its order. (``record_stream`` would free it when the host happens to
see that a copy is done; the host is far ahead, and nothing would be saved.) They come back ahead of backward's asking,
on another stream (``_host_copies``). Pinned memory comes from torch's caching allocator, which keeps blocks for the
next step and hands none out again before the copies that use it are done.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections import deque
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from samegrad.errors import UsageError
from samegrad.exact.dataless import is_torchs_own, memory_of
from samegrad.levers._host_copies import HostCopy, WayBack

# Copies to the host that may be on their way.
_MOST_LEAVING = 2


class SavedTensors:
    """Hooks for one forward. ``resident``: tensors that stay on the device whether they are saved or not."""

    def __init__(self, smallest_bytes: int, resident: Iterable[Tensor]) -> None:
        self._smallest_bytes = max(1, smallest_bytes)
        self._resident = {memory_of(t) for t in resident if _is_plain(t)}
        self._copies: dict[tuple[int, int, int], HostCopy] = {}
        # Of each device; a forward has one, but for models that lie on several.
        self._ways_back: dict[torch.device, WayBack] = {}
        # Storages are held until the computation has waited for their copies.
        self._leaving: deque[tuple[torch.UntypedStorage, HostCopy]] = deque()

    @classmethod
    def all_staying(cls) -> SavedTensors:
        """Hooks under which nothing travels."""
        return cls(sys.maxsize, [])

    @contextlib.contextmanager
    def travelling(self) -> Iterator[None]:
        """A block in which what autograd saves goes to the host, and after which all of it has left."""
        with self.leaving(), self.hooked():
            yield

    @contextlib.contextmanager
    def leaving(self) -> Iterator[None]:
        """A block, with parts of it ``hooked``, after which all that went has left."""
        try:
            yield
        finally:
            self._let_go(0)

    def hooked(self) -> contextlib.AbstractContextManager[None]:
        """A part of a block in which what autograd saves goes to the host."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)

    def _pack(self, tensor: Tensor) -> _Staying | _Travelling:
        if not _is_plain(tensor) or not self._is_worth_it(tensor):
            return _Staying.of(tensor)
        return _Travelling.of(tensor, self._copy_of(tensor))

    def _is_worth_it(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().nbytes() >= self._smallest_bytes and memory_of(tensor) not in self._resident

    def _copy_of(self, tensor: Tensor) -> HostCopy:
        storage = tensor.untyped_storage()
        # Written in place between two times that it is saved, it holds something else. Parts of a storage may be
        # counted apart (recurrent layers write gates so), and what one count says is nothing about the others.
        counted = tensor if tensor._base is None else tensor._base
        key = (memory_of(tensor), id(counted), tensor._version)
        copy = self._copies.get(key)
        # Once a storage is freed, another may stand at its address.
        if copy is None or not copy.is_of(storage, counted):
            way_back = self._ways_back.setdefault(tensor.device, WayBack())
            copy = self._copies[key] = HostCopy(tensor, counted, way_back)
            self._leaving.append((storage, copy))
            self._let_go(_MOST_LEAVING)
        return copy

    def _let_go(self, most: int) -> None:
        """Holds at most ``most`` storages for copies that are on their way."""
        while len(self._leaving) > most:
            self._leaving.popleft()[1].wait_until_left()


@dataclasses.dataclass(frozen=True)
class _Staying:
    """A saved tensor that stays where it is, and how often it had been written in place."""

    tensor: Tensor
    version: int

    @classmethod
    def of(cls, tensor: Tensor) -> _Staying:
        return cls(tensor.detach(), tensor._version)

    def unpacked(self) -> Tensor:
        _check_unwritten(self.tensor, self.version, self.tensor.shape)
        return self.tensor


@dataclasses.dataclass(frozen=True)
class _Travelling:
    """A view of a storage that is on the host. ``counter`` counts what is written in place on the tensor saved.

    ``place``: in the order of what was saved.
    """

    copy: HostCopy
    place: int
    dtype: torch.dtype
    offset: int
    shape: torch.Size
    stride: tuple[int, ...]
    counter: Tensor
    version: int

    @classmethod
    def of(cls, tensor: Tensor, copy: HostCopy) -> _Travelling:
        # Detached, it shares the count; with other data, it holds none of the memory that is to be free.
        counter = tensor.detach()
        counter.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        offset = int(tensor.storage_offset())
        place = copy.saved_again()
        return cls(copy, place, tensor.dtype, offset, tensor.shape, tensor.stride(), counter, tensor._version)

    def unpacked(self) -> Tensor:
        _check_unwritten(self.counter, self.version, self.shape)
        storage = self.copy.brought_back(self.place)
        empty = torch.empty(0, dtype=self.dtype, device=self.copy.device)
        return empty.set_(storage, self.offset, self.shape, self.stride)


def _unpack(packed: _Staying | _Travelling) -> Tensor:
    return packed.unpacked()


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is its dtype, shape and strides over a storage, and nothing else."""
    return (
        is_torchs_own(tensor)
        and tensor.layout is torch.strided
        and not (tensor.is_quantized or tensor.is_conj() or tensor.is_neg() or tensor.device.type == "meta")
    )


def _check_unwritten(tensor: Tensor, version: int, shape: torch.Size) -> None:
    if tensor._version != version:
        raise UsageError(
            asked="gradients of the tensors that the forward used",
            found=f"a tensor of shape {tuple(shape)} that backward needs was modified in place after it was saved "
            f"(version {tensor._version}, saved at {version})",
            do="write its new values into another tensor (x = x + 1 for x += 1); the step fails without "
            "offload_saved as well",
        )
