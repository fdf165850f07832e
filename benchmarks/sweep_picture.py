"""The sweep of one card as a picture and a table: how fast everybody is with the bytes that it really took.

    python benchmarks/sweep_picture.py [--card h100]

Reads ``results/budget_sweep_<card>.json``, writes the ``.svg`` beside it, and prints the table. To the right: bytes
that the allocator reserved at its peak. Upwards: the plain step's time over the contender's, in the same file. What did
not fit its cap, and what computes another function, has no point.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import _results

from samegrad.report.axes import byte_ticks, even_ticks
from samegrad.report.palette import GREY, SERIES_COLOUR
from samegrad.report.plot import Plot, draw_x_axis, draw_y_axis, lay_out
from samegrad.report.shapes import (
    FONT_PX,
    LIMIT_STROKE,
    WIDE_PX,
    LegendItem,
    Mark,
    draw_frame,
    draw_legend,
    draw_line,
    draw_path,
    draw_point,
    draw_text,
    line_style,
)
from samegrad.units import format_bytes, format_seconds

PLAIN, OURS = "plain", "samegrad"
_HEADING_PX, _BELOW_PX = 26.0, 48.0


class Point(NamedTuple):
    """``speed``: in plain steps. ``budget``: its cell's, in percent; None for the plain step itself."""

    bytes: int
    speed: float
    budget: float | None


def cells_of(workload: dict[str, Any]) -> Iterator[tuple[float, str, dict[str, Any]]]:
    """Budget in percent, contender and cell; the largest budgets first."""
    for name, cell in sorted(workload["cells"].items(), key=lambda item: -float(item[0].split(" ", 1)[0])):
        budget, contender = name.split(" ", 1)
        yield float(budget), contender, cell


def series_of(workload: dict[str, Any]) -> dict[str, list[Point]]:
    """The points of each contender, those with the fewest bytes first."""
    plain_seconds = workload["plain_seconds"]
    found = {PLAIN: [Point(workload["plain_reserved_bytes"], 1.0, None)]}
    for budget, contender, cell in cells_of(workload):
        if cell["fits"] and not cell.get("changed_the_function"):
            point = Point(cell["peak_reserved_bytes"], plain_seconds / cell["seconds"], budget)
            found.setdefault(contender, []).append(point)
    return {contender: sorted(points) for contender, points in found.items()}


def draw_workload(name: str, workload: dict[str, Any], colours: dict[str, str]) -> tuple[str, float]:
    """A panel and its height."""
    series = series_of(workload)
    points = [point for some in series.values() for point in some]
    top_bytes, top_speed = 1.05 * max(point.bytes for point in points), 1.15 * max(point.speed for point in points)
    ticks = even_ticks(0, top_speed, about=5)
    labels = [f"{tick:g}" for tick in ticks]
    plot = lay_out(x_range=(0, top_bytes), y_range=(0, top_speed), y_labels=labels, width_px=WIDE_PX)
    bytes_at = byte_ticks(top_bytes, about=6)
    floor = plot.x.place(workload["floor_bytes"])
    shapes = [
        draw_y_axis(plot, ticks=ticks, labels=labels),
        draw_x_axis(plot, ticks=bytes_at, labels=[format_bytes(tick) for tick in bytes_at], name="peak reserved"),
        draw_line(plot.x.start, plot.y.place(1), plot.x.end, plot.y.place(1), style=LIMIT_STROKE),
        draw_line(floor, plot.below, floor, plot.y.end, style=line_style(Mark.DOTS, GREY)),
    ]
    for contender, some in series.items():
        shapes += _draw_series(contender, some, plot, colours[contender])
    heading = draw_text(1, FONT_PX + 2, f"{name}: speed in plain steps of {format_seconds(workload['plain_seconds'])}")
    return f'{heading}<g transform="translate(0 {_HEADING_PX:g})">{"".join(shapes)}</g>', (
        _HEADING_PX + plot.below + _BELOW_PX
    )


def _draw_series(contender: str, points: list[Point], plot: Plot, colour: str) -> Iterator[str]:
    places = [(plot.x.place(point.bytes), plot.y.place(point.speed)) for point in points]
    if len(places) > 1:
        yield draw_path(places, style=line_style(Mark.LINE, colour), name=contender)
    for number, ((x, y), point) in enumerate(zip(places, points, strict=True)):
        yield draw_point(x, y, colour=colour)
        if contender == OURS and point.budget is not None:
            label = f"{point.budget:g} %"
            # A line that rises to the next point would go through a label on that side.
            if number + 1 < len(places) and places[number + 1][1] < y:
                yield draw_text(x - 6, y + FONT_PX + 2, label, anchor="end")
            else:
                yield draw_text(x + 6, y - 7, label)


def picture(sweep: dict[str, Any]) -> str:
    """One ``<svg>`` with a panel a workload."""
    workloads = {name: workload for name, workload in sweep["workloads"].items() if "plain_seconds" in workload}
    seen = dict.fromkeys(contender for workload in workloads.values() for contender in series_of(workload))
    names = [OURS, *(name for name in seen if name not in (OURS, PLAIN))]
    colours = {PLAIN: GREY, **dict(zip(names, SERIES_COLOUR, strict=False))}
    if len(names) > len(SERIES_COLOUR):
        raise SystemExit(f"{len(names)} contenders, and colours for {len(SERIES_COLOUR)}: draw fewer at a time")
    shapes, height = [], 0.0
    for name, workload in workloads.items():
        panel, tall = draw_workload(name, workload, colours)
        shapes.append(f'<g transform="translate(0 {height:g})">{panel}</g>')
        height += tall
    items = [LegendItem(label=name, mark=Mark.POINT, colour=colours[name]) for name in (*names, PLAIN)]
    items.append(LegendItem(label="parameters, gradients, optimizer state", mark=Mark.DOTS, colour=GREY))
    legend, tall = draw_legend(items, x=1, y=height, width=WIDE_PX - 2)
    return draw_frame(
        "".join([*shapes, legend]),
        size=(WIDE_PX, height + tall),
        title=f"Speed over bytes on one {sweep['machine']['device']}",
        description="; ".join(table(sweep)[2:]),
    )


def table(sweep: dict[str, Any]) -> list[str]:
    """Lines of a Markdown table, a cell a line."""
    lines = [
        "| workload | budget | who | peak reserved | a step | of plain speed | off plain gradients | off float64's |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, workload in sweep["workloads"].items():
        for budget, contender, cell in cells_of(workload):
            where = f"| {name} | {budget:g} %, {format_bytes(cell['budget_bytes'])} | {contender} "
            if not cell["fits"]:
                lines.append(f"{where}| did not fit | | | | |")
                continue
            speed = f"{workload['plain_seconds'] / cell['seconds']:.2f}" if "plain_seconds" in workload else ""
            same = "another function" if cell.get("changed_the_function") else f"{cell['gradient_difference']:.1g}"
            took = f"{format_bytes(cell['peak_reserved_bytes'])} | {format_seconds(cell['seconds'])}"
            known = "gradient_error" in cell and "plain_error" in workload
            errors = f"{cell['gradient_error']:.3g} (plain {workload['plain_error']:.3g})" if known else ""
            lines.append(f"{where}| {took} | {speed} | {same} | {errors} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--card", default="h100", help="as in the name of the file")
    card = parser.parse_args().card
    sweep = json.loads((_results.RESULTS / f"budget_sweep_{card}.json").read_text())
    (_results.RESULTS / f"budget_sweep_{card}.svg").write_text(picture(sweep))
    print("\n".join(table(sweep)))


if __name__ == "__main__":
    main()
