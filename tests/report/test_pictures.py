"""The SVG pictures: finite numbers, labels inside the frame and apart, gaps as gaps, colours that stay apart."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
import xml.etree.ElementTree as ET

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from samegrad.records import Category, Counting, Footprint, Origin, Phase, TimelinePoint
from samegrad.report import Bar, Series, bars_svg, curve_svg, timeline_svg
from samegrad.report.axes import Scale, byte_ticks, even_ticks, log_ticks, tick_labels
from samegrad.report.palette import CATEGORY_COLOUR, PHASE_OPACITY
from samegrad.report.shapes import BOLD_PX, FONT_PX, NARROW_PX, WIDE_PX, text_width, wrap_text
from samegrad.units import format_bytes

NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[-+]?\d+)?")
COORDINATES = ("x", "y", "x1", "x2", "y1", "y2", "cx", "cy", "r", "width", "height", "d", "viewBox", "stroke-width")
WIDTHS = (WIDE_PX, NARROW_PX)


def elements(svg: str, name: str) -> list[ET.Element]:
    return [element for element in ET.fromstring(svg).iter() if element.tag.endswith("}" + name)]


def words(svg: str) -> list[str]:
    return [element.text or "" for element in elements(svg, "text")]


def bad_coordinates(svg: str) -> list[str]:
    """Attributes of a picture that are not finite numbers."""
    found = []
    for element in ET.fromstring(svg).iter():
        for name in COORDINATES:
            for part in re.split(r"[ ,]+", element.get(name, "").replace("M", "")):
                if part and not NUMBER.fullmatch(part):
                    found.append(f"{element.tag} {name}={part}")
    return found


def boxes(svg: str) -> list[tuple[str, float, float, float, float]]:
    """Every text of a picture with the rectangle it covers: left, top, right, bottom."""
    found = []
    for element in elements(svg, "text"):
        text, x, y = element.text or "", float(element.get("x", "")), float(element.get("y", ""))
        width = text_width(text, size=BOLD_PX if element.get("font-weight") else FONT_PX)
        left = x - {"start": 0.0, "middle": width / 2, "end": width}[element.get("text-anchor", "start")]
        found.append((text, left, y - 0.8 * FONT_PX, left + width, y + 0.2 * FONT_PX))
    return found


def clashes(svg: str) -> list[str]:
    """Texts that lie on one another, or outside the picture."""
    _, _, width, height = (float(part) for part in ET.fromstring(svg).get("viewBox", "").split())
    placed = boxes(svg)
    found = [
        f"{a[0]!r} on {b[0]!r}"
        for a, b in itertools.combinations(placed, 2)
        if a[1] < b[3] and b[1] < a[3] and a[2] < b[4] and b[2] < a[4]
    ]
    outside = [b[0] for b in placed if b[1] < -1 or b[3] > width + 1 or b[2] < -1 or b[4] > height + 1]
    return found + outside


FOOTPRINT = Footprint(
    device="cpu",
    counting=Counting.TENSOR_BYTES,
    origin=Origin.MEASURED,
    basis="made by hand",
    rows=2,
    batch_rows=8,
    peak_allocated_bytes=1_500_000,
    timeline=tuple(
        TimelinePoint(
            position_fraction=i / 10,
            phase=phase,
            live_bytes={Category.PARAMETERS: 400_000, Category.ACTIVATIONS: height, Category.BUFFERS: 0},
        )
        for i, (phase, height) in enumerate(
            zip(
                [*[Phase.FORWARD] * 4, Phase.LOSS, *[Phase.BACKWARD] * 4, Phase.OPTIMIZER], range(0, 1_100_000, 110_000)
            )
        )
    ),
)

amounts = st.integers(min_value=0, max_value=2**50)
names = st.text(max_size=60)
losses = st.floats(allow_nan=True, allow_infinity=True)
curves = st.lists(st.tuples(st.integers(0, 10**7).map(float), losses), max_size=40)
points = st.builds(
    TimelinePoint,
    position_fraction=st.floats(0, 1),
    phase=st.sampled_from(Phase),
    live_bytes=st.dictionaries(st.sampled_from(Category), amounts),
)


@settings(max_examples=60, deadline=None)
@given(series=st.lists(curves, min_size=1, max_size=3), log_y=st.booleans(), width=st.sampled_from(WIDTHS))
def test_curves_of_any_values_have_finite_coordinates(
    series: list[list[tuple[float, float]]], log_y: bool, width: int
) -> None:
    named = [Series(name=f"series {i}", points=tuple(sorted(one, key=lambda p: p[0]))) for i, one in enumerate(series)]
    svg = curve_svg(named, log_y=log_y, title="t", width_px=width)
    if svg:
        assert bad_coordinates(svg) == []
        assert clashes(svg) == []
    else:
        assert not any(math.isfinite(y) and 1e-300 < y < 1e300 for one in series for _, y in one)


@settings(max_examples=60, deadline=None)
@given(moments=st.lists(points, max_size=30), budget=st.none() | amounts, width=st.sampled_from(WIDTHS))
def test_timelines_of_any_moments_have_finite_coordinates(
    moments: list[TimelinePoint], budget: int | None, width: int
) -> None:
    footprint = dataclasses.replace(FOOTPRINT, timeline=tuple(moments))
    svg = timeline_svg(footprint, budget, width_px=width)
    assert bool(svg) == bool(moments)
    if svg:
        assert bad_coordinates(svg) == []
        assert clashes(svg) == []


@example(bars=[Bar(name="", amount_bytes=1024, detail="0" * 37)], width=340)
@settings(max_examples=60, deadline=None)
@given(
    bars=st.lists(
        st.builds(Bar, name=names, amount_bytes=amounts, detail=names, limit_bytes=st.none() | amounts), max_size=5
    ),
    width=st.sampled_from(WIDTHS),
)
def test_bars_of_any_amounts_and_names_have_finite_coordinates(bars: list[Bar], width: int) -> None:
    svg = bars_svg(bars, title="t", width_px=width)
    if svg:
        assert bad_coordinates(svg) == []
        assert clashes(svg) == []


def test_the_checks_of_a_picture_catch_planted_faults() -> None:
    svg = curve_svg([Series(name="loss", points=((0.0, 1.0), (1.0, 2.0)))], log_y=False, title="t")
    assert bad_coordinates(svg.replace(' y="', ' y="nan', 1)) != []
    first = elements(svg, "text")[0]
    twin = f'<text x="{first.get("x")}" y="{first.get("y")}" text-anchor="end">{first.text}</text>'
    assert clashes(svg.replace("</svg>", twin + "</svg>")) != []
    assert clashes(svg.replace("</svg>", '<text x="9000" y="10">far</text></svg>')) == ["far"]


def test_a_gap_parts_the_curve_and_is_counted() -> None:
    ys = [3.0, 2.0, math.nan, 1.0, math.inf, 0.5, 0.4]
    series = Series(name="train", points=tuple((float(x), y) for x, y in enumerate(ys)))
    svg = curve_svg([series], log_y=False, title="t")
    finite = [list(run) for ok, run in itertools.groupby(ys, math.isfinite) if ok]
    assert len(elements(svg, "path")) == sum(len(run) > 1 for run in finite)
    assert len(elements(svg, "circle")) == sum(map(len, finite))
    assert "train (2 of 7 values not drawn)" in words(svg)


def test_values_without_a_logarithm_are_gaps_on_a_logarithmic_axis() -> None:
    svg = curve_svg([Series(name="s", points=((0.0, 1.0), (1.0, 0.0), (2.0, -3.0)))], log_y=True, title="t")
    assert "s (2 of 3 values not drawn)" in words(svg)
    assert len(elements(svg, "circle")) == 1


@pytest.mark.parametrize("value", [0.0, 1.0, -5.0, 1e-8, 1e12, 1e290, 5e-324])
@pytest.mark.parametrize("count", [1, 20])
def test_a_constant_series_lies_inside_its_plot(value: float, count: int) -> None:
    series = Series(name="s", points=tuple((float(x), value) for x in range(count)))
    svg = curve_svg([series], log_y=False, title="t")
    axis = elements(svg, "line")[0]
    heights = {float(circle.get("cy", "")) for circle in elements(svg, "circle")}
    assert len(heights) == 1
    assert 0 < heights.pop() < float(axis.get("y1", ""))


@pytest.mark.parametrize("outlier", [9.0, -7.0])
def test_a_thinned_curve_keeps_a_single_spike_or_dip(outlier: float) -> None:
    values = [(float(x), 1.0) for x in range(50_000)]
    values[31_234] = (31_234.0, outlier)
    svg = curve_svg([Series(name="s", points=tuple(values))], log_y=False, title="t")
    path = elements(svg, "path")[0].get("d", "")
    heights = [place.split(",")[1] for place in path.removeprefix("M").split()]
    assert len(heights) < 4 * WIDE_PX
    assert sorted(heights.count(height) == 1 for height in set(heights)) == [False, True]


def test_the_axis_reaches_the_steps_whose_loss_was_not_finite() -> None:
    ended = Series(name="s", points=(*((float(x), 1.0) for x in range(50)), (100.0, math.nan)))
    assert "100" in words(curve_svg([ended], log_y=False, title="t"))


def test_a_timeline_stacks_to_the_total_of_its_highest_moment() -> None:
    svg = timeline_svg(FOOTPRINT, None)
    highest = max(FOOTPRINT.timeline, key=lambda point: sum(point.live_bytes.values()))
    total = sum(highest.live_bytes.values())
    shown = words(svg)
    assert f"highest {format_bytes(total)}, of it" in shown
    for category, amount in ((c, n) for c, n in highest.live_bytes.items() if n):
        assert f"{category.value} {format_bytes(amount)}" in shown


def test_each_band_of_a_timeline_is_as_thick_as_its_category() -> None:
    bands = elements(timeline_svg(FOOTPRINT, None), "path")
    count = len(FOOTPRINT.timeline)
    drawn = []
    for band in bands:
        heights = [float(place.split(",")[1]) for place in band.get("d", "").removeprefix("M").split()]
        drawn.append([low - high for high, low in zip(heights[:count], reversed(heights[count:]), strict=True)])
    per_pixel = FOOTPRINT.timeline[0].live_bytes[Category.PARAMETERS] / drawn[0][0]
    for thicknesses, category in zip(drawn, (Category.PARAMETERS, Category.ACTIVATIONS), strict=True):
        wanted = [point.live_bytes[category] / per_pixel for point in FOOTPRINT.timeline]
        assert thicknesses == pytest.approx(wanted, abs=0.5)
    lower_top, upper_foot = (bands[0].get("d", "").split()[0], bands[1].get("d", "").split()[-1])
    assert lower_top.removeprefix("M") == upper_foot


def test_categories_that_hold_nothing_are_not_drawn() -> None:
    drawn = {title.text for path in elements(timeline_svg(FOOTPRINT, None), "path") for title in path}
    assert drawn == {c.value for point in FOOTPRINT.timeline for c, amount in point.live_bytes.items() if amount}


def test_every_phase_is_named_however_narrow() -> None:
    for width in WIDTHS:
        assert {point.phase.value for point in FOOTPRINT.timeline} <= set(
            words(timeline_svg(FOOTPRINT, None, width_px=width))
        )


def test_a_timeline_of_many_moments_keeps_its_peak() -> None:
    many = [
        TimelinePoint(position_fraction=i / 9999, phase=Phase.FORWARD, live_bytes={Category.ACTIVATIONS: 1000})
        for i in range(10_000)
    ]
    many[7777] = dataclasses.replace(many[7777], live_bytes={Category.ACTIVATIONS: 123_456})
    svg = timeline_svg(dataclasses.replace(FOOTPRINT, timeline=tuple(many)), None)
    assert f"highest {format_bytes(123_456)}, of it" in words(svg)
    assert len(svg) < 60_000


def test_a_timeline_of_many_moments_keeps_its_valley() -> None:
    many = [
        TimelinePoint(position_fraction=i / 9999, phase=Phase.FORWARD, live_bytes={Category.ACTIVATIONS: 1000})
        for i in range(10_000)
    ]
    many[7777] = dataclasses.replace(many[7777], live_bytes={Category.ACTIVATIONS: 10})
    path = elements(timeline_svg(dataclasses.replace(FOOTPRINT, timeline=tuple(many)), None), "path")[0].get("d", "")
    top_edge = path.removeprefix("M").split()
    top_edge = top_edge[: len(top_edge) // 2]
    assert len({place.split(",")[1] for place in top_edge}) == 2


def test_a_budget_far_above_the_peak_is_named_but_does_not_flatten_the_picture() -> None:
    near, far = (timeline_svg(FOOTPRINT, budget) for budget in (2 * 2**20, 2**40))
    assert "budget 2.00 MiB" in words(near)
    assert "budget 1.00 TiB, above this picture" in words(far)
    assert [tick for tick in words(far) if tick.endswith("TiB")] == []


def test_a_prediction_that_counts_something_else_is_not_laid_over_a_measurement() -> None:
    same = dataclasses.replace(FOOTPRINT, origin=Origin.PREDICTED)
    other = dataclasses.replace(same, counting=Counting.CUDA_ALLOCATOR)
    assert "predicted total" in words(timeline_svg(FOOTPRINT, None, same))
    assert "predicted total" not in words(timeline_svg(FOOTPRINT, None, other))


def test_bar_lengths_are_in_the_ratio_of_their_amounts() -> None:
    svg = bars_svg([Bar(name="a", amount_bytes=3000), Bar(name="b", amount_bytes=1500)], title="t")
    lengths = [float(box.get("width", "")) for box in elements(svg, "rect") if box.get("fill") != "currentColor"]
    assert lengths[0] / lengths[1] == pytest.approx(3000 / 1500, abs=0.001)


@pytest.mark.parametrize("width", WIDTHS)
def test_a_long_name_of_a_bar_never_reaches_its_amount(width: int) -> None:
    for length in range(1, 40):
        bar = Bar(name="rows at a time " * length, amount_bytes=1023 * 2**20, detail="counted tensor bytes " * length)
        assert clashes(bars_svg([bar], title="t", width_px=width)) == []


def test_what_exceeds_the_limit_is_set_off_and_what_does_not_is_not() -> None:
    within, over = (bars_svg([Bar(name="a", amount_bytes=n, limit_bytes=10)], title="t") for n in (10, 11))
    assert len(elements(over, "rect")) == len(elements(within, "rect")) + 1


def test_nothing_to_draw_is_an_empty_string() -> None:
    assert bars_svg([], title="t") == ""
    assert curve_svg([Series(name="s", points=((1.0, math.nan),))], log_y=False, title="t") == ""
    assert timeline_svg(dataclasses.replace(FOOTPRINT, timeline=()), 5) == ""


@pytest.mark.parametrize("width", WIDTHS)
def test_every_picture_says_what_it_shows_to_who_can_not_see_it(width: int) -> None:
    pictures = (
        bars_svg([Bar(name="peak", amount_bytes=3000)], title="Peaks", width_px=width),
        timeline_svg(FOOTPRINT, 10, width_px=width),
        curve_svg([Series(name="s", points=((0.0, 1.0),))], log_y=False, title="Loss", width_px=width),
    )
    for svg in pictures:
        title, description, *_ = ET.fromstring(svg)
        assert title.tag.endswith("}title") and title.text
        assert description.tag.endswith("}desc") and re.search(r"\d", description.text or "")
        assert {text.get("fill", "currentColor") for text in elements(svg, "text")} == {"currentColor"}


@given(low=st.floats(-1e9, 1e9), span=st.floats(1e-3, 1e9), about=st.integers(2, 9))
def test_ticks_lie_in_their_range_and_have_labels_of_their_own(low: float, span: float, about: int) -> None:
    ticks = even_ticks(low, low + span, about=about)
    labels = tick_labels(ticks)
    assert 1 <= len(ticks) <= 3 * about
    assert len(set(labels)) == len(ticks)
    assert [float(label) for label in labels] == ticks
    assert all(low - 1e-6 * span <= tick <= low + span * (1 + 1e-6) for tick in ticks)


@given(power=st.integers(-200, 200), decades=st.floats(0.2, 60))
@example(power=23, decades=0.25)  # 10.0**23 is a last digit above 1e23
def test_logarithmic_ticks_are_never_missing(power: int, decades: float) -> None:
    low = 10.0**power
    ticks = log_ticks(low, low * 10**decades)
    assert 1 <= len(ticks) <= 20
    assert all(low <= tick <= low * 10**decades for tick in ticks)


@given(amounts)
def test_byte_ticks_are_few_and_even(top: int) -> None:
    ticks = byte_ticks(top)
    assert ticks[0] == 0 and ticks[-1] <= top and len(ticks) <= 6
    assert len({b - a for a, b in itertools.pairwise(ticks)}) <= 1


@given(low=st.floats(-1e300, 1e300), high=st.floats(-1e300, 1e300))
def test_a_scale_maps_its_ends_to_its_pixels(low: float, high: float) -> None:
    if low < high and (high - low) > 1e-9 * max(abs(low), abs(high)):
        scale = Scale(low=low, high=high, start=10, end=110)
        assert scale.place(low) == pytest.approx(10)
        assert scale.place(high) == pytest.approx(110)


@given(text=st.text(max_size=200), width=st.floats(30, 400), most=st.integers(1, 4))
def test_wrapped_lines_fit(text: str, width: float, most: int) -> None:
    lines = wrap_text(text, width=width, most_lines=most)
    assert len(lines) <= most
    assert all(text_width(line) <= width for line in lines)


def seen(colour: str, matrix: tuple[tuple[float, float, float], ...]) -> tuple[float, ...]:
    """A colour in CIE Lab as it is seen through ``matrix``, which acts on linear RGB."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    r, g, b = (min(max(sum(m * c for m, c in zip(row, linear, strict=True)), 0.0), 1.0) for row in matrix)
    xyz = (
        (0.4124 * r + 0.3576 * g + 0.1805 * b) / 0.9505,
        0.2126 * r + 0.7152 * g + 0.0722 * b,
        (0.0193 * r + 0.1192 * g + 0.9505 * b) / 1.089,
    )
    x, y, z = (t ** (1 / 3) if t > 0.008856 else 7.787 * t + 16 / 116 for t in xyz)
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


