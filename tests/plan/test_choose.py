"""The ladder of plans: pure, never over the budget, and honest about why nothing fits."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from samegrad.errors import BudgetTooSmall, CannotSplit
from samegrad.levers import find_levers
from samegrad.plan.choose import choose_plan
from samegrad.plan.explain import explain_plan
from samegrad.plan.floor import floor_bytes
from samegrad.plan.margin import budget_for, usable_bytes
from samegrad.plan.options import Options
from samegrad.records import (
    Budget,
    Category,
    Counting,
    Exactness,
    Footprint,
    HeadLaws,
    KnobOrigin,
    Origin,
    Phase,
    PhaseLaw,
    Plan,
)
from samegrad.units import parse_bytes

MIB = 2**20


def law(phase: Phase, fixed: float, per_chunk_row: float, per_batch_row: float = 0.0) -> PhaseLaw:
    return PhaseLaw(
        phase=phase, fixed_bytes=fixed, per_chunk_row_bytes=per_chunk_row, per_batch_row_bytes=per_batch_row
    )


def footprint(**changes: Any) -> Footprint:
    """A step of 1000 rows: 20 MiB resident, a MiB a row in backward, a tenth of one kept for every row."""
    resident = {
        Category.PARAMETERS: 5 * MIB, Category.GRADIENTS: 5 * MIB, Category.OPTIMIZER_STATE: 10 * MIB,
        Category.BUFFERS: 0,
    }  # fmt: skip
    laws = (law(Phase.FORWARD, 16 * MIB, MIB / 2), law(Phase.BACKWARD, 21 * MIB, MIB, MIB / 10))
    plain = (law(Phase.BACKWARD, 21 * MIB, 1.1 * MIB), law(Phase.OPTIMIZER, 22 * MIB, 0.0))
    given = {
        "device": "cpu", "counting": Counting.TENSOR_BYTES, "origin": Origin.MEASURED, "basis": "five probes",
        "rows": 8, "batch_rows": 1000, "peak_allocated_bytes": 30 * MIB, "resident_bytes": resident, "laws": laws,
        "plain_laws": plain, "seconds_per_row": 1e-4, "seconds_per_chunk": 1e-3,
        "refusals": {"host_rows": "the batch is on the model's device already"},
    }  # fmt: skip
    return Footprint(**(given | changes))


def budget(total_bytes: int, counting: Counting = Counting.TENSOR_BYTES) -> Budget:
    return Budget(total_bytes=total_bytes, device="cpu", counting=counting, source="--budget given")


def rows_of(plan: Plan) -> int:
    rows: int = plan.levers["split_rows"]["rows"] if "split_rows" in plan.levers else plan.batch_rows
    return rows


BYTES = st.floats(0, 1e9)
LAWS = st.lists(
    st.builds(law, st.sampled_from(Phase), st.floats(1, 1e10), BYTES, BYTES), min_size=1, max_size=5
).map(tuple)  # fmt: skip
STEPS = st.builds(
    footprint, laws=LAWS, plain_laws=LAWS, batch_rows=st.integers(2, 5000),
    counting=st.sampled_from(Counting), seconds_per_row=st.floats(0, 1),
)  # fmt: skip
BUDGETS = st.builds(budget, st.integers(1, 2**45), st.sampled_from(Counting))


@settings(deadline=None)
@given(STEPS, BUDGETS)
def test_no_rung_is_ever_predicted_over_the_budget_and_each_is_smaller(step: Footprint, limit: Budget) -> None:
    try:
        ladder = choose_plan(step, Options(), limit)
    except BudgetTooSmall:
        # Nothing fits only when one row does not.
        assert step.predicted_peak_bytes(rows=1) > usable_bytes(limit)
        return
    peaks = []
    for plan in ladder:
        assert plan.predicted_peak_bytes == step.predicted_peak_bytes(rows=rows_of(plan))
        assert plan.predicted_peak_bytes <= limit.total_bytes
        peaks.append(plan.predicted_peak_bytes)
    split = peaks[1:] if not ladder[0].levers else peaks
    assert split == sorted(split, reverse=True)
    assert [rows_of(plan) for plan in ladder] == sorted({rows_of(plan) for plan in ladder}, reverse=True)
    assert rows_of(ladder[-1]) == 1 or len(ladder) == 1


@settings(deadline=None)
@given(STEPS, BUDGETS)
def test_the_same_footprint_gives_the_same_ladder_also_when_read_from_a_file(step: Footprint, limit: Budget) -> None:
    def ladder(of: Footprint) -> Any:
        try:
            return choose_plan(of, Options(), limit)
        except BudgetTooSmall as error:
            return str(error)

    assert ladder(step) == ladder(step) == ladder(Footprint.from_json(step.to_json()))


@settings(deadline=None)
@given(st.integers(30 * MIB, 2**31), st.integers(30 * MIB, 2**31))
def test_a_smaller_budget_never_has_a_larger_predicted_peak(a: int, b: int) -> None:
    step = footprint()
    peaks = []
    for total in sorted((a, b)):
        try:
            peaks.append(choose_plan(step, Options(), budget(total))[0].predicted_peak_bytes or 0)
        except BudgetTooSmall:
            peaks.append(0)
    assert peaks[0] <= peaks[1]


def test_the_first_rung_uses_the_most_rows_that_fit_in_even_chunks() -> None:
    step, limit = footprint(), budget(200 * MIB)
    first = choose_plan(step, Options(), limit)[0]
    usable = usable_bytes(limit)
    most = max(n for n in range(1, 1000) if step.predicted_peak_bytes(rows=n) <= usable)
    chunks = -(-1000 // most)
    assert rows_of(first) == -(-1000 // chunks)
    assert first.exactness is Exactness.SAME_SUM
    assert first.knob_origins == dict.fromkeys(("split_rows.rows", "split_rows.kept_chunks"), KnobOrigin.CHOSEN)


def test_a_step_that_fits_runs_whole_and_bit_for_bit() -> None:
    first = choose_plan(footprint(), Options(), budget(3000 * MIB))[0]
    assert first.levers == {} and first.exactness is Exactness.SAME_BITS
    assert first.reasons["split_rows"] == "not needed: the plain step fits"
    # What cannot be taken is needed as little; where the plain step does not fit, that it cannot is the reason.
    cannot = "the batch is on the model's device already"
    assert first.reasons["host_rows"] == f"not needed: the plain step fits; refused besides: {cannot}"
    assert not any(reason.startswith(("refused", "taken")) for reason in first.reasons.values())
    split = choose_plan(footprint(), Options(), budget(200 * MIB))[0]
    assert split.reasons["host_rows"] == f"refused: {cannot}" and split.reasons["split_rows"].startswith("taken")


def test_every_lever_has_its_reason_and_explain_says_it() -> None:
    step = footprint()
    for total in (200 * MIB, 3000 * MIB):
        plan = choose_plan(step, Options(), budget(total))[0]
        assert plan.reasons.keys() == find_levers().keys()
        text = explain_plan(plan, step)
        assert all(f"{name}: {reason}." in text for name, reason in plan.reasons.items())
        assert "five probes" in text and "--budget given" in text


def test_explain_says_how_it_runs_at_what_peak_and_how_long() -> None:
    step = footprint(forwards_per_step=2, facts={"loss": "two passes, since it couples rows"})
    plan = choose_plan(step, Options(), budget(200 * MIB))[0]
    text = explain_plan(plan, step)
    assert f"{rows_of(plan)} rows at a time" in text and "2 passes" in text
    assert "two passes, since it couples rows" in text and "a step" in text and "smallest plan" in text


def test_explain_names_the_levers_that_leave_the_chunks_as_they_are() -> None:
    step = footprint()
    chosen = choose_plan(step, Options(), budget(200 * MIB))[0]
    split = dataclasses.replace(chosen, levers=chosen.levers | {"layout": {}, "optimizer_state": {}})
    assert "1 pass, with layout and optimizer_state; the same sum" in explain_plan(split, step)
    whole = dataclasses.replace(chosen, levers={"offload_saved": {}, "host_rows": {}}, exactness=Exactness.SAME_BITS)
    assert "It runs whole, with offload_saved: bit for bit the plain step." in explain_plan(whole, step)


# Pins


@pytest.mark.parametrize("rows", [1, 7, 60, (400, 400, 200)], ids=str)
def test_pinned_rows_are_taken_as_they_are(rows: Any) -> None:
    [plan] = choose_plan(footprint(), Options(rows=rows), budget(2000 * MIB))
    assert plan.levers["split_rows"]["rows"] == (rows if isinstance(rows, int) else list(rows))
    assert plan.knob_origins == {
        "split_rows.rows": KnobOrigin.PINNED, "split_rows.kept_chunks": KnobOrigin.CHOSEN,
    }  # fmt: skip
    assert Plan.from_json(plan.to_json()) == plan


def test_all_rows_pinned_is_the_plain_step() -> None:
    [plan] = choose_plan(footprint(), Options(rows=5000), budget(3000 * MIB))
    assert plan.levers == {}


@pytest.mark.parametrize("counting", Counting)
@pytest.mark.parametrize("rows", [300, (300, 300, 400), 1000], ids=str)
def test_pinned_rows_that_do_not_fit_are_refused_by_name_and_the_advice_works(rows: Any, counting: Counting) -> None:
    step = footprint(counting=counting)
    largest = max(rows) if isinstance(rows, tuple) else rows
    with pytest.raises(BudgetTooSmall, match=f"{largest} rows") as caught:
        choose_plan(step, Options(rows=rows), budget(100 * MIB, counting))
    raised = budget(advised(caught.value.do), counting)
    assert choose_plan(step, Options(rows=rows), raised)


def test_pinned_rows_of_a_step_that_cannot_be_split_are_refused_with_the_reason() -> None:
    step = footprint(laws=(), refusals={"split_rows": "norm (BatchNorm1d in training mode) mixes rows"})
    with pytest.raises(CannotSplit, match="BatchNorm1d"):
        choose_plan(step, Options(rows=8), budget(3000 * MIB))


# Below the floor


def advised(text: str) -> int:
    """The budget that an error's advice names."""
    found = re.search(r"raise the budget to ([\d.]+ \w+)", text)
    assert found is not None, text
    return parse_bytes(found[1])


