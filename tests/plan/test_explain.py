"""How exact a plan is, in words, and which lever decides it."""

from __future__ import annotations

from typing import Any

import pytest

import samegrad as sg
from samegrad.levers import find_levers
from samegrad.plan.explain import exactness_lines, explain_given
from samegrad.records import Exactness

from ..contract.lever_zoo import KNOBS, forced, mlp, plan_with
from ..contract.plain import cross_entropy


@pytest.mark.parametrize("levers", [{}, {"offload_saved": {}}, {"optimizer_state": {}, "recompute": {"blocks": ["0"]}}])
def test_a_plan_of_the_same_bits_needs_no_words(levers: dict[str, Any]) -> None:
    assert exactness_lines(plan_with(**levers)) == []


@pytest.mark.parametrize("lever", KNOBS)
def test_the_weakest_lever_is_named(lever: str) -> None:
    plan = plan_with(split_rows={"rows": 3}, host_rows={}, **{lever: KNOBS[lever]})
    [line] = exactness_lines(plan)
    weakest = max(Exactness.SAME_SUM, find_levers()[lever].exactness)
    assert weakest.name in line and weakest.explained() in line and "host_rows" not in line
    assert (lever in line) is (find_levers()[lever].exactness is weakest)
    assert ("not against the declared one" in line) is (weakest is Exactness.ROUNDED)


def test_a_plan_may_call_itself_weaker_than_its_levers() -> None:
    plan = sg.Plan(levers={"split_rows": {"rows": 3}}, exactness=Exactness.ROUNDED, batch_rows=9)
    assert exactness_lines(plan)[0].startswith("Exactness ROUNDED") and "(the plan itself)" in exactness_lines(plan)[0]


def test_a_given_plan_says_what_it_costs_and_what_was_found() -> None:
    text = explain_given(plan_with(recompute={"blocks": ["0"]}, autocast={}), ["loss: a sum"])
    assert "The plan was given, not chosen" in text and "recompute: 2 forwards a row" in text
    assert "its weakest lever (autocast)" in text and text.endswith("loss: a sum")


def test_a_step_that_was_verified_says_what_was_found() -> None:
    model, batch = mlp()
    step = forced(model.float(), cross_entropy, autocast={}, split_rows={"rows": 5})
    batch = (batch[0].float(), batch[1])
    step.sizes_for(batch)
    assert "its own reference" not in step.explain()
    assert sg.verify_step(step, batch).same
    assert "Same as its own reference" in step.explain() and "which is what autocast costs" in step.explain()
