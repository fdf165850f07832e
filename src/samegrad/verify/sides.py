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
from samegrad.exact.mapped import MappedStep
from samegrad.exact.one_chunk import ChunkedStep, OneChunkStep
from samegrad.exact.shared_leaves import cut_loose
from samegrad.exact.split import SplitStep, under_draws
from samegrad.exact.step_draws import StepDraws
from samegrad.exact.undisturbed import Generators, ModuleState, step_undisturbed
from samegrad.execute.apply import in_force
from samegrad.records import Plan
from samegrad.trees import RowLayout
from samegrad.verify.compare import Gradients
from samegrad.verify.precision import precision_in_use
from samegrad.verify.rounded import Rounding
from samegrad.verify.tolerance import Precision

Side = Callable[[ChunkedStep, Any, RowLayout, Sequence[int], float], Gradients]

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
    in force as on a batch of ``plan_rows`` rows. ``sites``: where the model draws; both sides make the same draws.
    ``by_rows``: what splits a step that runs whole, where something does. ``loss_scale``: of the loss on both sides.
    """

    declared: DeclaredStep
    split: ChunkedStep | None
    plan: Plan
    plan_rows: int
    layout: RowLayout
    parts: tuple[int, ...]
    sites: DrawSites | None = None
    by_rows: ChunkedStep | None = None
    loss_scale: float = 1.0

    @property
    def is_plain_call(self) -> bool:
        """Whether nothing of it could differ: no lever, and the forward that it is compared with."""
        return not self.plan.levers and self.declared.plain_forward is None

    @property
    def rounding(self) -> Rounding:
        """How the plan rounds beyond what was declared."""
        return Rounding.of(self.plan)

    @property
    def precision(self) -> Precision:
        """The coarsest rounding that gradients pass through under the plan."""
        with self.rounding.block(self.declared.device.type):
            return precision_in_use(self.declared)

    def reference(self, rows: Any) -> Gradients:
        """The plain step's gradients for ``rows``, rounded as the plan rounds."""
        with self.rounding.applied(self.declared.as_plain) as declared:
            return plain_gradients(declared, rows, self.sites, self.loss_scale)

    def gradients(self, rows: Any) -> Gradients:
        """What the planned step would hand over for ``rows``, with Σ|g_k| of small parts of them beside it."""
        return self._with_magnitudes(rows, _totals)

    def handed_over(self, rows: Any) -> Gradients:
        """The same as it arrives in ``.grad``. For copies of a model only, since that is where it is left."""
        return self._with_magnitudes(rows, _arrived)

    def bare_gradients(self, rows: Any) -> Gradients:
        """What the planned step would hand over for ``rows``, and nothing beside it."""
        with in_force(self.plan, self.declared, self.plan_rows) as execution:
            return self._run(execution.declared, rows, _totals)

    def _with_magnitudes(self, rows: Any, side: Side) -> Gradients:
        with in_force(self.plan, self.declared, self.plan_rows) as execution:
            found = self._run(execution.declared, rows, side)
            # Gradients that the loss itself adds have no chunks; their own size is their scale.
            sizes = {name: None if g is None else g.abs() for name, g in found.by_name.items()}
            keeping = self._keeping_magnitudes(execution.declared)
            if keeping is not None:
                parts = self.parts if isinstance(self.split, SplitStep) else None
                sizes |= _magnitudes(keeping, rows, self.layout, parts, self.loss_scale)
            return dataclasses.replace(found, magnitudes=sizes)

    def _run(self, declared: DeclaredStep, rows: Any, side: Side) -> Gradients:
        """The planned step, as its levers ``declared`` it."""
        if self.split is None:
            return plain_gradients(declared, rows, self.sites, self.loss_scale)
        return side(_declared_as(declared, self.split), rows, self.layout, self.parts, self.loss_scale)

    def _keeping_magnitudes(self, declared: DeclaredStep) -> ChunkedStep | None:
        """What sums up the sizes of small parts' gradients, where anything does: by rows, where that can be."""
        if self.split is None:
            return None if self.by_rows is None else self.by_rows.keeping_magnitudes()
        if isinstance(self.split, (MappedStep, OneChunkStep)) and self.split.examination.by_rows is not None:
            return SplitStep(self.declared, self.split.aliases, self.split.examination.by_rows).keeping_magnitudes()
        return _declared_as(declared, self.split).keeping_magnitudes()