def amounts(text: str) -> list[int]:
    return [parse_bytes(amount) for amount in re.findall(r"[\d.]+ (?:[KMGT]iB|B)\b", text)]


@pytest.mark.parametrize("counting", Counting)
def test_below_the_floor_its_parts_add_up_and_three_ways_down_are_shown(counting: Counting) -> None:
    step = footprint(counting=counting)
    with pytest.raises(BudgetTooSmall) as caught:
        choose_plan(step, Options(), budget(10 * MIB, counting))
    made_of, _, reserve = caught.value.found.partition("; beside that ")
    whole, *parts = amounts(made_of)
    # Only a card's allocator leaves gaps.
    told = "64.0 MiB are kept in reserve (6 % of a budget, at least 64.0 MiB) for gaps"
    assert reserve.startswith(told) is (counting is Counting.CUDA_ALLOCATOR)
    assert abs(sum(parts) - whole) <= 0.01 * whole
    assert abs(whole - floor_bytes(step)) <= 0.01 * whole
    assert all(word in caught.value.found for word in ("parameters", "gradients", "optimizer state", "one row"))
    # A budget that is enough, and three ways.
    assert len(caught.value.do.split("; ")) == 4


@settings(deadline=None)
@given(STEPS)
def test_the_budget_that_the_error_advises_is_enough(step: Footprint) -> None:
    limit = budget(1, step.counting)
    with pytest.raises(BudgetTooSmall) as caught:
        choose_plan(step, Options(), limit)
    assert choose_plan(step, Options(), budget(advised(caught.value.do), step.counting))


