"""Below a plan that was believed: plans that need an eighth less each, down to the smallest, without a device."""

from __future__ import annotations

import dataclasses
import itertools

import torch
from torch import nn

import samegrad as sg
from samegrad.records import Counting, Exactness, Footprint, Phase, PhaseLaw, Plan
from samegrad.settle import smaller_plans

from ..contract.plain import cross_entropy, labelled


def measured(rows: int = 64) -> tuple[Footprint, Plan]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 40), nn.Tanh(), nn.Linear(40, 3)).double()
    with sg.Step(model, cross_entropy, budget="1MiB") as step:
        plan = step.prepare(labelled(rows))
        assert step.footprint is not None
        return step.footprint, plan


def peaks_below(footprint: Footprint, plan: Plan) -> list[int]:
    found = list(smaller_plans(footprint, plan, Exactness.SAME_SUM))
    assert all(p.budget == plan.budget and p.signature == plan.signature for p in found)
    return [p.predicted_peak_bytes or 0 for p in found]


def test_each_needs_an_eighth_less_and_the_last_is_the_smallest() -> None:
    footprint, plan = measured()
    start = plan.predicted_peak_bytes or 0
    peaks = peaks_below(footprint, plan)
    assert len(peaks) > 3
    for before, after in zip([start, *peaks[:-2]], peaks[:-1]):
        assert after <= before * 7 / 8
    assert peaks[-1] == footprint.predicted_peak_bytes(rows=1) == min(peaks)


def test_on_a_card_the_same_plan_in_segments_that_grow_comes_first() -> None:
    footprint, plan = measured()
    assert plan.budget is not None
    others_refused = {name: why for name, why in footprint.refusals.items() if name != "expandable_segments"}
    footprint = dataclasses.replace(footprint, refusals=others_refused)
    counted = list(smaller_plans(footprint, plan, Exactness.SAME_SUM))
    on_card = dataclasses.replace(plan, budget=dataclasses.replace(plan.budget, counting=Counting.CUDA_ALLOCATOR))
    first, *others = smaller_plans(footprint, on_card, Exactness.SAME_SUM)
    grows = {"expandable_segments": {}}
    assert first.levers == plan.levers | grows and first.predicted_peak_bytes == plan.predicted_peak_bytes
    assert "memory ran out" in first.reasons["expandable_segments"]
    assert others and all(p.levers.keys() > grows.keys() and p.reasons.keys() >= grows.keys() for p in others)
    assert not any("expandable_segments" in p.levers for p in counted)
    # Not twice, and not where it cannot be.
    assert next(smaller_plans(footprint, first, Exactness.SAME_SUM)).levers != first.levers
    refused = dataclasses.replace(footprint, refusals=footprint.refusals | {"expandable_segments": "no segments"})
    assert not any("expandable_segments" in p.levers for p in smaller_plans(refused, on_card, Exactness.SAME_SUM))


def test_below_a_floor_that_hides_the_rows_half_as_many_come_next() -> None:
    footprint, plan = measured()
    floor = PhaseLaw(phase=Phase.BACKWARD, fixed_bytes=10**6, per_chunk_row_bytes=100, per_batch_row_bytes=0)
    high = dataclasses.replace(footprint, laws=(floor,), plain_laws=(floor,))
    whole = dataclasses.replace(plan, predicted_peak_bytes=10**6 + 6400)
    below = list(smaller_plans(high, whole, Exactness.SAME_SUM))
    rows = [64, *(p.levers["split_rows"]["rows"] for p in below)]
    assert all(after <= before // 2 for before, after in itertools.pairwise(rows)) and rows[-1] == 1
    assert rows[1] > 16


def test_below_the_smallest_there_is_nothing_nor_where_nothing_may_be_split() -> None:
    footprint, plan = measured()
    smallest = list(smaller_plans(footprint, plan, Exactness.SAME_SUM))[-1]
    assert not peaks_below(footprint, smallest)
    assert not list(smaller_plans(footprint, plan, Exactness.SAME_BITS))
    assert not list(smaller_plans(footprint, dataclasses.replace(plan, predicted_peak_bytes=None), Exactness.SAME_SUM))
