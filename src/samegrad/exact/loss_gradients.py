"""The loss on all output rows, once: its gradients with respect to them, and those of parameters it uses itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from samegrad.declared import DeclaredStep, checked_loss
from samegrad.errors import CannotSplit
from samegrad.exact import losses, program
from samegrad.exact.aliases import ParameterAliases
from samegrad.exact.handoff import hooks_silenced
from samegrad.exact.phases import announce
from samegrad.exact.sharded import refuse_in_loss
from samegrad.records import Phase


@dataclasses.dataclass(frozen=True)
class LossGradients:
    """``loss``: () detached. ``cotangents``: of each output leaf, None where the loss does not use it.

    ``owned``: parameters that the loss uses beside the rows, with their gradients.
    """

    loss: Tensor
    cotangents: list[Tensor | None]
    owned: list[nn.Parameter]
    owned_totals: list[Tensor | None]

    def joined(self, parameters: Sequence[nn.Parameter], totals: list[Tensor | None]) -> list[nn.Parameter]:
        """``parameters`` and after them those that only the loss owns, whose gradients are put into ``totals``."""
        all_of_them = list(parameters)
        place = {id(p): i for i, p in enumerate(all_of_them)}
        for parameter, total in zip(self.owned, self.owned_totals):
            index = place.get(id(parameter))
            if index is None:
                all_of_them.append(parameter)
                totals.append(total)
            else:
                # A parameter of the model that the loss uses as well: its gradient is the sum of both ways.
                before = totals[index]
                totals[index] = total if before is None else before.add_(total) if total is not None else before
        return all_of_them


def loss_gradients(
    declared: DeclaredStep,
    outputs: program.OutputRows,
    batch: Any,
    scale: Tensor,
    aliases: ParameterAliases,
    swapped: Sequence[nn.Parameter],
) -> LossGradients:
    """``declared``'s loss on ``outputs`` and its gradients; ``swapped`` stand in the place of the parameters now."""
    announce(Phase.LOSS)
    leaves = [leaf.requires_grad_() if leaf.is_floating_point() else leaf for leaf in outputs.leaves()]
    live = [leaf for leaf in leaves if leaf.requires_grad]
    with torch.enable_grad():
        loss = checked_loss(declared.loss_fn(outputs.tree(), batch))
    known = {id(leaf) for leaf in live}
    owned = [leaf for leaf in losses.leaves_under(loss) if id(leaf) not in known]
    if sharded := aliases.sharded_names():
        refuse_in_loss(owned, declared.network, sharded)
    owners = owners_of(owned, swapped, aliases.parameters)
    with hooks_silenced(owned):
        gradients = program.gradients_outside_autocast(loss, scale.to(loss.dtype), live + owned)
    by_leaf = {id(leaf): g for leaf, g in zip(live, gradients)}
    return LossGradients(loss.detach(), [by_leaf.get(id(leaf)) for leaf in leaves], owners, gradients[len(live) :])


def owners_of(
    leaves: Sequence[Tensor], stand_ins: Sequence[nn.Parameter], parameters: Sequence[nn.Parameter]
) -> list[nn.Parameter]:
    """The parameters whose ``stand_ins`` are among the ``leaves`` of a loss; other parameters are themselves.

    Raises CannotSplit for a tensor that is no parameter.
    """
    parameter_of = dict(zip(map(id, stand_ins), parameters))
    return [parameter_of[id(leaf)] if id(leaf) in parameter_of else _itself(leaf) for leaf in leaves]


def _itself(leaf: Tensor) -> nn.Parameter:
    if isinstance(leaf, nn.Parameter):
        return leaf
    raise CannotSplit(
        asked="a loss of the outputs, the batch and parameters",
        found=f"the loss also depends on a plain tensor of shape {tuple(leaf.shape)} that requires grad",
        do="make it a torch.nn.Parameter, detach it, or run the step whole with rows=<the batch's rows>",
    )
