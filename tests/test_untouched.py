"""What looks at a step changes nothing of it: measuring, planning and following, also when the user's code raises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import samegrad as sg
from samegrad.measure.target import Target
from samegrad.plan.options import Options
from samegrad.settle import plan_ahead, plan_followed
from samegrad.settle.front import front_here, front_on_card
from tests.execute.test_undone import Setting

CARD = "RTX 4070 Laptop"
LOOKS: dict[str, Callable[[Setting], Any]] = {
    "measure_step": lambda s: sg.measure_step(s.step, s.batch),
    "measure_step for a card": lambda s: sg.measure_step(s.step, s.batch, device=CARD),
    "settle_plan": lambda s: sg.settle_plan(s.step, s.batch, budget="1MiB"),
    "settle_plan for a card": lambda s: sg.settle_plan(s.step, s.batch, device=CARD),
    "plan_ahead": lambda s: plan_ahead(s.step, s.batch, CARD),
    "plan_followed": lambda s: plan_followed(s.step, s.batch, CARD, sg.settle_plan(s.step, s.batch, budget="1MiB")[0]),
    "front_here": lambda s: front_here(s.step.declared, s.batch, Options()),
    "front_on_card": lambda s: front_on_card(s.step.declared, s.batch, Target.named(CARD), Options()),
    "prepare": lambda s: s.step.prepare(s.batch),
}


@pytest.mark.parametrize("fails", [False, True], ids=["runs", "raises"])
@pytest.mark.parametrize("look", LOOKS)
def test_looking_changes_nothing(look: str, fails: bool) -> None:
    setting = Setting("adam", trained=True)
    # Raises in the middle, not at once.
    setting.model.fails_at = setting.model.calls + 2 if fails else None
    before = setting.fingerprint()
    if fails and look != "prepare":
        with pytest.raises((ValueError, sg.SamegradError), match="own"):
            LOOKS[look](setting)
    else:
        LOOKS[look](setting)
    assert setting.fingerprint() == before


def test_a_backward_that_stays_is_seen() -> None:
    setting = Setting("adam", trained=True)
    before = setting.fingerprint()
    setting.step.backward(setting.batch)
    assert setting.fingerprint() != before
