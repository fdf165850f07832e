"""A verdict in words: the answer, how exact the plan was asked to be, and never "same gradients" for what rounds."""

from __future__ import annotations

import dataclasses
import math

import pytest

from samegrad.records import Check, Departure, Exactness, Same, Verdict
from samegrad.report import Story, render_markdown, render_report
from samegrad.report.statement import Tone
from samegrad.report.terminal import verdict_lines
from samegrad.report.verdicts import check_title, describe_exactness, describe_tiers, judge, share_of_allowed


@pytest.fixture
def verdict(story: Story) -> Verdict:
    assert story.verdict is not None
    return story.verdict


def failed(verdict: Verdict) -> Verdict:
    check = dataclasses.replace(verdict.checks[1], passed=False, error=0.25, allowed=1e-14)
    return dataclasses.replace(verdict, checks=(verdict.checks[0], check))


def test_a_proven_verdict_is_good_and_shows_error_and_allowance_of_one_check(verdict: Verdict) -> None:
    statement = judge(verdict)
    assert (statement.tone, statement.answer) == (Tone.GOOD, "Same gradients")
    assert "3.1e-16 of the allowed 6.2e-14, in encoder.0.weight" in statement.sentence


def test_the_allowance_in_the_headline_is_that_of_the_check(verdict: Verdict) -> None:
    check = dataclasses.replace(verdict.checks[0], allowed=7.7e-13)
    assert "of the allowed 7.7e-13" in judge(dataclasses.replace(verdict, checks=(check,))).sentence


def test_no_verdict_is_not_verified() -> None:
    assert (judge(None).tone, judge(None).answer) == (Tone.OPEN, "Not verified")


def test_a_differing_step_names_what_failed(verdict: Verdict) -> None:
    statement = judge(dataclasses.replace(failed(verdict), answer=Same.DIFFERS))
    assert statement.tone is Tone.BAD
    assert "1 of 2 checks failed (buffers)" in statement.sentence
    assert "not those of the plain step" in statement.sentence


def test_a_differing_step_says_what_is_at_fault(verdict: Verdict) -> None:
    at_fault = dataclasses.replace(failed(verdict), answer=Same.DIFFERS, fault="lever split_rows: without it it passes")
    assert "at fault: lever split_rows" in judge(at_fault).sentence
    assert "at fault" not in judge(dataclasses.replace(at_fault, fault="")).sentence


def test_tiers_are_named_once_each_and_in_order(verdict: Verdict) -> None:
    checks = tuple(dataclasses.replace(verdict.checks[0], tier=tier) for tier in (3, 0, 0, None))
    tiered = dataclasses.replace(verdict, checks=checks)
    assert describe_tiers(tiered) == "0 bit for bit, 3 rounding against float64"
    assert check_title(checks[0]) == "tier 3, gradients" and check_title(checks[3]) == "gradients"
    assert describe_tiers(verdict) == ""


def test_low_precision_alone_is_called_unproven(verdict: Verdict) -> None:
    statement = judge(dataclasses.replace(verdict, answer=Same.UNPROVEN, dtype="bfloat16"))
    assert statement.tone is Tone.OPEN
    assert "only in bfloat16, which proves nothing" in statement.sentence


def test_what_kept_a_comparison_from_float64_is_said(verdict: Verdict) -> None:
    narrow = dataclasses.replace(verdict, dtype="bfloat16", compared_dtype="float32", narrowed_by="a cast (net.py:7)")
    assert "compared in float32 and not in float64 (a cast (net.py:7))" in judge(narrow).sentence
    unproven = judge(dataclasses.replace(narrow, answer=Same.UNPROVEN)).sentence
    assert "only in bfloat16 (a cast (net.py:7)), which proves nothing" in unproven


def test_same_with_a_failed_check_is_not_believed(verdict: Verdict) -> None:
    assert judge(failed(verdict)).tone is Tone.BAD


