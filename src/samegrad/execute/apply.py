"""A plan in force: its levers nested in slot order, all undone on the way out."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

from samegrad.declared import Around, DeclaredStep
from samegrad.errors import CannotSplit, UsageError
from samegrad.exact.aliases import ParameterAliases
from samegrad.exact.chunk_graphs import CapturedPrograms
from samegrad.exact.compiled import CompiledLoss
from samegrad.exact.examine_loss import module_hooks
from samegrad.exact.mapped import MappedStep
from samegrad.exact.one_chunk import ChunkedStep, OneChunkStep
from samegrad.exact.pass_programs import EagerPrograms, LossMaker, Programs, eager_loss
from samegrad.exact.split import Chunks, SplitStep
from samegrad.exact.undisturbed import NotToBeTried
from samegrad.execute.new_state import room_for_new_state
from samegrad.execute.ways import Ways
from samegrad.levers import Execution, Lever, StandingLever, levers_of
from samegrad.measure import counters
from samegrad.records import Plan


@contextlib.contextmanager
def applied(plan: Plan, declared: DeclaredStep, batch_rows: int) -> Iterator[Execution]:
    """The execution of ``plan`` on a batch of ``batch_rows`` rows."""
    with contextlib.ExitStack() as stack:
        execution = Execution(declared=declared, batch_rows=batch_rows)
        for lever in levers_of(plan):
            execution = stack.enter_context(lever.apply(execution))
        yield execution


@contextlib.contextmanager
def standing(plan: Plan, declared: DeclaredStep) -> Iterator[Around]:
    """A block in which stands what ``plan`` needs between steps as well, for batches of any number of rows.

    It yields what goes around every backward inside it.
    """
    with contextlib.ExitStack() as stack:
        levers = [lever for lever in levers_of(plan) if isinstance(lever, StandingLever)]
        yield functools.partial(_around, [stack.enter_context(lever.standing(declared)) for lever in levers])


def stands_between_steps(plan: Plan) -> bool:
    """Whether something stands under ``standing``."""
    return any(isinstance(lever, StandingLever) for lever in levers_of(plan))


@contextlib.contextmanager
def _around(levers: Sequence[Around]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for around in levers:
            stack.enter_context(around())
        yield


@contextlib.contextmanager
def in_force(plan: Plan, declared: DeclaredStep, batch_rows: int) -> Iterator[Execution]:
    """All of it, for one backward: the execution of ``plan`` on a batch, what stands, and what goes around it."""
    with standing(plan, declared) as around, around(), applied(plan, declared, batch_rows) as execution:
        yield execution


class Standing:
    """What stands for a step's plans: it stays from batch to batch, and goes when a plan that needs other comes."""

    def __init__(self, declared: DeclaredStep) -> None:
        self._declared = declared
        self._stack = contextlib.ExitStack()
        self._around: Around = contextlib.nullcontext
        self._levers: Sequence[Lever] = []
        self._brought: dict[str, dict[str, Any]] | None = None
        self._has_workspaces = False
        # A step that nobody closed: at the end of the process tensors are taken apart before blocks are.
        weakref.finalize(self, self._stack.close)

    def bring(self, plan: Plan) -> contextlib.AbstractContextManager[None]:
        """Puts in place what ``plan`` needs, unless it stands already. Returns the block of one backward under it."""
        # Asked in every step, and mostly for the plan of the step before.
        if plan.levers == self._brought:
            return self._around()
        levers = [lever for lever in levers_of(plan) if isinstance(lever, StandingLever)]
        if self._brought is None or levers != self._levers:
            self.close()
            self._stack.enter_context(room_for_new_state(self._declared))
            if not self._has_workspaces:
                # Small, and kept for good: it would part what is free among the activations of the first step, and
                # keeps with the allocator what examining the step took around it.
                take = counters.take_workspaces if levers else counters.retake_workspaces
                take(self._declared.device)
                self._has_workspaces = True
            self._around = self._stack.enter_context(standing(plan, self._declared))
            self._levers = levers
        self._brought = plan.levers
        return self._around()

    def close(self) -> None:
        """Puts back everything."""
        self._levers, self._brought, self._around = [], None, contextlib.nullcontext
        self._stack.close()


def check_scaled(execution: Execution, scaler: object) -> None:
    """Raises UsageError where gradients would vanish without a ``scaler`` and there is none."""
    if execution.needs_scaler and scaler is None:
        raise UsageError(
            asked="step.backward(batch) under a plan in float16",
            found="no scaler=, and what is below 6e-8 is zero in float16: small gradients would be lost",
            do="step.backward(batch, scaler=torch.amp.GradScaler()), and its step and update, or plan for bfloat16",
        )


def loss_maker_of(execution: Execution) -> LossMaker:
    """What makes the loss of a chunk of ``execution``, as new: nothing is compiled yet."""
    return eager_loss if execution.compiler is None else CompiledLoss(execution.compiler, execution.head)


