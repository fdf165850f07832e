"""Levers that leave the chunks as they are, on the device at hand: probed, predicted to the byte, chosen if faster."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import samegrad as sg
from samegrad.errors import BudgetTooSmall, NotMeasured
from samegrad.execute.apply import applied, standing
from samegrad.measure.trace import plainly
from samegrad.plan.choose import choose_plan
from samegrad.plan.margin import usable_bytes
from samegrad.plan.options import Options
from samegrad.plan.predict import predict_plan
from samegrad.records import Budget, Counting, Exactness, Footprint, Plan, ProbedWay
from samegrad.settle import Measurement, aliases_for, measure, measure_for, settle

from ..contract.plain import assert_close, gradients, left_alone, plain_step
from ..measure.traced import counted_peaks, cross_entropy

ROWS = 37
ROUNDED = Options(allow=Exactness.ROUNDED)


def pictures(dtype: torch.dtype = torch.float32) -> tuple[sg.Step, tuple[Tensor, Tensor]]:
    """Rows that are apart, in convolutions; what they keep is more than parameters and state.

    Of so many channels that they are copied to have them last.
    """
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(6, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 64, 5)
    ).to(dtype)
    batch = torch.randn(ROWS, 6, 12, 12, dtype=dtype), torch.arange(ROWS) % 5
    return sg.Step(model, cross_entropy, optimizer=torch.optim.SGD(model.parameters(), 0.1)), batch


def budget(total_bytes: int) -> Budget:
    return Budget(total_bytes=total_bytes, device="cpu", counting=Counting.TENSOR_BYTES, source="given")


def measured(options: Options = ROUNDED, share: float = 0.6) -> tuple[sg.Step, Any, Measurement, Budget]:
    step, batch = pictures()
    plain = measure(step.declared, batch, aliases_for(step.declared)).footprint.predicted_peak_bytes(rows=ROWS)
    limit = budget(int(share * plain))
    return step, batch, measure_for(step.declared, batch, aliases_for(step.declared), limit, options), limit


def timed(way: ProbedWay, footprint: Footprint, factor: float) -> ProbedWay:
    """``way`` as if it took ``factor`` of the plain step's time, whatever this machine does."""
    assert footprint.seconds_per_row is not None and footprint.seconds_per_chunk is not None
    return dataclasses.replace(
        way, seconds_per_row=factor * footprint.seconds_per_row, seconds_per_chunk=factor * footprint.seconds_per_chunk
    )


def with_factors(footprint: Footprint, **factors: float) -> Footprint:
    """Each way under one lever at a time taken, with its time; seconds of the plain step that are known as well."""
    footprint = dataclasses.replace(footprint, seconds_per_row=1e-4, seconds_per_chunk=1e-3)
    ways = [way for way in footprint.probed if len(way.levers) == 1]
    found = tuple(timed(way, footprint, factors.get(next(iter(way.levers)), 1.0)) for way in ways)
    return dataclasses.replace(footprint, probed=found)


@pytest.mark.parametrize("lever", ["autocast", "layout"])
def test_the_step_under_a_lever_is_predicted_to_hold_to_the_byte_what_is_counted(lever: str) -> None:
    step, batch, measurement, _ = measured()
    [way] = [way for way in measurement.footprint.probed if way.levers.keys() == {lever}]
    predicted = predict_plan(measurement.footprint, way.levers).peak_allocated_bytes
    plan = Plan(levers=way.levers, exactness=Exactness.ROUNDED, batch_rows=ROWS)
    with standing(plan, step.declared), applied(plan, step.declared, ROWS) as execution:
        # The second step has what stands between steps.
        counted = counted_peaks(execution.declared, batch, plainly())[1]
    assert predicted == counted
    # Planted: laws of the plain step under the lever's name, and those of other rows.
    plain = dataclasses.replace(way, plain_laws=measurement.footprint.plain_laws)
    wrong = dataclasses.replace(measurement.footprint, probed=(plain,))
    assert predict_plan(wrong, way.levers).peak_allocated_bytes != counted
    stale = dataclasses.replace(measurement.footprint, batch_rows=ROWS - 1)
    assert predict_plan(stale, way.levers).peak_allocated_bytes != counted


