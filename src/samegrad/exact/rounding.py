"""How coarse numbers are where they were computed, which their dtype alone does not say."""

from __future__ import annotations

import torch
from torch import Tensor

from samegrad.exact.tf32 import Tf32Products

# TF32 keeps 10 bits of a factor.
_TF32_EPS = 2.0**-10


def eps_in_use(of: Tensor) -> float:
    """The distance from 1 to the next number in the coarsest format that ``of`` may have gone through now.

    Autocast returns float32 from sums of bfloat16 products, and products of float32 may be rounded to TF32 on CUDA.
    """
    eps = float(torch.finfo(of.dtype).eps)
    device_type = of.device.type
    if torch.is_autocast_enabled(device_type):
        eps = max(eps, float(torch.finfo(torch.get_autocast_dtype(device_type)).eps))
    if device_type == "cuda" and of.dtype is torch.float32 and Tf32Products.now().any:
        eps = max(eps, _TF32_EPS)
    return eps
