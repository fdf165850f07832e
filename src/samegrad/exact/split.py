"""One whole backward: plain when it is not split, in chunks when it is, handed over in one go.

``backward`` is a transaction up to the hand-over: if anything raises before, ``.grad``, state and generators are those
before the call; so they are where the hand-over raises and can be taken back. A model that begins to change its buffers
after it was examined is refused with the buffer's name, but what it wrote stays.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from samegrad import trees
from samegrad.declared import DeclaredStep, checked_loss
from samegrad.errors import BadInput, CannotSplit, GradientsDiffer
from samegrad.exact import passes, program
from samegrad.exact.aliases import NARROW, GradientMagnitudes, GradientTotals, ParameterAliases
from samegrad.exact.dataless import has_data
from samegrad.exact.findings import Examination
from samegrad.exact.forward import StepForward
from samegrad.exact.held import Held, held_by
from samegrad.exact.loop import with_idle_chunks
from samegrad.exact.losses import Form
from samegrad.exact.on_use import arriving
from samegrad.exact.pass_programs import EAGER, GradientSums, Programs
from samegrad.exact.passes import StepTotals
from samegrad.exact.phases import announce, arriving_chunks
from samegrad.exact.randomness import StepKey
from samegrad.exact.ranks import Agreement
from samegrad.exact.schemes import Scheme
from samegrad.exact.sharded import ranks_of
from samegrad.exact.shared_leaves import stood_in
from samegrad.exact.softmax_loss import SoftmaxLoss
from samegrad.exact.softmax_passes import softmax_passes
from samegrad.exact.step_draws import StepDraws
from samegrad.exact.undisturbed import Before, Generators, ModuleState
from samegrad.module_walk import buffers_of
from samegrad.records import Phase
from samegrad.trees import RowLayout

# chunks(batch, layout, sizes, device): the chunks in order, on the device. The data floor streams; tests slice.
Chunks = Callable[[Any, RowLayout, Sequence[int], torch.device], Iterable[Any]]


def sliced_chunks(batch: Any, layout: RowLayout, sizes: Sequence[int], device: torch.device) -> Iterable[Any]:
    """The chunks one after another, each moved when it is needed and not ahead of it."""
    start = 0
    for size in sizes:
        yield trees.move(trees.slice_rows(batch, layout, start, start + size), device)
        start += size


def plain_backward(
    declared: DeclaredStep, batch: Any, layout: RowLayout, scaler: Any, draws: StepDraws | None = None
) -> Tensor:
    """The unconstrained step itself: the user's call, on the whole batch. Returns the detached loss.

    ``draws``: what the model draws, where the step is one that may be split.
    """
    [whole] = arriving_chunks([whole_on_device(declared, batch, layout)])
    drawing = under_draws(declared, draws)
    announce(Phase.FORWARD)
    outputs = drawing.forward(drawing.model, whole)
    announce(Phase.LOSS)
    loss = checked_loss(drawing.loss_fn(outputs, whole))
    del outputs
    announce(Phase.BACKWARD)
    scaled = loss if scaler is None else scaler.scale(loss)
    program.backward_outside_autocast([scaled], [torch.ones_like(scaled)])
    return loss.detach()


def under_draws(declared: DeclaredStep, draws: StepDraws | None) -> DeclaredStep:
    """``declared`` whose forward of a whole batch makes the draws that its chunks make."""
    if draws is None or draws.sites is None:
        return declared

    def forward(network: nn.Module, batch: Any) -> Any:
        ids = torch.arange(declared.layout(batch).rows, device=declared.device)
        with draws.all_rows(ids):
            return declared.forward(network, batch)

    return dataclasses.replace(declared, forward=forward)


def whole_on_device(declared: DeclaredStep, batch: Any, layout: RowLayout) -> Any:
    """``batch`` on the device, read where it is no tensor yet."""
    whole = trees.slice_rows(batch, layout, 0, layout.rows) if _needs_reading(batch) else batch
    return trees.move(whole, declared.device)


def _needs_reading(batch: Any) -> bool:
    return any(trees.is_row_source(leaf) for leaf in trees.leaves_of(batch))


@dataclasses.dataclass(frozen=True)
class SplitStep:
    """A step that runs in chunks, as examined. ``chunks`` brings them to the device, ``sums_of`` adds them up.

    ``inside``: what is in force in the model while chunks run. ``programs``: what runs the chunks of a single pass.
    ``agreement``: where ranks go on together or not at all.
    """

    declared: DeclaredStep
    aliases: ParameterAliases
    examination: Examination
    chunks: Chunks = sliced_chunks
    sums_of: GradientSums = GradientTotals
    kept: int = 0
    inside: Scheme | None = None
    programs: Programs = EAGER
    agreement: Agreement | None = None

    def keeping_magnitudes(self) -> SplitStep:
        """The same step, whose totals bring the sums of the chunks' absolute gradients."""
        return dataclasses.replace(self, sums_of=GradientMagnitudes)

    def totals(
        self, batch: Any, layout: RowLayout, sizes: Sequence[int], scaler: Any = None, key: StepKey | None = None
    ) -> StepTotals:
        """The step's gradients and state, not handed over. ``key``: of its draws, by default the next one.

        Raises GradientsDiffer when the second pass is not the first.
        """
        owned = [] if self.declared.loss_module is None else [self.declared.loss_module]
        # In one pass the loss was seen to change nothing. All else is not touched before the hand-over.
        held = held_by(self.declared) if self.examination.passes == 2 else Held()
        before = Before(self.declared.device, ModuleState(owned, held))
        with before.restored_on_failure():
            totals = self._totals(batch, layout, sizes, scaler, key)
        return dataclasses.replace(totals, committed=functools.partial(before.around, totals.committed))

    def _totals(
        self, batch: Any, layout: RowLayout, sizes: Sequence[int], scaler: Any, key: StepKey | None
    ) -> StepTotals:
        device = self.declared.device
        scale = torch.ones((), dtype=torch.float64, device=device)
        if scaler is not None:
            scale = scaler.scale(torch.ones((), device=device)).to(torch.float64)
        versions = [(b, b._version) for b in buffers_of([self.declared.network])]
        batch, aliases = stood_in(batch, layout, self.aliases)
        standing = dataclasses.replace(self, aliases=aliases)
        draws = StepDraws(self.examination.sites, StepKey() if key is None else key, are_all=True)
        draws.take()
        generators = Generators(device)
        forward = StepForward.of(self.declared, layout.rows, draws, self.examination.rules)
        totals = standing._summed(forward, batch, layout, sizes, scale)

        def checked() -> tuple[None, int]:
            self._check_untouched(generators, versions)
            forward.state.check()
            _check_repeated(totals)
            return None, 0

        ranks = ranks_of(self.declared.modules) if aliases.sharded else None
        # A rank that raised alone would leave the others with gradients that it does not have.
        checked() if ranks is None else ranks.together(checked)
        return totals

    def _inside(self, sizes: Sequence[int], draws: StepDraws) -> AbstractContextManager[object]:
        """What is in force in the model while chunks run that make ``draws``."""
        if self.inside is None:
            return contextlib.nullcontext()
        return self.inside(self.declared.network, sizes=sizes, draws=draws, rules=self.examination.rules)

    def _summed(
        self, forward: StepForward, batch: Any, layout: RowLayout, sizes: Sequence[int], scale: Tensor
    ) -> StepTotals:
        device = self.declared.device
        if self.examination.passes == 1:
            shares = self._agreed_shares(batch, layout, sizes)
            chunks = arriving_chunks(self._all_chunks(batch, layout, sizes))
            form = self.examination.form
            if len(sizes) == 1 and not self.aliases.sharded:
                # The loss of all rows is the loss: no share of it is to be rounded.
                form, shares = Form.ROW_SUM, [1.0]
            narrow = any(p.dtype in NARROW for p in self.aliases.parameters) and len(sizes) > 1
            by_rows = form is Form.ROW_MEAN or (self.examination.declared and self.declared.normalise == "mean")
            return passes.single_pass(
                self.declared, self.aliases, forward, form, chunks, sizes, shares, scale, self.sums_of,
                # What is left of the divisor is this rank's own, and sharded gradients are summed over ranks by then.
                divisor=layout.rows if narrow and by_rows and not self.aliases.sharded else 1.0,
                programs=self.programs, inside=functools.partial(self._inside, sizes),
            )  # fmt: skip

        def first_chunks(some: Sequence[int]) -> Iterable[Any]:
            rows = sum(some)
            head = trees.first_rows(batch, layout, rows)
            return arriving_chunks(self._all_chunks(head, dataclasses.replace(layout, rows=rows), some))

        softmax = isinstance(self.declared.loss_fn, SoftmaxLoss)
        with self._inside(sizes, forward.draws):
            return (softmax_passes if softmax else passes.two_passes)(
                self.declared, self.aliases, forward, arriving(batch, layout, device), first_chunks, sizes, scale,
                self.sums_of, first_pass=self.examination.first_pass, kept=min(self.kept, len(sizes)),
            )  # fmt: skip

    def _all_chunks(self, batch: Any, layout: RowLayout, sizes: Sequence[int]) -> Iterable[Any]:
        if all(sizes):
            return self.chunks(batch, layout, sizes, self.declared.device)
        return with_idle_chunks(self.chunks, batch, layout, sizes, self.declared.device)

    def backward(
        self, batch: Any, layout: RowLayout, sizes: Sequence[int], scaler: Any = None, key: StepKey | None = None
    ) -> Tensor:
        """The step's loss, detached; gradients are in ``.grad`` as after the plain step's backward."""

        def totals() -> StepTotals:
            return self.totals(batch, layout, sizes, scaler, key)

        return passes.handed_over(self.declared, totals, self.agreement)

    def _agreed_shares(self, batch: Any, layout: RowLayout, sizes: Sequence[int]) -> list[float]:
        ranks = ranks_of(self.declared.modules) if callable(self.declared.normalise) else None
        if ranks is None:
            return self._shares(batch, layout, sizes)
        # A rank without a valid target raises, and the others wait in their first chunk.
        return ranks.together(lambda: (self._shares(batch, layout, sizes), 0))[0]

    def _shares(self, batch: Any, layout: RowLayout, sizes: Sequence[int]) -> list[float]:
        if not self.examination.declared:
            if self.examination.form is Form.COUNTED:
                expected = layout.rows * (self.examination.count_per_row or 1.0)
                # A power of two, so that n / expected is exact in every dtype.
                return [2.0 ** -round(math.log2(expected))] * len(sizes)
            mean = self.examination.form is Form.ROW_MEAN
            return [size / layout.rows if mean else float(size > 0) for size in sizes]
        normalise = self.declared.normalise
        if normalise == "sum":
            return [float(size > 0) for size in sizes]
        if normalise == "mean" or normalise is None or isinstance(normalise, str):
            return [size / layout.rows for size in sizes]
        return _counted_shares(normalise, batch, layout, sizes)

    def _check_untouched(self, generators: Generators, versions: list[tuple[Tensor, int]]) -> None:
        drew = generators.advanced() if self.examination.passes == 1 else []
        written = {id(buffer) for buffer, version in versions if buffer._version != version}
        if not drew and not written:
            return
        changed = [name for name, buffer in self.declared.network.named_buffers() if id(buffer) in written]
        found = f"the forward drew random numbers ({', '.join(drew)})" if drew else f"buffers changed: {changed[:3]}"
        raise CannotSplit(
            asked="a step whose chunks draw nothing and change nothing",
            found=f"{found}, although it did not on its first rows; no gradient was handed over",
            do="run the step whole, or take the drawing or the state out of the model",
        )


