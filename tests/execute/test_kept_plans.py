"""Batches of other lengths: a plan for the longest serves shorter ones, and nothing else."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import samegrad as sg
from samegrad import step as step_module
from samegrad.execute.kept_plans import Kept, KeptPlans
from samegrad.records import Plan
from samegrad.trees import covers, extents_of, find_rows

from ..contract.plain import assert_close

ROWS, WORDS = 16, 13


class Text(nn.Module):
    """(rows, length) tokens to logits, attention within a row."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(WORDS, 16)
        self.block = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True)
        self.head = nn.Linear(16, WORDS)

    def forward(self, tokens: Tensor) -> Tensor:
        outputs: Tensor = self.head(self.block(self.embed(tokens)))
        return outputs


def text(length: int, rows: int = ROWS) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(length)
    tokens = torch.randint(0, WORDS, (rows, length), generator=generator)
    return tokens, tokens.roll(1, 1)


def next_token(outputs: Tensor, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(outputs.flatten(0, 1), batch[1].flatten())


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths that were planned for."""
    lengths: list[int] = []
    right = step_module.plan_here

    def noting(declared: Any, aliases: Any, batch: Any, *rest: Any) -> Any:
        lengths.append(batch[0].shape[1])
        return right(declared, aliases, batch, *rest)

    monkeypatch.setattr(step_module, "plan_here", noting)
    return lengths


def budget_for(length: int) -> int:
    """One that makes the longest batch split."""
    with sg.Step(Text().double(), next_token, budget="1GiB") as step:
        step.prepare(text(length))
        assert step.footprint is not None
        return int(0.7 * step.footprint.predicted_peak_bytes(rows=ROWS))


def test_the_plan_for_the_longest_batch_serves_shorter_ones_exactly(planned: list[int]) -> None:
    model, limit = Text().double(), budget_for(24)
    planned.clear()
    with sg.Step(model, next_token, budget=limit) as step:
        plan = step.prepare(text(24))
        assert "split_rows" in plan.levers
        for length in (7, 24, 15, 7):
            model.zero_grad()
            step.backward(text(length))
            assert step.plan is not None and step.plan.levers == plan.levers
            mine = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
            model.zero_grad()
            next_token(model(text(length)[0]), text(length)).backward()
            assert_close(mine, {name: p.grad for name, p in model.named_parameters()})
    assert planned == [24]


def test_a_longer_batch_more_rows_or_another_mode_are_planned_for(planned: list[int]) -> None:
    model = Text().double()
    with sg.Step(model, next_token, budget="1GiB") as step:
        step.backward(text(8))
        step.backward(text(9))
        step.backward(text(6, rows=ROWS + 1))
        model.eval()
        step.backward(text(5))
    assert planned == [8, 9, 6, 5]


class Shortcut(Text):
    """Takes the mean over the rows where texts are short, which no split may."""

    def forward(self, tokens: Tensor) -> Tensor:
        outputs = super().forward(tokens)
        return outputs - outputs.mean(0) if tokens.shape[1] < 10 else outputs


def test_code_that_does_something_else_for_shorter_ones_is_planned_for_itself(planned: list[int]) -> None:
    model, limit = Shortcut().double(), budget_for(24)
    planned.clear()
    with sg.Step(model, next_token, budget=limit) as step:
        step.prepare(text(24))
        step.backward(text(15))
        assert planned == [24]
        step.backward(text(7))
        assert planned == [24, 7] and step.plan is not None and "split_rows" not in step.plan.levers


def test_what_covers_what() -> None:
    def extents(batch: Any) -> Any:
        return extents_of(batch, find_rows(batch))

    longest = extents(text(24))
    assert covers(longest, extents(text(7, rows=3))) and covers(longest, longest)
    assert not covers(extents(text(7)), longest)
    assert not covers(longest, extents((text(7)[0].int(), text(7)[1])))
    assert not covers(longest, extents(text(7)[0]))
    assert not covers(longest, extents((*text(7), "a note")))


def kept(length: int, *levers: str) -> Kept:
    plan = Plan(levers={name: {} for name in levers}, exactness=sg.Exactness.SAME_SUM, batch_rows=ROWS)
    batch = text(length)
    return Kept(plan, None, extents_of(batch, find_rows(batch)))  # type: ignore[arg-type]  # nobody looks at it here


def taken(plans: KeptPlans, length: int, *levers: str, mode: str = "t") -> bool:
    """Whether a batch of ``length`` finds a plan; it gets one with ``levers`` if not."""
    one = kept(length, *levers)
    kind = str(length), mode
    found = plans.of(kind, one.extents, ROWS, lambda plan: True)
    if found is None:
        plans.keep(kind, one)
    return found is not None


@pytest.mark.parametrize("lever", ["compile", "graphs"])
def test_shapes_that_come_in_turns_are_not_compiled_at_every_turn(lever: str, caplog: pytest.LogCaptureFixture) -> None:
    plans = KeptPlans()
    assert not taken(plans, 24, lever) and taken(plans, 24) and not taken(plans, 16, lever) and taken(plans, 16)
    assert not plans.varied and not caplog.records
    # The first one comes back, and neither is compiled any more; what comes then serves shorter ones as well.
    assert not taken(plans, 24) and plans.varied
    assert all(taken(plans, length) for length in (16, 8, 24, 16))
    [told] = caplog.records
    assert "several shapes come in turns" in told.getMessage()


def test_a_few_shapes_one_after_another_may_each_be_compiled() -> None:
    plans = KeptPlans()
    for length in (8, 16, 24):
        assert not taken(plans, length, "compile") and taken(plans, length)
    assert not plans.varied
    assert not taken(plans, 32) and plans.varied


def test_plans_of_any_shape_stay_as_they_are() -> None:
    plans = KeptPlans()
    assert not taken(plans, 24, "split_rows") and taken(plans, 16) and taken(plans, 24)
    assert not taken(plans, 32, "split_rows") and taken(plans, 24) and not plans.varied


def test_shapes_in_turns_are_planned_without_what_is_of_one_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    right, asked = step_module.plan_here, list[bool]()

    def compiling(declared: Any, aliases: Any, batch: Any, budget: Any, options: Any) -> Any:
        asked.append(options.one_shape)
        plan, *rest = right(declared, aliases, batch, budget, options)
        more = {"compile": {"mode": "default", "fullgraph": False, "recompile_limit": 8}} if options.one_shape else {}
        return dataclasses.replace(plan, levers=plan.levers | more), *rest

    monkeypatch.setattr(step_module, "plan_here", compiling)
    with sg.Step(Text().double(), next_token, budget="1GiB") as step:
        for length in (24, 8, 24, 8):
            step.prepare(text(length))
    assert asked == [True, True, False]
