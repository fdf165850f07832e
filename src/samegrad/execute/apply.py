"""A plan in force: its levers nested in slot order, all undone on the way out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from samegrad.declared import DeclaredStep
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
