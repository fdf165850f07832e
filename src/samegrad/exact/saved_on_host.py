"""What autograd keeps for backward, moved to pinned host memory while it waits.

On the CPU there is nothing to be gained, and nothing is moved. Copies are ordered by the CUDA stream they were made on,
where backward runs as well. A tensor that several operations save is moved once.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Hashable, Iterable
from typing import Any

import torch
from torch import Tensor


class SavedOnHost:
    """Hooks for saved tensors. ``standing``: tensors that stay on the device anyway, such as parameters and inputs."""

    def __init__(self, device: torch.device, standing: Iterable[Tensor]) -> None:
        self._active = device.type == "cuda"
        self._standing = {t.untyped_storage()._cdata for t in standing}
        self._moved: dict[Hashable, _Moved] = {}
        self._seen: dict[int, tuple[Any, set[Hashable]]] = {}

    def entered(self) -> contextlib.AbstractContextManager[Any]:
        """For one thread; every thread that computes has to enter it."""
        if not self._active:
            return contextlib.nullcontext()
        return torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)

    def _pack(self, tensor: Tensor) -> Any:
        storage = tensor.untyped_storage()
        place = storage._cdata
        if tensor.device.type != "cuda" or place in self._standing:
            return tensor
        key = (place, tensor._version, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
        if key not in self._moved:
            if place not in self._seen:
                # Once freed, another tensor may stand at the same place.
                self._seen[place] = (weakref.ref(storage, lambda _: self._forget(place)), set())
            self._seen[place][1].add(key)
            self._moved[key] = _Moved(tensor)
        return self._moved[key]

    def _forget(self, place: int) -> None:
        for key in self._seen.pop(place)[1]:
            del self._moved[key]


class _Moved:
    def __init__(self, tensor: Tensor) -> None:
        self.device = tensor.device
        self.host = torch.empty_like(tensor, device="cpu", pin_memory=True)
        self.host.copy_(tensor, non_blocking=True)


def _unpack(packed: Any) -> Tensor:
    if isinstance(packed, _Moved):
        return packed.host.to(packed.device, non_blocking=True)
    assert isinstance(packed, Tensor)
    return packed
