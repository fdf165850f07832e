"""A step whose model couples rows: parts of the model run in chunks, the rest and the loss on the whole batch.

The model's own code runs once on all rows; what a scheme puts in place of its parts runs a few rows at a time and again
in backward. So any loss is exact, in one pass over the rest. Gradients are taken on aliases and handed over once, as
in a split step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from samegrad import trees
from samegrad.declared import DeclaredStep, checked_loss
from samegrad.exact import losses, program
from samegrad.exact.aliases import ParameterAliases
from samegrad.exact.chunk_map import kept_magnitudes
from samegrad.exact.findings import Examination
from samegrad.exact.handoff import hooks_silenced
from samegrad.exact.loss_gradients import owners_of
from samegrad.exact.passes import StepTotals, handed_over
from samegrad.exact.phases import announce, arriving_chunks
from samegrad.exact.randomness import DrawSites, StepKey
from samegrad.exact.ranks import Agreement
from samegrad.exact.schemes import Scheme
from samegrad.exact.shared_leaves import stood_in
from samegrad.exact.state import StateRule
from samegrad.exact.step_draws import StepDraws
from samegrad.exact.undisturbed import Before, ModuleState
from samegrad.records import Phase
from samegrad.trees import RowLayout


@dataclasses.dataclass(frozen=True)
class MappedExamination:
    """What is known of a mapped step. ``reason``: what couples its rows, in words. ``sites``: where it draws.

    ``by_rows``: how its rows could be split through the whole model, where they could. ``sites_are_all``: it is known
    to draw nowhere else. ``rules``: how state that it changes, running statistics apart, is reduced over chunks.
    """

    reason: str
    sites: DrawSites | None = None
    by_rows: Examination | None = None
    sites_are_all: bool = False
    rules: tuple[StateRule, ...] = ()
    passes: ClassVar[int] = 1


@dataclasses.dataclass(frozen=True)
class MappedStep:
    """A step under ``scheme``. ``agreement``: where ranks go on together or not at all."""

    declared: DeclaredStep
    aliases: ParameterAliases
    examination: MappedExamination
    scheme: Scheme
    with_magnitudes: bool = False
    agreement: Agreement | None = None

    def keeping_magnitudes(self) -> MappedStep:
        """The same step, whose totals bring the sums of the chunks' absolute gradients."""
        return dataclasses.replace(self, with_magnitudes=True)

    def totals(
        self, batch: Any, layout: RowLayout, sizes: Sequence[int], scaler: Any = None, key: StepKey | None = None
    ) -> StepTotals:
        """The step's gradients, not handed over. Buffers are written; when anything raises they are put back."""
        before = Before(self.declared.device, ModuleState.of(self.declared))
        with before.restored_on_failure():
            totals = self._totals(batch, layout, sizes, scaler, key)
        return dataclasses.replace(totals, committed=before.restored_on_failure)

    def _totals(
        self, batch: Any, layout: RowLayout, sizes: Sequence[int], scaler: Any, key: StepKey | None
    ) -> StepTotals:
        examined = self.examination
        draws = StepDraws(examined.sites, StepKey() if key is None else key, are_all=examined.sites_are_all)
        draws.take()
        return self._summed(batch, layout, sizes, scaler, draws)

    def backward(
        self, batch: Any, layout: RowLayout, sizes: Sequence[int], scaler: Any = None, key: StepKey | None = None
    ) -> Tensor:
        """The step's loss, detached; gradients are in ``.grad`` as after the plain step's backward."""
        def totals() -> StepTotals:
            return self.totals(batch, layout, sizes, scaler, key)

        return handed_over(self.declared, totals, self.agreement)

    def _summed(
        self, batch: Any, layout: RowLayout, sizes: Sequence[int], scaler: Any, draws: StepDraws
    ) -> StepTotals:
        declared, device, rules = self.declared, self.declared.device, self.examination.rules
        batch, aliases = stood_in(batch, layout, self.aliases)
        [whole] = arriving_chunks([trees.move(trees.slice_rows(batch, layout, 0, layout.rows), device)])
        ids = torch.arange(layout.rows, device=device) if draws.sites is not None else None
        with aliases.swapped() as swapped, kept_magnitudes(self.with_magnitudes) as magnitudes:
            with torch.enable_grad(), self.scheme(declared.network, sizes=sizes, draws=draws, rules=rules):
                announce(Phase.FORWARD)
                with draws.all_rows(ids):
                    outputs = declared.forward(declared.network, whole)
                announce(Phase.LOSS)
                loss = checked_loss(declared.loss_fn(outputs, whole))
                del outputs
                announce(Phase.BACKWARD)
                leaves = losses.leaves_under(loss)
                scaled = loss if scaler is None else scaler.scale(loss)
                with hooks_silenced(leaves):
                    gradients = program.gradients_outside_autocast(scaled, torch.ones_like(scaled), leaves)
            sizes_of: list[Tensor | None] = [None] * len(leaves)
            if self.with_magnitudes:
                sizes_of = [magnitudes.of(leaf, gradient) for leaf, gradient in zip(leaves, gradients)]
        owners = owners_of(leaves, swapped, aliases.parameters)
        # A parameter may be reached past its place as well: then it has two leaves.
        parameters = list(dict.fromkeys([*aliases.parameters, *owners]))
        return StepTotals(
            loss.detach(),
            parameters,
            _added_up(parameters, owners, gradients),
            magnitudes=_added_up(parameters, owners, sizes_of) if self.with_magnitudes else None,
        )


def _added_up(
    parameters: Sequence[nn.Parameter], owners: Sequence[nn.Parameter], parts: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """For each of ``parameters`` the sum of the ``parts`` that it owns, None where it owns none."""
    sums: dict[nn.Parameter, Tensor] = {}
    for owner, part in zip(owners, parts):
        if part is not None:
            sums[owner] = part if owner not in sums else sums[owner] + part
    return [sums.get(parameter) for parameter in parameters]