@given(st.integers(1, 2**45), st.sampled_from(Counting))
def test_a_budget_for_some_bytes_lets_them_be_used(needed: int, counting: Counting) -> None:
    assert usable_bytes(budget(budget_for(needed, counting), counting)) >= needed


def test_a_step_that_cannot_be_split_and_does_not_fit_names_the_reason_and_its_size() -> None:
    step = footprint(laws=(), refusals={"split_rows": "norm (BatchNorm1d in training mode) mixes rows"})
    with pytest.raises(CannotSplit, match="BatchNorm1d") as caught:
        choose_plan(step, Options(), budget(200 * MIB))
    assert advised(caught.value.do) >= step.predicted_peak_bytes(rows=1000)
    assert choose_plan(step, Options(), budget(advised(caught.value.do)))[0].levers == {}


def test_where_only_the_bits_may_be_kept_a_split_is_not_taken_and_the_error_says_so() -> None:
    for rows in (None, 30):
        with pytest.raises(BudgetTooSmall, match="allow SAME_SUM"):
            choose_plan(footprint(), Options(rows=rows, allow=Exactness.SAME_BITS), budget(200 * MIB))


HEAD = HeadLaws(
    path="decoder", classes=50257, positions_per_row=10.0,
    laws=(law(Phase.LOSS, 20 * MIB, MIB / 20, MIB / 20), law(Phase.OPTIMIZER, 22 * MIB, 0.0)),
)  # fmt: skip


