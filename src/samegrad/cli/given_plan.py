"""``--plan FILE``: reading the file, and telling of it whatever is refused because of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from samegrad.cli.run_story import read_record
from samegrad.cli.target import FunctionTarget, Target
from samegrad.errors import BadInput, BudgetTooSmall, CannotSplit, SamegradError, UsageError, WrongPlan
from samegrad.records import Plan


def read_plan(path: Path) -> Plan:
    """The plan in ``path``. Raises BadInput, naming the option, when there is none."""
    try:
        plan = read_record(path, Plan)
    except BadInput as error:
        raise _told_of(error, path, do=error.do) from None
    if plan is None:
        raise BadInput(
            asked=f"--plan {path}", found="no such file", do="give a plan.json that samegrad wrote",
            file=str(path), option="plan",
        )  # fmt: skip
    return plan


@contextlib.contextmanager
def of_plan_file(path: Path | None, target: Target) -> Iterator[None]:
    """A block that applies the plan in ``path``: what is refused there names the file and the option.

    Nothing is added without a file.
    """
    try:
        yield
    except WrongPlan as error:
        if path is None:
            raise
        again = f"plan again (samegrad plan {target.name} --output DIR, with the options of this line but --plan)"
        raise _told_of(error, path, do=f"{again}, or give the options and data that the plan was made with") from error
    except (BudgetTooSmall, CannotSplit, UsageError) as error:
        if path is None:
            raise
        own = error if isinstance(target, FunctionTarget) else error.without_declaration()
        raise _told_of(own, path, do=own.do) from error


def _told_of(error: SamegradError, path: Path, *, do: str) -> SamegradError:
    return type(error)(
        asked=f"--plan {path}: {error.asked}", found=error.found, do=do, file=str(path), option="plan"
    )
