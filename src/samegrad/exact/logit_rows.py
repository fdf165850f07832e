"""How hidden rows become logits: the head's weight, what the model does to its output, and zeros for kernels' sake.

On CUDA products are slow where a row of logits does not begin at a multiple of some bytes: a vocabulary that ends
elsewhere gets classes of zeros behind it, which nobody sees.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from samegrad.exact.chunk_map import Autocast

# From logits (positions, classes) to what the next operation takes, in the shape of the logits.
Pointwise = Callable[[Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class Cast:
    """Logits in another ``dtype``."""

    dtype: torch.dtype

    def __call__(self, logits: Tensor) -> Tensor:
        return logits.to(self.dtype)


# By device type: 128 bytes of the narrowest logits. Elsewhere kernels do not care.
_CLASSES_OF_A_TILE = {"cuda": 64}


@dataclasses.dataclass(frozen=True)
class LogitRows:
    """How a hidden row becomes its logits, and what the model makes of them before the loss takes them.

    ``weight`` (classes, width), ``bias`` (classes,) or None. ``autocast``: the blocks that were open at the head.
    ``beyond``: how many of their last classes are zeros that ``as_leaves`` put there.
    """

    weight: Tensor
    bias: Tensor | None
    autocast: Autocast
    then: tuple[Pointwise, ...] = ()
    beyond: int = 0

    def of(self, hidden: Tensor) -> Tensor:
        """(..., classes), of ``hidden`` (..., width): the operations of the plain step."""
        with self.autocast.entered():
            logits = F.linear(hidden, self.weight, self.bias)
        logits = logits[..., : logits.shape[-1] - self.beyond]
        for step in self.then:
            logits = step(logits)
        return logits

    def detached(self) -> LogitRows:
        return self._with(self.weight.detach(), None if self.bias is None else self.bias.detach())

    def as_leaves(self) -> LogitRows:
        """Leaves for one loss's chunks, cast once where autocast would cast in every chunk, with zeros behind."""
        beyond = -len(self.weight) % _CLASSES_OF_A_TILE.get(self.weight.device.type, 1)
        bias = None if self.bias is None else self._leaf(self.bias, beyond)
        return dataclasses.replace(self, weight=self._leaf(self.weight, beyond), bias=bias, beyond=beyond)

    def _with(self, weight: Tensor, bias: Tensor | None) -> LogitRows:
        return dataclasses.replace(self, weight=weight, bias=bias)

    def _leaf(self, parameter: Tensor, beyond: int) -> Tensor:
        own = self.autocast.cast(parameter.detach())
        leaf = torch.cat([own, own.new_zeros(beyond, *own.shape[1:])]) if beyond else own
        return leaf.requires_grad_(parameter.requires_grad)
