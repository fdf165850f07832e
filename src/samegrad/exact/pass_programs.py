"""What runs the chunks of a single pass: Python as it is here, or something that keeps its work from step to step.

A pass is asked for once a step and is a block: inside, the aliases of the work stand in the model, and the sums are
those of the step. Others: ``compiled.py`` (the loss of a chunk in one compiled function) and ``chunk_graphs.py`` (a
chunk as a graph of kernels that is replayed).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor, nn

from samegrad.declared import DeclaredStep, checked_loss
from samegrad.exact import losses, program
from samegrad.exact.aliases import GradientTotals, ParameterAliases
from samegrad.exact.forward import StepForward
from samegrad.exact.losses import Form
from samegrad.exact.phases import announce
from samegrad.exact.program import LossOfChunk, LossSums
from samegrad.exact.step_draws import StepDraws
from samegrad.exact.sums_in_backward import StandingSums
from samegrad.records import Phase

GradientSums = Callable[[Sequence[nn.Parameter]], GradientTotals]
# inside(draws): what is in force in the model while chunks run that make these draws.
Inside = Callable[[StepDraws], AbstractContextManager[object]]


@dataclasses.dataclass(frozen=True)
class ChunkWork:
    """What the chunks of one step compute, in one pass: the rows' forward, the loss of this ``form``, gradients."""

    declared: DeclaredStep
    aliases: ParameterAliases
    forward: StepForward
    form: Form
    sums_of: GradientSums = GradientTotals
    inside: Inside = lambda _: contextlib.nullcontext()


# loss_for(work, sums): what computes the loss of a chunk; it may add gradients to the standing sums itself.
LossMaker = Callable[[ChunkWork, StandingSums | None], LossOfChunk]


class RunningPass(Protocol):
    """The pass of one step: chunks one after another, then its totals in the order of the aliases."""

    @property
    def sums(self) -> LossSums: ...

    def run_once(self, chunk: Any, ids: Tensor | None, weight: Tensor, cotangent: Tensor) -> None:
        """``chunk`` into the sums. ``ids``, ``weight`` and ``cotangent`` as in ``program.single_pass_body``."""
        ...

    def idle(self, chunk: Any, used_by_loss: Callable[[Any, Any], Sequence[bool]]) -> None:
        """A chunk of zero weight, run since other ranks wait for its collectives."""
        ...

    def totals(self, factor: Tensor | None) -> list[Tensor | None]: ...

    def magnitudes(self) -> list[Tensor | None] | None: ...


class Programs(Protocol):
    """What makes passes, and may keep what it made for the next step."""

    def single_pass(self, work: ChunkWork) -> AbstractContextManager[RunningPass]: ...

    def close(self) -> None:
        """Gives back what it keeps; it can be used again."""
        ...

    def notes(self) -> list[str]:
        """What a person would want to know of what it keeps, in words."""
        ...


def eager_loss(work: ChunkWork, _: StandingSums | None = None) -> LossOfChunk:
    """The loss of a chunk as the user's code computes it, with its graph."""

    def loss_of(chunk: Any, ids: Tensor | None) -> tuple[Tensor, Tensor | None]:
        announce(Phase.FORWARD)
        outputs = work.forward.first(chunk, ids)
        announce(Phase.LOSS)
        loss = checked_loss(work.declared.loss_fn(outputs, chunk)).reshape(())
        work.forward.check(loss)
        return loss, losses.count_of(loss) if work.form is Form.COUNTED else None

    return loss_of


def notes_of(loss_for: LossMaker) -> list[str]:
    """What is known of a maker that keeps something."""
    notes: Callable[[], list[str]] | None = getattr(loss_for, "notes", None)
    return [] if notes is None else notes()


class EagerPass:
    """Chunks run by Python, one after another, with memory of this step alone."""

    def __init__(self, work: ChunkWork, swapped: Sequence[nn.Parameter], loss_for: LossMaker) -> None:
        self.sums = LossSums(work.declared.device)
        self._forward = work.forward
        self._gradients = work.sums_of(swapped)
        loss_of = loss_for(work, None if work.aliases.sharded else self._gradients.standing())
        self._chunk = program.ChunkProgram(program.single_pass_body(loss_of, self.sums), self._gradients)

    def run_once(self, chunk: Any, ids: Tensor | None, weight: Tensor, cotangent: Tensor) -> None:
        self._chunk.run_once(chunk, ids, weight, cotangent)

    def idle(self, chunk: Any, used_by_loss: Callable[[Any, Any], Sequence[bool]]) -> None:
        body = program.idle_body(self._forward.idle, used_by_loss)
        program.ChunkProgram(body, self._gradients).run_once(chunk)

    def totals(self, factor: Tensor | None) -> list[Tensor | None]:
        return self._chunk.totals(factor)

    def magnitudes(self) -> list[Tensor | None] | None:
        return self._gradients.magnitudes()


class EagerPrograms:
    """Passes that keep nothing but what ``loss_for`` does, which makes what computes the loss of a chunk."""

    def __init__(self, loss_for: LossMaker = eager_loss) -> None:
        self._loss_for = loss_for

    @contextlib.contextmanager
    def single_pass(self, work: ChunkWork) -> Iterator[EagerPass]:
        with work.inside(work.forward.draws), work.aliases.swapped() as swapped:
            yield EagerPass(work, swapped, self._loss_for)

    def close(self) -> None:
        pass

    def notes(self) -> list[str]:
        return notes_of(self._loss_for)


EAGER = EagerPrograms()
