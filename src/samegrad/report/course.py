"""The memory of one step over time in a terminal: bytes by category, stacked, with the phases below.

Every category has a sign of its own beside its colour, so that the picture reads without colours too.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from samegrad.records import Budget, Category, Footprint, TimelinePoint
from samegrad.report.facts import category_name, comparable_budget
from samegrad.report.palette import CATEGORY_COLOUR
from samegrad.report.timeline import total_bytes
from samegrad.units import format_bytes

if TYPE_CHECKING:
    from rich.text import Text

_COLUMNS, _ROWS = 60, 12
_MOST_NAMED_PHASES = 15
_SIGN = {
    Category.PARAMETERS: "█",
    Category.GRADIENTS: "▓",
    Category.OPTIMIZER_STATE: "▒",
    Category.BUFFERS: "=",
    Category.WORKSPACES: "%",
    Category.INPUTS: "+",
    Category.ACTIVATIONS: "░",
    Category.TEMPORARY: ":",
}
_BUDGET_SIGN = "╌"


def course_text(footprint: Footprint, budget: Budget | None) -> Text:
    """The picture, its phases and a legend of the highest moment; empty where the footprint has no timeline."""
    from rich.text import Text

    columns = _columns(footprint.timeline)
    if not columns:
        return Text()
    peak = max(footprint.timeline, key=total_bytes)
    top = total_bytes(peak)
    limit = comparable_budget(budget, footprint)
    text = Text(f"Memory over one step, {footprint.origin.value} on {footprint.device}:\n")
    if limit is not None and top < limit <= 2 * top:
        top = limit
    labels = [format_bytes(top * level / _ROWS) if level % 3 == 0 else "" for level in range(_ROWS, 0, -1)]
    width = max(map(len, labels))
    for level, label in zip(range(_ROWS, 0, -1), labels, strict=True):
        text.append(f"{label:>{width}} {'┤' if label else '│'}")
        is_limit = limit is not None and round(limit / top * _ROWS) == level
        for point in columns:
            _append_cell(text, point, (level - 0.5) / _ROWS * top, is_limit=is_limit)
        text.append(" budget\n" if is_limit else "\n")
    text.append(f"{'0':>{width}} └{'─' * len(columns)}\n{'':{width}}  {_phase_line(columns)}\n")
    return text.append(_legend(peak))


def _columns(points: Sequence[TimelinePoint]) -> list[TimelinePoint]:
    """The highest moment of each column; a column without one has that of the column before."""
    columns: list[TimelinePoint | None] = [None] * _COLUMNS
    for point in points:
        place = min(int(point.position_fraction * _COLUMNS), _COLUMNS - 1)
        before = columns[place]
        if before is None or total_bytes(point) > total_bytes(before):
            columns[place] = point
    filled: list[TimelinePoint] = []
    for column in columns:
        filled += [column] if column is not None else filled[-1:]
    return filled


def _append_cell(text: Text, point: TimelinePoint, height_bytes: float, *, is_limit: bool) -> None:
    floor = 0
    for category, colour in CATEGORY_COLOUR.items():
        floor += point.live_bytes.get(category, 0)
        if height_bytes <= floor:
            text.append(_SIGN[category], style=colour)
            return
    text.append(_BUDGET_SIGN if is_limit else " ")


def _phase_line(columns: Sequence[TimelinePoint]) -> str:
    """The names of the phases under their stretches, cut where a stretch is short."""
    runs = [(phase, len(list(run))) for phase, run in itertools.groupby(columns, key=lambda point: point.phase)]
    if len(runs) > _MOST_NAMED_PHASES:
        return f"{', '.join(dict.fromkeys(phase.value for phase, _ in runs))}: chunk after chunk"
    return "".join(f"|{phase.value}"[:width].ljust(width) for phase, width in runs)


def _legend(peak: TimelinePoint) -> Text:
    from rich.text import Text

    legend = Text(f"highest {format_bytes(total_bytes(peak))}, in {peak.phase.value}:")
    for category, colour in reversed(CATEGORY_COLOUR.items()):
        if amount := peak.live_bytes.get(category, 0):
            legend.append("  ").append(_SIGN[category], style=colour)
            legend.append(f" {category_name(category)} {format_bytes(amount)}")
    return legend
