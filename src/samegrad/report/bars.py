"""Peaks beside each other and beside the budget, as horizontal bars on one scale."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from samegrad.report.axes import Scale
from samegrad.report.palette import BLUE, OVER_BUDGET
from samegrad.report.shapes import (
    BOLD_PX,
    FONT_PX,
    LIMIT_STROKE,
    LINE_PX,
    MUTED,
    WIDE_PX,
    draw_box,
    draw_frame,
    draw_line,
    draw_text,
    text_width,
    wrap_text,
)
from samegrad.units import format_bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bar:
    """One bar: a name, its amount, and a muted line that says what is counted. ``limit_bytes`` draws the budget."""

    name: str
    amount_bytes: int
    detail: str = ""
    colour: str = BLUE
    over_colour: str = OVER_BUDGET
    limit_bytes: int | None = None


def bars_svg(bars: Sequence[Bar], *, title: str, limit_name: str = "budget", width_px: int = WIDE_PX) -> str:
    """Horizontal bars on one scale from zero; the part of a bar beyond its limit is set off by colour."""
    top = max((max(bar.amount_bytes, bar.limit_bytes or 0) for bar in bars), default=0)
    if top <= 0:
        return ""
    scale = Scale(low=0, high=top, start=1, end=width_px - 1)
    shapes: list[str] = []
    y = 2.0
    for bar in bars:
        drawn, height = _draw_bar(bar, scale=scale, y=y)
        shapes.append(drawn)
        y += height
    limits = sorted({bar.limit_bytes for bar in bars if bar.limit_bytes is not None})
    for limit in limits:
        y += 5
        shapes.append(draw_line(1, y - 4, 16, y - 4, style=LIMIT_STROKE))
        shapes.append(draw_text(23, y, f"{limit_name} {format_bytes(limit)}"))
        y += LINE_PX
    amounts = "; ".join(f"{bar.name}: {format_bytes(bar.amount_bytes)}, {bar.detail}" for bar in bars)
    limit_words = "".join(f"; {limit_name}: {format_bytes(limit)}" for limit in limits)
    return draw_frame("".join(shapes), size=(width_px, y), title=title, description=amounts + limit_words)


def _draw_bar(bar: Bar, *, scale: Scale, y: float) -> tuple[str, float]:
    amount = format_bytes(bar.amount_bytes)
    room = scale.end - scale.start
    # The amount stands on the first line of the name, which is there for a bar without a name too.
    names = wrap_text(bar.name, width=room - text_width(amount, size=BOLD_PX) - 16, size=BOLD_PX) or [""]
    details = wrap_text(bar.detail, width=room)
    shapes = [draw_text(scale.end, y + FONT_PX, amount, anchor="end", style='font-weight="600"')]
    for number, line in enumerate(names):
        shapes.append(draw_text(scale.start, y + FONT_PX + number * LINE_PX, line, style='font-weight="600"'))
    baseline = y + FONT_PX + len(names) * LINE_PX
    for number, line in enumerate(details):
        shapes.append(draw_text(scale.start, baseline + number * LINE_PX, line, style=MUTED))
    bar_y = y + (len(names) + len(details)) * LINE_PX + 4
    end = max(scale.place(bar.amount_bytes), scale.start + 2)
    shapes.append(draw_box(scale.start, bar_y, room, 14, style='fill="currentColor" fill-opacity="0.06" rx="3"'))
    fill = f'fill="{bar.colour}" rx="3"'
    shapes.append(draw_box(scale.start, bar_y, end - scale.start, 14, style=fill))
    if bar.limit_bytes is not None:
        limit = scale.place(bar.limit_bytes)
        if bar.amount_bytes > bar.limit_bytes:
            over = f'fill="{bar.over_colour}" rx="3"'
            shapes.append(draw_box(limit, bar_y, end - limit, 14, style=over))
        shapes.append(draw_line(limit, bar_y - 4, limit, bar_y + 18, style=LIMIT_STROKE))
    return "".join(shapes), bar_y - y + 14 + 20
