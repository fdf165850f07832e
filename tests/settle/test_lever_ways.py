"""Levers that leave the chunks as they are, planned for a card: followed, predicted as followed, chosen when needed."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import samegrad as sg
from samegrad.errors import BudgetTooSmall
from samegrad.measure.target import Target
from samegrad.measure.trace_reading import CUDA_BLOCK_BYTES, peak_bytes
from samegrad.plan.choose import choose_plan
from samegrad.plan.options import Options
from samegrad.plan.predict import predict_plan
from samegrad.plan.traced import Candidate, predict_traced, traced_candidates
from samegrad.records import Budget, Counting, Exactness, Footprint, Phase, PhaseLaw, Plan, ProbedWay
from samegrad.settle import aliases_for, plan_ahead
from samegrad.settle.followed_step import FollowedStep
from samegrad.settle.following import follow
from samegrad.settle.lever_ways import with_lever_ways
from samegrad.settle.on_card import footprint_of, with_levers_on_card

from .steps import Residual, cross_entropy
from .test_followed_plans import smaller_than_faster

CARD = "H200"
MIB = 2**20
# What a plan's prediction may be off by from the trace of that very plan, as for those without levers.
WITHIN = 0.01
ROUNDED = Options(allow=Exactness.ROUNDED)
ROWS = 1024


def perceptron() -> nn.Module:
    blocks = [Residual(nn.Linear(256, 1024), nn.GELU(), nn.Linear(1024, 256)) for _ in range(4)]
    return nn.Sequential(nn.Linear(20, 256), *blocks, nn.Linear(256, 10))


def pictures_model() -> nn.Module:
    blocks = [Residual(nn.Conv2d(12, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU()) for _ in range(3)]
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 10)
    )


STEPS = {"perceptron": (perceptron, (20,), ROWS), "pictures": (pictures_model, (3, 32, 32), 128)}


def stepped(name: str) -> tuple[sg.Step, tuple[Tensor, Tensor]]:
    """A step without data: nothing of it needs to be run."""
    make, row_shape, rows = STEPS[name]
    with torch.device("meta"):
        model = make()
        batch = torch.empty(rows, *row_shape), torch.empty(rows, dtype=torch.int64)
    return sg.Step(model, cross_entropy, optimizer=torch.optim.Adam(model.parameters())), batch


@functools.cache
def plainly_followed(name: str) -> tuple[FollowedStep, Footprint]:
    step, batch = stepped(name)
    return follow(step.declared, aliases_for(step.declared), batch, Target.named(CARD))


@functools.cache
def followed(name: str) -> tuple[FollowedStep, Footprint]:
    """As ``plainly_followed``, for a budget under which every lever counts."""
    step, footprint = plainly_followed(name)
    return step, with_lever_ways(step, footprint, ROUNDED, budget(2**14))


def budget(total_bytes: int, host_bytes: int | None = None) -> Budget:
    """In bytes that are counted, so that no margin hides what these small steps differ by."""
    counting = Counting.TENSOR_BYTES
    return Budget(total_bytes=total_bytes, device=CARD, counting=counting, source="given", host_bytes=host_bytes)


def levers_of(candidate: Candidate) -> dict[str, dict[str, Any]]:
    return {lever.name: lever.knobs() for lever in candidate.levers}


def error(step: FollowedStep, footprint: Footprint, levers: dict[str, dict[str, Any]]) -> float:
    """How far a prediction is from the traced plan's peak, beyond a few blocks, as a fraction of it."""
    predicted = predict_traced(footprint, levers)
    assert predicted is not None
    plan = Plan(levers=levers, exactness=Exactness.ROUNDED, batch_rows=footprint.batch_rows)
    real = peak_bytes(step.trace(plan), round_to=CUDA_BLOCK_BYTES)
    return max(0, abs(predicted.peak_bytes - real) - 16 * CUDA_BLOCK_BYTES) / real


def ways_of(footprint: Footprint) -> list[dict[str, dict[str, Any]]]:
    return [way.levers for way in footprint.traced]


@pytest.mark.parametrize("name", STEPS)
def test_every_lever_that_can_be_taken_is_followed_alone_and_beside_the_optimizers_state(name: str) -> None:
    _, footprint = followed(name)
    alone = {"autocast", "offload_saved", *(["layout"] if name == "pictures" else [])}
    singles = {next(iter(levers)) for levers in ways_of(footprint) if len(levers) == 1}
    assert singles == alone | {"optimizer_state"}
    for levers in ways_of(footprint):
        assert "optimizer_state" in levers or levers | {"optimizer_state": {}} in ways_of(footprint)
    assert ("layout" in footprint.refusals) is (name == "perceptron")


