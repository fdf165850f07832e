"""A story as markdown, for pasting into an issue: the same facts as the HTML report, without its pictures."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from samegrad.records import Footprint, Plan, Verdict
from samegrad.report.facts import (
    category_name,
    describe_budget,
    describe_plan,
    describe_training,
    examined,
    find_peaks,
    judge_fit,
    judge_prediction,
    levers_left_out,
    levers_used,
)
from samegrad.report.story import Story
from samegrad.report.verdicts import check_title, describe_exactness, judge, share_of_allowed
from samegrad.report.words import clean_block, clean_line, format_metric, format_number
from samegrad.units import format_bytes

# An underscore within a word starts nothing; a marker of a heading or list acts at the start of a line only.
_ACTIVE = re.compile(r"[\\`*\[\]|~$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|^[#+>=-]")
_REACHING_OUT = re.compile(r"(@|:(?=//)|www(?=\.)|#(?=\d))")


def render_markdown(story: Story) -> str:
    """The report of ``story`` as GitHub markdown, ending in a newline.

    Strings are shown as they are: none becomes markup, a link or a mention. Control bytes are removed.
    """
    verdict = judge(story.verdict)
    parts = [
        f"# {escape_markdown(story.title)}",
        f"**{verdict.answer}**: {escape_markdown(verdict.sentence)}.",
        *_memory(story),
        *_section("Loss", [escape_markdown(describe_training(story)), _validation(story)]),
        *(_plan(story.plan, story) if story.plan is not None else []),
        *(_checks(story.verdict) if story.verdict is not None else []),
        *_section("Metrics", [_pairs({name: format_metric(name, v) for name, v in story.metrics.items()})]),
        *_section("Pictures (in the HTML report)", [_list(p.caption for p in story.pictures)]),
        *_section("How the step is run", [_pairs(examined(story)), _fenced(story.explanation)]),
        *_section("If something goes wrong", [_list(story.troubleshooting, marker="1.")]),
        *_section("Notes", [_list(story.notes)]),
        *_section("Command and machine", [_fenced(story.command), _pairs(story.machine)]),
    ]
    return "\n\n".join(parts) + "\n"


def escape_markdown(text: str) -> str:
    """One line of ``text``, cleaned, that markdown shows as it is."""
    escaped = _ACTIVE.sub(r"\\\g<0>", clean_line(text)).replace("&", "&amp;").replace("<", "&lt;")
    # An invisible space keeps an address or a name from becoming a link or from calling people into the issue.
    escaped = _REACHING_OUT.sub("\\1\u200b", escaped)
    return re.sub(r"^(\d+)([.)])(?=\s|$)", r"\1\\\2", escaped)


def _section(name: str, blocks: Iterable[str]) -> list[str]:
    kept = [block for block in blocks if block]
    return [f"## {name}", *kept] if kept else []


def _table(names: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(escape_markdown(cell) for cell in row) + " |" for row in rows]
    return "\n".join(["| " + " | ".join(names) + " |", "|" + " --- |" * len(names), *lines]) if lines else ""


def _pairs(values: Mapping[str, str]) -> str:
    return _table(("", ""), values.items())


def _list(items: Iterable[str], *, marker: str = "-") -> str:
    return "\n".join(f"{marker} {escape_markdown(item)}" for item in items)


def _fenced(text: str) -> str:
    clean = clean_block(text).strip("\n")
    # The fence must be longer than any run of backticks inside.
    longest = max((len(run) for run in re.findall(r"`+", clean)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{clean}\n{fence}" if clean.strip() else ""


def _memory(story: Story) -> list[str]:
    fit, budget = judge_fit(story), story.limit
    peaks = [
        (f"{peak.name}, {peak.origin.value}", format_bytes(peak.amount_bytes), peak.counted, peak.basis)
        for peak in find_peaks(story)
    ]
    footprint = story.measured or story.predicted
    return _section(
        "Memory",
        [
            f"**{fit.answer}**: {escape_markdown(fit.sentence)}." if fit is not None else "",
            judge_prediction(story),
            f"Budget: {escape_markdown(describe_budget(budget))}." if budget is not None else "",
            _table(("Peak", "Bytes", "What is counted", "Basis"), peaks),
            _categories(footprint) if footprint is not None else "",
        ],
    )


def _categories(footprint: Footprint) -> str:
    rows = [(category_name(category), format_bytes(amount)) for category, amount in footprint.by_category.items()]
    counted = f"{footprint.counting.value}, {footprint.origin.value}"
    return _table((f"Live at the peak ({counted})", "Bytes"), rows)


def _validation(story: Story) -> str:
    if not story.validation:
        return ""
    step, loss = story.validation[-1]
    return f"Validation loss {escape_markdown(format_number(loss, digits=4))} at step {step}."


def _plan(plan: Plan, story: Story) -> list[str]:
    rows = [
        (lever.name, ", ".join(f"{k.name} = {k.value} ({k.origin})" for k in lever.knobs), lever.reason)
        for lever in levers_used(plan)
    ]
    table = _table(("Lever", "Knobs", "Reason"), rows)
    left_out = _table(("Not used", "Reason"), levers_left_out(plan, story.predicted, story.measured).items())
    return _section("Plan", [escape_markdown(describe_plan(plan)), table or "No lever: the plain step.", left_out])


def _checks(verdict: Verdict) -> list[str]:
    rows = [
        (
            check_title(check),
            "✓ passed" if check.passed else "✗ failed",
            format_number(check.error),
            format_number(check.allowed),
            share_of_allowed(check),
            check.worst,
            check.detail,
        )
        for check in verdict.checks
    ]
    names = ("Check", "Result", "Error", "Allowed", "Share", "Largest at", "Detail")
    return _section("Checks", [_pairs(dict(describe_exactness(verdict))), _table(names, rows)])
