"""Tensors that are put over a storage that is there already (``set_``), in a trace.

torch's fake tensors remember the results of operations by their arguments, and with them, for as long as the process
lives, a storage that is one. It would never be free in a trace, so such calls are not to be remembered.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


def _not_remembered(operation: Any, tensor: Any, *args: Any) -> Any:
    mode = tensor.fake_mode
    before, mode.cache_enabled = mode.cache_enabled, False
    try:
        return operation(tensor, *args)
    finally:
        mode.cache_enabled = before


STAND_INS: dict[str, Callable[..., Any]] = {
    f"set_.{overload}": functools.partial(_not_remembered, getattr(torch.ops.aten.set_, overload))
    for overload in ("source_Storage", "source_Storage_storage_offset")
}