def _declared_as(declared: DeclaredStep, split: ChunkedStep) -> ChunkedStep:
    return split if declared is split.declared else dataclasses.replace(split, declared=declared)


def plain_gradients(
    declared: DeclaredStep, batch: Any, sites: DrawSites | None = None, loss_scale: float = 1.0
) -> Gradients:
    """The unconstrained step's loss and gradients; ``.grad`` and the user's hooks see nothing of it.

    ``sites``: where the model draws, for the draws that the planned side makes.
    """
    declared = under_draws(declared, StepDraws(sites, step_key()))
    whole = trees.move(batch, declared.device)
    with torch.enable_grad():
        loss = checked_loss(declared.loss_fn(declared.forward(declared.network, whole), whole))
    leaves = losses.leaves_under(loss)
    with hooks_silenced(leaves), torch.autocast(declared.device.type, enabled=False):
        gradients = losses.gradients_apart_from(loss * loss_scale if loss_scale != 1 else loss, leaves)
    return Gradients(_by_name(declared, leaves, gradients, loss_scale), float(loss.detach()))


def step_key() -> StepKey:
    """The key of both sides' draws; torch's generators are left alone."""
    return StepKey.fixed(0)


def _scaler(loss_scale: float, device: torch.device) -> torch.amp.GradScaler | None:
    return None if loss_scale == 1 else torch.amp.GradScaler(device.type, init_scale=loss_scale)


def _totals(
    split: ChunkedStep, batch: Any, layout: RowLayout, parts: Sequence[int], loss_scale: float
) -> Gradients:
    scaler = _scaler(loss_scale, split.declared.device)
    totals = split.totals(batch, layout, parts, scaler, key=step_key())
    with totals.committed():
        return Gradients(_by_name(split.declared, totals.parameters, totals.totals, loss_scale), float(totals.loss))


def _arrived(
    split: ChunkedStep, batch: Any, layout: RowLayout, parts: Sequence[int], loss_scale: float
) -> Gradients:
    parameters = [p for module in split.declared.modules for p in module.parameters()]
    try:
        for parameter in parameters:
            parameter.grad = None
        loss = split.backward(batch, layout, parts, _scaler(loss_scale, split.declared.device), key=step_key())
        arrived = [parameter.grad for parameter in parameters]
        return Gradients(_by_name(split.declared, parameters, arrived, loss_scale), float(loss))
    finally:
        for parameter in parameters:
            parameter.grad = None


def _magnitudes(
    keeping: ChunkedStep, batch: Any, layout: RowLayout, parts: Sequence[int] | None, loss_scale: float
) -> dict[str, Tensor | None]:
    """Σ|g_k| of small parts; of the plan's ``parts`` where small ones do not repeat, nothing where it has none."""
    # Near an optimum a chunk's own gradient is what is left of terms that cancel, while rounding grows with the
    # terms: their size is taken from parts much smaller than the plan's.
    fine = trees.even_sizes(layout.rows, max(1, layout.rows // _MAGNITUDE_PARTS))
    scaler = _scaler(loss_scale, keeping.declared.device)
    with step_undisturbed(keeping.declared):
        try:
            small = keeping.totals(batch, layout, fine, scaler, key=step_key())
        except GradientsDiffer:
            # Of parts that the plan does not have; the plan's own are compared beside this.
            if parts is None:
                return {}
            small = keeping.totals(batch, layout, parts, scaler, key=step_key())
    return _by_name(keeping.declared, small.parameters, small.magnitudes or [], loss_scale)


def parameter_names(declared: DeclaredStep) -> dict[int, str]:
    """Names of the parameters by ``id``; the loss's begin with ``loss_fn``."""
    names = {id(p): name for name, p in declared.network.named_parameters()}
    if declared.loss_module is not None:
        names |= {id(p): f"loss_fn.{name}" for name, p in declared.loss_module.named_parameters()}
    return names


def _by_name(
    declared: DeclaredStep, leaves: Sequence[Tensor], gradients: Sequence[Tensor | None], loss_scale: float
) -> dict[str, Tensor | None]:
    names = parameter_names(declared)
    found: dict[str, Tensor | None] = {}
    for leaf, gradient in zip(leaves, gradients):
        if gradient is not None:
            name = names.get(id(leaf), f"a parameter of the loss, shape {tuple(leaf.shape)}")
            dense = gradient.to_dense() if gradient.is_sparse else gradient
            found[name] = dense / loss_scale if loss_scale != 1 else dense
    return found
