"""Terminal output: the promised memory line, lines that fit, and names that can't become markup."""

from __future__ import annotations

import dataclasses
import io
import math

import pytest
from rich.console import Console, RenderableType

from samegrad.records import Budget, Category, Check, Counting, Same, StepResult
from samegrad.report import Story
from samegrad.report.terminal import footprint_table, memory_line, plan_table, verdict_lines
from samegrad.units import format_bytes

GIB = 2**30
CUDA_BUDGET = Budget(total_bytes=4 * GIB, device="cuda:0", counting=Counting.CUDA_ALLOCATOR, source="--budget 4GiB")
RESULT = StepResult(
    index=3,
    loss=1.0,
    seconds=0.1,
    batch_rows=8,
    allocated_bytes=int(1.23 * GIB),
    reserved_bytes=int(1.5 * GIB),
    peak_allocated_bytes=int(1.75 * GIB),
    peak_reserved_bytes=2 * GIB,
)


def printed(thing: RenderableType, *, width: int = 40) -> str:
    """What a console without colours prints, after rich has read its markup."""
    stream = io.StringIO()
    Console(file=stream, width=width, no_color=True, force_terminal=False).print(thing)
    return stream.getvalue()


def test_the_memory_line_reads_as_promised() -> None:
    assert (
        memory_line(RESULT, CUDA_BUDGET, Counting.CUDA_ALLOCATOR)
        == "Memory: 1.23 GiB allocated, 1.50 GiB reserved (peak 2.00 GiB, budget 4.00 GiB)"
    )


def test_counted_bytes_are_named_so_in_the_memory_line() -> None:
    counted = dataclasses.replace(RESULT, reserved_bytes=None, peak_reserved_bytes=None)
    budget = dataclasses.replace(CUDA_BUDGET, counting=Counting.TENSOR_BYTES, device="cpu")
    line = memory_line(counted, budget, Counting.TENSOR_BYTES)
    assert line == "Memory: 1.23 GiB counted tensor bytes (peak 1.75 GiB, budget 4.00 GiB)"


def test_a_peak_below_what_the_budget_bounds_is_marked() -> None:
    line = memory_line(dataclasses.replace(RESULT, peak_reserved_bytes=None), CUDA_BUDGET, Counting.CUDA_ALLOCATOR)
    assert "peak 1.75 GiB allocated" in line


def test_a_budget_that_counts_something_else_is_marked() -> None:
    line = memory_line(dataclasses.replace(RESULT, reserved_bytes=None), CUDA_BUDGET, Counting.TENSOR_BYTES)
    assert "budget 4.00 GiB of CUDA allocator" in line


@pytest.mark.parametrize("counting", Counting)
def test_what_was_not_counted_is_not_invented(counting: Counting) -> None:
    bare = StepResult(index=0, loss=1.0, seconds=0.1, batch_rows=8)
    assert memory_line(bare, None, counting) == f"Memory: not counted ({counting.value})"


HOSTILE = ["[/red]", "[bold", "a\\[/b]", "x" * 90, "\x1b[31mred", "[link=file:///x]here[/link]", "\\", "w[0]"]


@pytest.mark.parametrize("columns", [20, 40, 80])
@pytest.mark.parametrize("text", HOSTILE)
def test_names_are_printed_as_they_are_and_never_crash(story: Story, text: str, columns: int) -> None:
    assert story.verdict and story.plan and story.measured
    check = Check(name=text, passed=False, error=1.0, allowed=0.5, worst=text, detail=text)
    verdict = dataclasses.replace(
        story.verdict, answer=Same.DIFFERS, reference=text, worst_parameter=text, checks=(check,)
    )
    plan = dataclasses.replace(story.plan, levers={text: {text: text}}, reasons={text: text, "other": text})
    shown = [
        printed("\n".join(verdict_lines(verdict, columns=columns)), width=200),
        printed(plan_table(plan, story.measured), width=columns),
        printed(footprint_table(dataclasses.replace(story.measured, device=text)), width=columns),
    ]
    visible = text.replace("\x1b[31m", "")
    for output in shown:
        assert "\x1b" not in output
        assert "".join(visible.split()) in "".join(output.split())


@pytest.mark.parametrize("columns", [20, 40, 80, 120])
def test_verdict_lines_keep_to_the_width(story: Story, columns: int) -> None:
    assert story.verdict
    for answer in Same:
        verdict = dataclasses.replace(story.verdict, answer=answer, worst_parameter="encoder." * 12)
        assert max(map(len, verdict_lines(verdict, columns=columns))) <= columns


def test_the_width_of_the_terminal_is_the_default(story: Story, monkeypatch: pytest.MonkeyPatch) -> None:
    assert story.verdict
    monkeypatch.setenv("COLUMNS", "40")
    assert verdict_lines(story.verdict) == verdict_lines(story.verdict, columns=40)
    assert verdict_lines(story.verdict) != verdict_lines(story.verdict, columns=80)


def test_the_answer_comes_first_and_every_check_of_a_failure_is_listed(story: Story) -> None:
    assert story.verdict
    assert verdict_lines(story.verdict, columns=80)[0].startswith("Same gradients: ")
    first, second = story.verdict.checks
    checks = (dataclasses.replace(first, passed=False, error=math.inf), second)
    lines = verdict_lines(dataclasses.replace(story.verdict, answer=Same.DIFFERS, checks=checks), columns=200)
    assert lines[0].startswith("Not the same: ")
    assert [line.split(":")[0].strip() for line in lines if ": error" in line] == ["✗ gradients", "✓ buffers"]


def test_the_plan_shows_knobs_with_who_set_them_and_every_reason(story: Story) -> None:
    assert story.plan
    text = printed(plan_table(story.plan, story.measured), width=80)
    assert "rows = 250  (chosen)" in text
    for reason in story.plan.reasons.values():
        assert reason in text


def test_a_plan_without_levers_is_the_plain_step(story: Story) -> None:
    assert story.plan
    assert "the plain step" in printed(plan_table(dataclasses.replace(story.plan, levers={}, reasons={}), None))


def test_predicted_and_measured_stand_side_by_side(story: Story) -> None:
    assert story.predicted and story.measured
    rows = [
        line.split("  ") for line in printed(footprint_table(story.predicted, story.measured), width=80).splitlines()
    ]
    cells = [[cell.strip() for cell in row if cell.strip()] for row in rows]
    assert ["bytes", "predicted", "measured"] in cells
    pair = (story.predicted, story.measured)
    activations = [format_bytes(one.by_category[Category.ACTIVATIONS]) for one in pair]
    assert ["activations", *activations] in cells
    assert ["peak allocated", *(format_bytes(one.peak_allocated_bytes) for one in pair)] in cells


def test_a_table_says_what_is_counted_and_when_columns_differ(story: Story) -> None:
    assert story.predicted and story.measured
    table = printed(footprint_table(story.predicted), width=80)
    assert "counted tensor bytes on cpu" in table and "reserved" not in table
    cuda = dataclasses.replace(story.measured, counting=Counting.CUDA_ALLOCATOR, device="cuda:0")
    assert "can't be compared" in " ".join(printed(footprint_table(story.predicted, cuda), width=80).split())


@pytest.mark.parametrize("width", [40, 80])
def test_tables_keep_whole_amounts_on_a_narrow_terminal(story: Story, width: int) -> None:
    assert story.predicted and story.measured
    output = printed(footprint_table(story.predicted, story.measured), width=width)
    assert max(len(line.rstrip()) for line in output.splitlines()) <= width
    assert "…" not in output
