"""Where the rows of each draw are, learnt from two runs at two row counts.

A draw's shape alone does not say which of its axes is the rows: (8, 8) may be rows by features or time by rows. At
another row count only the axis of the rows changes, in proportion. What changes in no axis is drawn once for the
whole batch, and chunks cannot share it.
"""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Protocol

import torch

from samegrad.errors import CannotSplit

_WAY_OUT = "draw it outside the model and pass it in the batch"


@dataclasses.dataclass(frozen=True)
class Place:
    """The axis of a draw that holds the rows, ``multiple`` entries for each, one row after the other.

    A shape does not tell that order: time and rows flattened into one axis, time first, look the same and would be
    drawn for the wrong rows. A few rows run alone then give other outputs than among others, so it is to be checked
    once that they do not.
    """

    axis: int
    multiple: int


@dataclasses.dataclass(frozen=True)
class Site:
    """One draw of a run: the function, its shape, and the place of its rows or what forbids splitting it."""

    function: str
    shape: tuple[int, ...]
    place: Place | None
    found: str = ""


class Sites(Protocol):
    """What is known of the draws of a run. Errors are CannotSplit naming the function and the shape."""

    def place(self, call: int, function: str, shape: tuple[int, ...], rows: int) -> Place | None:
        """Where the rows of draw ``call`` are; None for the whole batch."""

    def allow_uncovered(self, function: str) -> None:
        """Raises unless a draw that has no keyed form may be made as it is."""

    def allow_generator(self, function: str, generator: torch.Generator) -> None:
        """Raises unless a draw from the caller's own generator may be made as it is."""

    def finish(self, calls: int) -> None:
        """Raises unless a run may end after ``calls`` draws."""


def refused(function: str, found: str, do: str = _WAY_OUT) -> CannotSplit:
    return CannotSplit(asked="draw for each row what the unsplit step draws", found=f"{function} {found}", do=do)


@dataclasses.dataclass(frozen=True)
class DrawSites:
    """The draws of a model, in order. ``whole``: for a run on all rows, which may draw for the batch as well."""

    sites: tuple[Site, ...]
    whole: bool = False

    def for_all_rows(self) -> DrawSites:
        """The same sites for a run on all rows at once: it draws what chunks would, row by row."""
        return dataclasses.replace(self, whole=True)

    def check_split(self) -> None:
        """Raises CannotSplit for the first draw that chunks cannot make."""
        for site in self.sites:
            if site.place is None:
                raise refused(site.function, f"draws {site.shape}: {site.found}")

    def place(self, call: int, function: str, shape: tuple[int, ...], rows: int) -> Place | None:
        site = self.sites[call] if call < len(self.sites) else None
        if site is not None and site.function == function and site.place is not None:
            at = site.place
            if at.axis < len(shape) and shape[at.axis] == rows * at.multiple:
                return at
        if self.whole:
            return None
        if site is not None and site.function == function and site.place is None:
            raise refused(function, f"draws {shape} for {rows} rows: {site.found}")
        raise refused(function, f"draws {shape} for {rows} rows as draw {call}, another draw than on the probe's rows")

    def allow_uncovered(self, function: str) -> None:
        raise _uncovered(function)

    def allow_generator(self, function: str, generator: torch.Generator) -> None:
        return

    def finish(self, calls: int) -> None:
        if calls != len(self.sites) and not self.whole:
            raise refused(
                "the model", f"made {calls} draws, and {len(self.sites)} on the probe's rows", f"{_WAY_OUT}, each step"
            )


class LeadingRows:
    """For what runs once on all rows, as a loss does: rows first where the first axis is as long as the batch."""

    def place(self, call: int, function: str, shape: tuple[int, ...], rows: int) -> Place | None:
        return Place(0, 1) if shape and shape[0] == rows else None

    def allow_uncovered(self, function: str) -> None:
        return

    def allow_generator(self, function: str, generator: torch.Generator) -> None:
        return

    def finish(self, calls: int) -> None:
        return


class Recorder:
    """Sites of a run that is only looked at. ``draws``: function, shape and what is known to forbid splitting it."""

    def __init__(self) -> None:
        self.draws: list[Site] = []
        self.generators: list[tuple[str, str]] = []

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        return [draw.shape for draw in self.draws]

    def place(self, call: int, function: str, shape: tuple[int, ...], rows: int) -> Place | None:
        self.draws.append(Site(function, shape, None))
        return None

    def allow_uncovered(self, function: str) -> None:
        raise _uncovered(function)

    def allow_generator(self, function: str, generator: torch.Generator) -> None:
        state = generator.get_state().numpy().tobytes()
        self.generators.append((function, hashlib.sha256(state).hexdigest()))

    def finish(self, calls: int) -> None:
        return


def learn_sites(first: Recorder, second: Recorder, rows: tuple[int, int] = (8, 5)) -> DrawSites:
    """The sites of a model that was run on ``rows[0]`` and on ``rows[1]`` rows.

    Draws for the whole batch are kept, with what was found; ``DrawSites.check_split`` raises for them. Raises
    CannotSplit when the two runs drew other things, or from a generator that the model keeps between runs.
    """
    if first.generators != second.generators:
        function = next(
            (a[0] for a, b in zip(first.generators, second.generators) if a != b), "a generator of the model"
        )
        raise refused(function, "draws from a generator that is kept between runs: each chunk would draw anew")
    if [draw.function for draw in first.draws] != [draw.function for draw in second.draws]:
        raise refused("the model", f"makes {_list(first)} on {rows[0]} rows and {_list(second)} on {rows[1]}")
    return DrawSites(tuple(_site(a, b, rows) for a, b in zip(first.draws, second.draws)))


def _list(recorder: Recorder) -> str:
    return ", ".join(draw.function for draw in recorder.draws) or "no draw"


def _site(first: Site, second: Site, rows: tuple[int, int]) -> Site:
    a, b = first.shape, second.shape
    if len(a) != len(b):
        return dataclasses.replace(first, found="its number of axes depends on the number of rows")
    changed = [axis for axis in range(len(a)) if a[axis] != b[axis]]
    if not changed:
        return dataclasses.replace(first, found="no axis follows the rows, so it is one draw for the whole batch")
    if len(changed) > 1:
        return dataclasses.replace(first, found="more than one axis follows the rows, so it couples them")
    axis = changed[0]
    multiple, rest = divmod(a[axis], rows[0])
    if rest or b[axis] != rows[1] * multiple:
        return dataclasses.replace(first, found=f"axis {axis} does not grow in proportion to the rows")
    return dataclasses.replace(first, place=Place(axis, multiple))


def _uncovered(function: str) -> CannotSplit:
    return refused(function, "draws random numbers and has no form that is keyed by rows")
