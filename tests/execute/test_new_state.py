"""The first turn of an optimizer finds nothing in the allocator's cache; later ones are left alone."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from samegrad.declared import DeclaredStep, declare
from samegrad.execute.apply import Standing
from samegrad.execute.new_state import room_for_new_state

from ..contract.lever_zoo import cnn, plan_with
from ..contract.plain import cross_entropy


class Given:
    """A step as on a card, how often the cache was given back, and how many hooks its optimizer has."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, device: str = "cuda", momentum: float = 0.9) -> None:
        model, self.batch = cnn()
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum)
        declared = declare(model, cross_entropy, optimizer=self.optimizer)
        self.declared: DeclaredStep = dataclasses.replace(declared, device=torch.device(device))
        self.times = 0
        monkeypatch.setattr(torch.cuda, "empty_cache", self.given_back)
        for how in ("take_workspaces", "retake_workspaces"):
            monkeypatch.setattr(f"samegrad.execute.apply.counters.{how}", lambda _: None)

    def given_back(self) -> None:
        self.times += 1
        assert not any(self.optimizer.state.values())

    def turn(self) -> None:
        cross_entropy(self.declared.model(self.batch[0]), self.batch).backward()
        self.optimizer.step()

    @property
    def hooks(self) -> int:
        return len(self.optimizer._optimizer_step_pre_hooks)


@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_it_is_given_back_once_beside_hooks_of_others(momentum: float, monkeypatch: pytest.MonkeyPatch) -> None:
    given, turns = Given(monkeypatch, momentum=momentum), list[int]()
    given.optimizer.register_step_pre_hook(lambda *_: turns.append(given.times))
    with room_for_new_state(given.declared):
        given.optimizer.register_step_pre_hook(lambda *_: turns.append(given.times))
        assert given.hooks == 3
        for _ in range(3):
            given.turn()
    assert given.hooks == 2 and given.times == 1
    assert turns == [0, 1, *[1, 1] * 2]


def test_nothing_is_done_elsewhere_or_where_there_is_state_or_no_turn_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    given = Given(monkeypatch, device="cpu")
    with room_for_new_state(given.declared):
        assert given.hooks == 0
        given.turn()
    there = dataclasses.replace(given.declared, device=torch.device("cuda"))
    with room_for_new_state(there), room_for_new_state(dataclasses.replace(there, optimizer=None)):
        assert given.hooks == 0
    fresh = Given(monkeypatch)
    with pytest.raises(ZeroDivisionError), room_for_new_state(fresh.declared):
        assert fresh.hooks == 1
        raise ZeroDivisionError
    assert fresh.hooks == 0 and given.times == fresh.times == 0


def test_it_stands_from_the_first_plan_on_and_through_changes_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    given = Given(monkeypatch)
    standing = Standing(given.declared)
    for levers in ({}, {"split_rows": {"rows": 2}}, {"layout": {}}, {}):
        standing.bring(plan_with(**levers))
        assert given.hooks == (2 if "layout" in levers else 1)
    standing.close()
    assert given.hooks == 0
    standing.bring(plan_with())
    given.turn()
    assert given.times == 1
    standing.bring(plan_with(layout={}, optimizer_state={}))
    given.turn()
    standing.close()
    assert given.hooks == 0 and given.times == 1