@pytest.mark.parametrize("name", STEPS)
def test_on_all_rows_a_way_is_predicted_to_hold_to_the_block_what_its_trace_holds(name: str) -> None:
    step, footprint = followed(name)
    for levers in ways_of(footprint):
        plan = Plan(levers=levers, exactness=Exactness.ROUNDED, batch_rows=footprint.batch_rows)
        real = peak_bytes(step.trace(plan), round_to=CUDA_BLOCK_BYTES)
        predicted = predict_traced(footprint, levers)
        assert predicted is not None and abs(predicted.peak_bytes - real) <= 2 * CUDA_BLOCK_BYTES


@pytest.mark.parametrize("name", STEPS)
def test_with_rows_at_a_time_and_blocks_that_run_again_too(name: str) -> None:
    step, footprint = followed(name)
    candidates = [
        candidate
        for way in footprint.traced
        for candidate in traced_candidates(dataclasses.replace(footprint, traced=(way,)), ROUNDED)
        if candidate.levers and levers_of(candidate) != way.levers
    ][::9]
    assert candidates
    for candidate in candidates:
        assert error(step, footprint, levers_of(candidate)) <= WITHIN


@pytest.mark.parametrize("lever", ["optimizer_state", "offload_saved", "autocast"])
def test_a_planted_effect_of_the_wrong_sign_is_caught_by_the_trace_of_the_plan(lever: str) -> None:
    step, footprint = followed("perceptron")
    plain = footprint.traced[0].tables[0].resident_bytes
    [way] = [way for way in footprint.traced if way.levers.keys() == {lever}]
    levers = way.levers
    assert error(step, footprint, levers) <= WITHIN
    other = footprint.traced[0] if lever != "optimizer_state" else way
    # State that were counted twice instead of not at all, or what the plain step keeps, under the lever's name.
    tables = tuple(
        dataclasses.replace(table, resident_bytes=2 * plain - table.resident_bytes) for table in other.tables
    )
    wrong = dataclasses.replace(way, tables=tables)
    assert error(step, dataclasses.replace(footprint, traced=(footprint.traced[0], wrong)), levers) > WITHIN


def test_a_planted_way_of_other_rows_is_caught_by_the_trace_of_the_plan() -> None:
    step, footprint = followed("perceptron")
    [way] = [way for way in footprint.traced if way.levers.keys() == {"autocast"}]
    stale = dataclasses.replace(way.tables[3], rows=way.tables[0].rows)
    wrong = dataclasses.replace(way, tables=(stale, *way.tables[1:]))
    assert error(step, footprint, way.levers) <= WITHIN
    assert error(step, dataclasses.replace(footprint, traced=(wrong,)), way.levers) > WITHIN


def test_no_lever_is_followed_where_the_budget_holds_the_plain_step() -> None:
    step, footprint = plainly_followed("perceptron")
    assert with_levers_on_card(step, footprint, budget=budget(2**34), options=ROUNDED) is footprint
    reasons = choose_plan(footprint, ROUNDED, budget(2**34))[0].reasons
    assert reasons["offload_saved"] == "not needed: the plain step fits; what it would save was not measured"


