"""The declared step on copies of the model and the loss in float64, where rounding decides nothing."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from torch import nn

from samegrad import trees
from samegrad.declared import DeclaredStep
from samegrad.exact.captured import in_float64


def float64_declared(declared: DeclaredStep, device: torch.device) -> DeclaredStep:
    """The declared step on copies of the model and the loss in float64 on ``device``."""
    network, loss_module = copy.deepcopy((declared.network, declared.loss_module))
    if loss_module is None:
        loss_fn = in_float64(declared.loss_fn, device)
    else:
        loss_fn = loss_module.to(device, torch.float64)
    return dataclasses.replace(
        declared,
        model=network.to(device, torch.float64),
        loss_fn=loss_fn,
        forward=in_float64(declared.forward, device),
        plain_forward=None if declared.plain_forward is None else in_float64(declared.plain_forward, device),
        optimizer=_without_state(network) if declared.optimizer is not None else None,
        device=device,
    )


def _without_state(network: nn.Module) -> torch.optim.Optimizer:
    """An optimizer for levers that stand beside one: the user's state is no copy's."""
    return torch.optim.SGD(network.parameters(), lr=0.0)


def widened(batch: Any) -> Any:
    """``batch`` with its floating leaves in float64."""
    return trees.map_tensors(batch, lambda leaf: leaf.double() if leaf.is_floating_point() else leaf)
