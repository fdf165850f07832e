"""What is said about a verdict and a fit: honest also where the records are incomplete or contradict themselves."""

from __future__ import annotations

import dataclasses
import math

import pytest

from samegrad.records import Check, Counting, Origin, Same, Verdict
from samegrad.report import Story
from samegrad.report.checks import check_title, describe_tiers
from samegrad.report.facts import (
    Tone,
    find_peaks,
    judge,
    judge_fit,
    judge_prediction,
    levers_left_out,
    levers_used,
    share_of_allowed,
)
from samegrad.units import format_bytes


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


def with_peak(story: Story, amount_bytes: int, *, origin: Origin) -> Story:
    assert story.measured is not None
    measured = dataclasses.replace(story.measured, peak_allocated_bytes=amount_bytes, origin=origin)
    return dataclasses.replace(story, measured=measured, predicted=None, results=())


def test_a_peak_is_within_the_budget_up_to_the_last_byte(story: Story) -> None:
    assert story.budget is not None
    limit = story.budget.total_bytes
    tones = [judge_fit(with_peak(story, limit + extra, origin=Origin.MEASURED)) for extra in (0, 1)]
    assert [fit.tone for fit in tones if fit is not None] == [Tone.GOOD, Tone.BAD]


def test_a_predicted_fit_is_open_and_says_so(story: Story) -> None:
    fit = judge_fit(with_peak(story, 1000, origin=Origin.PREDICTED))
    assert fit is not None and fit.tone is Tone.OPEN and "not measured" in fit.sentence


def test_the_worst_measured_peak_decides(story: Story) -> None:
    assert story.budget is not None
    over = story.budget.total_bytes + 5_000_000
    last = dataclasses.replace(story.results[-1], peak_allocated_bytes=over)
    fit = judge_fit(dataclasses.replace(story, results=(*story.results, last)))
    assert fit is not None and fit.tone is Tone.BAD and format_bytes(over) in fit.sentence


def test_counted_bytes_are_not_held_against_a_cuda_budget(story: Story) -> None:
    assert story.budget is not None
    cuda = dataclasses.replace(story.budget, counting=Counting.CUDA_ALLOCATOR, device="cuda:0")
    fit = judge_fit(dataclasses.replace(story, budget=cuda, results=()))
    assert fit is not None and fit.tone is Tone.OPEN and fit.answer == "Not comparable"


def test_a_cuda_budget_bounds_what_is_reserved_not_what_is_allocated(story: Story) -> None:
    assert story.budget is not None and story.measured is not None
    budget = dataclasses.replace(story.budget, counting=Counting.CUDA_ALLOCATOR)
    limit = budget.total_bytes
    measured = dataclasses.replace(
        story.measured, counting=Counting.CUDA_ALLOCATOR, peak_allocated_bytes=limit - 9, peak_reserved_bytes=limit + 9
    )
    fit = judge_fit(dataclasses.replace(story, budget=budget, measured=measured, predicted=None, results=()))
    assert fit is not None and fit.tone is Tone.BAD


def test_without_a_budget_or_a_peak_nothing_is_said_about_a_fit(story: Story) -> None:
    assert story.plan is not None
    assert judge_fit(dataclasses.replace(story, budget=None)) is None
    nothing = dataclasses.replace(story, predicted=None, measured=None, results=(), plan=None)
    assert judge_fit(nothing) is None


def test_the_plans_budget_stands_in_for_the_storys(story: Story) -> None:
    assert story.plan is not None
    planned = dataclasses.replace(story, budget=None, plan=dataclasses.replace(story.plan, budget=story.budget))
    assert judge_fit(planned) == judge_fit(story)


@pytest.mark.parametrize(("factor", "word"), [(2.0, "100 % too high"), (0.5, "50 % too low"), (1.0, "exact")])
def test_a_prediction_is_held_against_its_measurement(story: Story, factor: float, word: str) -> None:
    assert story.predicted is not None and story.measured is not None
    forecast = int(story.measured.peak_allocated_bytes * factor)
    predicted = dataclasses.replace(story.predicted, peak_allocated_bytes=forecast)
    assert word in judge_prediction(dataclasses.replace(story, predicted=predicted))


@pytest.mark.parametrize("change", [{"rows": 100}, {"counting": Counting.CUDA_ALLOCATOR}])
def test_predictions_of_something_else_are_not_compared(story: Story, change: dict[str, object]) -> None:
    assert story.predicted is not None
    predicted = dataclasses.replace(story.predicted, **change)
    assert judge_prediction(dataclasses.replace(story, predicted=predicted)) == ""


def test_each_peak_says_where_it_comes_from(story: Story) -> None:
    assert story.predicted is not None and story.measured is not None
    assert [(peak.amount_bytes, peak.origin) for peak in find_peaks(story)] == [
        (story.predicted.predicted_peak_bytes(rows=4000), Origin.PREDICTED),
        (story.predicted.peak_allocated_bytes, Origin.PREDICTED),
        (story.measured.peak_allocated_bytes, Origin.MEASURED),
        (max(result.peak_allocated_bytes or 0 for result in story.results), Origin.MEASURED),
    ]


def test_knobs_say_who_set_them_and_admit_when_it_is_not_known(story: Story) -> None:
    assert story.plan is not None
    knobs = {knob.name: knob.origin for lever in levers_used(story.plan) for knob in lever.knobs}
    assert knobs == {"rows": "chosen", "passes": "not recorded"}


def test_levers_left_out_keep_the_plans_reason_before_the_steps_refusal(story: Story) -> None:
    assert story.plan is not None and story.predicted is not None
    refusing = dataclasses.replace(story.predicted, refusals={"autocast": "narrower", "recompute": "hooks"})
    assert levers_left_out(story.plan, refusing, None) == {"autocast": "narrower", "recompute": "not needed"}
