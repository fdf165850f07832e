"""Losses whose one number stands in memory for all entries.

torch's kernels of these first make room for every entry and then cut the result to its shape; the memory stays as long
as the loss does. Shapes alone do not tell. Source: torch's ``aten/src/ATen/native/BinaryOps.cpp``,
``TORCH_META_FUNC(mse_loss)``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_NO_REDUCTION = 0


def _reduced(outputs: Tensor, targets: Tensor, reduction: int = 1, *_: Any) -> Tensor:
    dtype = torch.result_type(outputs, targets)
    every = torch.empty(_entries(outputs, targets), dtype=dtype, device=outputs.device)
    return every if reduction == _NO_REDUCTION or not every.numel() else every.as_strided((), ())


def scratch_bytes(args: tuple[Any, ...]) -> int:
    """Beside the result, the kernel holds every entry once more while it adds them up."""
    outputs, targets = args[:2]
    if len(args) > 2 and args[2] == _NO_REDUCTION:
        return 0
    return _entries(outputs, targets).numel() * torch.result_type(outputs, targets).itemsize


def _entries(outputs: Tensor, targets: Tensor) -> torch.Size:
    return torch.Size(torch.broadcast_shapes(outputs.shape, targets.shape))  # type: ignore[no-untyped-call]  # torch has no types here


STAND_INS: dict[str, Callable[..., Any]] = {"mse_loss": _reduced, "smooth_l1_loss": _reduced}
