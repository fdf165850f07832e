"""The pieces of a picture as SVG text: shapes, text that knows its width, and a legend that wraps.

Text takes the page's own colour (``currentColor``), so the same picture serves light and dark pages.
"""

from __future__ import annotations

import dataclasses
import enum
import math
import unicodedata
from collections.abc import Sequence

from samegrad.report.story import SVG_NAMESPACE
from samegrad.report.words import clean_line, escape_line

# The widths at which a picture's text has its proper size: on a desktop page, and on a phone.
WIDE_PX = 760
NARROW_PX = 340
FONT_PX = 12.0
LINE_PX = 17.0
# Bold letters of a size are about as wide as regular ones an eighth larger.
BOLD_PX = 13.5
MUTED = 'fill-opacity="0.72"'
LIMIT_STROKE = 'stroke="currentColor" stroke-width="1.5" stroke-dasharray="5 3"'
_FONTS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Noto Sans', 'Helvetica Neue', Arial, sans-serif"


class Mark(enum.Enum):
    """What stands before a legend's label."""

    AREA = "area"
    LINE = "line"
    LIMIT = "limit"
    DASHES = "dashes"
    DOTS = "dots"
    POINT = "point"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LegendItem:
    label: str
    mark: Mark
    colour: str
    opacity: float = 1.0


def pixels(value: float) -> str:
    """A coordinate as SVG writes it. A coordinate that is not finite is a bug of ours: ValueError."""
    if not math.isfinite(value):
        raise ValueError(f"a coordinate of a picture is {value}")
    text = f"{value:.1f}".removesuffix(".0")
    return "0" if text == "-0" else text


def text_width(text: str, *, size: float = FONT_PX) -> float:
    """Pixels that ``text`` takes at most in an ordinary sans-serif font; a page can't be asked for the truth."""
    ems = 0.0
    for character in text:
        if unicodedata.east_asian_width(character) in "WF":
            ems += 1.05
        elif character in "mwMW@%—…":
            ems += 0.98
        elif character in " .,:;|'!()[]ijlIft/-":
            ems += 0.40
        else:
            ems += 0.70 if character.isupper() else 0.64
    return ems * size


def wrap_text(text: str, *, width: float, size: float = FONT_PX, most_lines: int = 3) -> list[str]:
    """Lines of ``text``, each at most ``width`` pixels; what does not fit on the last line ends in an ellipsis."""
    lines: list[str] = []
    line = ""
    for word in clean_line(text).split():
        candidate = f"{line} {word}" if line else word
        if text_width(candidate, size=size) <= width:
            line = candidate
            continue
        if line:
            lines.append(line)
        while text_width(word, size=size) > width and len(word) > 1:
            fits = next(n for n in range(len(word) - 1, 0, -1) if n == 1 or text_width(word[:n], size=size) <= width)
            lines.append(word[:fits])
            word = word[fits:]
        line = word
    lines += [line] if line else []
    if len(lines) <= most_lines:
        return lines
    last = lines[most_lines - 1]
    while last and text_width(last + "…", size=size) > width:
        last = last[:-1]
    return [*lines[: most_lines - 1], last.rstrip() + "…"]


def draw_text(x: float, y: float, text: str, *, anchor: str = "start", style: str = "") -> str:
    """``text`` with its baseline at ``y``; ``style`` adds attributes, ``anchor`` is start, middle or end."""
    side = "" if anchor == "start" else f' text-anchor="{anchor}"'
    extra = f" {style}" if style else ""
    return f'<text x="{pixels(x)}" y="{pixels(y)}"{side}{extra}>{escape_line(text)}</text>'


def draw_line(x1: float, y1: float, x2: float, y2: float, *, style: str) -> str:
    ends = f'x1="{pixels(x1)}" y1="{pixels(y1)}" x2="{pixels(x2)}" y2="{pixels(y2)}"'
    return f"<line {ends} {style}/>"


def draw_box(x: float, y: float, width: float, height: float, *, style: str) -> str:
    corner = f'x="{pixels(x)}" y="{pixels(y)}"'
    return f'<rect {corner} width="{pixels(max(width, 0))}" height="{pixels(max(height, 0))}" {style}/>'


def draw_path(points: Sequence[tuple[float, float]], *, style: str, name: str = "") -> str:
    """A line through ``points``; ``name`` is what a browser shows when the pointer rests on it."""
    places = " ".join(f"{pixels(x)},{pixels(y)}" for x, y in points)
    inside = f"<title>{escape_line(name)}</title>" if name else ""
    return f'<path d="M{places}" {style}>{inside}</path>'


def draw_point(x: float, y: float, *, colour: str, radius: float = 3.5) -> str:
    return f'<circle cx="{pixels(x)}" cy="{pixels(y)}" r="{radius:g}" fill="{colour}"/>'


def draw_legend(items: Sequence[LegendItem], *, x: float, y: float, width: float) -> tuple[str, float]:
    """The legend's shapes and its height in pixels; items flow into as many lines as ``width`` asks for."""
    shapes: list[str] = []
    left, baseline = x, y + FONT_PX
    for item in items:
        lines = wrap_text(item.label, width=width - 22)
        taken = 22 + max((text_width(line) for line in lines), default=0) + 16
        if left > x and left + taken - 16 > x + width:
            left, baseline = x, baseline + LINE_PX + 2
        shapes.append(_draw_mark(item, x=left, y=baseline - 4))
        for number, line in enumerate(lines):
            shapes.append(draw_text(left + 22, baseline + number * LINE_PX, line))
        if len(lines) > 1:
            left, baseline = x, baseline + LINE_PX * (len(lines) - 1) + LINE_PX + 2
        else:
            left += taken
    # After an item of several lines the next line is already open, with nothing on it yet.
    open_line = 0.0 if left > x else LINE_PX + 2
    return "".join(shapes), baseline - open_line - y + 6


def _draw_mark(item: LegendItem, *, x: float, y: float) -> str:
    if item.mark is Mark.AREA:
        fill = f'fill="{item.colour}" fill-opacity="{item.opacity:g}" stroke="currentColor" stroke-opacity="0.3"'
        return draw_box(x, y - 5.5, 14, 11, style=f'{fill} stroke-width="0.5" rx="2"')
    if item.mark is Mark.POINT:
        return draw_point(x + 7, y, colour=item.colour)
    style = LIMIT_STROKE if item.mark is Mark.LIMIT else line_style(item.mark, item.colour)
    return draw_line(x, y, x + 15, y, style=style)


def line_style(mark: Mark, colour: str, *, width: float = 2.0) -> str:
    """The stroke attributes of a line drawn as ``mark``."""
    dashes = {Mark.DASHES: ' stroke-dasharray="6 4"', Mark.DOTS: ' stroke-dasharray="1.5 4"'}.get(mark, "")
    ends = ' stroke-linecap="round" stroke-linejoin="round"'
    return f'fill="none" stroke="{colour}" stroke-width="{width:g}"{dashes}{ends}'


def draw_frame(shapes: str, *, size: tuple[float, float], title: str, description: str) -> str:
    """A whole ``<svg>`` element around ``shapes``, with a title and a description for readers who can't see it."""
    width, height = (pixels(math.ceil(side)) for side in size)
    opening = f'<svg xmlns="{SVG_NAMESPACE}" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    font = f'font-family="{_FONTS}" font-size="{FONT_PX:g}" fill="currentColor" role="img"'
    names = f"<title>{escape_line(title)}</title><desc>{escape_line(description)}</desc>"
    return f"{opening} {font}>{names}{shapes}</svg>"
