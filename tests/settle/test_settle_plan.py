"""Settling: the rung that is returned was measured, fits, and is right."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import samegrad as sg
from samegrad.measure.rungs import Rung
from samegrad.plan.choose import choose_plan
from samegrad.plan.floor import floor_bytes
from samegrad.plan.margin import usable_bytes
from samegrad.plan.options import Options
from samegrad.records import Budget, Counting, Exactness, Footprint, KnobOrigin, PhaseLaw, Plan
from samegrad.settle import Measurement, aliases_for, check_one_of, ladder, measure, settle
from samegrad.settle.last_rungs import rungs_to_try
from samegrad.unit_tables import TracedWay
from samegrad.units import format_bytes

from ..contract.plain import assert_close, gradients, labelled, left_alone, plain_step

ROWS = 600


def wide(outputs: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 80), nn.Tanh(), nn.Linear(80, 40), nn.Tanh(), nn.Linear(40, outputs)).double()


def one_pass(outputs: Tensor, batch: Any) -> Tensor:
    return F.cross_entropy(outputs, batch[1])


def two_passes(outputs: Tensor, batch: Any) -> Tensor:
    return one_pass(outputs, batch) + outputs.std(0).mean()


LOSSES = pytest.mark.parametrize("loss_fn", [one_pass, two_passes], ids=["one pass", "two passes"])


def stepped(loss_fn: Any, *, outputs: int = 3, **given: Any) -> sg.Step:
    model = wide(outputs)
    return sg.Step(model, loss_fn, optimizer=torch.optim.Adam(model.parameters()), **given)


@LOSSES
@pytest.mark.parametrize("fraction", [0.1, 0.4, 0.8])
def test_what_then_runs_stays_within_the_budget_and_keeps_the_gradients(loss_fn: Any, fraction: float) -> None:
    batch = labelled(ROWS)
    footprint = sg.measure_step(stepped(loss_fn), batch)
    low, high = (footprint.predicted_peak_bytes(rows=n) for n in (1, ROWS))
    total = int(low * 1.02 + fraction * (high - low))
    step = stepped(loss_fn, budget=total)
    _, expected = plain_step(step.declared.model, loss_fn, batch)
    plan = step.prepare(batch)
    assert plan.levers
    step.backward(batch)
    assert_close(gradients(step.declared.model), expected)
    step.declared.model.zero_grad()
    for result in sg.train(step, [batch, batch], counter=sg.count_bytes(step)):
        assert result.peak_allocated_bytes is not None and result.peak_allocated_bytes <= total
    assert plan.predicted_peak_bytes is not None
    assert abs(result.peak_allocated_bytes - plan.predicted_peak_bytes) <= 0.1 * plan.predicted_peak_bytes


@LOSSES
def test_the_measured_peak_of_the_rung_is_that_of_the_real_step(loss_fn: Any) -> None:
    # Many outputs: what two passes keep of every row is then a good part of the peak.
    batch = labelled(ROWS)
    step = stepped(loss_fn, outputs=60)
    measurement = measure(step.declared, batch, aliases_for(step.declared))
    low, high = (measurement.footprint.predicted_peak_bytes(rows=n) for n in (1, ROWS))
    assert low < high
    limit = sg.Budget(total_bytes=(low + high) // 2, device="cpu", counting=Counting.TENSOR_BYTES, source="test")
    aliases = aliases_for(step.declared)
    plan, _, measured = settle(step.declared, aliases, measurement, batch, budget=limit, options=Options())
    running = stepped(loss_fn, outputs=60, plan=plan)
    *_, last = sg.train(running, [batch, batch], counter=sg.count_bytes(running))
    assert measured is not None and last.peak_allocated_bytes is not None
    assert abs(measured - last.peak_allocated_bytes) <= 0.02 * measured


def timed_alike(measurement: Measurement) -> Measurement:
    """Bytes as measured; times by rows and chunks alone, so that a busy machine changes no order of plans."""
    footprint = dataclasses.replace(measurement.footprint, seconds_per_row=1e-6, seconds_per_chunk=1e-4)
    return dataclasses.replace(measurement, footprint=footprint)


def too_low(measurement: Measurement, factor: float) -> Measurement:
    """The planted fault: laws that promise less than a row takes."""

    def lowered(law: PhaseLaw) -> PhaseLaw:
        return dataclasses.replace(law, per_chunk_row_bytes=law.per_chunk_row_bytes * factor)

    laws = tuple(lowered(law) for law in measurement.footprint.laws)
    return dataclasses.replace(measurement, footprint=dataclasses.replace(measurement.footprint, laws=laws))


@LOSSES
def test_a_rung_that_measures_more_than_it_was_predicted_gives_way_to_the_next(loss_fn: Any) -> None:
    batch = labelled(ROWS)
    step = stepped(loss_fn)
    right = timed_alike(measure(step.declared, batch, aliases_for(step.declared)))
    low, high = (right.footprint.predicted_peak_bytes(rows=n) for n in (1, ROWS))
    limit = sg.Budget(total_bytes=low + (high - low) // 4, device="cpu", counting=Counting.TENSOR_BYTES, source="test")
    wrong = too_low(right, 0.3)
    believed = sg.choose_plan(wrong.footprint, Options(), limit)[0]
    assert right.footprint.predicted_peak_bytes(rows=believed.levers["split_rows"]["rows"]) > limit.total_bytes
    plan, _, measured = settle(step.declared, aliases_for(step.declared), wrong, batch, budget=limit, options=Options())
    assert plan.levers["split_rows"]["rows"] < believed.levers["split_rows"]["rows"]
    assert measured is not None and measured <= limit.total_bytes


def test_when_every_rung_measures_too_much_the_error_shows_what_was_tried() -> None:
    batch = labelled(ROWS)
    step = stepped(one_pass)
    right = measure(step.declared, batch, aliases_for(step.declared))
    floor = right.footprint.predicted_peak_bytes(rows=1)
    laws = tuple(dataclasses.replace(law, fixed_bytes=law.fixed_bytes / 4) for law in right.footprint.laws)
    wrong = dataclasses.replace(right, footprint=dataclasses.replace(right.footprint, laws=laws))
    limit = sg.Budget(total_bytes=floor // 2, device="cpu", counting=Counting.TENSOR_BYTES, source="test")
    with pytest.raises(sg.BudgetTooSmall, match=r"rows: predicted .*, measured "):
        settle(step.declared, aliases_for(step.declared), wrong, batch, budget=limit, options=Options())


@LOSSES
@pytest.mark.parametrize("rows", [64, [300, 200, 100]], ids=str)
def test_pinned_rows_are_settled_as_they_are(loss_fn: Any, rows: Any) -> None:
    batch = labelled(ROWS)
    plan, _ = sg.settle_plan(stepped(loss_fn), batch, budget="1GiB", rows=rows)
    assert plan.levers["split_rows"]["rows"] == rows
    assert plan.knob_origins["split_rows.rows"] is KnobOrigin.PINNED
    step = stepped(loss_fn, plan=plan)
    _, expected = plain_step(step.declared.model, loss_fn, batch)
    step.backward(batch)
    assert_close(gradients(step.declared.model), expected)


def test_settling_from_a_step_and_preparing_it_make_the_same_plan() -> None:
    batch = labelled(ROWS)
    total = sg.measure_step(stepped(one_pass), batch).predicted_peak_bytes(rows=ROWS) // 2
    settled, _ = sg.settle_plan(stepped(one_pass), batch, budget=total)
    prepared = stepped(one_pass, budget=total).prepare(batch)
    # Reasons quote seconds, which were measured twice.
    timed = {"predicted_seconds": None, "signature": "", "reasons": {}}
    assert dataclasses.replace(settled, **timed) == dataclasses.replace(prepared, **timed)


def test_settling_changes_nothing_of_the_users() -> None:
    step = stepped(two_passes)
    for parameter in step.declared.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    batch = labelled(ROWS)
    x = batch[0].clone()
    with left_alone(step.declared.model, optimizer=step.declared.optimizer):
        sg.settle_plan(step, batch, budget="1GiB")
    assert torch.equal(batch[0], x)


def test_a_step_that_does_not_fit_is_never_run_whole_to_find_out() -> None:
    seen: list[int] = []

    class Watching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = wide()

        def forward(self, x: Tensor) -> Tensor:
            seen.append(len(x))
            return self.inner(x)

    batch = labelled(ROWS)
    model = Watching()
    total = sg.measure_step(sg.Step(model, one_pass), batch).predicted_peak_bytes(rows=ROWS) // 2
    seen.clear()
    plan = sg.Step(model, one_pass, budget=total).prepare(batch)
    assert max(seen) <= max(plan.levers["split_rows"]["rows"], 32)


def test_the_refusal_of_a_split_is_in_the_footprint_and_the_plain_laws_still_hold() -> None:
    class Centred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Parameter(torch.randn(6, 30, dtype=torch.float64))
            self.last = nn.Parameter(torch.randn(30, 3, dtype=torch.float64))

        def forward(self, x: Any) -> Any:
            return (x - x.mean(0)) @ self.first @ self.last

    torch.manual_seed(0)
    model = Centred()
    batch = labelled(200)
    footprint = sg.measure_step(sg.Step(model, one_pass), batch)
    assert "mixes rows" in footprint.refusals["split_rows"] and footprint.laws == () == footprint.variants
    step = sg.Step(model, one_pass, optimizer=torch.optim.SGD(model.parameters(), 0.1), budget="1GiB")
    step.prepare(batch)
    *_, last = sg.train(step, [batch, batch], counter=sg.count_bytes(step))
    assert last.peak_allocated_bytes is not None
    predicted = footprint.predicted_peak_bytes(rows=200)
    assert abs(predicted - last.peak_allocated_bytes) <= 0.01 * predicted + 1024
    with pytest.raises(sg.CannotSplit, match="mixes rows"):
        sg.Step(model, one_pass, budget=predicted // 2).backward(batch)


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_the_smallest_batches_are_planned_also_with_batch_normalisation(rows: int) -> None:
    model = nn.Sequential(nn.Linear(6, 30), nn.LayerNorm(30), nn.Linear(30, 3)).double()
    sg.Step(model, one_pass, budget="1GiB").backward(labelled(rows))
    if rows > 1:
        coupled = nn.Sequential(nn.Linear(6, 30), nn.BatchNorm1d(30), nn.Linear(30, 3)).double()
        sg.Step(coupled, one_pass, budget="1GiB").backward(labelled(rows))


def test_a_share_of_the_machine_is_a_budget() -> None:
    step = stepped(one_pass, budget="50%")
    step.prepare(labelled(64))
    assert step.budget is not None and "50%" in step.budget.source
    assert format_bytes(step.budget.total_bytes) in step.explain()


@pytest.mark.parametrize("given", [0, -5, 1.5, True, "lots", "8"], ids=str)
def test_what_is_no_budget_is_refused(given: Any) -> None:
    with pytest.raises(sg.UsageError, match="budget"):
        stepped(one_pass, budget=given).prepare(labelled(8))


def test_at_most_one_way_to_say_how_a_step_runs() -> None:
    ways = {"budget": "1GiB", "rows": 4, "plan": object()}
    for count in range(4):
        for names in itertools.combinations(ways, count):
            chosen = {name: ways[name] if name in names else None for name in ways}
            if count < 2:
                check_one_of(**chosen)
            else:
                with pytest.raises(sg.UsageError, match=" and ".join(f"{name}=" for name in names)):
                    check_one_of(**chosen)


@pytest.mark.parametrize(("held", "said"), [(2**40, "cannot be given back"), (0, "every rung measured more")])
def test_where_nothing_fits_it_is_said_whether_the_allocator_holds_it(
    held: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = labelled(ROWS)
    known = stepped(one_pass, budget="1GiB")
    known.prepare(batch)
    assert known.footprint is not None
    budget = int(0.9 * known.footprint.predicted_peak_bytes(rows=ROWS))
    monkeypatch.setattr(ladder, "measured", lambda *_: None)
    monkeypatch.setattr(ladder, "measured_whole", lambda *_: None)
    monkeypatch.setattr(ladder, "_held_for_nothing", lambda _: held)
    with pytest.raises(sg.BudgetTooSmall, match=said):
        stepped(one_pass, budget=budget).prepare(batch)


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "split"])
def test_a_measured_plan_takes_what_its_state_takes_to_travel(whole: bool) -> None:
    step, batch = stepped(one_pass), labelled(ROWS)
    declared, aliases = step.declared, aliases_for(step.declared)
    found = measure(declared, batch, aliases)

    def way(seconds: float, **levers: Any) -> TracedWay:
        return TracedWay(
            levers=levers, tables=(), accumulator_bytes=0, chunk_seconds=0.0, optimizer_bytes=0,
            optimizer_seconds=seconds,
        )  # fmt: skip

    footprint = dataclasses.replace(found.footprint, traced=(way(1.0), way(101.0, optimizer_state={})))
    measurement = dataclasses.replace(found, footprint=footprint)
    for levers, takes in (({}, False), ({"optimizer_state": {}}, True)):
        levers |= {} if whole else {"split_rows": {"rows": 100, "kept_chunks": 0}}
        plan = Plan(levers=levers, exactness=Exactness.SAME_SUM, batch_rows=ROWS)
        if whole:
            rung = ladder.measured_whole(declared, batch, measurement, plan, 2**30)
        else:
            rung = ladder.measured(declared, aliases, measurement, batch, plan, Counting.TENSOR_BYTES, 2**30)
        assert rung is not None and (100.0 < rung.seconds < 200.0 if takes else rung.seconds < 100.0)


def split(rows: int, seconds: float, budget: Budget, **more: Any) -> Plan:
    levers = {"split_rows": {"rows": rows, "kept_chunks": 0}, **more}
    return Plan(
        levers=levers, exactness=Exactness.SAME_SUM, batch_rows=ROWS, budget=budget, predicted_seconds=seconds,
        predicted_peak_bytes=rows,
    )  # fmt: skip


def settled_of(
    plans: list[tuple[int, float, float, dict[str, Any]]], counting: Counting, monkeypatch: pytest.MonkeyPatch,
    launching_share: float | None = None,
) -> tuple[Plan, list[int]]:  # fmt: skip
    """What is settled of ``plans``: rows, predicted and played seconds, levers beside the split; the rows measured."""
    declared = stepped(one_pass).declared
    batch, aliases = labelled(ROWS), aliases_for(declared)
    budget = Budget(total_bytes=2**30, device="played", counting=counting, source="played")
    ladder_plans = tuple(split(rows, seconds, budget, **more) for rows, seconds, _, more in plans)
    played = {rows: seconds for rows, _, seconds, _ in plans}
    seen: list[int] = []

    def measured(plan: Plan) -> Rung:
        rows = plan.levers["split_rows"]["rows"]
        seen.append(rows)
        return Rung(rows, played[rows], launching_share)

    monkeypatch.setattr(ladder, "measured", lambda *given: measured(given[4]))
    monkeypatch.setattr(ladder, "measured_whole", lambda *given, most: measured(given[3]))
    monkeypatch.setattr(ladder, "rungs_to_try", lambda *_: (ladder_plans, None))
    given = declared, aliases, measure(declared, batch, aliases), batch
    return settle(*given, budget=budget, options=Options())[0], seen


AGAIN = {"host_rows": {}}


def test_a_rung_that_is_slower_than_predicted_is_measured_beside_what_may_be_faster(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The second differs in rows alone, and is off as the first is; the fourth is not predicted to be faster.
    plans = [(40, 1.0, 3.0, {}), (30, 1.1, 3.3, {}), (20, 1.5, 1.6, AGAIN), (10, 2.9, 0.1, AGAIN)]
    plan, seen = settled_of(plans, Counting.CUDA_ALLOCATOR, monkeypatch)
    assert seen == [40, 20] and plan.levers["split_rows"]["rows"] == 20
    assert plan.predicted_seconds == 1.6


@pytest.mark.parametrize(
    ("plans", "measured"),
    [
        ([(40, 1.0, 1.1, {}), (20, 1.05, 0.5, AGAIN)], [40]),
        ([(40, 1.0, 3.0, {}), (20, 1.5, 3.6, AGAIN)], [40, 20]),
    ],
    ids=["as predicted", "slower still"],
)
def test_the_first_that_fits_stays_where_nothing_is_faster(
    plans: Any, measured: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, seen = settled_of(plans, Counting.CUDA_ALLOCATOR, monkeypatch)
    assert seen == measured and plan.levers["split_rows"]["rows"] == 40


@pytest.mark.parametrize(
    ("share", "predicted", "measured"),
    [(0.99, 1.05, [200, 300]), (0.5, 1.05, [200]), (None, 1.05, [200]), (0.99, 1.5, [200])],
    ids=["launches bind", "the device binds", "nothing is launched", "far slower by prediction"],
)
def test_where_launches_bind_fewer_chunks_are_measured_beside(
    share: float | None, predicted: float, measured: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    # 600 rows in three chunks, in two that hold less, and in four.
    plans = [(200, 1.0, 1.2, {}), (300, predicted, 0.8, AGAIN), (150, 1.06, 0.1, AGAIN)]
    plan, seen = settled_of(plans, Counting.CUDA_ALLOCATOR, monkeypatch, share)
    assert seen == measured and plan.levers["split_rows"]["rows"] == measured[-1]


def test_on_a_cpu_whose_times_come_and_go_the_first_that_fits_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    plans = [(40, 1.0, 3.0, {}), (20, 1.5, 1.6, AGAIN)]
    plan, seen = settled_of(plans, Counting.TENSOR_BYTES, monkeypatch)
    assert seen == [40] and plan.levers["split_rows"]["rows"] == 40


@pytest.mark.parametrize(("counting", "seen", "seconds"), [
    (Counting.CUDA_ALLOCATOR, [ROWS], 3.0),
    (Counting.TENSOR_BYTES, [], 1.0),
], ids=["card", "cpu"])  # fmt: skip
def test_what_levers_cost_the_whole_step_is_measured_on_a_card(
    counting: Counting, seen: list[int], seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, found = settled_of([(ROWS, 1.0, 3.0, {})], counting, monkeypatch)
    assert found == seen and plan.predicted_seconds == seconds


def between() -> tuple[Footprint, Budget]:
    """A footprint, and a budget that its smallest plan is within, but not within what predictions may come to."""
    declared = stepped(one_pass).declared
    footprint = measure(declared, labelled(ROWS), aliases_for(declared)).footprint
    total = floor_bytes(footprint) + 2**20
    return footprint, Budget(total_bytes=total, device="played", counting=Counting.CUDA_ALLOCATOR, source="played")


def test_within_the_margin_of_a_budget_the_smallest_plans_are_tried_on_a_card() -> None:
    footprint, budget = between()
    with pytest.raises(sg.BudgetTooSmall, match=r"are kept in reserve .* for gaps") as refused:
        choose_plan(footprint, Options(), budget)
    rungs, refusal = rungs_to_try(footprint, Options(), budget)
    assert 1 <= len(rungs) <= 4 and refusal is not None and refusal.found == refused.value.found
    assert all(plan.budget == budget for plan in rungs)
    assert all(usable_bytes(budget) < (plan.predicted_peak_bytes or 0) <= budget.total_bytes for plan in rungs)
    # Counted bytes have no gaps, pins are refused by their own number, and below the floor nothing is tried.
    floor = floor_bytes(footprint)
    for other, options in (
        (dataclasses.replace(budget, counting=Counting.TENSOR_BYTES, total_bytes=floor), Options()),
        (budget, Options(rows=5)),
        (dataclasses.replace(budget, total_bytes=floor - 1), Options()),
    ):
        with pytest.raises(sg.BudgetTooSmall):
            rungs_to_try(footprint, options, other)


@pytest.mark.parametrize("fits", [True, False])
def test_what_is_tried_there_is_taken_or_the_refusal_says_what_was_measured(
    fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    declared = stepped(one_pass).declared
    batch, aliases = labelled(ROWS), aliases_for(declared)
    measurement, budget = measure(declared, batch, aliases), between()[1]
    peak = budget.total_bytes // 2 if fits else 2 * budget.total_bytes
    monkeypatch.setattr(ladder, "measured", lambda *_: Rung(peak, 1.0))
    monkeypatch.setattr(ladder, "measured_whole", lambda *_, most: Rung(peak, 1.0))
    given: dict[str, Any] = {"budget": budget, "options": Options()}
    if fits:
        plan, _, found = settle(declared, aliases, measurement, batch, **given)
        assert plan.budget == budget and found == peak
        return
    with pytest.raises(sg.BudgetTooSmall, match=r"(?s)smallest plan needs.*tried on the device all the same: \d+ rows"):
        settle(declared, aliases, measurement, batch, **given)
