"""What ``--dtype`` asks for: the format of the weights, and autocast over them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def weight_dtype(dtype: str) -> torch.dtype:
    """float64 where it is asked for, else float32: narrower formats are autocast's."""
    return torch.float64 if dtype == "float64" else torch.float32


def narrow_dtype(dtype: str) -> torch.dtype | None:
    """The format of autocast, None for none."""
    return {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(dtype)


def autocast(dtype: torch.dtype | None, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Autocast in ``dtype``; nothing for None."""
    return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def forward_under(dtype: torch.dtype | None) -> Callable[[nn.Module, Tensor], Tensor] | None:
    """How a model of one tensor is called: None for its own way, or under autocast."""
    if dtype is None:
        return None

    def under_autocast(model: nn.Module, rows: Tensor) -> Tensor:
        with torch.autocast(rows.device.type, dtype=dtype):
            found: Tensor = model(rows)
        return found

    return under_autocast
