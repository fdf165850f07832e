"""Blocks run again where rows could be split too and nothing is followed: predicted to the byte, taken if faster."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import samegrad as sg
from samegrad.levers.recompute import Recompute
from samegrad.plan.choose import choose_plan
from samegrad.plan.options import Options
from samegrad.plan.predict import predict_plan
from samegrad.records import Budget, Counting, Exactness, Footprint, Plan, Variant
from samegrad.settle import Measurement, aliases_for, measure, measure_for, settle
from samegrad.settle.again_ways import with_blocks_again

from ..contract.plain import assert_close, gradients, left_alone, plain_step
from .steps import Residual, contrast, cross_entropy

ROWS, D = 37, torch.float64
LOSSES = {"one pass": cross_entropy, "two passes": contrast}


def perceptron() -> nn.Module:
    blocks = [Residual(nn.Linear(16, 64), nn.GELU(), nn.Dropout(0.2), nn.Linear(64, 16)) for _ in range(3)]
    return nn.Sequential(nn.Linear(5, 16), *blocks, nn.Linear(16, 10))


def made(loss: str, model: nn.Module | None = None) -> tuple[sg.Step, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    model = perceptron().to(D) if model is None else model.to(D)
    batch = torch.randn(ROWS, 5, dtype=D), torch.arange(ROWS) % 10
    return sg.Step(model, LOSSES[loss], optimizer=torch.optim.SGD(model.parameters(), 0.1)), batch


def measured(loss: str, share: float, model: nn.Module | None = None) -> tuple[sg.Step, Any, Measurement, Budget]:
    step, batch = made(loss, model)
    plain = measure(step.declared, batch, aliases_for(step.declared)).footprint.predicted_peak_bytes(rows=ROWS)
    limit = Budget(total_bytes=int(share * plain), device="cpu", counting=Counting.TENSOR_BYTES, source="given")
    return step, batch, measure_for(step.declared, batch, aliases_for(step.declared), limit, Options()), limit


def again_of(footprint: Footprint) -> Variant:
    [way] = footprint.variants
    assert way.lever == Recompute.name
    return way


def timed(footprint: Footprint, factor: float) -> Footprint:
    """As if running blocks again took ``factor`` of what rows take in chunks, and a chunk as much as ten rows."""
    seconds = {"seconds_per_row": 1e-3, "seconds_per_chunk": 1e-2}
    way = dataclasses.replace(again_of(footprint), seconds_per_row=factor * 1e-3, seconds_per_chunk=factor * 1e-2)
    return dataclasses.replace(footprint, variants=(way,), **seconds)


@pytest.mark.parametrize("loss", LOSSES)
def test_what_it_holds_is_predicted_to_the_byte_that_is_counted(loss: str) -> None:
    step, batch, measurement, _ = measured(loss, 0.8)
    knobs = again_of(measurement.footprint).knobs
    assert knobs == {"blocks": ["1", "2", "3"]}
    plan = Plan(levers={Recompute.name: knobs}, exactness=Exactness.SAME_BITS, batch_rows=ROWS)
    running = sg.Step(step.declared.model, LOSSES[loss], optimizer=step.declared.optimizer, plan=plan)
    *_, last = sg.train(running, [batch] * 2, counter=sg.count_bytes(running))
    predicted = predict_plan(measurement.footprint, plan.levers).peak_allocated_bytes
    assert predicted == last.peak_allocated_bytes
    # Planted: the laws of the plain step under the lever's name.
    wrong = dataclasses.replace(again_of(measurement.footprint), laws=measurement.footprint.plain_laws)
    stale = dataclasses.replace(measurement.footprint, variants=(wrong,))
    assert predict_plan(stale, plan.levers).peak_allocated_bytes != last.peak_allocated_bytes


@pytest.mark.parametrize(("factor", "taken"), [(0.9, True), (9.0, False)])
@pytest.mark.parametrize("loss", LOSSES)
def test_it_is_taken_where_chunks_take_longer_and_has_the_plain_steps_gradients(
    loss: str, factor: float, taken: bool
) -> None:
    step, batch, measurement, limit = measured(loss, 0.8)
    footprint = timed(measurement.footprint, factor)
    changed = dataclasses.replace(measurement, footprint=footprint)
    plan, _, _ = settle(step.declared, aliases_for(step.declared), changed, batch, budget=limit, options=Options())
    assert (Recompute.name in plan.levers) is taken and ("split_rows" in plan.levers) is not taken
    assert plan.reasons[Recompute.name].startswith("taken: saves" if taken else "not needed: the plan fits with split")
    model = step.declared.model.eval()
    _, expected = plain_step(model, LOSSES[loss], batch)
    sg.Step(model, LOSSES[loss], plan=plan).backward(batch)
    assert_close(gradients(model), expected)


def test_time_is_never_said_to_be_gained_by_running_blocks_again() -> None:
    *_, measurement, limit = measured("one pass", 0.8)
    for factor, words in ((0.5, "plain step's"), (1.2, "a step")):
        plan = choose_plan(timed(measurement.footprint, factor), Options(), limit)[0]
        assert "split_rows" not in plan.levers
        assert (" costs " in plan.reasons[Recompute.name]) is (factor > 1) and words in plan.reasons[Recompute.name]
        assert " and " not in plan.reasons[Recompute.name]


def test_the_floor_is_that_of_blocks_run_again_where_a_row_at_a_time_needs_more() -> None:
    *_, measurement, limit = measured("one pass", 0.8)
    way, footprint = again_of(measurement.footprint), measurement.footprint
    law = dataclasses.replace(way.laws[0], fixed_bytes=100.0, per_chunk_row_bytes=0.0, per_batch_row_bytes=1.0)
    tiny = dataclasses.replace(limit, total_bytes=10)
    with pytest.raises(sg.BudgetTooSmall, match="one row and what stays beside it"):
        choose_plan(footprint, Options(), tiny)
    footprint = dataclasses.replace(footprint, variants=(dataclasses.replace(way, laws=(law,)),))
    with pytest.raises(sg.BudgetTooSmall, match=r"the smallest plan needs 137 B.*temporaries with recompute"):
        choose_plan(footprint, Options(), tiny)


def test_it_changes_nothing_of_the_users_and_is_not_tried_where_the_plain_step_fits() -> None:
    step, _, fitting, _ = measured("one pass", 2.0)
    assert fitting.footprint.variants == ()
    assert step.declared.optimizer is not None
    with left_alone(step.declared.network, optimizer=step.declared.optimizer):
        step, batch, measurement, _ = measured("one pass", 0.8)
    assert again_of(measurement.footprint).seconds_per_row is not None
    # Of a step that was followed, traces say it.
    measurement = dataclasses.replace(
        measurement, footprint=dataclasses.replace(measurement.footprint, traced=("followed",), variants=())  # type: ignore[arg-type]
    )
    assert with_blocks_again(step.declared, aliases_for(step.declared), measurement, batch) is measurement


def test_blocks_that_cannot_run_again_are_refused_and_rows_are_split() -> None:
    single = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 10))
    *_, measurement, limit = measured("one pass", 0.8, single)
    plan = choose_plan(measurement.footprint, Options(), limit)[0]
    assert measurement.footprint.variants == () and "split_rows" in plan.levers
    assert "single layers" in plan.reasons[Recompute.name]
