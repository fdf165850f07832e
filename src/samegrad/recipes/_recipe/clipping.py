"""Gradients scaled down to a norm before each optimizer step, once, on the total gradient."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn, optim


@dataclasses.dataclass(frozen=True)
class Clip:
    """Scales the gradients that an optimizer is about to use down to a norm of ``largest_norm``."""

    largest_norm: float

    def __call__(self, optimizer: optim.Optimizer, _: Any, __: Any) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        nn.utils.clip_grad_norm_(parameters, self.largest_norm)


def clip_before_step(optimizer: optim.Optimizer, largest_norm: float) -> None:
    """From now on; a norm of 0 leaves gradients alone.

    The optimizer's own hook and nothing in the loop: by then a GradScaler has taken its scale off.
    """
    if largest_norm:
        optimizer.register_step_pre_hook(Clip(largest_norm))
