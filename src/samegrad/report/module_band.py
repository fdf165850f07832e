"""The modules of a step as a band under its course: which part of the model runs at each moment."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

from samegrad.records import TimelinePoint
from samegrad.report.module_paths import is_numbered, module_name, module_names
from samegrad.report.plot import Plot
from samegrad.report.shapes import draw_path, draw_text, text_width

MODULE_BAND_PX = 19.0
MODULE_OPACITY = 0.09
_DEEPEST = 4
# Of the band's width, how much must carry a name before names are cut shorter.
_NAMED_FRACTION = 0.5
# Below this names stand in the legend as well; more than so many say nothing there.
_LEAST_NAMED_FRACTION = 0.15
_MOST_IN_LEGEND = 12
# Narrower ones, on average, would be a grey smear.
_LEAST_WIDTH_PX = 4.0
_STYLE = (
    f'fill="currentColor" fill-opacity="{MODULE_OPACITY:g}" stroke="currentColor" stroke-opacity="0.35" '
    'stroke-width="0.5"'
)
# The path, cut to the depth that is shown, and where it begins and ends.
_Span = tuple[str, float, float]


def has_modules(points: Sequence[TimelinePoint]) -> bool:
    return any(point.module for point in points)


def draw_modules(
    points: Sequence[TimelinePoint], *, plot: Plot, top: float, classes: Mapping[str, str] | None = None
) -> tuple[str, str]:
    """The band, ``MODULE_BAND_PX`` high from ``top`` down, and what the legend has to say of it, or "".

    Names stand where there is room, all show on hovering. Empty where modules are too many to be told apart.
    ``classes``: those of modules that have only a number for a name, by path.
    """
    names = _Names(_common_parts([point.module for point in points if point.module]), classes or {})
    spans = _readable_spans(points, plot, names)
    widths = [right - left for path, left, right in spans if path]
    told = list(dict.fromkeys(names.full(path) for path, _, _ in spans if path))
    named = _named_fraction(spans, names) >= _LEAST_NAMED_FRACTION
    if not named and (sum(widths) < _LEAST_WIDTH_PX * len(widths) or len(told) > _MOST_IN_LEGEND):
        return "", ""
    shapes = []
    for path, left, right in spans:
        if not path:
            continue
        corners = [(left, top), (right, top), (right, top + MODULE_BAND_PX), (left, top + MODULE_BAND_PX)]
        shapes.append(draw_path(corners, style=_STYLE, name=names.full(path)))
        if label := names.label(path, right - left):
            shapes.append(draw_text((left + right) / 2, top + 14, label, anchor="middle"))
    return "".join(shapes), "" if named else f"modules in order: {', '.join(told)}"


@dataclasses.dataclass(frozen=True)
class _Names:
    """How paths are named whose first ``common`` parts need not be read."""

    common: int
    classes: Mapping[str, str]

    def full(self, path: str) -> str:
        return module_name(path, self.classes, shown=self._shown(path))

    def label(self, path: str, width: float) -> str:
        """The longest name that has room in ``width`` pixels; empty where none has."""
        names = module_names(path, self.classes, shown=self._shown(path))
        return next((text for text in names if text_width(text) + 6 <= width), "")

    def _shown(self, path: str) -> str:
        return ".".join(path.split(".")[self.common :])


def _readable_spans(points: Sequence[TimelinePoint], plot: Plot, names: _Names) -> list[_Span]:
    """By the longest names of which enough fit."""
    chosen = _spans(points, plot, names.common + 1)
    for depth in range(2, _DEEPEST + 1):
        spans = _spans(points, plot, names.common + depth)
        if _named_fraction(spans, names) < _NAMED_FRACTION:
            break
        chosen = spans
    return chosen


def _named_fraction(spans: Sequence[_Span], names: _Names) -> float:
    """Of the width that modules take, how much carries a name."""
    named = sum(right - left for path, left, right in spans if path and names.label(path, right - left))
    whole = sum(right - left for path, left, right in spans if path)
    return named / whole if whole else 0.0


def _spans(points: Sequence[TimelinePoint], plot: Plot, parts: int) -> list[_Span]:
    runs = [
        (path, next(run).position_fraction)
        for path, run in itertools.groupby(points, key=lambda point: ".".join(point.module.split(".")[:parts]))
    ]
    starts = [plot.x.place(start) for _, start in runs]
    ends = [*starts[1:], plot.x.end]
    return [(path, left, right) for (path, _), left, right in zip(runs, starts, ends, strict=True)]


def _common_parts(modules: Sequence[str]) -> int:
    """How many leading parts all paths share and need not be read again and again."""
    paths = [module.split(".") for module in modules]
    shared = 0
    # The last part of the shortest path must stay to be named.
    for parts in zip(*(path[:-1] for path in paths), strict=False):
        if len(set(parts)) > 1:
            break
        shared += 1
    # And the parent's name before what is only a number.
    while shared and any(is_numbered(path[shared]) for path in paths):
        shared -= 1
    return shared
