"""What is said about a verdict and a fit: honest also where the records are incomplete or contradict themselves."""

from __future__ import annotations

import dataclasses

import pytest

from samegrad.records import Counting, Origin
from samegrad.report import Story
from samegrad.report.facts import find_peaks, judge_fit, judge_prediction, levers_left_out, levers_used
from samegrad.report.statement import Tone
from samegrad.units import format_bytes


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
