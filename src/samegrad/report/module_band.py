"""The modules of a step as a band under its course: which part of the model runs at each moment."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from samegrad.records import TimelinePoint
from samegrad.report.plot import Plot
from samegrad.report.shapes import draw_path, draw_text, text_width
from samegrad.report.words import clean_line

MODULE_BAND_PX = 19.0
_DEEPEST = 4
# Of the band's width, how much must carry a name before names are cut shorter.
_NAMED_FRACTION = 0.5
# And how much at least for the band to say anything.
_LEAST_NAMED_FRACTION = 0.15
_STYLE = 'fill="currentColor" fill-opacity="0.09" stroke="currentColor" stroke-opacity="0.35" stroke-width="0.5"'
_Span = tuple[str, float, float]


def has_modules(points: Sequence[TimelinePoint]) -> bool:
    return any(point.module for point in points)


def draw_modules(points: Sequence[TimelinePoint], *, plot: Plot, top: float) -> str:
    """The band, ``MODULE_BAND_PX`` high from ``top`` down; names stand where there is room, all show on hovering.

    Empty where hardly any name has room.
    """
    spans = _readable_spans(points, plot)
    if _named_fraction(spans) < _LEAST_NAMED_FRACTION:
        return ""
    shapes = []
    for name, left, right in spans:
        if not name:
            continue
        corners = [(left, top), (right, top), (right, top + MODULE_BAND_PX), (left, top + MODULE_BAND_PX)]
        shapes.append(draw_path(corners, style=_STYLE, name=name))
        if label := _label(name, right - left):
            shapes.append(draw_text((left + right) / 2, top + 14, label, anchor="middle"))
    return "".join(shapes)


def _readable_spans(points: Sequence[TimelinePoint], plot: Plot) -> list[_Span]:
    """By the longest names of which enough fit."""
    common = _common_parts([point.module for point in points if point.module])
    chosen = _spans(points, plot, common, 1)
    for depth in range(2, _DEEPEST + 1):
        spans = _spans(points, plot, common, depth)
        if _named_fraction(spans) < _NAMED_FRACTION:
            break
        chosen = spans
    return chosen


def _named_fraction(spans: Sequence[_Span]) -> float:
    """Of the width that modules take, how much carries a name."""
    named = sum(right - left for name, left, right in spans if _label(name, right - left))
    whole = sum(right - left for name, left, right in spans if name)
    return named / whole if whole else 0.0


def _spans(points: Sequence[TimelinePoint], plot: Plot, common: int, depth: int) -> list[_Span]:
    runs = [
        (name, next(run).position_fraction)
        for name, run in itertools.groupby(points, key=lambda point: _short(point.module, common, depth))
    ]
    starts = [plot.x.place(start) for _, start in runs]
    ends = [*starts[1:], plot.x.end]
    return [(name, left, right) for (name, _), left, right in zip(runs, starts, ends, strict=True)]


def _short(module: str, common: int, depth: int) -> str:
    return clean_line(".".join(module.split(".")[common : common + depth]))


def _common_parts(modules: Sequence[str]) -> int:
    """How many leading parts all paths share and need not be read again and again."""
    paths = [module.split(".") for module in modules]
    shared = 0
    # The last part of the shortest path must stay to be named.
    for parts in zip(*(path[:-1] for path in paths), strict=False):
        if len(set(parts)) > 1:
            break
        shared += 1
    return shared


def _label(name: str, width: float) -> str:
    """The name, or its last part, where that has room in ``width`` pixels."""
    return next((text for text in (name, name.rpartition(".")[2]) if text_width(text) + 6 <= width), "")