def test_rounding_is_followed_and_taken_only_where_it_is_allowed() -> None:
    step, footprint = plainly_followed("perceptron")
    exactly = with_lever_ways(step, footprint, Options(), budget(MIB))
    assert not any("autocast" in levers for levers in ways_of(exactly))
    _, rounded = followed("perceptron")
    # State on the host is as small here, and faster.
    kept = tuple(way for way in rounded.traced if "optimizer_state" not in way.levers)
    rounded = dataclasses.replace(rounded, traced=kept)
    for options, taken in ((Options(), False), (ROUNDED, True)):
        candidates = traced_candidates(rounded, options)
        assert any("autocast" in levers_of(candidate) for candidate in candidates) is taken
    limit = budget(traced_candidates(exactly, Options())[0].peak_bytes * 4 // 5)
    assert choose_plan(exactly, Options(), limit)[0].reasons["autocast"].startswith("not allowed: ")


@pytest.mark.parametrize(
    ("slower", "holds", "is_followed"),
    [(1.0, 1.0, False), (1.2, 1.1, False), (0.9, 1.0, True), (1.0, 0.9, True)],
    ids=["no faster", "slower", "faster", "holds less"],
)
def test_what_was_probed_to_bring_nothing_is_not_followed(slower: float, holds: float, is_followed: bool) -> None:
    step, footprint = plainly_followed("pictures")
    law = PhaseLaw(phase=Phase.BACKWARD, fixed_bytes=1e6, per_chunk_row_bytes=0.0, per_batch_row_bytes=0.0)
    probed = ProbedWay(
        levers={"layout": {}}, plain_laws=(dataclasses.replace(law, fixed_bytes=holds * 1e6),),
        seconds_per_row=0.0, seconds_per_chunk=slower,
    )  # fmt: skip
    measured = dataclasses.replace(
        footprint, plain_laws=(law,), seconds_per_row=0.0, seconds_per_chunk=1.0, probed=(probed,)
    )
    looked = with_lever_ways(step, measured, Options(), budget(MIB))
    assert ({"layout": {}} in ways_of(looked)) is is_followed
    assert ("layout" in looked.refusals) is ("layout" in measured.refusals)


def test_state_that_hardly_counts_is_not_followed_and_the_reason_says_what_it_is() -> None:
    step, footprint = plainly_followed("perceptron")
    looked = with_lever_ways(step, footprint, Options(), budget(2**36))
    assert not any("optimizer_state" in levers for levers in ways_of(looked))
    assert looked.refusals["optimizer_state"].startswith("not needed: the optimizer's state is ")


def test_the_optimizers_state_waits_on_the_host_where_nothing_else_fits_or_it_costs_least() -> None:
    _, footprint = followed("perceptron")
    kept = tuple(way for way in footprint.traced if "optimizer_state" not in way.levers)
    others = smaller_than_faster(traced_candidates(dataclasses.replace(footprint, traced=kept), Options()))
    found = smaller_than_faster(traced_candidates(footprint, Options()))
    taken = [candidate for candidate in found if "optimizer_state" in levers_of(candidate)]
    assert taken
    for candidate in taken:
        fitting = [other for other in others if other.peak_bytes <= candidate.peak_bytes]
        assert all(other.seconds > candidate.seconds for other in fitting)
        plan = choose_plan(footprint, Options(), budget(math.ceil(candidate.peak_bytes / 0.99) + 1))[0]
        assert plan.levers == {"host_rows": {}} | levers_of(candidate) or plan.levers == levers_of(candidate)
        assert re.match(r"taken: saves .*, pins .* on the host \(predicted\)$", plan.reasons["optimizer_state"])
    with_state, without = taken[-1].peak_bytes, others[-1].peak_bytes
    # The optimizer's own turn holds parameters, gradients and state in any plan.
    assert with_state >= footprint.traced[0].optimizer_bytes and with_state <= without


def test_a_host_without_room_gets_no_plan_that_pins_its_memory() -> None:
    _, footprint = followed("perceptron")
    for host_bytes in (0, 10 * MIB, 10**12):
        for candidate in traced_candidates(footprint, Options(), budget(MIB, host_bytes)):
            assert (predict_plan(footprint, levers_of(candidate)).host_bytes or 0) <= host_bytes
    names = {name for c in traced_candidates(footprint, Options(), budget(MIB, 0)) for name in levers_of(c)}
    assert not names & {"optimizer_state", "offload_saved"}


@pytest.mark.parametrize("options", [Options(), ROUNDED], ids=["exact", "rounded"])
@pytest.mark.parametrize("name", STEPS)
def test_a_smaller_budget_is_never_predicted_faster_or_larger(name: str, options: Options) -> None:
    _, footprint = followed(name)
    most = 2 * footprint.peak_allocated_bytes
    last = (0.0, 2**60)
    for share in range(20, 0, -1):
        try:
            plan = choose_plan(footprint, options, budget(most * share // 20))[0]
        except BudgetTooSmall:
            break
        assert plan.predicted_seconds is not None and plan.predicted_peak_bytes is not None
        assert plan.predicted_seconds >= last[0] and plan.predicted_peak_bytes <= last[1]
        last = plan.predicted_seconds, plan.predicted_peak_bytes
        assert set(plan.reasons) >= {"autocast", "layout", "offload_saved", "optimizer_state"}


def test_reasons_say_bytes_and_seconds_of_every_lever_that_was_looked_at() -> None:
    _, footprint = followed("pictures")
    plan = choose_plan(footprint, Options(), budget(traced_candidates(footprint, Options())[0].peak_bytes * 4 // 5))[0]
    for name in {"layout", "offload_saved", "optimizer_state"} - plan.levers.keys():
        assert re.search(r"\d (B|.iB)", plan.reasons[name]) and "a step" in plan.reasons[name]


def test_what_is_chosen_for_a_card_is_followed_whole_before_it_is_believed() -> None:
    step, batch = stepped("pictures")
    _, footprint = plainly_followed("pictures")
    assert footprint.steady_cap_bytes is not None
    total = int(0.8 * footprint.steady_cap_bytes)
    ahead = plan_ahead(step, batch, CARD, budget=total)
    assert ahead.plan.levers
    assert ahead.predicted.steady_cap_bytes is not None and ahead.predicted.steady_cap_bytes <= total
    again = footprint_of(*followed("pictures"), ahead.plan)
    assert again.steady_cap_bytes == ahead.predicted.steady_cap_bytes
    assert {"layout", "offload_saved"} <= {name for levers in ways_of(ahead.footprint) for name in levers}