def test_a_loss_in_chunks_comes_before_a_split_and_every_rung_is_smaller() -> None:
    ladder = choose_plan(footprint(head=HEAD), Options(), budget(300 * MIB))
    assert ladder[0].levers == {"chunk_loss": {"head": "decoder", "rows": 4096}}
    assert ladder[0].exactness is Exactness.SAME_SUM and ladder[0].reasons["chunk_loss"].startswith("taken: saves")
    peaks = [plan.predicted_peak_bytes for plan in ladder]
    assert peaks == sorted(peaks, reverse=True) and len(set(peaks)) == len(peaks) and max(peaks) <= 300 * MIB
    said = explain_plan(ladder[0], footprint(head=HEAD))
    assert "It runs all rows at once, the loss of decoder 4096 positions at a time" in said


def test_a_split_follows_where_it_needs_less_than_the_smallest_chunk_of_the_loss() -> None:
    head = dataclasses.replace(HEAD, laws=(law(Phase.LOSS, 20 * MIB, MIB / 20, MIB / 5),))
    ladder = choose_plan(footprint(head=head), Options(), budget(300 * MIB))
    levers = ["split_rows" if "split_rows" in plan.levers else "chunk_loss" for plan in ladder]
    assert levers == sorted(levers) and set(levers) == {"split_rows", "chunk_loss"}
    peaks = [plan.predicted_peak_bytes for plan in ladder]
    assert peaks == sorted(peaks, reverse=True) and len(set(peaks)) == len(peaks)


def test_a_loss_in_chunks_is_left_alone_where_it_is_refused_or_not_needed_or_not_allowed() -> None:
    with_head = footprint(head=HEAD)
    assert choose_plan(with_head, Options(), budget(2000 * MIB))[0].levers == {}
    refused = footprint(head=HEAD, refusals={"chunk_loss": "decoder: its logits meet logsumexp"})
    assert all("chunk_loss" not in plan.levers for plan in choose_plan(refused, Options(), budget(300 * MIB)))
    with pytest.raises(BudgetTooSmall):
        choose_plan(with_head, Options(allow=Exactness.SAME_BITS), budget(300 * MIB))


def test_where_nothing_can_be_split_the_smallest_chunk_of_the_loss_is_the_floor() -> None:
    step = footprint(laws=(), refusals={"split_rows": "norm mixes rows"}, head=HEAD)
    assert floor_bytes(step) == HEAD.laws[0].peak_bytes(rows=64, batch_rows=1000)
    [*_, last] = choose_plan(step, Options(), budget(80 * MIB))
    assert last.levers["chunk_loss"]["rows"] == 64
    both = explain_plan(
        dataclasses.replace(last, levers={"split_rows": {"rows": 100}} | last.levers), footprint(head=HEAD)
    )
    assert "10 chunks, 1 pass, the loss of decoder 64 positions at a time" in both


def test_a_plan_says_nothing_of_a_device_and_needs_none() -> None:
    # A footprint of a card that is not here is planned like any other.
    step = dataclasses.replace(footprint(), device="NVIDIA H200", counting=Counting.CUDA_ALLOCATOR)
    assert choose_plan(step, Options(), budget(300 * MIB, Counting.CUDA_ALLOCATOR))
