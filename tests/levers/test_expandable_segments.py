"""What the allocator is told while a plan with growing segments is in force, before and after; and when it is taken."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from torch import nn

import samegrad as sg
from samegrad.declared import declare
from samegrad.exact import growing_segments
from samegrad.execute.apply import standing
from samegrad.levers.expandable_segments import ExpandableSegments
from samegrad.measure.rungs import Rung
from samegrad.records import Plan
from samegrad.settle.making_room import GrowingWhereNeeded

from ..contract.lever_zoo import MODELS, plan_with
from ..contract.plain import cross_entropy

PLAN = plan_with(expandable_segments={})


@pytest.fixture(params=["", "max_split_size_mb:128"], ids=["nothing set", "something set"])
def told(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What the allocator was told, one after the other; the first is what the user had set."""
    said: list[str] = [request.param]
    monkeypatch.setattr(growing_segments, "_settings", lambda: said[-1])
    monkeypatch.setattr(growing_segments, "_change", said.append)
    monkeypatch.setattr(growing_segments.sys, "platform", "linux")
    yield said


def test_segments_grow_while_the_plan_stands_and_what_the_user_set_stays(told: list[str]) -> None:
    step = declare(MODELS["mlp"]()[0], cross_entropy)
    before = f"{told[0]}," if told[0] else ""
    with standing(PLAN, step):
        assert told[1:] == [f"{before}expandable_segments:True"]
        with growing_segments.growing_segments():
            assert len(told) == 2
    with pytest.raises(ZeroDivisionError), standing(PLAN, step):
        raise ZeroDivisionError
    on, off = f"{before}expandable_segments:True", f"{before}expandable_segments:False"
    assert told[1:] == [on, off, on, off]


def test_who_cannot_have_them_or_has_them_already(monkeypatch: pytest.MonkeyPatch) -> None:
    here = declare(nn.Linear(6, 3), cross_entropy)
    on_card = dataclasses.replace(here, device=torch.device("cuda", 0))
    assert "the model is on cpu" in (ExpandableSegments.unsuited(here) or "")
    assert ExpandableSegments.unsuited(on_card) is None
    monkeypatch.setattr(growing_segments, "_settings", lambda: "backend:cudaMallocAsync")
    assert "cudaMallocAsync" in (ExpandableSegments.unsuited(on_card) or "")
    monkeypatch.setattr(growing_segments, "_settings", lambda: "expandable_segments:True")
    assert "told so already" in (ExpandableSegments.unsuited(on_card) or "")


def footprint(refusals: dict[str, str]) -> sg.Footprint:
    model, batch = MODELS["mlp"]()
    return dataclasses.replace(sg.measure_step(sg.Step(model, cross_entropy), batch), refusals=refusals)


@pytest.mark.parametrize("without", [None, Rung(120, 1.0)], ids=["out of memory", "more than the budget"])
def test_it_is_taken_where_gaps_are_what_does_not_fit(without: Rung | None) -> None:
    tried: list[bool] = []

    def run(plan: Plan) -> Rung | None:
        tried.append(ExpandableSegments.name in plan.levers)
        return Rung(90, 1.0) if tried[-1] else without

    measuring = GrowingWhereNeeded(footprint({}), 100)
    assert measuring.measured(plan_with(), lambda _: Rung(90, 1.0)) == (plan_with(), Rung(90, 1.0))
    plan, rung = measuring.measured(plan_with(split_rows={"rows": 5}), run)
    assert list(plan.levers) == ["split_rows", "expandable_segments"] and rung == Rung(90, 1.0)
    assert "taken: without it" in plan.reasons["expandable_segments"]
    # Where one needed it, the next begins with it.
    assert "expandable_segments" in measuring.measured(plan_with(split_rows={"rows": 4}), run)[0].levers
    assert tried == [False, True, True]
    refused = GrowingWhereNeeded(footprint({"expandable_segments": "another allocator"}), 100)
    assert refused.measured(plan_with(), run) == (plan_with(), without)


@pytest.mark.parametrize("rows", [None, 5], ids=["whole", "split"])
def test_on_the_cpu_it_is_refused_by_planning_and_harmless_in_a_plan(rows: int | None) -> None:
    model, batch = MODELS["mlp"]()
    levers = {"expandable_segments": {}} | ({} if rows is None else {"split_rows": {"rows": rows}})
    with sg.Step(model, cross_entropy, plan=plan_with(**levers)) as step:
        step.backward(batch)
        assert sg.verify_step(step, batch).same
    assert "on cpu" in sg.measure_step(sg.Step(model, cross_entropy), batch).refusals["expandable_segments"]
