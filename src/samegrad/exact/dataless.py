"""Tensors without data: on the meta device, or those of a trace that follows a step without running it.

The engine runs on them as on others, up to the few places that read a value back. Those ask here.
"""

from __future__ import annotations

import torch
from torch import Tensor


def has_data(tensor: Tensor) -> bool:
    """Whether ``tensor`` has values that could be read."""
    # A traced tensor names the device that it stands for; its memory is where it really is.
    return tensor.untyped_storage().device.type != "meta"


def computing() -> bool:
    """Whether operations compute: not while a trace follows them, when new tensors have no data."""
    return has_data(torch.empty(0, device="cpu"))
