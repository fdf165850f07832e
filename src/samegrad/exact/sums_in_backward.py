"""Gradients that a compiled backward adds to the step's sums itself, parameter by parameter.

A compiled backward hands all gradients out at its end, so that a chunk would hold a second set of them beside the sums.
Here each parameter is read through a node whose backward adds to its sum, and nothing is left to hand out. The compiler
sees that, frees each gradient as it is added, and lets products add where they can.

Where no sum stands, and for whatever a trial of a few rows did not reach, gradients arrive as they always do.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.stateless import _reparametrize_module

# By the names of a network's parameters.
NamedSums = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class StandingSums:
    """``of(index)``: the sum of an alias, which stands to the end of the step and is added to in place.

    ``always``: they stand whether or not there is more than one chunk.
    """

    of: Callable[[int], Tensor]
    always: bool = False


class _ReadThrough(torch.autograd.Function):
    """The parameter itself; what arrives for it is added to its sum and goes no further."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, total: Tensor) -> Tensor:
        ctx.save_for_backward(total)
        return parameter.view_as(parameter)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        (total,) = ctx.saved_tensors
        total.add_(gradient)
        return None, None


def adding_to(network: nn.Module, sums: NamedSums) -> AbstractContextManager[Any]:
    """A block in which gradients of ``network`` go to ``sums``; those of other parameters to ``.grad``."""
    through = {
        # autograd.Function.apply carries no types.
        name: cast(Any, _ReadThrough).apply(parameter, sums[name])
        for name, parameter in network.named_parameters()
        if name in sums
    }
    return cast(AbstractContextManager[Any], _reparametrize_module(network, through, tie_weights=True))
