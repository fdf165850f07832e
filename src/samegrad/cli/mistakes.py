"""What is wrong with options, gathered from all sources and told together, each with its place.

Types are judged where a value is read. Ranges only the classes know that have the options, and what goes with what:
they complain of one thing at a time.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

from samegrad.errors import UsageError
from samegrad.recipes import OutOfRange
from samegrad.units import check_amount

ENVIRONMENT_PREFIX = "SAMEGRAD_"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mistake:
    """What is wrong with one option: a line for a person that begins with the place, and the place by itself."""

    text: str
    option: str | None = None
    where: str = ""


def file_of(where: str) -> str | None:
    """The file of a value's place, None for flags, variables and what nobody wrote."""
    return None if where.startswith(("--", ENVIRONMENT_PREFIX)) else where.rpartition(":")[0] or None


def outside_ranges(kinds: Sequence[type], values: Mapping[str, Any]) -> list[UsageError]:
    """A complaint for every one of ``values`` that is wrong by itself."""
    complaints: list[UsageError] = []
    if isinstance(values.get("budget"), str):
        try:
            check_amount(values["budget"])
        except UsageError as error:
            complaints.append(error)
    for kind in kinds:
        mine = {field.name: values[field.name] for field in dataclasses.fields(kind) if field.name in values}
        # A class complains of one value at a time: without that one it is asked again.
        while (complaint := _first_outside(kind, mine)) is not None:
            complaints.append(complaint)
            del mine[complaint.option or ""]
    return complaints


def _first_outside(kind: type, values: Mapping[str, Any]) -> OutOfRange | None:
    try:
        kind(**values)
    except OutOfRange as error:
        return error if error.option in values else None
    except UsageError:
        # Options against each other are judged once each is right by itself.
        return None
    return None


def with_ranges(
    problems: Sequence[Mistake], outside: Sequence[UsageError], values: Mapping[str, Any], origins: Mapping[str, str]
) -> list[Mistake]:
    """``problems`` and what lies ``outside`` its range, one line each."""
    told = list(problems)
    for error in outside:
        name = error.option or ""
        where = origins[name]
        same = next((i for i, p in enumerate(told) if (p.option, p.where) == (name, where)), None)
        if same is not None:
            told[same] = dataclasses.replace(told[same], text=f"{told[same].text}: {error.found}")
            continue
        place = f"--{name}" if where.startswith("--") else f"{where}: {name}"
        told.append(Mistake(text=f"{place} {values[name]}: {error.found}", option=name, where=where))
    return told


@contextlib.contextmanager
def placing(origins: Mapping[str, str]) -> Iterator[None]:
    """Adds to a dataclass's own complaint who wrote the value: it knows the range, only we know the place."""
    try:
        yield
    except UsageError as error:
        if origins.get(error.option or "", "default") in ("default", "recipe"):
            raise
        raise placed(error, origins) from None


def placed(error: UsageError, origins: Mapping[str, str]) -> UsageError:
    where = origins[error.option or ""]
    return UsageError(
        asked=error.asked, found=f"{where}: {error.found}", do=error.do, file=file_of(where), option=error.option
    )


def refuse(prog: str, problems: Sequence[Mistake]) -> NoReturn:
    first, texts = problems[0], [problem.text for problem in problems]
    raise UsageError(
        asked=prog,
        found=first.text if len(texts) == 1 else "\n    ".join([f"{len(texts)} mistakes", *texts]),
        do=f"{prog} --help lists every option and what it accepts",
        file=file_of(first.where),
        option=first.option,
    )
