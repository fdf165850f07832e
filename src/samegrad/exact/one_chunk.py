"""A step whose rows cannot be split, as one chunk of all of them: what is captured once and replayed in every step.

Rows may depend on each other and the loss may be any: it is the plain step's forward, loss and backward, in one pass.

1. The forward writes its state where it stands, once a step; what fails before the hand-over is taken back.
2. A replay does not run Python: state that the forward keeps anywhere but in the memory of its buffers is refused, and
   so is what draws from torch's generators without a key. Both are looked at where the chunk is warmed up.
3. All that the loss depends on must be parameters of the model and of the loss: others have no place for a gradient.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from samegrad.declared import DeclaredStep
from samegrad.errors import CannotSplit
from samegrad.exact import losses, passes
from samegrad.exact.aliases import GradientMagnitudes, GradientTotals, ParameterAliases
from samegrad.exact.attributes import same_tensor
from samegrad.exact.forward import StepForward
from samegrad.exact.losses import Form
from samegrad.exact.mapped import MappedExamination, MappedStep
from samegrad.exact.pass_programs import GradientSums, Programs
from samegrad.exact.passes import StepTotals
from samegrad.exact.phases import arriving_chunks
from samegrad.exact.randomness import StepKey
from samegrad.exact.ranks import Agreement
from samegrad.exact.schemes import Scheme
from samegrad.exact.split import SplitStep, whole_on_device
from samegrad.exact.step_draws import StepDraws
from samegrad.exact.undisturbed import Before, Generators, ModuleState
from samegrad.trees import RowLayout

_ASKED = "capture the step on all rows"


@dataclasses.dataclass(frozen=True)
class OneChunkStep:
    """A step on all rows at once. ``examination``: what is known of it, ``programs``: what runs it.

    ``inside``: what is in force in the model. ``agreement``: where ranks go on together or not at all.
    """

    declared: DeclaredStep
    aliases: ParameterAliases
    examination: MappedExamination
    programs: Programs
    inside: Scheme | None = None
    sums_of: GradientSums = GradientTotals
    agreement: Agreement | None = None

    def keeping_magnitudes(self) -> OneChunkStep:
        """The same step, whose totals bring the absolute gradients."""
        return dataclasses.replace(self, sums_of=GradientMagnitudes)

    def totals(
        self, batch: Any, layout: RowLayout, sizes: Sequence[int], scaler: Any = None, key: StepKey | None = None
    ) -> StepTotals:
        """The step's gradients, not handed over; of all rows, whatever ``sizes`` are. Buffers are written."""
        before = Before(self.declared.device, ModuleState.of(self.declared))
        with before.restored_on_failure():
            totals = self._totals(batch, layout, scaler, key)
        return dataclasses.replace(totals, committed=before.restored_on_failure)

    def backward(
        self, batch: Any, layout: RowLayout, sizes: Sequence[int], scaler: Any = None, key: StepKey | None = None
    ) -> Tensor:
        """The step's loss, detached; gradients are in ``.grad`` as after the plain step's backward."""
        def totals() -> StepTotals:
            return self.totals(batch, layout, sizes, scaler, key)

        return passes.handed_over(self.declared, totals, self.agreement)

    def _totals(self, batch: Any, layout: RowLayout, scaler: Any, key: StepKey | None) -> StepTotals:
        device = self.declared.device
        scale = torch.ones((), dtype=torch.float64, device=device)
        if scaler is not None:
            scale = scaler.scale(torch.ones((), device=device)).to(torch.float64)
        # rule 2: there is nothing else that is drawn.
        draws = StepDraws(self.examination.sites, StepKey() if key is None else key, are_all=True)
        draws.take()
        forward = _WholeForward.of(self.declared, layout.rows, draws)
        chunks = arriving_chunks([whole_on_device(self.declared, batch, layout)])
        return passes.single_pass(
            self.declared, self.aliases, forward, Form.ROW_SUM, chunks, [layout.rows], [1.0], scale, self.sums_of,
            programs=self.programs, inside=self._inside,
        )  # fmt: skip

    def _inside(self, draws: StepDraws) -> contextlib.AbstractContextManager[object]:
        if self.inside is None:
            return contextlib.nullcontext()
        return self.inside(self.declared.network, sizes=(), draws=draws, rules=())


