"""The plain step as a transaction: the user's call on the whole batch, and gradients handed over at the end.

``loss.backward()`` writes ``.grad``, fires hooks and lets DDP reduce while it runs, so what fails halfway could not be
undone. Here it runs with gradients of its own, and what it found is delivered as that of a step in chunks is. The
operations and their bits are the plain step's. Where ``.grad`` stands already, the new gradients take memory beside it.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import torch
from torch import Tensor, nn

from samegrad import trees
from samegrad.declared import DeclaredStep, checked_loss
from samegrad.exact import losses, program
from samegrad.exact.handoff import begin_step, gradients_apart, hand_over
from samegrad.exact.phases import announce, arriving_chunks
from samegrad.exact.ranks import Agreement
from samegrad.exact.split import under_draws, whole_on_device
from samegrad.exact.step_draws import StepDraws
from samegrad.exact.undisturbed import undone_on_failure
from samegrad.records import Phase
from samegrad.trees import RowLayout


@dataclasses.dataclass(frozen=True)
class WholeStep:
    """A step that is not split. ``draws``: what the model draws, where the step is one that may be split.

    ``agreement``: where ranks go on together or not at all.
    """

    declared: DeclaredStep
    draws: StepDraws | None = None
    agreement: Agreement | None = None

    def backward(self, batch: Any, layout: RowLayout, scaler: Any = None) -> Tensor:
        """The step's loss, detached; gradients are in ``.grad`` as after the plain step's backward."""
        begin_step(self.declared.model)
        with undone_on_failure(self.declared):
            loss, leaves, totals = self._totals(batch, layout, scaler)
            if self.agreement is not None:
                self.agreement.ready()
            announce(Phase.HANDOFF)
            hand_over(self.declared.model, leaves, totals)
        return loss

    def _totals(
        self, batch: Any, layout: RowLayout, scaler: Any
    ) -> tuple[Tensor, list[nn.Parameter], list[Tensor | None]]:
        """The loss, what may have a gradient (a tensor of the batch as it stands there), and the gradients."""
        declared = under_draws(self.declared, self.draws)
        batch, owner_of = _apart(batch)
        [whole] = arriving_chunks([whole_on_device(declared, batch, layout)])
        announce(Phase.FORWARD)
        outputs = declared.forward(declared.network, whole)
        announce(Phase.LOSS)
        loss = checked_loss(declared.loss_fn(outputs, whole))
        del outputs
        announce(Phase.BACKWARD)
        # A reentrant checkpoint hides parameters from the graph.
        own = [p for module in declared.modules for p in module.parameters() if p.requires_grad]
        leaves: list[Any] = list({id(leaf): leaf for leaf in (*own, *losses.leaves_under(loss))}.values())
        scaled = loss if scaler is None else scaler.scale(loss)
        with gradients_apart(leaves) as totals:
            program.backward_outside_autocast([scaled], [torch.ones_like(scaled)])
        return loss.detach(), [owner_of.get(id(leaf), leaf) for leaf in leaves], totals


def _apart(batch: Any) -> tuple[Any, dict[int, Tensor]]:
    """``batch`` with leaves of their own for what requires grad, and whose place each takes: its graph runs once."""
    owner_of: dict[int, Tensor] = {}
    stand_ins: dict[int, Tensor] = {}

    def apart(leaf: Tensor) -> Tensor:
        if not leaf.requires_grad:
            return leaf
        stand_in = stand_ins.setdefault(id(leaf), leaf.detach().requires_grad_())
        owner_of[id(stand_in)] = leaf
        return stand_in

    return trees.map_tensors(batch, apart), owner_of


def reduces_in_backward(declared: DeclaredStep) -> bool:
    """Whether nodes of the parameters' own wait for other ranks while backward runs (FullyShardedDataParallel)."""
    loaded = sys.modules.get("torch.distributed.fsdp")
    return loaded is not None and any(
        isinstance(part, loaded.FullyShardedDataParallel) for module in declared.modules for part in module.modules()
    )
