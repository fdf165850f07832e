"""What the command line prints: the same facts as lines and rich renderables.

Names from models and files are never read as markup: lines come escaped for rich, renderables hold ``Text``. Rich is
imported where it is used, so that reading a record costs no start-up time.
"""

from __future__ import annotations

import shutil
import textwrap
from typing import TYPE_CHECKING, TypeVar

from samegrad.records import Budget, Check, Counting, Footprint, Plan, Same, StepResult, Verdict
from samegrad.report.facts import LeverUse, allocated, category_name, describe_plan, levers_left_out, levers_used
from samegrad.report.verdicts import check_title, describe_exactness, describe_tiers, judge, share_of_allowed
from samegrad.report.words import clean_line, format_number, format_rows
from samegrad.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

_Key = TypeVar("_Key")
_LABEL_COLUMNS = 10


def memory_line(result: StepResult, budget: Budget | None, counting: Counting) -> str:
    """``Memory: 1.23 GiB allocated, 1.50 GiB reserved (peak 2.00 GiB, budget 4.00 GiB)`` for one step.

    Where tensors are counted the line says so. Amounts that were not taken are left out; the peak is what the budget
    bounds: reserved bytes where an allocator reserves, else allocated ones.
    """
    cuda = counting is Counting.CUDA_ALLOCATOR
    names = ((result.allocated_bytes, "allocated"), (result.reserved_bytes, "reserved")) if cuda else (
        (result.allocated_bytes, counting.value),
    )  # fmt: skip
    now = ", ".join(f"{format_bytes(amount)} {name}" for amount, name in names if amount is not None)
    reserved = result.peak_reserved_bytes if cuda else None
    peak = result.peak_allocated_bytes if reserved is None else reserved
    inside = []
    if peak is not None:
        # A lone allocated peak is less than what a budget bounds, and the line must not hide that.
        kind = " allocated" if cuda and reserved is None else ""
        inside.append(f"peak {format_bytes(peak)}{kind}")
    if budget is not None:
        other = f" of {budget.counting.value}" if budget.counting is not counting else ""
        inside.append(f"budget {format_bytes(budget.total_bytes)}{other}")
    if not now and peak is None:
        now = f"not counted ({counting.value})"
    elif not now:
        now = counting.value
    if result.driver_process_bytes is not None:
        inside.append(f"process by the driver {format_bytes(result.driver_process_bytes)}")
    return f"Memory: {now}" + (f" ({', '.join(inside)})" if inside else "")


def verdict_lines(verdict: Verdict, *, columns: int | None = None) -> list[str]:
    """The verdict in lines of at most ``columns`` (default: the terminal's), the answer first, failed checks last.

    Escaped for rich; without anything that looks like markup in a name they are plain text.
    """
    from rich.markup import escape

    width = _columns(columns)
    statement = judge(verdict)
    headline = textwrap.wrap(clean_line(statement.text), width=width, break_on_hyphens=False)
    facts = [("compared", f"{verdict.parameters_checked} parameters, {verdict.buffers_checked} buffers")]
    facts = describe_exactness(verdict) + facts
    if tiers := describe_tiers(verdict):
        facts.append(("tiers", tiers))
    if verdict.seconds is not None:
        facts.append(("took", format_seconds(verdict.seconds)))
    lines = headline + [line for name, value in facts for line in _fact_lines(name, value, width=width)]
    shown = verdict.checks if verdict.answer is not Same.SAME else [c for c in verdict.checks if not c.passed]
    lines += [line for check in shown for line in _check_lines(check, width=width)]
    # Escaping the whole text also reaches a tag that wrapping has broken over two lines.
    return escape("\n".join(lines)).split("\n")


def _columns(columns: int | None) -> int:
    return max(20, shutil.get_terminal_size().columns if columns is None else columns)


def _fact_lines(name: str, value: str, *, width: int) -> list[str]:
    first = f"  {name:<{_LABEL_COLUMNS}}"
    return textwrap.wrap(
        clean_line(value), width=width, initial_indent=first, subsequent_indent=" " * len(first), break_on_hyphens=False
    )


