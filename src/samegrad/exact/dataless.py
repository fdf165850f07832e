"""Tensors without data: on the meta device, or those of a trace that follows a step without running it.

The engine runs on them as on others, up to the few places that read a value back. Those ask here.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor


def has_data(tensor: Tensor) -> bool:
    """Whether ``tensor`` has values that could be read."""
    # A traced tensor names the device that it stands for; its memory is where it really is.
    return tensor.untyped_storage().device.type != "meta"


def is_torchs_own(tensor: Tensor) -> bool:
    """Whether ``tensor`` is of no kind of its own: torch's plain one, a parameter, or one's twin in a trace."""
    return type(tensor) in (Tensor, nn.Parameter) or _is_traced(tensor)


def memory_of(tensor: Tensor) -> int:
    """A number that tensors share which lie in one storage, for as long as it lives."""
    storage = tensor.untyped_storage()
    return int(storage._cdata) if _is_traced(tensor) else storage.data_ptr()


def _is_traced(tensor: Tensor) -> bool:
    return type(tensor) is FakeTensor or (isinstance(tensor, nn.Parameter) and isinstance(tensor.data, FakeTensor))


def computing() -> bool:
    """Whether operations compute: not while a trace follows them, when new tensors have no data."""
    return has_data(torch.empty(0, device="cpu"))
