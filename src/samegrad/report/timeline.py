"""The memory of one step over time: bytes by category, stacked, with the phases of the step and the budget.

No label stands inside the plot, so none can lie on another: the legend names and numbers everything.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

from samegrad.records import Category, Footprint, Phase, TimelinePoint
from samegrad.report.aligned import aligned
from samegrad.report.axes import byte_ticks
from samegrad.report.facts import category_name
from samegrad.report.module_band import MODULE_BAND_PX, MODULE_OPACITY, draw_modules, has_modules
from samegrad.report.palette import CATEGORY_COLOUR, PHASE_OPACITY
from samegrad.report.plot import Plot, draw_y_axis, lay_out
from samegrad.report.shapes import (
    LIMIT_STROKE,
    MUTED,
    WIDE_PX,
    LegendItem,
    Mark,
    draw_box,
    draw_frame,
    draw_legend,
    draw_line,
    draw_path,
    draw_point,
    draw_text,
    line_style,
    text_width,
)
from samegrad.units import format_bytes

_INK = "currentColor"
_PHASE_BAND_PX = 19.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Moments:
    """What is drawn: the moments in order with their totals, the predicted ones, and the budget's bytes."""

    points: list[TimelinePoint]
    forecast: list[TimelinePoint]
    budget_bytes: int | None

    @property
    def peak(self) -> TimelinePoint:
        return max(self.points, key=total_bytes)

    @property
    def highest_bytes(self) -> int:
        return max(1, *(total_bytes(point) for point in [*self.points, *self.forecast]))

    @property
    def budget_shown_bytes(self) -> int | None:
        """The budget where a line for it would not press the picture flat."""
        budget = self.budget_bytes
        return budget if budget is not None and budget <= 3 * self.highest_bytes else None

    @property
    def categories(self) -> list[Category]:
        return [c for c in CATEGORY_COLOUR if any(point.live_bytes.get(c, 0) for point in self.points)]


def total_bytes(point: TimelinePoint) -> int:
    return sum(point.live_bytes.values())


def timeline_svg(
    footprint: Footprint,
    budget_bytes: int | None,
    predicted: Footprint | None = None,
    *,
    width_px: int = WIDE_PX,
) -> str:
    """One ``<svg>``: live bytes of ``footprint``'s step over its moments; empty where it has no timeline.

    ``budget_bytes`` must count what the footprint counts; one above three times the peak is only named in the
    legend. ``predicted`` adds a dotted line where it counts the same. ``width_px`` is the width of the picture.
    """
    points = _thinned(footprint.timeline, most=width_px)
    if not points:
        return ""
    comparable = predicted is not None and predicted.counting is footprint.counting
    forecast = _thinned(predicted.timeline, most=width_px) if predicted is not None and comparable else []
    forecast = aligned(forecast, points)
    moments = _Moments(points=points, forecast=forecast, budget_bytes=budget_bytes)
    top = 1.06 * max(moments.highest_bytes, moments.budget_shown_bytes or 0)
    ticks = byte_ticks(top)
    labels = [format_bytes(tick) for tick in ticks]
    plot = lay_out(x_range=(0, 1), y_range=(0, top), y_labels=labels, width_px=width_px)
    # What was only counted knows no modules; the prediction of the same step does.
    modules = next((line for line in (points, forecast) if has_modules(line)), None)
    classes = footprint.module_classes | ({} if predicted is None else predicted.module_classes)
    foot = plot.below + 1 + _PHASE_BAND_PX
    band, unnamed = _draw_phases(points, plot=plot)
    below, told = "", ""
    if modules is not None:
        below, told = draw_modules(modules, plot=plot, top=foot + 2, classes=classes)
    if below:
        band += below
        foot += 2 + MODULE_BAND_PX
    band += _draw_ends(plot, foot + 15)
    items = _legend_items(moments, unnamed=unnamed)
    items += [LegendItem(label=told, mark=Mark.AREA, colour=_INK, opacity=MODULE_OPACITY)] if told else []
    legend, height = draw_legend(items, x=1, y=foot + 32, width=width_px - 2)
    counted = f"{footprint.counting.value}, {footprint.origin.value}, on {footprint.device}"
    return draw_frame(
        draw_y_axis(plot, ticks=ticks, labels=labels) + _draw_moments(moments, plot=plot) + band + legend,
        size=(width_px, foot + 32 + height),
        title="Memory over one step",
        description=f"{counted}. At the highest moment: " + "; ".join(item.label for item in items),
    )


def _thinned(timeline: Sequence[TimelinePoint], *, most: int) -> list[TimelinePoint]:
    """The moments in order, at most about ``most``: of each stretch the lowest and the highest one."""
    points = [point for point in timeline if math.isfinite(point.position_fraction)]
    points.sort(key=lambda point: point.position_fraction)
    if len(points) <= most:
        return points
    size = math.ceil(2 * len(points) / most)
    kept: list[TimelinePoint] = []
    for start in range(0, len(points), size):
        stretch = range(start, min(start + size, len(points)))
        ends = {min(stretch, key=lambda i: total_bytes(points[i])), max(stretch, key=lambda i: total_bytes(points[i]))}
        kept += [points[i] for i in sorted(ends)]
    return kept


