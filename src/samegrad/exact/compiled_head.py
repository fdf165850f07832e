"""A compiled forward without its head: the hidden rows come out, and the loss makes logits of them in chunks.

A compiler does not follow logits that have no memory. Inside the compiled function the head hands on what enters it, so
the hidden rows stand in the outputs where the logits would; outside they become logits that are still to be made
(``deferred_logits.py``), and the user's loss takes those in Python. Its chunks are compiled by themselves.

That is the same function only where the model hands its logits out as they are, which is tried on a few rows first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from samegrad import trees
from samegrad.errors import CannotSplit
from samegrad.exact.chunk_map import Autocast
from samegrad.exact.chunked_head import ChunkLosses, HeadLoss, losses_of_chunk
from samegrad.exact.deferred_logits import DeferredLogits, deferred
from samegrad.exact.find_head import HeadInChunks, named_head
from samegrad.exact.logit_rows import LogitRows
from samegrad.exact.pending_logits import PendingLogits, Uses


@dataclasses.dataclass(frozen=True)
class LogitPlace:
    """Where in the outputs the logits of ``head`` are: leaf ``index``, of ``dtype``, made under ``autocast``."""

    head: HeadInChunks
    index: int
    dtype: torch.dtype
    autocast: Autocast

    def with_logits(self, network: nn.Module, outputs: Any, losses: ChunkLosses) -> Any:
        """``outputs`` with deferred logits where hidden rows stand for them; ``losses`` computes those of chunks."""
        leaves, spec = trees.flatten(outputs)
        hidden: Tensor = leaves[self.index]
        head = named_head(network, self.head.path)
        logits = LogitRows(head.weight, head.bias, self.autocast)
        uses = Uses(self.head.path)
        leaves[self.index] = deferred(
            PendingLogits(hidden, logits, hidden.dim() - 1, self.dtype, self.head.rows, uses, losses)
        )
        return trees.unflatten(leaves, spec)


def own_losses_of_chunk() -> ChunkLosses:
    """What computes the losses of a chunk, as a function of its own: each that is compiled has one."""

    def losses(loss: HeadLoss, logits: LogitRows, hidden: Tensor, targets: Tensor) -> Tensor:
        return losses_of_chunk(loss, logits, hidden, targets)

    return losses


def find_place(head: HeadInChunks, network: nn.Module, forward: Callable[[], Any]) -> LogitPlace:
    """Where the logits of ``head`` come out. ``forward``: outputs on a few rows, with a graph and deferred logits.

    Raises CannotSplit where they do not come out as they are.
    """
    entered: list[Tensor] = []
    hook = named_head(network, head.path).register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0]))
    try:
        outputs = forward()
    finally:
        hook.remove()
    found = [
        (index, leaf.pending)
        for index, leaf in enumerate(trees.leaves_of(outputs))
        if isinstance(leaf, DeferredLogits)
    ]
    if len(entered) == 1 and len(found) == 1:
        [(index, known)] = found
        if known.hidden is entered[0] and not known.logits.then and known.class_axis == known.hidden.dim() - 1:
            return LogitPlace(head, index, known.dtype, known.logits.autocast)
    raise CannotSplit(
        asked=f"compile the forward of a step whose loss of {head.path} runs in chunks",
        found=f"the model does not give the logits of {head.path} out once and as they are: {len(entered)} calls, "
        f"{len(found)} outputs",
        do="leave compile or chunk_loss out of the plan, or do in the loss function what the model does to its logits",
    )