def programs_of(execution: Execution, loss_for: LossMaker | None = None) -> Programs:
    """What runs the chunks of ``execution``: nothing is captured yet. ``loss_for``: one that is kept from before."""
    loss_for = loss_maker_of(execution) if loss_for is None else loss_for
    return CapturedPrograms(loss_for) if execution.captures else EagerPrograms(loss_for)


def chunked_step(
    execution: Execution, aliases: ParameterAliases, ways: Ways, chunks: Chunks, programs: Programs | None = None
) -> ChunkedStep:
    """What runs ``execution`` in chunks. ``chunks`` brings rows to the device, ``programs`` may be kept from before.

    Raises CannotSplit when the step was examined and cannot run that way, or for levers that exclude each other.
    """
    if execution.inside is not None:
        _check_inside(execution, aliases)
    if _is_one_chunk(execution, ways):
        _check_one_chunk(execution, ways)
        return OneChunkStep(
            execution.declared, aliases, ways.mapped_examination(),
            programs_of(execution) if programs is None else programs, inside=execution.inside,
        )  # fmt: skip
    if execution.programmed:
        _check_programmed(execution, ways)
    if (scheme := execution.mapping) is not None:
        return MappedStep(execution.declared, aliases, ways.mapped_examination(), scheme)
    if ways.by_rows is None:
        assert ways.refusal is not None
        raise ways.refusal
    if execution.one_pass_for and ways.by_rows.passes == 2:
        raise CannotSplit(
            asked=f"{execution.one_pass_for} in a step that takes two passes",
            found=f"the first pass keeps the logits of all rows for the loss ({ways.by_rows.reason})",
            do=f"leave {execution.one_pass_for} or the split out, or declare normalise= if the loss is a sum over rows",
        )
    return SplitStep(
        execution.declared, aliases, ways.by_rows, chunks, kept=execution.kept_chunks, inside=execution.inside,
        programs=programs_of(execution) if programs is None else programs,
    )  # fmt: skip


def _is_one_chunk(execution: Execution, ways: Ways) -> bool:
    """Whether all rows are captured as one chunk, since they cannot be split in one pass."""
    if not execution.captures or execution.compiler is not None or execution.splits or execution.mapping is not None:
        return False
    return ways.by_rows is None or ways.by_rows.passes == 2


def _check_one_chunk(execution: Execution, ways: Ways) -> None:
    """Raises CannotSplit for what would not run when the step on all rows is replayed."""
    if hooks := module_hooks(execution.declared.network):
        found = f"hooks of the user's, which a replay would not call: {hooks}"
    elif ways.waits_inside:
        found = "the step waits for other ranks"
    elif isinstance(ways.refusal, NotToBeTried):
        # To warm it up is to try it.
        found = ways.refusal.found
    elif execution.travels:
        found = f"{execution.travels} moves tensors to the host and back while the step runs"
    else:
        return
    raise CannotSplit(asked="capture the step on all rows", found=found, do="leave graphs out of the plan")


def _check_programmed(execution: Execution, ways: Ways) -> None:
    """Raises CannotSplit where a chunk's forward, loss and backward are not one piece of work."""
    names = [name for name, taken in (("compile", execution.compiler), ("graphs", execution.captures)) if taken]
    asked, do = f"take {' and '.join(names)} in this step", f"leave {' and '.join(names)} out of the plan"
    if execution.mapping is not None:
        found = "parts of the model run in chunks, or the loss of all rows does, and those are not one chunk's work"
    elif ways.by_rows is not None and ways.by_rows.passes == 2:
        found = f"the step takes two passes, with the loss between them ({ways.by_rows.reason})"
    elif execution.captures and execution.travels:
        found = f"{execution.travels} moves tensors to the host and back while a chunk runs"
    elif execution.captures and ways.by_rows is not None and ways.by_rows.module_hooks:
        found = f"hooks of the user's run in every chunk, and a replay would not call them: {ways.by_rows.module_hooks}"
    else:
        return
    raise CannotSplit(asked=asked, found=found, do=do)


def _check_inside(execution: Execution, aliases: ParameterAliases) -> None:
    """Raises CannotSplit where the model's submodules are not called as they are."""
    asked = "run blocks of the model again in backward"
    if aliases.sharded:
        raise CannotSplit(
            asked=asked,
            found="parameters are sharded over ranks (fully_shard), whose hooks do not see parts run again in backward",
            do="leave recompute out of the plan, or use DistributedDataParallel",
        )
    if not execution.calls_submodules:
        raise CannotSplit(
            asked=f"{asked}, beside exact_batchnorm",
            found="exact_batchnorm runs stretches between BatchNorm layers, across the blocks, and runs them again "
            "itself",
            do="take one of the two: recompute runs its blocks on the whole batch, with exact statistics too",
        )