def _draw_moments(moments: _Moments, *, plot: Plot) -> str:
    shapes = _draw_bands(moments, plot=plot)
    if moments.forecast:
        line = [(point.position_fraction, float(total_bytes(point))) for point in moments.forecast]
        dots = line_style(Mark.DOTS, _INK, width=1.8)
        shapes.append(draw_path(_placed(line, plot=plot), style=dots, name="predicted total"))
    if moments.budget_shown_bytes is not None:
        level = plot.y.place(moments.budget_shown_bytes)
        shapes.append(draw_line(plot.x.start, level, plot.x.end, level, style=LIMIT_STROKE))
    peak = moments.peak
    shapes.append(
        draw_point(plot.x.place(peak.position_fraction), plot.y.place(total_bytes(peak)), colour=_INK, radius=3)
    )
    return "".join(shapes)


def _draw_bands(moments: _Moments, *, plot: Plot) -> list[str]:
    shapes = []
    floor = [0.0] * len(moments.points)
    places = [point.position_fraction for point in moments.points]
    for category in moments.categories:
        roof = [low + point.live_bytes.get(category, 0) for low, point in zip(floor, moments.points, strict=True)]
        upper = _placed(list(zip(places, roof, strict=True)), plot=plot)
        lower = _placed(list(zip(places, floor, strict=True)), plot=plot)
        # A thin edge of the text's colour parts neighbours that a reader's eye may not.
        style = f'fill="{CATEGORY_COLOUR[category]}" stroke="{_INK}" stroke-opacity="0.35" stroke-width="0.5"'
        shapes.append(draw_path([*upper, *reversed(lower)], style=style, name=category_name(category)))
        floor = roof
    return shapes


def _placed(line: list[tuple[float, float]], *, plot: Plot) -> list[tuple[float, float]]:
    """The pixels of ``line``; a single moment becomes a level across the whole plot."""
    if len(line) == 1:
        line = [(0.0, line[0][1]), (1.0, line[0][1])]
    return [(plot.x.place(x), plot.y.place(y)) for x, y in line]


def _draw_phases(points: list[TimelinePoint], *, plot: Plot) -> tuple[str, list[Phase]]:
    """The band of phases below the plot, and the phases whose name found no room in it."""
    spans = [(phase, list(run)) for phase, run in itertools.groupby(points, key=lambda point: point.phase)]
    starts = [0.0, *(run[0].position_fraction for _, run in spans[1:]), 1.0]
    shapes, named = [], set()
    # Edges drawn closer than this would hide the bands they mark.
    roomy = len(spans) * 40 <= plot.x.end - plot.x.start
    top = plot.below + 1
    for (phase, _), (start, end) in zip(spans, itertools.pairwise(starts), strict=True):
        left, right = plot.x.place(start), plot.x.place(end)
        tint = f'fill="{_INK}" fill-opacity="{PHASE_OPACITY[phase]:g}"'
        shapes.append(draw_box(left, top, right - left, _PHASE_BAND_PX, style=tint))
        if start > 0 and roomy:
            edge = f'stroke="{_INK}" stroke-opacity="0.4" stroke-width="1" stroke-dasharray="2 3"'
            shapes.append(draw_line(left, plot.y.end, left, top + _PHASE_BAND_PX, style=edge))
        if text_width(phase.value) + 8 <= right - left:
            shapes.append(draw_text((left + right) / 2, top + 14, phase.value, anchor="middle"))
            named.add(phase)
    return "".join(shapes), [phase for phase in Phase if phase in {p for p, _ in spans} - named]


def _draw_ends(plot: Plot, baseline: float) -> str:
    long, short = "start of the step, operations in order", "start of the step"
    told = long if text_width(long) + 40 <= plot.x.end - plot.x.start else short
    start = draw_text(plot.x.start, baseline, told, style=MUTED)
    return start + draw_text(plot.x.end, baseline, "end", anchor="end", style=MUTED)


def _legend_items(moments: _Moments, *, unnamed: list[Phase]) -> list[LegendItem]:
    peak = moments.peak
    items = [LegendItem(label=f"highest {format_bytes(total_bytes(peak))}, of it", mark=Mark.POINT, colour=_INK)]
    for category in reversed(moments.categories):
        label = f"{category_name(category)} {format_bytes(peak.live_bytes.get(category, 0))}"
        items.append(LegendItem(label=label, mark=Mark.AREA, colour=CATEGORY_COLOUR[category]))
    if moments.budget_bytes is not None:
        where = "" if moments.budget_shown_bytes is not None else ", above this picture"
        label = f"budget {format_bytes(moments.budget_bytes)}{where}"
        items.append(LegendItem(label=label, mark=Mark.LIMIT, colour=_INK))
    if moments.forecast:
        items.append(LegendItem(label="predicted total", mark=Mark.DOTS, colour=_INK))
    for phase in unnamed:
        items.append(LegendItem(label=phase.value, mark=Mark.AREA, colour=_INK, opacity=PHASE_OPACITY[phase]))
    return items