def test_nothing_is_probed_where_the_plain_step_fits_and_what_rounds_only_where_it_is_allowed() -> None:
    assert measured(share=2.0)[2].footprint.probed == ()
    for options, expected in ((Options(), {"layout"}), (ROUNDED, {"layout", "autocast"})):
        levers = {name for way in measured(options)[2].footprint.probed for name in way.levers}
        assert levers == expected


def test_probing_changes_nothing_of_the_users() -> None:
    step, batch = pictures()
    for parameter in step.declared.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    strides = [p.stride() for p in step.declared.model.parameters()]
    with left_alone(step.declared.model, optimizer=step.declared.optimizer):
        measure_for(step.declared, batch, aliases_for(step.declared), budget(1), ROUNDED)
    assert [p.stride() for p in step.declared.model.parameters()] == strides


@pytest.mark.parametrize(("factor", "taken"), [(0.7, True), (1.0, False), (1.3, False)])
def test_the_layout_is_taken_when_it_is_faster_and_only_then(factor: float, taken: bool) -> None:
    *_, measurement, limit = measured(Options())
    footprint = with_factors(measurement.footprint, layout=factor)
    plan = choose_plan(footprint, Options(), limit)[0]
    assert ("layout" in plan.levers) is taken and "split_rows" in plan.levers
    reason = plan.reasons["layout"]
    if taken:
        assert reason.startswith("taken: ") and " of a step" in reason
    else:
        assert reason.startswith("not needed: ") and "by itself it takes " in reason and reason.endswith("(measured)")


def test_rounding_is_taken_where_it_is_allowed_and_fits_and_settled_by_a_measured_peak() -> None:
    step, batch, measurement, limit = measured(share=0.9)
    footprint = with_factors(measurement.footprint, autocast=0.8)
    measurement = dataclasses.replace(measurement, footprint=footprint)
    aliases = aliases_for(step.declared)
    plan, _, _ = settle(step.declared, aliases, measurement, batch, budget=limit, options=ROUNDED)
    assert set(plan.levers) >= {"autocast"} and plan.exactness is Exactness.ROUNDED
    exact = choose_plan(footprint, Options(), limit)[0]
    assert "autocast" not in exact.levers and exact.reasons["autocast"].startswith("not allowed")


@pytest.mark.parametrize("factor", [0.7, 1.2])
def test_a_smaller_budget_is_never_predicted_faster(factor: float) -> None:
    *_, measurement, _ = measured()
    footprint = with_factors(measurement.footprint, layout=factor, autocast=factor)
    most, last = 2 * footprint.predicted_peak_bytes(rows=ROWS), 0.0
    for options in (Options(), ROUNDED):
        last = 0.0
        for share in range(40, 0, -1):
            limit = budget(most * share // 40)
            try:
                plan = choose_plan(footprint, options, limit)[0]
            except BudgetTooSmall:
                break
            assert plan.predicted_peak_bytes is not None and plan.predicted_seconds is not None
            assert plan.predicted_peak_bytes <= usable_bytes(limit)
            assert plan.predicted_seconds >= last - 1e-9
            last = plan.predicted_seconds


def test_a_plan_that_takes_a_layout_runs_the_plain_steps_sum() -> None:
    step, batch = pictures(torch.float64)
    _, expected = plain_step(step.declared.model, cross_entropy, batch)
    levers = {"split_rows": {"rows": 11, "kept_chunks": 0}, "layout": {}}
    plan = Plan(levers=levers, exactness=Exactness.SAME_SUM, batch_rows=ROWS)
    sg.Step(step.declared.model, cross_entropy, plan=plan).backward(batch)
    assert_close(gradients(step.declared.model), expected)


def test_a_lever_that_was_not_probed_is_not_predicted_and_a_footprint_comes_back_from_a_file() -> None:
    footprint = measured()[2].footprint
    assert Footprint.from_json(footprint.to_json()) == footprint
    with pytest.raises(NotMeasured, match=r"layout.*\n.*neither probed nor followed"):
        predict_plan(dataclasses.replace(footprint, probed=()), {"layout": {}})
