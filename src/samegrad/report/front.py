"""Budgets against step times: the staircase of plans that no other one beats, as a picture and as rows of a table."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from samegrad.records import Front, FrontPoint
from samegrad.report.axes import byte_ticks, even_ticks
from samegrad.report.palette import BLUE
from samegrad.report.plot import Plot, draw_x_axis, draw_y_axis, lay_out
from samegrad.report.shapes import (
    WIDE_PX,
    LegendItem,
    Mark,
    draw_frame,
    draw_legend,
    draw_path,
    draw_point,
    draw_text,
    line_style,
)
from samegrad.units import format_bytes, format_seconds

# Above this a step time is drawn on the upper edge: one plan that is very slow would press all others flat.
_LARGEST_RATIO = 12.0
# Numbers nearer than this would touch.
_APART_PX = 15.0


def front_rows(front: Front) -> list[tuple[str, str, str, str, str]]:
    """Number, budget, step time, times slower than the fastest, and how the plan runs, for each point."""
    if not front.points:
        return []
    fastest = front.points[0].seconds
    return [
        (
            str(number),
            format_bytes(point.budget_bytes),
            format_seconds(point.seconds),
            f"{point.seconds / fastest:.2f}x" if fastest else "",
            describe_levers(point.plan.levers),
        )
        for number, point in enumerate(front.points, start=1)
    ]


def describe_levers(levers: Mapping[str, Mapping[str, Any]]) -> str:
    """A plan's levers in a few words, with how much: ``"split_rows 8 rows, recompute 4 blocks"``."""
    told = []
    for name, knobs in levers.items():
        if name == "host_rows":
            continue
        how = []
        if isinstance(knobs.get("rows"), int):
            how.append(_amount(knobs["rows"], "position" if name == "chunk_loss" else "row"))
        if knobs.get("kept_chunks"):
            how.append(f"({_amount(knobs['kept_chunks'], 'chunk')} kept)")
        if isinstance(knobs.get("blocks"), (list, tuple)):
            how.append(_amount(sum(1 if isinstance(entry, str) else len(entry) for entry in knobs["blocks"]), "block"))
        told.append(" ".join([name, *how]))
    return ", ".join(told) or "the plain step"


def _amount(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def front_svg(front: Front, *, width_px: int = WIDE_PX) -> str:
    """One ``<svg>``: bytes to the right, seconds upwards; empty where there is no point.

    Between two plans the line is a staircase: a budget buys the fastest plan that needs no more.
    """
    if not front.points:
        return ""
    points = sorted(front.points, key=lambda point: point.budget_bytes)
    fastest = min(point.seconds for point in points)
    slowest = min(max(point.seconds for point in points), _LARGEST_RATIO * fastest)
    top_seconds, top_bytes = 1.15 * slowest, 1.06 * points[-1].budget_bytes
    y_ticks = even_ticks(0, top_seconds, about=5)
    y_labels = ["0" if tick == 0 else format_seconds(tick) for tick in y_ticks]
    plot = lay_out(x_range=(0, top_bytes), y_range=(0, top_seconds), y_labels=y_labels, width_px=width_px)
    x_ticks = byte_ticks(top_bytes, about=6)
    counted = f"budget ({front.counting.value} on {front.device}), against the time of a step; predicted"
    axes = draw_y_axis(plot, ticks=y_ticks, labels=y_labels) + draw_x_axis(
        plot, ticks=x_ticks, labels=[format_bytes(tick) for tick in x_ticks], name=counted
    )
    told = "; ".join(f"{budget}: {seconds}, {how}" for _, budget, seconds, _, how in front_rows(front))
    legend, height = draw_legend(_legend_items(front), x=1, y=plot.below + 50, width=width_px - 2)
    return draw_frame(
        axes + _stairs(points, plot) + _marks(points, plot) + legend,
        size=(width_px, plot.below + 50 + height),
        title="What every budget buys",
        description=told,
    )


def _stairs(points: list[FrontPoint], plot: Plot) -> str:
    """From the smallest budget on: level until the next plan fits, then down to it."""
    corners: list[tuple[float, float]] = []
    for point, following in itertools.pairwise(points):
        corners += [(point.budget_bytes, point.seconds), (following.budget_bytes, point.seconds)]
    corners += [(points[-1].budget_bytes, points[-1].seconds), (plot.x.high, points[-1].seconds)]
    line = [(plot.x.place(x), plot.y.place(y)) for x, y in corners]
    return draw_path(line, style=line_style(Mark.LINE, BLUE), name="the fastest plan at each budget")


def _marks(points: list[FrontPoint], plot: Plot) -> str:
    """A dot a plan with its number, which is left out where it would lie on the one before it."""
    shapes: list[str] = []
    named: tuple[float, float] | None = None
    for number, point in zip(range(len(points), 0, -1), points, strict=True):
        x, y = plot.x.place(point.budget_bytes), plot.y.place(point.seconds)
        shapes.append(draw_point(x, y, colour=BLUE))
        if named is None or abs(x - named[0]) > _APART_PX or abs(y - named[1]) > _APART_PX:
            if point.seconds > plot.y.high:
                shapes.append(draw_text(x - 7, y + 5, f"↑ {number}", anchor="end"))
            else:
                shapes.append(draw_text(x + 6, y - 7, str(number)))
            named = (x, y)
    return "".join(shapes)


def _legend_items(front: Front) -> list[LegendItem]:
    return [
        LegendItem(label=f"{number}: {how}, {seconds}", mark=Mark.POINT, colour=BLUE)
        for number, _, seconds, _, how in front_rows(front)
    ]
