"""The front of budgets against times: nothing on it is beaten, and every budget buys what it says."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

import samegrad as sg
from samegrad.errors import BudgetTooSmall, CannotSplit
from samegrad.plan.choose import choose_plan
from samegrad.plan.front import plan_front, strictly_smaller
from samegrad.plan.options import Options
from samegrad.records import Budget, Counting, Exactness, Footprint, FrontPoint, Plan


@pytest.fixture(scope="module")
def footprint() -> Footprint:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 3))
    step = sg.Step(model, lambda out, batch: nn.functional.mse_loss(out, batch[1]))
    measured = sg.measure_step(step, (torch.randn(997, 16), torch.randn(997, 3)))
    # Times of a busy machine are no test's business.
    return dataclasses.replace(measured, seconds_per_row=1e-6, seconds_per_chunk=1e-4)


def budget(total_bytes: int) -> Budget:
    return Budget(total_bytes=total_bytes, device="cpu", counting=Counting.TENSOR_BYTES, source="test")


def test_the_front_goes_from_the_plain_step_to_the_smallest_plan(footprint: Footprint) -> None:
    points = plan_front(footprint, Options())
    assert len(points) > 4
    assert points[0].plan.levers == {}
    budgets, seconds = [point.budget_bytes for point in points], [point.seconds for point in points]
    assert budgets == sorted(set(budgets), reverse=True) and seconds == sorted(set(seconds))
    with pytest.raises((BudgetTooSmall, CannotSplit)):
        choose_plan(footprint, Options(), budget(int(0.96 * budgets[-1])))


def test_each_budget_buys_its_plan_and_no_faster_one(footprint: Footprint) -> None:
    for point in plan_front(footprint, Options()):
        bought = choose_plan(footprint, Options(), budget(point.budget_bytes))[0]
        assert bought.predicted_seconds == point.seconds
        assert point.plan.budget is not None and point.plan.budget.total_bytes == point.budget_bytes


def test_the_same_footprint_has_the_same_front(footprint: Footprint) -> None:
    assert plan_front(footprint, Options()) == plan_front(Footprint.from_json(footprint.to_json()), Options())


def test_what_is_not_allowed_is_not_on_it(footprint: Footprint) -> None:
    assert [point.plan.levers for point in plan_front(footprint, Options(allow=Exactness.SAME_BITS))] == [{}]


def test_a_point_that_another_one_beats_is_left_out() -> None:
    def point(budget_bytes: int, seconds: float) -> FrontPoint:
        plan = Plan(levers={}, exactness=Exactness.SAME_BITS, batch_rows=1)
        return FrontPoint(budget_bytes=budget_bytes, seconds=seconds, plan=plan)

    given = [point(10, 3.0), point(30, 1.0), point(20, 2.0), point(25, 2.5), point(20, 2.0), point(40, 1.0)]
    assert [(p.budget_bytes, p.seconds) for p in strictly_smaller(iter(given))] == [(30, 1.0), (20, 2.0), (10, 3.0)]
