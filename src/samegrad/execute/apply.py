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

    Raises CannotSplit when the step was examined and cannot run that way.
    """
    if execution.scheme is not None:
        return MappedStep(execution.declared, aliases, ways.mapped_examination(), execution.scheme)
    if ways.by_rows is None:
        assert ways.refusal is not None
        raise ways.refusal
    if execution.one_pass_for and ways.by_rows.passes == 2:
        raise CannotSplit(
            asked=f"{execution.one_pass_for} in a step that takes two passes",
            found=f"the first pass keeps the logits of all rows for the loss ({ways.by_rows.reason})",
            do=f"leave {execution.one_pass_for} or the split out, or declare normalise= if the loss is a sum over rows",
        )
    return SplitStep(execution.declared, aliases, ways.by_rows, chunks, kept=execution.kept_chunks)
