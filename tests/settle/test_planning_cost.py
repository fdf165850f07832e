"""benchmarks/_planning_cost.py: what is planned goes through the phases that it times."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import samegrad as sg
import samegrad.settle

BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")
sys.path.insert(0, BENCHMARKS)
try:
    import _planning_cost
finally:
    sys.path.remove(BENCHMARKS)


class Wide(nn.Sequential):
    """Of a type of its own, whose calls are counted."""


def prepared_under(cost: _planning_cost.PlanningCost) -> None:
    model = Wide(nn.Linear(8, 256), nn.Tanh(), nn.Linear(256, 8))
    batch = torch.randn(256, 8), torch.randn(256, 8)
    with sg.Step(model, lambda outputs, batch: F.mse_loss(outputs, batch[1]), budget="400KiB") as step, cost.counted():
        step.prepare(batch)


def test_every_phase_of_planning_is_timed_and_put_back() -> None:
    cost, before = _planning_cost.PlanningCost(Wide, 256), vars(samegrad.settle).copy()
    prepared_under(cost)
    assert set(cost.phases) == {name for name, _ in _planning_cost._PHASES}
    assert cost.phases["examined_and_probed"]["plain_steps"] > 0
    assert vars(samegrad.settle) == before


def test_a_phase_that_is_no_longer_called_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_planning_cost, "_PHASES", (*_planning_cost._PHASES, ("never", "smaller_plans")))
    cost = _planning_cost.PlanningCost(Wide, 256)
    prepared_under(cost)
    assert "never" not in cost.phases
