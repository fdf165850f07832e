"""Plans from a budget: saved, applied again, never exchanged silently, and made without leaving a trace."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import samegrad as sg
from samegrad.errors import BadInput, CannotSplit, UsageError, WrongPlan
from samegrad.records import Exactness, Plan

from . import plain
from .plain import (
    assert_close,
    cross_entropy,
    gradients,
    labelled,
    left_alone,
    mlp,
    plain_step,
    spread,
)

N = 29
X, Y = labelled(N)
D = torch.float64


def drawing() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.Dropout(0.4), nn.Linear(9, 3), nn.Dropout(0.2)).to(D)


def normalised() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 3)).to(D)


def tight_budget(model: nn.Module, loss_fn: Any, batch: Any) -> int:
    """A budget between the smallest plan's peak and the plain step's."""
    footprint = sg.measure_step(sg.Step(model, loss_fn), batch)
    low = footprint.predicted_peak_bytes(rows=1)
    high = footprint.predicted_peak_bytes(rows=footprint.batch_rows)
    assert low < high
    return (low + high) // 2


LARGE = labelled(1024)


@pytest.fixture(scope="module")
def planned() -> tuple[sg.Step, sg.Plan]:
    step = sg.Step(mlp(), cross_entropy, budget=tight_budget(mlp(), cross_entropy, LARGE))
    return step, step.prepare(LARGE)


def test_a_tight_budget_splits_and_keeps_the_gradients(planned: tuple[sg.Step, sg.Plan]) -> None:
    step, plan = planned
    assert 1 <= plan.levers["split_rows"]["rows"] < 1024
    model = step.declared.model
    model.zero_grad()
    _, expected = plain_step(model, cross_entropy, LARGE)
    step.backward(LARGE)
    assert_close(gradients(model), expected)


def test_planning_changes_nothing_of_the_users() -> None:
    model = drawing()
    optimizer = torch.optim.Adam(model.parameters())
    cross_entropy(model(X), (X, Y)).backward()
    optimizer.step()
    with left_alone(model, optimizer=optimizer):
        sg.Step(model, cross_entropy, budget="1GiB", optimizer=optimizer).prepare(LARGE)


def test_training_with_a_planner_is_training_without_one_bit_for_bit() -> None:
    weights = []
    for planner in (False, True):
        model = normalised()
        optimizer = torch.optim.Adam(model.parameters())
        step = sg.Step(model, cross_entropy, budget="1GiB", optimizer=optimizer) if planner else None
        torch.manual_seed(9)
        for size in (N, 20, 11):
            batch = (X[:size], Y[:size])
            if step is None:
                cross_entropy(model(batch[0]), batch).backward()
            else:
                step.backward(batch)
            optimizer.step()
            optimizer.zero_grad()
        weights.append(model.state_dict())
    assert plain.same(*weights)


def test_a_plan_saved_as_json_is_applied_again(planned: tuple[sg.Step, sg.Plan]) -> None:
    _, plan = planned
    again = sg.Plan.from_json(plan.to_json())
    assert again == plan
    model = mlp()
    _, expected = plain_step(model, cross_entropy, LARGE)
    step = sg.Step(model, cross_entropy, plan=again)
    step.backward(LARGE)
    assert_close(gradients(model), expected)
    assert step.sizes_for(LARGE)[0] == plan.levers["split_rows"]["rows"]


def test_a_plan_for_another_kind_of_batch_is_refused(planned: tuple[sg.Step, sg.Plan]) -> None:
    _, plan = planned
    step = sg.Step(mlp(torch.float32), cross_entropy, plan=plan)
    with pytest.raises(WrongPlan, match="float32"):
        step.backward(labelled(64, torch.float32))


def test_a_given_plan_is_never_exchanged_for_another(planned: tuple[sg.Step, sg.Plan]) -> None:
    _, plan = planned
    step = sg.Step(mlp(), cross_entropy, plan=plan)
    step.backward(labelled(64))
    with pytest.raises(WrongPlan, match="1025 rows"):
        step.backward(labelled(1025))
    assert step.plan is plan


@pytest.mark.parametrize(
    "levers", [{"split_rows": {"rows": 0}}, {"split_rows": {"rows": "8"}}, {"split_rows": {"rows": [4, -1]}},
               {"split_rows": {"lines": 4}}, {"magic": {}}],
    ids=str,
)  # fmt: skip
def test_a_plan_that_was_edited_wrongly_is_refused_by_its_lever(levers: dict[str, Any]) -> None:
    step = sg.Step(mlp(), cross_entropy, plan=Plan(levers=levers, exactness=Exactness.SAME_SUM, batch_rows=N))
    with pytest.raises(BadInput, match=next(iter(levers))):
        step.backward((X, Y))


def test_a_plan_that_is_less_exact_than_allowed_is_refused() -> None:
    plan = Plan(levers={}, exactness=Exactness.ROUNDED, batch_rows=N)
    with pytest.raises(UsageError, match=r"allow=Exactness\.ROUNDED"):
        sg.Step(mlp(), cross_entropy, plan=plan).backward((X, Y))


def test_a_plan_cannot_claim_to_be_more_exact_than_its_levers() -> None:
    plan = Plan(levers={"split_rows": {"rows": 4}}, exactness=Exactness.SAME_BITS, batch_rows=N)
    with pytest.raises(UsageError, match="SAME_BITS at most"):
        sg.Step(mlp(), cross_entropy, plan=plan, allow=Exactness.SAME_BITS).backward((X, Y))


def test_a_smaller_batch_keeps_the_plan_and_a_larger_one_is_planned_again() -> None:
    step = sg.Step(mlp(), cross_entropy, budget=tight_budget(mlp(), cross_entropy, LARGE))
    step.backward(labelled(64))
    first = step.plan
    step.backward(labelled(40))
    assert step.plan is first and first is not None and first.levers == {}
    step.backward(LARGE)
    assert step.plan is not None and step.plan.levers and step.plan.batch_rows == 1024


def test_each_shape_of_batch_is_planned_once_and_for_its_own_rows() -> None:
    step = sg.Step(mlp(), lambda z, b: F.cross_entropy(z, b[1]), budget=tight_budget(mlp(), cross_entropy, LARGE))
    with_weights = (*labelled(16), torch.ones(16))
    step.backward(LARGE)
    large = step.plan
    step.backward(with_weights)
    step.backward(LARGE)
    assert step.plan is large
    # Sixteen rows fit whole; that says nothing of a thousand.
    step.backward((*labelled(1024), torch.ones(1024)))
    assert step.plan is not None and step.plan.levers and step.plan.batch_rows == 1024


def test_a_budget_no_plan_fits_says_what_the_floor_is_made_of() -> None:
    model = mlp()
    with left_alone(model), pytest.raises(sg.BudgetTooSmall, match="parameters"):
        sg.Step(model, cross_entropy, budget=2000).backward((X, Y))


def test_no_budget_means_what_is_free_now_and_says_where_that_was_read() -> None:
    step = sg.Step(mlp(), cross_entropy)
    step.prepare((X, Y))
    assert step.budget is not None and "free now" in step.budget.source
    assert step.budget.source in step.explain()


def test_before_the_first_batch_there_is_nothing_to_explain() -> None:
    assert "No plan yet" in sg.Step(mlp(), cross_entropy).explain()


def test_explain_names_module_hooks_and_the_cost_of_two_passes() -> None:
    model = mlp()
    model[1].register_forward_hook(lambda *_: None)
    step = sg.Step(model, spread, budget="1GiB")
    step.prepare((X, Y))
    text = step.explain()
    assert "1 (Tanh)" in text and "two passes" in text and "normalise='mean'" in text


def test_enforcing_a_budget_is_harmless_where_there_is_no_allocator() -> None:
    model = mlp()
    _, expected = plain_step(model, cross_entropy, (X, Y))
    with sg.Step(model, cross_entropy, budget="1GiB", enforce=True) as step:
        step.backward((X, Y))
    assert_close(gradients(model), expected)


def test_a_closed_step_is_refused_and_closing_twice_is_harmless() -> None:
    with sg.Step(mlp(), cross_entropy, rows=4) as step:
        step.backward((X, Y))
    step.close()
    with pytest.raises(UsageError, match="closed"):
        step.backward((X, Y))


def test_leaving_the_block_by_an_exception_closes_the_step() -> None:
    with pytest.raises(ZeroDivisionError), sg.Step(mlp(), cross_entropy, rows=4) as step:
        raise ZeroDivisionError
    with pytest.raises(UsageError, match="closed"):
        step.prepare((X, Y))


def test_a_batch_that_does_not_fit_the_model_says_where_and_raises_the_models_own_error_when_whole() -> None:
    model = mlp()
    with left_alone(model), pytest.raises(CannotSplit, match=r"0 \(Linear\) fails .* shapes cannot be multiplied"):
        sg.Step(model, cross_entropy, rows=4).backward((X[:, :5], Y))
    with left_alone(model), pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        sg.Step(model, cross_entropy, rows=N).backward((X[:, :5], Y))


def test_a_plan_for_another_model_is_refused() -> None:
    batch = (torch.randn(64, 6), torch.randint(0, 3, (64,)))

    def declared(width: int, **how: object) -> sg.Step:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(6, width), torch.nn.ReLU(), torch.nn.Linear(width, 3))
        return sg.Step(model, lambda o, b: torch.nn.functional.cross_entropy(o, b[1]), **how)  # type: ignore[arg-type]

    plan = declared(64, budget="14KiB").prepare(batch)
    again = sg.Plan.from_json(plan.to_json())
    assert "split_rows" in again.levers
    declared(64, plan=again).backward(batch)
    with pytest.raises(WrongPlan, match=r"parameter 0.weight was float32\[64, 6\] .* is float32\[65, 6\] now; 2 more"):
        declared(65, plan=again).backward(batch)
    with pytest.raises(WrongPlan, match=r"batch\[0\] was float32\[rows,6\] .* is float64\[rows,6\] now"):
        declared(64, plan=again).backward((batch[0].double(), batch[1]))
    frozen = declared(64, plan=again)
    next(frozen.declared.model.parameters()).requires_grad_(False)
    with pytest.raises(WrongPlan, match=r"0.weight was float32\[64, 6\], training .* is float32\[64, 6\], frozen now"):
        frozen.backward(batch)
    # A plan from before parameters were written down names none of them, and is refused all the same.
    with pytest.raises(WrongPlan, match="which of them train"):
        declared(65, plan=dataclasses.replace(again, parameters={})).backward(batch)
