"""A forward on a few rows of the batch, which a model may not be able to take: refused with the module it fails in."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from samegrad.exact.out_of_memory import is_out_of_memory
from samegrad.exact.undisturbed import FailsOnFewRows

# What models raise on rows that they do not fit. Anything else is a fault of another kind.
_FAILURES = (RuntimeError, ValueError, TypeError, IndexError, AssertionError)


@contextlib.contextmanager
def on_few_rows(rows: int, running: Sequence[str]) -> Iterator[None]:
    """What the forward raises inside as FailsOnFewRows. ``running``: the modules that run, outermost first.

    Running out of memory stays what it is.
    """
    try:
        yield
    except _FAILURES as error:
        if is_out_of_memory(error):
            raise
        raise FailsOnFewRows(
            asked="split the rows of a step",
            found=f"{running[-1] if running else 'the forward'} fails on {rows} rows of the batch: "
            f"{type(error).__name__}: {' '.join(str(error).split())[:200]}",
            do="run the step whole (a larger budget, or rows=<the batch's rows>), or make the model take any number "
            "of rows",
        ) from error
