"""A training program by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from samegrad.recipes._recipe.asked import CommonOptions
from samegrad.recipes._recipe.program import Program

Cell = int | float | str | None


@dataclasses.dataclass(frozen=True)
class LongTable:
    """The rows of a table that takes its time, to be read once: each is measured when it is asked for.

    ``len`` says how many there are, so that whoever reads them can tell how far they are.
    """

    count: int
    rows: Iterator[Mapping[str, Cell]]

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Mapping[str, Cell]]:
        return self.rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """A training program by name.

    ``document`` is the number of the document it builds right. ``build`` makes the program, ``table`` the rows of
    ``plan --table``: the document's own figures beside ours. ``pins`` maps an option to the knob of the plan that it
    pins. ``troubleshooting`` is the document's advice in its order, made true.
    """

    name: str
    summary: str
    document: str
    options: type[CommonOptions]
    build: Callable[[Any], Program]
    table: Callable[[Any], Sequence[Mapping[str, Cell]] | LongTable]
    pins: Mapping[str, str]
    troubleshooting: tuple[str, ...]