def _check_lines(check: Check, *, width: int) -> list[str]:
    share = share_of_allowed(check)
    numbers = f"{format_number(check.error)}, allowed {format_number(check.allowed)}" + (f" ({share})" if share else "")
    mark = "✓" if check.passed else "✗"
    place = f", at {check.worst}" if check.worst else ""
    detail = f"; {check.detail}" if check.detail else ""
    return textwrap.wrap(
        clean_line(f"{mark} {check_title(check)}: error {numbers}{place}{detail}"),
        width=width, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False,
    )  # fmt: skip


def plan_table(plan: Plan, footprint: Footprint | None) -> Group:
    """A rich renderable of ``plan``: what it promises, then each lever with its knobs, who set them, and why.

    ``footprint``, where given, adds the rows at a time and the peak it predicts or measured.
    """
    from rich.console import Group
    from rich.padding import Padding
    from rich.text import Text

    parts: list[Text | Padding] = [Text(describe_plan(plan))]
    if footprint is not None:
        rows = format_rows(footprint.rows, of=footprint.batch_rows)
        peak = f"{format_bytes(footprint.peak_allocated_bytes)} {allocated(footprint.counting)}"
        parts.append(Text(f"{rows} at a time, peak {peak}, {footprint.origin.value}."))
    used = levers_used(plan)
    if not used:
        parts += [Text(), Text("No lever: the plain step.")]
    for lever in used:
        parts += [Text(), Text(clean_line(lever.name), style="bold")]
        parts += [Padding(text, (0, 0, 0, 2), expand=False) for text in _lever_texts(lever)]
    left_out = levers_left_out(plan, footprint)
    if left_out:
        parts += [Text(), Text("Not used", style="bold")]
        for name, reason in left_out.items():
            parts.append(Padding(Text(clean_line(f"{name}: {reason}")), (0, 0, 0, 2), expand=False))
    return Group(*parts)


def _lever_texts(lever: LeverUse) -> list[Text]:
    from rich.text import Text

    texts = [
        Text.assemble(clean_line(f"{knob.name} = {knob.value}"), ("  (" + clean_line(knob.origin) + ")", "dim"))
        for knob in lever.knobs
    ]
    return texts + ([Text(clean_line(lever.reason))] if lever.reason else [])


def footprint_table(footprint: Footprint, measured: Footprint | None = None) -> Table:
    """A rich table of a step's bytes: by category and by phase, the peaks, and ``measured`` beside it where given.

    Each column's head says whether it was predicted or measured; the caption says what is counted.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    columns = [footprint] if measured is None else [footprint, measured]
    counted = {column.counting for column in columns}
    caption = "; ".join(dict.fromkeys(f"{column.counting.value} on {column.device}" for column in columns))
    if len(counted) > 1:
        caption = "; ".join(f"{column.origin.value}: {column.counting.value} on {column.device}" for column in columns)
        caption += "; they count different things and can't be compared"
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption=Text(clean_line(caption)), caption_justify="left")
    table.add_column("bytes")
    for column in columns:
        table.add_column(column.origin.value, justify="right", no_wrap=True)
    for name, amounts, ends_section in _footprint_rows(columns):
        cells = ["–" if amount is None else format_bytes(amount) for amount in amounts]
        table.add_row(Text(name), *cells, end_section=ends_section)
    return table


def _footprint_rows(columns: list[Footprint]) -> list[tuple[str, list[int | None], bool]]:
    """Rows of the table: a name, an amount for each column, and whether a group ends there."""
    groups: list[list[tuple[str, list[int | None]]]] = [[], [], []]
    for category in _members(columns[0].by_category, columns[-1].by_category):
        groups[0].append((category_name(category), [column.by_category.get(category) for column in columns]))
    for phase in _members(columns[0].by_phase, columns[-1].by_phase):
        groups[1].append((f"peak, {phase.value}", [column.by_phase.get(phase) for column in columns]))
    groups[2] = [
        ("peak allocated", [column.peak_allocated_bytes for column in columns]),
        ("peak reserved", [column.peak_reserved_bytes for column in columns]),
        ("steady cap", [column.steady_cap_bytes for column in columns]),
        ("smallest cap", [column.smallest_cap_bytes for column in columns]),
    ]
    rows = []
    for group in groups:
        known = [(name, amounts) for name, amounts in group if any(amount is not None for amount in amounts)]
        rows += [(name, amounts, name == known[-1][0]) for name, amounts in known]
    return rows


def _members(first: dict[_Key, int], second: dict[_Key, int]) -> list[_Key]:
    return list(dict.fromkeys([*first, *second]))
