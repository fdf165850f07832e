"""Values over steps as lines: a gap where a value is missing, a dot where it stands alone."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from samegrad.report.axes import (
    even_ticks,
    is_drawable,
    log_ticks,
    padded_log_range,
    padded_range,
    tick_labels,
)
from samegrad.report.palette import SERIES_COLOUR
from samegrad.report.plot import Plot, draw_x_axis, draw_y_axis, lay_out
from samegrad.report.shapes import (
    WIDE_PX,
    LegendItem,
    Mark,
    draw_frame,
    draw_legend,
    draw_path,
    draw_point,
    line_style,
)
from samegrad.report.words import format_number

# A line of so few points shows each of them.
_MARKED_POINTS = 30
_MARKS = (Mark.LINE, Mark.DASHES, Mark.DOTS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Series:
    """A named line through ``points`` of (x, y), in order; a y that is not finite leaves a gap."""

    name: str
    points: tuple[tuple[float, float], ...]


def curve_svg(
    series: Sequence[Series], *, log_y: bool, title: str, x_name: str = "step", width_px: int = WIDE_PX
) -> str:
    """One ``<svg>`` with a line for each of ``series``; empty where no point can be drawn.

    With ``log_y`` values of zero and below have no place and leave gaps. Values left out are counted in the legend.
    """
    drawn = [(one, _runs(one.points, log_y=log_y)) for one in series]
    points = [point for _, runs in drawn for run in runs for point in run]
    if not points:
        return ""
    # The axis covers every step, so that a loss which stopped being finite leaves a visible end.
    xs = [x for one in series for x, _ in one.points if is_drawable(x)]
    ys = [y for _, y in points]
    y_range = padded_log_range(ys) if log_y else padded_range(ys)
    y_ticks = log_ticks(*y_range) if log_y else even_ticks(*y_range, about=5)
    y_labels = tick_labels(y_ticks)
    reach = max(1.0, 0.1 * abs(xs[0])) if min(xs) == max(xs) else 0.0
    x_range = (min(xs) - reach, max(xs) + reach)
    plot = lay_out(x_range=x_range, y_range=y_range, y_labels=y_labels, width_px=width_px, logarithmic=log_y)
    x_ticks = even_ticks(*x_range, about=width_px // 90, whole=True)
    shapes = [
        draw_y_axis(plot, ticks=y_ticks, labels=y_labels),
        draw_x_axis(plot, ticks=x_ticks, labels=tick_labels(x_ticks), name=x_name),
    ]
    items = []
    for number, (one, runs) in enumerate(drawn):
        item = _legend_item(one, number=number, missing=len(one.points) - sum(map(len, runs)))
        items.append(item)
        for run in runs:
            shapes.append(_draw_run(run, item=item, plot=plot))
    legend, height = draw_legend(items, x=1, y=plot.below + 46, width=width_px - 2)
    described = [_description(one, runs) for one, runs in drawn]
    return draw_frame(
        "".join(shapes) + legend,
        size=(width_px, plot.below + 46 + height),
        title=title,
        description=("Logarithmic scale. " if log_y else "") + "; ".join(described),
    )


def suits_log_scale(series: Sequence[Series]) -> bool:
    """Whether a logarithmic axis shows more: every finite value is positive, and they span a factor above 30."""
    values = [y for one in series for _, y in one.points if math.isfinite(y)]
    return bool(values) and min(values) > 0 and max(values) > 30 * min(values)


def _runs(points: Sequence[tuple[float, float]], *, log_y: bool) -> list[list[tuple[float, float]]]:
    """The stretches of ``points`` without a gap."""
    runs: list[list[tuple[float, float]]] = [[]]
    for x, y in points:
        if is_drawable(x) and is_drawable(y, logarithmic=log_y):
            runs[-1].append((x, y))
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _legend_item(one: Series, *, number: int, missing: int) -> LegendItem:
    gaps = f" ({missing} of {len(one.points)} values not drawn)" if missing else ""
    return LegendItem(
        label=one.name + gaps,
        mark=_MARKS[number % len(_MARKS)],
        colour=SERIES_COLOUR[number % len(SERIES_COLOUR)],
    )


def _draw_run(run: list[tuple[float, float]], *, item: LegendItem, plot: Plot) -> str:
    places = _thinned([(plot.x.place(x), plot.y.place(y)) for x, y in run])
    line = draw_path(places, style=line_style(item.mark, item.colour), name=item.label) if len(places) > 1 else ""
    if len(run) > _MARKED_POINTS:
        return line
    return line + "".join(draw_point(x, y, colour=item.colour, radius=2.8) for x, y in places)


def _thinned(places: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """``places`` with at most four points in each column of one pixel: first, lowest, highest, last."""
    kept: list[tuple[float, float]] = []
    start = 0
    for end in range(1, len(places) + 1):
        if end < len(places) and int(places[end][0]) == int(places[start][0]):
            continue
        column = range(start, end)
        chosen = {start, end - 1, min(column, key=lambda i: places[i][1]), max(column, key=lambda i: places[i][1])}
        kept += [places[i] for i in sorted(chosen)]
        start = end
    return kept


def _description(one: Series, runs: list[list[tuple[float, float]]]) -> str:
    if not runs:
        return f"{one.name}: no value to draw"
    (first_x, first_y), (last_x, last_y) = runs[0][0], runs[-1][-1]
    start, end = (f"{format_number(y, digits=4)} at {x:g}" for x, y in ((first_x, first_y), (last_x, last_y)))
    lowest = format_number(min(y for run in runs for _, y in run), digits=4)
    return f"{one.name}: from {start} to {end}, lowest {lowest}"
