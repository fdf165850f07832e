"""The two sides of a verification: the plain step and the planned one, from the same weights, state and draws.

Rows stay where the batch is. The plain side moves them to its device as a whole; the planned side lets its levers
bring them, as the step does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from samegrad import trees
from samegrad.declared import DeclaredStep, checked_loss
from samegrad.errors import GradientsDiffer
from samegrad.exact import losses
from samegrad.exact.draw_sites import DrawSites
from samegrad.exact.draws import StepKey
from samegrad.exact.handoff import hooks_silenced
from samegrad.exact.mapped import ChunkedStep, MappedStep
from samegrad.exact.shared_leaves import cut_loose
from samegrad.exact.split import SplitStep, under_draws
from samegrad.exact.step_draws import StepDraws
from samegrad.exact.undisturbed import Generators, ModuleState, step_undisturbed
from samegrad.execute.apply import applied
from samegrad.records import Plan
from samegrad.trees import RowLayout
from samegrad.verify.compare import Gradients

_MAGNITUDE_PARTS = 64


@dataclasses.dataclass(frozen=True)
class Bench:
    """Runs each side from the same buffers and generators, on rows of its own: forwards may write on their input."""

    generators: Generators
    state: ModuleState
    rows: Any

    def run(self, side: Callable[[Any], Gradients]) -> Gradients:
        self.state.restore()
        self.generators.restore()
        return side(cut_loose(trees.map_tensors(self.rows, Tensor.clone)))


@dataclasses.dataclass(frozen=True)
class Planned:
    """The planned step on the rows that are compared.

    ``split`` is None where the plan runs whole. ``layout`` and ``parts`` are those of the compared rows, ``plan`` is
    in force as on a batch of ``plan_rows`` rows.
    """

    declared: DeclaredStep
    split: ChunkedStep | None
    plan: Plan
    plan_rows: int
    layout: RowLayout
    parts: tuple[int, ...]

    @property
    def sites(self) -> DrawSites | None:
        """Where the model draws; both sides make the same draws. None where it draws nothing, or runs whole."""
        return None if self.split is None else self.split.examination.sites

    def gradients(self, rows: Any) -> Gradients:
        """What the planned step would hand over for ``rows``, with Σ|g_k| of small parts of them beside it."""
        return self._run(rows, _totals)

    def handed_over(self, rows: Any) -> Gradients:
        """The same as it arrives in ``.grad``. For copies of a model only, since that is where it is left."""
        return self._run(rows, _arrived)

    def _run(self, rows: Any, side: Callable[[ChunkedStep, Any, RowLayout, Sequence[int]], Gradients]) -> Gradients:
        with applied(self.plan, self.declared, self.plan_rows) as execution:
            if self.split is None:
                whole = plain_gradients(execution.declared, rows)
                sizes = {name: None if g is None else g.abs() for name, g in whole.by_name.items()}
                return dataclasses.replace(whole, magnitudes=sizes)
            split = self.split
            if execution.declared is not split.declared:
                split = dataclasses.replace(split, declared=execution.declared)
            found = side(split, rows, self.layout, self.parts)
            # Gradients that the loss itself adds have no chunks; their own size is their scale.
            sizes = {name: None if g is None else g.abs() for name, g in found.by_name.items()}
            keeping = _keeping_magnitudes(split, self.declared)
            return dataclasses.replace(found, magnitudes=sizes | _magnitudes(keeping, rows, self.layout, self.parts))


def plain_gradients(declared: DeclaredStep, batch: Any, sites: DrawSites | None = None) -> Gradients:
    """The unconstrained step's loss and gradients; ``.grad`` and the user's hooks see nothing of it.

    ``sites``: where the model draws, for the draws that the planned side makes.
    """
    declared = under_draws(declared, StepDraws(sites, step_key()))
    whole = trees.move(batch, declared.device)
    with torch.enable_grad():
        loss = checked_loss(declared.loss_fn(declared.forward(declared.network, whole), whole))
    leaves = losses.leaves_under(loss)
    with hooks_silenced(leaves), torch.autocast(declared.device.type, enabled=False):
        gradients = torch.autograd.grad(loss, leaves)
    return Gradients(_by_name(declared, leaves, gradients), float(loss.detach()))


def step_key() -> StepKey:
    """The key of both sides' draws; torch's generators are left alone."""
    return StepKey.fixed(0)


def _totals(split: ChunkedStep, batch: Any, layout: RowLayout, parts: Sequence[int]) -> Gradients:
    totals = split.totals(batch, layout, parts, key=step_key())
    totals.commit()
    return Gradients(_by_name(split.declared, totals.parameters, totals.totals), float(totals.loss))


def _arrived(split: ChunkedStep, batch: Any, layout: RowLayout, parts: Sequence[int]) -> Gradients:
    parameters = [p for module in split.declared.modules for p in module.parameters()]
    try:
        for parameter in parameters:
            parameter.grad = None
        loss = split.backward(batch, layout, parts, key=step_key())
        return Gradients(_by_name(split.declared, parameters, [p.grad for p in parameters]), float(loss))
    finally:
        for parameter in parameters:
            parameter.grad = None


def _keeping_magnitudes(split: ChunkedStep, declared: DeclaredStep) -> ChunkedStep:
    """What sums up the sizes of small parts' gradients: the declared step split by rows, where ``split`` runs whole."""
    by_rows = split.examination.by_rows if isinstance(split, MappedStep) else None
    if by_rows is None:
        return split.keeping_magnitudes()
    return SplitStep(declared, split.aliases, by_rows).keeping_magnitudes()


def _magnitudes(
    keeping: ChunkedStep, batch: Any, layout: RowLayout, parts: Sequence[int]
) -> dict[str, Tensor | None]:
    # Near an optimum a chunk's own gradient is what is left of terms that cancel, while rounding grows with the
    # terms: their size is taken from parts much smaller than the plan's.
    fine = trees.even_sizes(layout.rows, max(1, layout.rows // _MAGNITUDE_PARTS))
    with step_undisturbed(keeping.declared):
        try:
            small = keeping.totals(batch, layout, fine, key=step_key())
        except GradientsDiffer:
            # Of parts that the plan does not have; the plan's own are compared beside this.
            small = keeping.totals(batch, layout, parts, key=step_key())
    return _by_name(keeping.declared, small.parameters, small.magnitudes or [])


def parameter_names(declared: DeclaredStep) -> dict[int, str]:
    """Names of the parameters by ``id``; the loss's begin with ``loss_fn``."""
    names = {id(p): name for name, p in declared.network.named_parameters()}
    if declared.loss_module is not None:
        names |= {id(p): f"loss_fn.{name}" for name, p in declared.loss_module.named_parameters()}
    return names


def _by_name(
    declared: DeclaredStep, leaves: Sequence[Tensor], gradients: Sequence[Tensor | None]
) -> dict[str, Tensor | None]:
    names = parameter_names(declared)
    found: dict[str, Tensor | None] = {}
    for leaf, gradient in zip(leaves, gradients):
        if gradient is not None:
            name = names.get(id(leaf), f"a parameter of the loss, shape {tuple(leaf.shape)}")
            found[name] = gradient.to_dense() if gradient.is_sparse else gradient
    return found
