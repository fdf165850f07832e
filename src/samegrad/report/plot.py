"""A plot's rectangle with its axes: where the curves and the timeline are drawn."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from samegrad.report.axes import Scale
from samegrad.report.shapes import FONT_PX, MUTED, draw_line, draw_text, text_width

PLOT_HEIGHT_PX = 220.0
_GRID = 'stroke="currentColor" stroke-opacity="0.14" stroke-width="1"'
_AXIS = 'stroke="currentColor" stroke-opacity="0.45" stroke-width="1"'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plot:
    """The two scales of a plot; ``x.start`` is its left edge and ``y.start`` its lower one, in pixels."""

    x: Scale
    y: Scale

    @property
    def below(self) -> float:
        return self.y.start


def lay_out(
    *,
    x_range: tuple[float, float],
    y_range: tuple[float, float],
    y_labels: Sequence[str],
    width_px: int,
    logarithmic: bool = False,
) -> Plot:
    """A plot that leaves room for the widest of ``y_labels`` on its left."""
    left = max((text_width(label) for label in y_labels), default=0) + 9
    # A little room at the top and the right keeps half labels and thick lines inside.
    top, right = FONT_PX * 0.75, width_px - 6
    return Plot(
        x=Scale(low=x_range[0], high=x_range[1], start=left, end=right),
        y=Scale(
            low=y_range[0],
            high=y_range[1],
            start=top + PLOT_HEIGHT_PX,
            end=top,
            logarithmic=logarithmic,
        ),
    )


def draw_y_axis(plot: Plot, *, ticks: Sequence[float], labels: Sequence[str]) -> str:
    """Grid lines with their labels, left of the plot, and the line at its foot."""
    shapes = [draw_line(plot.x.start, plot.below, plot.x.end, plot.below, style=_AXIS)]
    for tick, label in zip(ticks, labels, strict=True):
        level = plot.y.place(tick)
        shapes.append(draw_line(plot.x.start, level, plot.x.end, level, style=_GRID))
        shapes.append(draw_text(plot.x.start - 7, level + 4, label, anchor="end", style=MUTED))
    return "".join(shapes)


def draw_x_axis(plot: Plot, *, ticks: Sequence[float], labels: Sequence[str], name: str) -> str:
    """Tick marks with labels below the plot, and the axis' name on the next line; at most 40 px high.

    A label that would touch the one before it is left out.
    """
    shapes, occupied = [], 0.0
    for tick, label in zip(ticks, labels, strict=True):
        place, half = plot.x.place(tick), text_width(label) / 2
        shapes.append(draw_line(place, plot.below, place, plot.below + 5, style=_AXIS))
        centre = min(max(place, plot.x.start + min(half, 8)), plot.x.end + 6 - half)
        if centre - half >= occupied:
            shapes.append(draw_text(centre, plot.below + 18, label, anchor="middle", style=MUTED))
            occupied = centre + half + 8
    shapes.append(draw_text((plot.x.start + plot.x.end) / 2, plot.below + 35, name, anchor="middle", style=MUTED))
    return "".join(shapes)