class _WholeForward(StepForward):
    """The forward of all rows: it draws as the plain step does, and its outputs may be anything."""

    def check(self, loss: Tensor) -> None:
        """Raises CannotSplit for rule 3."""
        known = {id(parameter) for module in self.declared.modules for parameter in module.parameters()}
        strange = [leaf for leaf in losses.leaves_under(loss) if id(leaf) not in known]
        if strange:
            raise CannotSplit(
                asked=_ASKED,
                found=f"the loss depends on a tensor of shape {tuple(strange[0].shape)} that is no parameter of the "
                "model or of loss_fn",
                do="make loss_fn a module that owns it, or leave the lever graphs out of the plan",
            )

    @contextlib.contextmanager
    def warming_up(self) -> Iterator[None]:
        """State, weights and generators are as before on every way out. Raises CannotSplit for rule 2."""
        generators, state = Generators(self.declared.device), ModuleState.of(self.declared)
        # Of each module by itself: the loss may have a buffer by the name of something else in the model.
        modules = [_InPlace(module) for module in self.declared.modules]
        weights = _Weights(self.declared)
        elsewhere: list[str] = []
        drew: list[str] = []
        try:
            yield
            elsewhere = [name for module in modules for name in module.changed_elsewhere()] + state.held_changed()
            drew = generators.advanced()
        finally:
            state.restore()
            generators.restore()
            written = weights.put_back()
        if written:
            raise CannotSplit(
                asked=_ASKED,
                found=f"the step itself writes its parameters {', '.join(written[:3])}",
                do="write them outside of the step, or leave the lever graphs out of the plan",
            )
        if elsewhere:
            raise CannotSplit(
                asked=_ASKED,
                found=f"the step changes {', '.join(elsewhere[:3])} in Python, which a replay does not run",
                do="write that state into a buffer in place, or leave the lever graphs out of the plan",
            )
        if drew:
            raise CannotSplit(
                asked=_ASKED,
                found=f"the step draws from torch's generators ({', '.join(drew)}) without a key",
                do="draw it outside of the step, or leave the lever graphs out of the plan",
            )

    def _run(self, chunk: Any, ids: Tensor | None, share: float | None) -> Any:
        with self.draws.all_rows(ids):
            return self.declared.forward(self.declared.network, chunk)


class _InPlace:
    """The state of a module, to tell what changes in the memory of its buffers from what changes elsewhere."""

    def __init__(self, module: nn.Module) -> None:
        self._state = ModuleState([module])
        self._buffers = [
            (f"{name}.{key}" if name else key, part, key, buffer)
            for name, part in module.named_modules()
            for key, buffer in part._buffers.items()
        ]

    def changed_elsewhere(self) -> list[str]:
        in_place = {name for name, part, key, buffer in self._buffers if part._buffers.get(key) is buffer}
        return [name for name in self._state.changed() if name not in in_place]


class _Weights:
    """Copies of all parameters on the host: a warm-up is no step, and what it writes on them is to be seen."""

    def __init__(self, declared: DeclaredStep) -> None:
        named = [item for module in declared.modules for item in module.named_parameters()]
        self._copies = [(name, p, p.detach().to("cpu", copy=True)) for name, p in named]

    @torch.no_grad()
    def put_back(self) -> list[str]:
        """The names of those that were written on, which are as before now."""
        written = [(name, p, copy) for name, p, copy in self._copies if not same_tensor(p.detach().cpu(), copy)]
        for _, parameter, copy in written:
            parameter.copy_(copy)
        return [name for name, _, _ in written]


ChunkedStep = SplitStep | MappedStep | OneChunkStep
