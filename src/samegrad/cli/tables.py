"""Tables of a recipe's document, as wide as the terminal and no wider: no word of them is cut.

Each column is at least as wide as the longest word in it, amounts stay on one line, and room that is left goes to what
would wrap. Columns that do not fit stand in a further table below, beside the columns that tell the rows apart.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from samegrad.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions
    from rich.table import Table

# Between two columns.
_GAP = 2


@dataclasses.dataclass(frozen=True)
class _Column:
    """A head and the cells below it; ``wraps`` is true of words, which also stand to the left."""

    head: str
    cells: tuple[str, ...]
    wraps: bool

    @property
    def least(self) -> int:
        """The width in which no word is cut."""
        words = self.head.split() + [word for cell in self.cells for word in (cell.split() if self.wraps else [cell])]
        return max(map(len, words), default=1)

    @property
    def most(self) -> int:
        """The width in which nothing wraps."""
        return max(map(len, (self.head, *self.cells)))

    def is_beside(self, other: _Column) -> bool:
        """Whether both heads begin with the same word."""
        return self.head.split()[0] == other.head.split()[0]


class DrawnTable:
    """The rows under their column names, amounts in units that read well; a rich renderable."""

    def __init__(self, rows: Sequence[Mapping[str, Any]]) -> None:
        names = dict.fromkeys(name for row in rows for name in row)
        self._columns = [_column(name, [row.get(name) for row in rows]) for name in names]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table | str]:
        for number, columns in enumerate(self._fitting(options.max_width)):
            if number:
                yield ""
            yield _table(columns, options.max_width)

    def _fitting(self, width: int) -> list[list[_Column]]:
        """The columns in groups that are at most ``width`` wide, each with those that tell the rows apart."""
        keys, *rest = self._columns[: self._key_count()], *self._columns[self._key_count() :]
        groups: list[list[_Column]] = [[]]
        for column in rest:
            if groups[-1] and _least([*keys, *groups[-1], column]) > width:
                # What is about one thing, the document's figures say, stays together.
                together = len([*itertools.takewhile(column.is_beside, reversed(groups[-1]))]) % len(groups[-1])
                moved = groups[-1][len(groups[-1]) - together :]
                if _least([*keys, *moved, column]) > width:
                    moved = []
                groups[-1] = groups[-1][: len(groups[-1]) - len(moved)]
                groups.append(moved)
            groups[-1].append(column)
        return [[*keys, *group] for group in groups]

    def _key_count(self) -> int:
        """How many of the first columns tell the rows apart; one where none do."""
        for count in range(1, len(self._columns)):
            if len(set(zip(*(column.cells for column in self._columns[:count])))) == len(self._columns[0].cells):
                return count
        return min(1, len(self._columns))


def _column(name: str, values: Sequence[Any]) -> _Column:
    head = name.removesuffix("_bytes")
    if head.endswith("_seconds"):
        # A step's seconds, not a step.
        head = head.removesuffix("_seconds") + "_time"
    return _Column(
        head=head.replace("_", " "),
        cells=tuple(_cell(name, value) for value in values),
        wraps=any(isinstance(value, str) for value in values),
    )


def _cell(name: str, value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, (int, float)) and name.endswith("_bytes"):
        return format_bytes(value)
    if isinstance(value, (int, float)) and name.endswith("_seconds"):
        return format_seconds(value)
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + _GAP * (len(widths) - 1)


def _least(columns: Sequence[_Column]) -> int:
    """The width of a table of ``columns`` in which no word is cut."""
    return _total([column.least for column in columns])


def _widths(columns: Sequence[_Column], width: int) -> list[int]:
    """The least of each, and what is left of ``width`` handed out one by one to those that would wrap."""
    widths = [column.least for column in columns]
    left = width - _total(widths)
    while left > 0 and any(have < column.most for have, column in zip(widths, columns)):
        for place, column in enumerate(columns):
            if left > 0 and widths[place] < column.most:
                widths[place] += 1
                left -= 1
    return widths


def _table(columns: Sequence[_Column], width: int) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for column, its_width in zip(columns, _widths(columns, width)):
        table.add_column(
            column.head, justify="left" if column.wraps else "right", vertical="top", width=its_width, overflow="fold"
        )
    for cells in zip(*(column.cells for column in columns)):
        table.add_row(*map(Text, cells))
    return table