@pytest.mark.parametrize("error", [math.nan, math.inf])
def test_same_without_a_finite_error_is_not_believed(verdict: Verdict, error: float) -> None:
    statement = judge(dataclasses.replace(verdict, max_relative_error=error, checks=()))
    assert statement.tone is Tone.OPEN


def test_an_allowance_is_never_borrowed_from_a_check_with_another_error(verdict: Verdict) -> None:
    statement = judge(dataclasses.replace(verdict, max_relative_error=9.9e-16))
    assert "9.9e-16" in statement.sentence and "allowed" not in statement.sentence


def test_only_one_answer_is_ever_good(verdict: Verdict) -> None:
    for answer in Same:
        for one in (verdict, failed(verdict)):
            good = judge(dataclasses.replace(one, answer=answer)).tone is Tone.GOOD
            assert good == (answer is Same.SAME and all(check.passed for check in one.checks))


def test_all_rows_are_called_all(verdict: Verdict) -> None:
    assert "all 4000 rows" in judge(dataclasses.replace(verdict, rows_checked=4000)).sentence


@pytest.mark.parametrize(("error", "allowed"), [(1e-16, 4e-14), (3.0, 1e-9), (0.0, 1.0)])
def test_a_share_of_the_allowance_is_their_quotient(error: float, allowed: float) -> None:
    share = share_of_allowed(Check(name="c", passed=True, error=error, allowed=allowed))
    number, unit = share.split(" ")
    assert float(number) * {"%": 0.01, "times": 1}[unit] == pytest.approx(error / allowed, rel=0.05)


def test_a_share_of_nothing_is_not_given() -> None:
    assert share_of_allowed(Check(name="c", passed=True, error=0.0, allowed=0.0)) == ""


def rounded(verdict: Verdict) -> Verdict:
    """As of a plan that takes autocast."""
    departure = Departure(levers=("autocast",), gradient_norm_fraction=0.004, loss_fraction=0.0001)
    return dataclasses.replace(
        verdict, reference="the plain step under autocast in bfloat16 on cpu", asked=Exactness.ROUNDED,
        found=Exactness.ROUNDED, departure=departure,
    )  # fmt: skip


def test_what_rounds_is_the_same_as_its_own_reference_only_and_both_are_named(verdict: Verdict) -> None:
    statement = judge(rounded(verdict))
    assert statement.answer == "Same as its own reference"
    assert "against the plain step under autocast in bfloat16 on cpu" in statement.sentence
    assert "not the declared step: its gradients are 0.4 % away and its loss 0.01 %" in statement.sentence
    assert statement.sentence.endswith("which is what autocast costs")
    differs = dataclasses.replace(rounded(verdict), answer=Same.DIFFERS, found=None)
    assert "are not those of its own reference" in judge(differs).sentence


def test_the_class_that_was_asked_and_the_one_that_was_found_are_said_in_every_report(story: Story) -> None:
    assert story.verdict is not None
    verdict = dataclasses.replace(story.verdict, asked=Exactness.SAME_SUM, found=Exactness.SAME_BITS)
    assert describe_exactness(verdict) == [
        ("asked", "the same sum in another order: equal up to rounding (SAME_SUM)"),
        ("found", "bit for bit the plain step (SAME_BITS)"),
    ]
    facts = [line.split() for line in verdict_lines(verdict, columns=100)]
    assert [(words[0], words[-1]) for words in facts if words[0] in ("asked", "found")] == [
        ("asked", "(SAME_SUM)"), ("found", "(SAME_BITS)"),
    ]  # fmt: skip
    told = dataclasses.replace(story, verdict=verdict)
    for report in (render_report(told), render_markdown(told)):
        plain = report.replace("\\", "")
        assert "SAME_SUM" in plain and "bit for bit the plain step (SAME_BITS)" in plain


def test_nothing_is_found_where_nothing_is_proven_or_was_recorded(verdict: Verdict) -> None:
    assert describe_exactness(verdict) == []
    differs = dataclasses.replace(failed(verdict), answer=Same.DIFFERS, asked=Exactness.SAME_BITS)
    assert describe_exactness(differs)[1] == ("found", "nothing that is proven")
