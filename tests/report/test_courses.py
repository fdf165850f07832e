"""The course of a step: two laid over each other, its modules, what lives at its peak, and what budgets buy."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.report.test_pictures import FOOTPRINT, WIDTHS, bad_coordinates, clashes, elements, words

from samegrad.records import (
    Budget,
    Category,
    Counting,
    Exactness,
    Front,
    FrontPoint,
    LiveTensors,
    Phase,
    Plan,
    TimelinePoint,
)
from samegrad.report import timeline_svg
from samegrad.report.ahead import ahead_lines
from samegrad.report.aligned import aligned
from samegrad.report.at_peak import peak_lines, peak_rows
from samegrad.report.course import course_text
from samegrad.report.front import describe_levers, front_rows, front_svg


def course(*lengths: int, phases: tuple[Phase, ...] = (Phase.FORWARD, Phase.BACKWARD)) -> list[TimelinePoint]:
    """As many moments of each phase as ``lengths`` says, evenly spaced."""
    named = [phase for phase, length in zip(phases, lengths, strict=True) for _ in range(length)]
    return [
        TimelinePoint(position_fraction=i / (len(named) - 1), phase=phase, live_bytes={Category.ACTIVATIONS: i})
        for i, phase in enumerate(named)
    ]


def starts(points: list[TimelinePoint]) -> list[float]:
    return [next(run).position_fraction for _, run in itertools.groupby(points, key=lambda point: point.phase)]


def test_phases_of_two_courses_begin_together() -> None:
    moved = aligned(course(3, 9), course(8, 4))
    assert starts(moved) == starts(course(8, 4))
    assert moved[-1].position_fraction == pytest.approx(1.0)
    assert [point.live_bytes for point in moved] == [point.live_bytes for point in course(3, 9)]
    places = [point.position_fraction for point in moved]
    assert places == sorted(places)


@pytest.mark.parametrize("ours_lack_it", [True, False])
def test_phases_begin_together_where_one_course_lacks_one(ours_lack_it: bool) -> None:
    plain = course(6, 9, 5, phases=(Phase.FORWARD, Phase.BACKWARD, Phase.OPTIMIZER))
    handed = course(6, 9, 7, 5, phases=(Phase.FORWARD, Phase.BACKWARD, Phase.HANDOFF, Phase.OPTIMIZER))
    points, onto = (plain, handed) if ours_lack_it else (handed, plain)
    there = dict(zip((p.phase for p in reversed(onto)), (p.position_fraction for p in reversed(onto))))

    def begin_together(moved: list[TimelinePoint]) -> bool:
        begins = {p.phase: p.position_fraction for p in reversed(moved) if p.phase in there}
        return all(there[phase] == pytest.approx(begin) for phase, begin in begins.items())

    moved = aligned(points, onto)
    assert begin_together(moved) and not begin_together(points)
    places = [point.position_fraction for point in moved]
    assert places == sorted(places) and places[-1] == pytest.approx(1.0)


def test_chunks_lie_over_the_same_chunks() -> None:
    """Also where thinning took a phase out of one of them."""
    twice = (Phase.FORWARD, Phase.LOSS, Phase.BACKWARD) * 4
    whole, thinned = course(*(4, 1, 7) * 4, phases=twice), course(4, 1, 7, 4, 7, 4, 1, 7, 4, 1, 7, phases=(
        *twice[:4], *twice[5:]))  # fmt: skip
    assert starts(aligned(thinned, whole)) == pytest.approx([s for i, s in enumerate(starts(whole)) if i != 4])


def test_other_phases_are_not_bent_into_shape() -> None:
    other = course(3, 9, phases=(Phase.LOSS, Phase.OPTIMIZER))
    assert aligned(other, course(8, 4)) == other
    assert aligned([], course(8, 4)) == []


def with_modules(*modules: str) -> list[TimelinePoint]:
    return [
        dataclasses.replace(FOOTPRINT.timeline[0], position_fraction=i / len(modules), module=module)
        for i, module in enumerate(modules)
    ]


def shown(svg: str) -> list[str]:
    return [title.text or "" for path in elements(svg, "path") for title in path]


def test_modules_are_named_as_deep_as_there_is_room() -> None:
    few = with_modules("net.stem", "net.stem", "net.blocks.0.up", "net.blocks.0.down", "net.head", "net.head")
    svg = timeline_svg(dataclasses.replace(FOOTPRINT, timeline=tuple(few)), None)
    assert {"stem", "blocks.0.up", "blocks.0.down", "head"} <= set(shown(svg))
    many = with_modules("net.stem", *(f"net.blocks.{i // 8}.{i % 8}" for i in range(240)))
    svg = timeline_svg(dataclasses.replace(FOOTPRINT, timeline=tuple(many)), None, width_px=340)
    assert "blocks" in words(svg) and "blocks.0.0" not in shown(svg)


def test_a_module_that_is_only_numbered_is_named_by_its_parent_or_its_class() -> None:
    """Also where there is room in the legend only; without classes the numbers of a path still have their parent."""
    course = with_modules("0", "0", "0", "1", "1", "1")
    classes = {"0": "Conv2d", "1": "ReLU"}
    known = dataclasses.replace(FOOTPRINT, timeline=tuple(course), module_classes=classes)
    assert {"0 (Conv2d)", "1 (ReLU)"} <= set(shown(timeline_svg(known, None)))
    bare = timeline_svg(dataclasses.replace(known, module_classes={}), None)
    inside = dataclasses.replace(known, timeline=tuple(with_modules(*(f"net.blocks.{i // 2}" for i in range(6)))))
    many = dataclasses.replace(known, timeline=tuple(with_modules(*"01" * 30)))
    for svg in (timeline_svg(known, None), bare, timeline_svg(inside, None), timeline_svg(many, None, width_px=340)):
        assert not {"0", "1", "2"} & {*shown(svg), *(t.text for t in elements(svg, "text"))}
    assert "blocks.1" in words(timeline_svg(inside, None)) and "module 0" in shown(bare)
    assert "modules in order: 0 (Conv2d), 1 (ReLU)" in words(timeline_svg(many, None, width_px=340))


def test_a_counted_course_takes_its_modules_from_the_prediction() -> None:
    predicted = dataclasses.replace(FOOTPRINT, timeline=tuple(with_modules("stem", "stem", "head", "head")))
    assert "stem" in words(timeline_svg(FOOTPRINT, None, predicted))
    assert "stem" not in words(timeline_svg(FOOTPRINT, None))


@settings(max_examples=40, deadline=None)
@given(modules=st.lists(st.text(max_size=12), min_size=1, max_size=30), width=st.sampled_from(WIDTHS))
def test_modules_of_any_name_are_drawn_without_a_clash(modules: list[str], width: int) -> None:
    svg = timeline_svg(dataclasses.replace(FOOTPRINT, timeline=tuple(with_modules(*modules))), None, width_px=width)
    assert bad_coordinates(svg) == [] and clashes(svg) == []


AT_PEAK = (
    LiveTensors(
        size_bytes=900,
        category=Category.ACTIVATIONS,
        count=3,
        module="blocks.0",
        operation="aten.relu.default",
        phase=Phase.FORWARD,
    ),
    LiveTensors(
        size_bytes=80,
        category=Category.OPTIMIZER_STATE,
        operation="aten.zeros_like.default",
        phase=Phase.OPTIMIZER,
    ),
    LiveTensors(size_bytes=20, category=Category.PARAMETERS),
)


def test_what_lives_at_the_peak_is_told_largest_first_and_adds_up() -> None:
    footprint = dataclasses.replace(
        FOOTPRINT, at_peak=AT_PEAK, by_category={Category.ACTIVATIONS: 2000}, module_classes={"blocks.0": "Block"}
    )
    rows = peak_rows(footprint)
    assert [(row.what, row.made_by, row.share) for row in rows] == [
        ("activations ×3", "blocks.0 (Block): relu, forward", "45 %"),
        ("optimizer state", "the optimizer's turn: zeros_like", "4 %"),
        ("parameters", "there before the step", "1 %"),
        ("all else", "", "50 %"),
    ]
    assert peak_lines(footprint, most=1)[-1].split()[0] == "1.07"


def test_the_terminal_s_course_reads_without_colours() -> None:
    budget = Budget(total_bytes=2_000_000, device="cpu", counting=Counting.TENSOR_BYTES, source="test")
    plain = course_text(FOOTPRINT, budget).plain
    assert "█" in plain and "░" in plain and "budget" in plain and "backward" in plain
    other = dataclasses.replace(budget, counting=Counting.CUDA_ALLOCATOR)
    assert "budget" not in course_text(FOOTPRINT, other).plain
    assert course_text(dataclasses.replace(FOOTPRINT, timeline=()), budget).plain == ""


def test_the_terminal_s_course_is_as_high_as_its_bytes() -> None:
    """Each column has as many signs as its bytes ask for; a planted cell too many would show."""
    lines = [line for line in course_text(FOOTPRINT, None).plain.splitlines() if "┤" in line or "│" in line]
    columns = list(zip(*(line.split("┤" if "┤" in line else "│", 1)[1].ljust(60) for line in lines)))
    top = max(sum(point.live_bytes.values()) for point in FOOTPRINT.timeline)
    last = sum(FOOTPRINT.timeline[-1].live_bytes.values())
    assert sum(sign != " " for sign in columns[-1]) == round(len(lines) * last / top)


def front(*points: tuple[int, float, dict[str, dict[str, object]]]) -> Front:
    return Front(
        device="RTX 4070 Laptop", counting=Counting.CUDA_ALLOCATOR, basis="test", batch_rows=8,
        points=tuple(
            FrontPoint(budget_bytes=b, seconds=s, plan=Plan(levers=levers, exactness=Exactness.SAME_SUM, batch_rows=8))
            for b, s, levers in points
        ),
    )  # fmt: skip


FRONT = front(
    (2**30, 1.0, {}),
    (2**29, 1.5, {"chunk_loss": {"head": "head", "rows": 512}}),
    (2**28, 20.0, {"host_rows": {}, "split_rows": {"rows": 1}, "recompute": {"blocks": ["a", ["b", "c"]]}}),
)


def test_the_front_s_rows_say_how_much_slower_and_how() -> None:
    assert front_rows(FRONT) == [
        ("1", "1.00 GiB", "1 s", "1.00x", "the plain step"),
        ("2", "512 MiB", "1.5 s", "1.50x", "chunk_loss 512 positions"),
        ("3", "256 MiB", "20 s", "20.00x", "split_rows 1 row, recompute 3 blocks"),
    ]


def test_plans_that_differ_in_the_chunks_they_keep_are_told_apart() -> None:
    told = [describe_levers({"split_rows": {"rows": 34, "kept_chunks": kept}}) for kept in (0, 1, 3)]
    assert told == ["split_rows 34 rows", "split_rows 34 rows (1 chunk kept)", "split_rows 34 rows (3 chunks kept)"]


def test_a_very_slow_plan_does_not_press_the_others_flat() -> None:
    svg = front_svg(FRONT)
    assert "↑ 3" in words(svg) and "RTX 4070 Laptop" in svg
    assert bad_coordinates(svg) == []
    assert front_svg(front()) == "" and front_rows(front()) == []


amounts, seconds = st.integers(1, 2**45), st.floats(1e-7, 1e5)


@settings(max_examples=40, deadline=None)
@given(pairs=st.lists(st.tuples(amounts, seconds), min_size=1, max_size=20, unique=True), width=st.sampled_from(WIDTHS))
def test_fronts_of_any_points_are_drawn(pairs: list[tuple[int, float]], width: int) -> None:
    assert bad_coordinates(front_svg(front(*((b, s, {}) for b, s in pairs)), width_px=width)) == []


def test_a_prediction_for_a_card_says_so_and_keeps_the_context_apart() -> None:
    card = {
        "name": "RTX 3090", "memory_bytes": 24 * 2**30, "memory_basis": "as on the box", "calibrated": False,
        "context_bytes": 2**29, "context_basis": "assumed",
    }  # fmt: skip
    footprint = dataclasses.replace(FOOTPRINT, steady_cap_bytes=3 * 2**20, seconds=0.25)
    budget = Budget(total_bytes=4 * 2**20, device="RTX 3090", counting=Counting.CUDA_ALLOCATOR, source="test")
    plan = Plan(levers={}, exactness=Exactness.SAME_BITS, batch_rows=8, budget=budget)
    told = "\n".join(ahead_lines(plan, footprint, card))
    for part in ("Predicted for RTX 3090, not measured", "75 % of the budget", "512 MiB", "assumed", "uncalibrated"):
        assert part in told
    assert "smallest cap" not in told
