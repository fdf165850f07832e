"""A plan in force: its levers nested in slot order, all undone on the way out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from samegrad.declared import DeclaredStep
from samegrad.errors import CannotSplit
from samegrad.exact.aliases import ParameterAliases
from samegrad.exact.mapped import ChunkedStep, MappedStep
from samegrad.exact.split import Chunks, SplitStep
from samegrad.execute.ways import Ways
from samegrad.levers import Execution, levers_of
from samegrad.records import Plan


@contextlib.contextmanager
def applied(plan: Plan, declared: DeclaredStep, batch_rows: int) -> Iterator[Execution]:
    """The execution of ``plan`` on a batch of ``batch_rows`` rows."""
    with contextlib.ExitStack() as stack:
        execution = Execution(declared=declared, batch_rows=batch_rows)
        for lever in levers_of(plan):
            execution = stack.enter_context(lever.apply(execution))
        yield execution


def chunked_step(
    execution: Execution, aliases: ParameterAliases, ways: Ways, chunks: Chunks
) -> ChunkedStep:
    """What runs ``execution`` in chunks. ``chunks`` brings rows to the device.

    Raises CannotSplit when the step was examined and cannot run that way, or for levers that exclude each other.
    """
    if execution.inside is not None:
        _check_inside(execution, aliases)
    if (scheme := execution.mapping) is not None:
        return MappedStep(execution.declared, aliases, ways.mapped_examination(), scheme)
    if ways.by_rows is None:
        assert ways.refusal is not None
        raise ways.refusal
    return SplitStep(
        execution.declared, aliases, ways.by_rows, chunks, kept=execution.kept_chunks, inside=execution.inside
    )


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
