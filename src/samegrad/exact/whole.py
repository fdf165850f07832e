"""The plain step as a transaction: the user's call on the whole batch, and gradients handed over at the end.

``loss.backward()`` writes ``.grad``, fires hooks and lets DDP reduce while it runs, so what fails halfway could not be
undone. Here it runs with gradients of its own, and what it found is delivered as that of a step in chunks is. The
operations and their bits are the plain step's. Where ``.grad`` stands already, the new gradients take memory beside it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from samegrad import trees
from samegrad.declared import DeclaredStep, checked_loss
from samegrad.exact import losses, program
from samegrad.exact.findings import Examination
from samegrad.exact.handoff import begin_step, gradients_apart, hand_over
from samegrad.exact.phases import announce, arriving_chunks
from samegrad.exact.ranks import Agreement
from samegrad.exact.split import under_draws, whole_on_device
from samegrad.exact.state import StateTransaction
from samegrad.exact.step_draws import StepDraws
from samegrad.exact.undisturbed import Generators, undone_on_failure
from samegrad.records import Phase
from samegrad.trees import RowLayout


@dataclasses.dataclass(frozen=True)
class WholeStep:
    """A step that is not split. ``parameters``: those that train. ``draws``: what the model draws, where it may split.

    ``examination``: how it could be split, where it could: then it is known what the step changes, and only that is
    set aside. ``agreement``: where ranks go on together or not at all.
    """

    declared: DeclaredStep
    parameters: Sequence[nn.Parameter]
    draws: StepDraws | None = None
    examination: Examination | None = None
    agreement: Agreement | None = None

    def backward(self, batch: Any, layout: RowLayout, scaler: Any = None) -> Tensor:
        """The step's loss, detached; gradients are in ``.grad`` as after the plain step's backward."""
        begin_step(self.declared.model)
        with self._undone_on_failure():
            loss, leaves, totals = self._totals(batch, layout, scaler)
            hand_over(self.declared.model, leaves, totals, self.agreement)
        return loss

    @contextlib.contextmanager
    def _undone_on_failure(self) -> Iterator[None]:
        if self._known is None:
            with undone_on_failure(self.declared):
                yield
            return
        state = StateTransaction(self.declared.network, self._known.rules)
        with Generators(self.declared.device).restored_on_failure(), state.undone_on_failure():
            yield

    @property
    def _known(self) -> Examination | None:
        # In one pass the loss was seen to change nothing and to use nothing but rows and its module's own parameters.
        return self.examination if self.examination is not None and self.examination.passes == 1 else None

    def _totals(
        self, batch: Any, layout: RowLayout, scaler: Any
    ) -> tuple[Tensor, list[nn.Parameter], list[Tensor | None]]:
        """The loss, what may have a gradient (a tensor of the batch as it stands there), and the gradients."""
        declared = under_draws(self.declared, self.draws)
        batch, stand_ins, owner_of = _apart(batch)
        [whole] = arriving_chunks([whole_on_device(declared, batch, layout)])
        announce(Phase.FORWARD)
        outputs = declared.forward(declared.network, whole)
        announce(Phase.LOSS)
        loss = checked_loss(declared.loss_fn(outputs, whole))
        del outputs
        announce(Phase.BACKWARD)
        # A reentrant checkpoint hides parameters from the graph.
        others = stand_ins if self._known is not None else losses.leaves_under(loss)
        leaves: list[Any] = list({id(leaf): leaf for leaf in (*self.parameters, *others)}.values())
        scaled = loss if scaler is None else scaler.scale(loss)
        with gradients_apart(leaves) as totals:
            program.backward_outside_autocast([scaled], [torch.ones_like(scaled)])
        return loss.detach(), [owner_of.get(id(leaf), leaf) for leaf in leaves], totals


def _apart(batch: Any) -> tuple[Any, list[Tensor], dict[int, Tensor]]:
    """``batch`` with leaves of their own for what requires grad; those, and whose place each takes.

    So the graph that they came from runs once, when gradients are handed over.
    """
    stand_ins: dict[int, Tensor] = {}
    owner_of: dict[int, Tensor] = {}

    def apart(leaf: Tensor) -> Tensor:
        if not leaf.requires_grad:
            return leaf
        stand_in = stand_ins.setdefault(id(leaf), leaf.detach().requires_grad_())
        owner_of[id(stand_in)] = leaf
        return stand_in

    return trees.map_tensors(batch, apart), list(stand_ins.values()), owner_of


def reduces_in_backward(declared: DeclaredStep) -> bool:
    """Whether nodes of the parameters' own wait for other ranks while backward runs (FullyShardedDataParallel)."""
    loaded = sys.modules.get("torch.distributed.fsdp")
    return loaded is not None and any(
        isinstance(part, loaded.FullyShardedDataParallel) for module in declared.modules for part in module.modules()
    )
