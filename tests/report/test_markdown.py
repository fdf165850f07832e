"""The markdown of a story: the page's facts, and strings that markdown shows as they are."""

from __future__ import annotations

import dataclasses
import itertools
import re

import pytest

from samegrad.report import Story, render_markdown
from samegrad.report.facts import find_peaks, judge_fit
from samegrad.report.markdown import escape_markdown
from samegrad.report.verdicts import judge
from samegrad.units import format_bytes


def test_the_facts_of_the_page_are_all_there(story: Story) -> None:
    text = render_markdown(story)
    fit = judge_fit(story)
    assert story.verdict and fit is not None
    assert f"**{judge(story.verdict).answer}**: {judge(story.verdict).sentence}." in text
    assert f"**{fit.answer}**: {fit.sentence}." in text
    for peak in find_peaks(story):
        assert f"| {format_bytes(peak.amount_bytes)} | {peak.counted} |" in text


def test_a_bare_story_is_a_title_and_the_missing_verdict() -> None:
    lines = [line for line in render_markdown(Story(title="bare")).splitlines() if line]
    assert lines[0] == "# bare" and lines[1].startswith("**Not verified**") and len(lines) == 2


ROW = re.compile(r"(?<!\\)\|")


def ragged(text: str) -> list[str]:
    """Table rows with another number of cells than the row above them."""
    lines = text.splitlines()
    return [
        b
        for a, b in itertools.pairwise(lines)
        if a.startswith("|") and b.startswith("|") and len(ROW.findall(a)) != len(ROW.findall(b))
    ]


@pytest.mark.parametrize("text", ["a|b", "a\\|b", "line\nbreak", "`tick`", "| --- |", "\x1b[31mx"])
def test_no_string_breaks_a_table(story: Story, text: str) -> None:
    changed = render_markdown(dataclasses.replace(story, metrics={text: text}, machine={text: text}))
    assert ragged(changed) == []
    assert "\x1b" not in changed


def test_the_table_check_catches_a_bare_pipe() -> None:
    assert ragged("| a | b |\n| --- | --- |\n| a|b | c |") != []


@pytest.mark.parametrize(
    ("text", "active"),
    [
        ("<script>", "<script"),
        ("![x](http://e.org/x.png)", "]("),
        ("see https://e.org", "://"),
        ("www.e.org", "www."),
        ("@everyone", "@e"),
        ("fixes #12", "#1"),
        ("# heading", "# "),
        ("- item", "- "),
        ("1. item", "1. "),
        ("> quote", "> "),
        ("*bold* _it_", "*bold"),
        ("`code`", "`code"),
        ("&lt;", "&lt;"),
    ],
)
def test_strings_can_not_become_markup_links_or_mentions(text: str, active: str) -> None:
    escaped = escape_markdown(text)
    at_start = escaped.startswith(active)
    within = re.search(r"(?<!\\)" + re.escape(active), escaped)
    assert not at_start
    assert within is None or active in {"# ", "- ", "> ", "1. "}


def test_ordinary_names_stay_readable() -> None:
    for name in ("encoder.0.weight", "split_rows = 250", "3.1e-16", "--budget 16MiB", "the plain step (cpu)"):
        assert escape_markdown(name).removeprefix("\\") == name


@pytest.mark.parametrize("text", ["```\n# not a heading\n```", "`` ` ``", "plain\n  indented"])
def test_preformatted_text_stays_inside_its_fence(story: Story, text: str) -> None:
    lines = render_markdown(Story(title="t", explanation=text)).splitlines()
    fence = next(line for line in lines if line.startswith("```")).removesuffix("text")
    start = lines.index(fence + "text")
    end = lines.index(fence, start)
    assert lines[start + 1 : end] == text.splitlines()
    assert end == len(lines) - 1
