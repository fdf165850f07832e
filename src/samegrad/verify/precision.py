"""How a step rounds: the precision its gradients pass through, and whether layers share statistics of all rows."""

from __future__ import annotations

import torch
from torch import nn

from samegrad.declared import DeclaredStep
from samegrad.exact.tf32 import Tf32Products
from samegrad.verify import tolerance
from samegrad.verify.tolerance import Precision


def precision_in_use(declared: DeclaredStep) -> Precision:
    """The coarsest rounding that gradients pass through: of parameters, of autocast, or of TF32 products."""
    device_type = declared.device.type
    kinds = {p.dtype for p in declared.network.parameters() if p.is_floating_point()}
    if torch.is_autocast_enabled(device_type):
        kinds.add(torch.get_autocast_dtype(device_type))
    dtype = max(kinds, key=lambda kind: torch.finfo(kind).eps, default=torch.get_default_dtype())
    if dtype is torch.float32 and device_type == "cuda" and _has_tf32_products(declared.network):
        return tolerance.TF32
    return tolerance.precision_of(dtype)


def _has_tf32_products(network: nn.Module) -> bool:
    products = Tf32Products.now()
    return products.matrices or any(
        (products.convolutions and isinstance(part, nn.modules.conv._ConvNd))
        or (products.recurrences and isinstance(part, nn.RNNBase))
        for part in network.modules()
    )


def uses_batch_statistics(declared: DeclaredStep) -> bool:
    """Whether a layer normalises with the statistics of all rows, as BatchNorm does in training mode."""
    return any(
        isinstance(part, nn.modules.batchnorm._BatchNorm)
        and not isinstance(part, nn.modules.instancenorm._InstanceNorm)
        and (part.training or part.running_mean is None)
        for part in declared.network.modules()
    )