def _check_repeated(totals: StepTotals) -> None:
    if totals.mismatches is None or not has_data(totals.mismatches):
        return
    if count := int(totals.mismatches):
        raise GradientsDiffer(
            asked="a second pass that repeats the first bit for bit",
            found=f"{count} output entries differ: the forward is not the same function twice",
            do="look for randomness, state or nondeterministic kernels in the model "
            "(torch.use_deterministic_algorithms(True, warn_only=True) names kernels), or run the step whole",
        )


def _counted_shares(
    normalise: Callable[[Any], Any], batch: Any, layout: RowLayout, sizes: Sequence[int]
) -> list[float]:
    counts, start = [], 0
    for size in sizes:
        counts.append(normalise(trees.slice_rows(batch, layout, start, start + size)) if size else 0)
        start += size
    stacked = torch.stack([torch.as_tensor(c, dtype=torch.float64) for c in counts])
    if not has_data(stacked):
        return [size / layout.rows for size in sizes]
    # One transfer for all chunks when the counts are device tensors.
    on_host = stacked.tolist()
    total = sum(on_host)
    if not total > 0:
        raise BadInput(
            asked="a batch with at least one row or target that counts",
            found=f"normalise(batch) is {total} over {layout.rows} rows",
            do="drop batches without valid targets",
        )
    return [count / total for count in on_host]