# Machado, Oliveira and Fernandes 2009, "A Physiologically-based Model for Simulation of Color Vision Deficiency",
# severity 1.0; and ordinary sight.
SIGHTS = {
    "ordinary": ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)),
    "protanopia": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    "deuteranopia": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881)),
}
JUST_APART = 2.3  # the just noticeable difference in CIE Lab


def closest(colours: list[str], sight: str) -> float:
    return min(math.dist(seen(a, SIGHTS[sight]), seen(b, SIGHTS[sight])) for a, b in itertools.pairwise(colours))


@pytest.mark.parametrize("sight", SIGHTS)
def test_neighbours_in_a_stack_stay_apart_for_every_eye(sight: str) -> None:
    assert closest(list(CATEGORY_COLOUR.values()), sight) > 6 * JUST_APART


def test_the_colour_check_catches_red_beside_green() -> None:
    assert closest(["#b05a2c", "#7a7a2c"], "protanopia") < 6 * JUST_APART < closest(["#b05a2c", "#7a7a2c"], "ordinary")


def test_every_category_and_phase_has_a_look_of_its_own() -> None:
    assert set(CATEGORY_COLOUR) == set(Category) and len(set(CATEGORY_COLOUR.values())) == len(Category)
    assert set(PHASE_OPACITY) == set(Phase) and len(set(PHASE_OPACITY.values())) == len(Phase)


def test_text_is_never_wider_than_the_layout_believes() -> None:
    matplotlib = pytest.importorskip("matplotlib")
    fonts = pytest.importorskip("PIL.ImageFont")
    # DejaVu Sans is among the widest of the fonts that a page may fall back to.
    font = fonts.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", 100)
    bold = fonts.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans-Bold.ttf", 100)
    for text in (
        "activations 1023 MiB",
        "optimizer state 2.40 GiB",
        "validation (89 of 300 values not drawn)",
        "0.0001",
    ):
        assert font.getlength(text) / 100 * FONT_PX <= text_width(text) * 1.02
        assert bold.getlength(text) / 100 * FONT_PX <= text_width(text, size=BOLD_PX) * 1.02
