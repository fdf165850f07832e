"""Levers that leave the chunks as they are, chosen and settled on a real card, within the budget."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import samegrad as sg
from samegrad.plan.margin import usable_bytes
from samegrad.plan.options import Options
from samegrad.records import Budget, Counting, Exactness
from samegrad.settle import aliases_for, measure, measure_for, settle

from ..settle.steps import Residual, cross_entropy

pytestmark = pytest.mark.gpu
ROWS = 256


def pictures() -> tuple[sg.Step, Any]:
    """Convolutions and BatchNorm: rows are not split."""
    torch.manual_seed(0)
    blocks = [Residual(nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU()) for _ in range(6)]
    model = nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)
    ).cuda()
    batch = torch.randn(ROWS, 3, 64, 64, device="cuda"), torch.arange(ROWS, device="cuda") % 10
    return sg.Step(model, cross_entropy, optimizer=torch.optim.Adam(model.parameters())), batch


@pytest.mark.parametrize("options", [Options(), Options(allow=Exactness.ROUNDED)], ids=["exact", "rounded"])
@pytest.mark.parametrize("share", [0.8, 0.5])
def test_a_plan_with_such_levers_is_settled_within_its_budget(share: float, options: Options) -> None:
    step, batch = pictures()
    aliases = aliases_for(step.declared)
    plain = measure(step.declared, batch, aliases).footprint.predicted_peak_bytes(rows=ROWS)
    limit = Budget(
        total_bytes=int(share * plain), device="cuda", counting=Counting.CUDA_ALLOCATOR, source="given"
    )
    measurement = measure_for(step.declared, batch, aliases, limit, options)
    footprint = measurement.footprint
    assert {name for way in footprint.probed for name in way.levers} >= {"layout"}, footprint.refusals
    assert "offload_saved" in {name for way in footprint.traced for name in way.levers}, footprint.facts
    assert usable_bytes(limit) < plain
    plan, _, peak = settle(step.declared, aliases, measurement, batch, budget=limit, options=options)
    print(share, plan.levers, plan.predicted_seconds, peak, plan.reasons)
    assert plan.levers and (peak is None or peak <= limit.total_bytes)
    assert ("autocast" not in plan.levers) or options.allow is Exactness.ROUNDED
