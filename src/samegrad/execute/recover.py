"""Out of memory inside a step: nothing of the attempt stays, and a plan that needs less runs the same batch.

    for attempt in attempts:
        with attempt:
            return run(attempt.plan)

The engine undoes what it did when anything raises before the hand-over; here the error is recognised, its frames are
let go of, memory is given back and the next plan is chosen. So the step that runs at last is the one that had run with
that plan from the start.

1. What the frames of the error hold is freed before the cache is emptied, and both before the next attempt.
2. A plan that was pinned is never left. Attempts are bounded.
3. Ranks go on together: each tells the others how its attempt ended before any gradient is reduced, and they retry
   only if all of them have a plan to retry with. Where ranks wait for each other inside the attempt they cannot be
   told: the rank that ran out raises, the others end at the time-out of their process group.
4. KeyboardInterrupt and what is not an out-of-memory error go on as they are.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, NoReturn, Self

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from samegrad import trees
from samegrad.declared import DeclaredStep
from samegrad.exact.batchnorm import shared_over_ranks
from samegrad.exact.findings import Examination
from samegrad.exact.handoff import has_hooks
from samegrad.exact.out_of_memory import OutOfMemory, is_out_of_memory
from samegrad.exact.phases import announce, phase_now
from samegrad.exact.ranks import Agreement, Outcome, Ranks
from samegrad.execute.ways import Ways
from samegrad.measure import counters
from samegrad.measure.failures import first_line
from samegrad.measure.within_memory import let_go, place_of
from samegrad.module_walk import parameters_of
from samegrad.records import Phase, Plan, Recovery
from samegrad.report.recoveries import describe_plan_taken, describe_recovery
from samegrad.units import format_bytes

_log = logging.getLogger("samegrad")

MOST_ATTEMPTS = 8

_NO_MORE = (
    "free memory on the device (other processes, tensors kept between steps), raise the budget where it is what caps "
    "the allocator, or take smaller batches"
)
_PINNED = (
    "{pinned} is a pin, and a pinned plan is not left: pin fewer rows at a time or a smaller plan, or give budget= in "
    "its place, under which a smaller plan is taken by itself"
)
_SHARDED = (
    "parameters are sharded over ranks, which wait for each other in every chunk, so no rank can try again: end all of "
    "them (they end by themselves at their process group's time-out), and start again under a smaller budget"
)
_WAITING = (
    "ranks wait for each other inside the step, so no rank can try again: end all of them (they end by themselves at "
    "their process group's time-out), and start again under a smaller budget"
)


@dataclasses.dataclass
class Failure:
    """What is kept of an attempt that failed: no tensor, no frame, no exception.

    ``final``: why there can be no other attempt, and what to do instead. ``told``: the other ranks know, or cannot be
    told any more.
    """

    place: str
    found: str
    rank: int | None = None
    final: tuple[str, str] | None = None
    told: bool = True


class Attempt:
    """One run of the step under ``plan``. As a context it takes an out-of-memory error and keeps what is known of it.

    For the engine: ``parameters`` that train, how the step may be split (``examination``), the ``agreement`` of ranks,
    and whether a step that is not split is ``undoable``; its gradients then come at the end.
    """

    def __init__(
        self,
        plan: Plan,
        declared: DeclaredStep,
        batch: Any,
        *,
        parameters: Sequence[nn.Parameter],
        examination: Examination | None,
        agreement: Agreement | None,
        undoable: bool,
    ) -> None:
        self.plan, self.agreement = plan, agreement
        self.parameters, self.examination, self.undoable = parameters, examination, undoable
        self.failure: Failure | None = None
        self._declared = declared
        self._gradients = _gradient_marks(parameters)
        self._rows = _row_marks(batch)
        self._batch = batch

    def __enter__(self) -> Self:
        self._start = time.perf_counter()
        # An error that is being handled around the step is not the step's.
        self._around = sys.exception()
        announce(None)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> bool:
        if error is None or not isinstance(error, Exception):
            return False
        if not is_out_of_memory(error):
            if self.agreement is not None and not self.agreement.spoken:
                self.agreement.tell(Outcome.RAISED)
            return False
        self.failure = Failure(place_of(error, self._declared), first_line(error))
        let_go(error, self._around)
        self._agree(self.failure)
        self.failure.final = self.failure.final or self._kept()
        return True

    def ended(self) -> Failure:
        """What is known of the failure; the batch is let go of."""
        assert self.failure is not None, "an attempt that ran ends the loop"
        self._batch = None
        return self.failure

    def give_back(self) -> float:
        """Frees what only cycles or the cache still hold. Returns seconds since the attempt began."""
        gc.collect()
        counters.release_cached(self._declared.device)
        return time.perf_counter() - self._start

    def _agree(self, failure: Failure) -> None:
        if self.agreement is None:
            return
        # Known already where another rank ran out.
        worst, failure.rank = self.agreement.worst or self.agreement.tell(Outcome.OUT_OF_MEMORY)
        failure.told = worst is not Outcome.OUT_OF_MEMORY
        if worst is Outcome.RAISED:
            failure.final = (f"rank {failure.rank} raised another error", f"see the message of rank {failure.rank}")

    def _kept(self) -> tuple[str, str] | None:
        """What of the attempt could not be undone."""
        handing_over = phase_now() is Phase.HANDOFF
        reduced = self.agreement is not None and self.agreement.agreed
        hooked = handing_over and any(has_hooks(p) for p in self.parameters)
        if reduced or hooked or _gradient_marks(self.parameters) != self._gradients:
            return (
                "gradients were being handed over, and what was added, hooked or reduced cannot be taken back",
                "zero the gradients and run the batch again under a smaller budget",
            )
        if _row_marks(self._batch) != self._rows:
            return "the forward had written into the batch", "give the step the batch again, under a smaller budget"
        return None


class Attempts:
    """The attempts of one step, each under a plan that needs less; ends by an error where there is none to try.

    ``smaller``: the plans below ``plan``, largest first. ``examination``: how the step may be split, where it may.
    ``advice``: what to do when all fail. ``undoable``: whether a step that is not split can be undone. ``ranks``: those
    that go on together. ``recoveries``: what happened so far.
    """

    def __init__(
        self,
        declared: DeclaredStep,
        batch: Any,
        plan: Plan,
        *,
        smaller: Iterator[Plan],
        examination: Examination | None,
        advice: str,
        undoable: bool = True,
        ranks: Ranks | None = None,
    ) -> None:
        self._declared, self._batch, self._plan = declared, batch, plan
        self._smaller, self._advice, self._ranks = smaller, advice, ranks
        self._failed: list[str] = []
        self._examination, self._undoable = examination, undoable
        self._parameters = [p for p in parameters_of(declared.modules) if p.requires_grad]
        self.recoveries: list[Recovery] = []

    def __iter__(self) -> Iterator[Attempt]:
        plan = self._plan
        while True:
            agreement = None if self._ranks is None else Agreement(self._ranks)
            attempt = Attempt(
                plan, self._declared, self._batch, parameters=self._parameters, examination=self._examination,
                agreement=agreement, undoable=self._undoable,
            )  # fmt: skip
            yield attempt
            failure = attempt.ended()
            following = self._following(plan, failure)
            self._tell(plan, following, failure, attempt.give_back())
            plan = following

    def _following(self, failed: Plan, failure: Failure) -> Plan:
        told = describe_plan_taken(failed.levers, failed.predicted_peak_bytes)
        self._failed.append(f"{told}, in {failure.place}: {failure.found}")
        bounded = len(self._failed) < MOST_ATTEMPTS
        following = next(self._smaller, None) if bounded and failure.final is None else None
        elsewhere = False
        if self._ranks is not None and not failure.told:
            elsewhere = self._ranks.largest(int(following is None)) != [0]
        if failure.final is not None:
            self._give_up(*failure.final)
        if following is None:
            self._give_up("" if bounded else f"{MOST_ATTEMPTS} plans were tried, which is the most", self._advice)
        if elsewhere:
            self._give_up("another rank has no smaller plan", self._advice)
        return following

    def _tell(self, failed: Plan, following: Plan, failure: Failure, seconds: float) -> None:
        recovery = Recovery(
            place=failure.place,
            found=failure.found,
            seconds=seconds,
            left=failed.levers,
            taken=following.levers,
            left_predicted_bytes=failed.predicted_peak_bytes,
            taken_predicted_bytes=following.predicted_peak_bytes,
            rank=failure.rank,
        )
        self.recoveries.append(recovery)
        # A warning, so that it is seen without any logging set up: the plan is not the one that was believed.
        _log.warning("samegrad: %s", describe_recovery(recovery))

    def _give_up(self, why: str, do: str) -> NoReturn:
        budget = self._plan.budget
        within = "" if budget is None else f" within {format_bytes(budget.total_bytes)} ({budget.source})"
        raise OutOfMemory(
            asked=f"step.backward(batch){within}",
            found="; ".join([f"out of memory under {'; then under '.join(self._failed)}", *filter(None, [why])]),
            do=do,
        )


def attempts_for(
    declared: DeclaredStep,
    batch: Any,
    plan: Plan,
    smaller: Iterator[Plan],
    ways: Ways | None,
    *,
    pinned: str,
    sharded: bool,
) -> Attempts:
    """The attempts of a step under ``plan`` and then ``smaller``, as far as it may be tried again.

    ``ways``: how it may be split, where that is known. ``pinned``: the argument that pinned the plan, or "".
    ``sharded``: parameters are, over ranks.
    """
    ddp: Any = declared.model if isinstance(declared.model, DistributedDataParallel) else None
    stays = functools.partial(
        Attempts, declared, batch, plan, smaller=iter(()), examination=None if ways is None else ways.by_rows
    )
    if sharded:
        return stays(advice=_SHARDED, undoable=False)
    if pinned:
        return stays(advice=_PINNED.format(pinned=pinned), undoable=ddp is None)
    if ddp is None:
        return stays(advice=_NO_MORE, smaller=smaller)
    # Ranks that ran out of batches (join) answer DDP's own collectives only.
    # A static graph counts every gradient that arrives, also those of a whole step that are not to be reduced yet.
    waits_inside = (ways is not None and ways.waits_inside) or ddp.static_graph
    if waits_inside or ddp._join_config.enable or shared_over_ranks(declared.network):
        return stays(advice=_WAITING, undoable=False)
    return stays(advice=_NO_MORE, smaller=smaller, ranks=Ranks((ddp.process_group,), declared.device))


def _gradient_marks(parameters: Sequence[nn.Parameter]) -> list[tuple[int, int] | None]:
    """Which gradients stand, and how often each was written."""
    return [None if (grad := p.grad) is None else (id(grad), grad._version) for p in parameters]


def _row_marks(batch: Any) -> list[int]:
    """How often the tensors of ``batch`` were written."""
    leaves = trees.leaves_of(batch)
    return [leaf._version for leaf in leaves if isinstance(leaf, Tensor) and not leaf.is_inference()]
