"""Predictions by traced effects: taken off where they hold, before a split or after it, and nothing without one."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from samegrad.errors import BadInput
from samegrad.levers.autocast import Autocast
from samegrad.levers.layout import Layout
from samegrad.levers.offload_saved import OffloadSaved
from samegrad.levers.optimizer_state import OptimizerState
from samegrad.levers.split_rows import SplitRows
from samegrad.plan.reasons import Reasons
from samegrad.records import Effect, Exactness, Footprint, Origin, Phase, Plan, Variant

from ..plan.test_choose import MIB, footprint, law

LEVERS = [Autocast, Layout, OffloadSaved, OptimizerState]
RUNNING = (Phase.FORWARD, Phase.LOSS, Phase.BACKWARD, Phase.HANDOFF)


def effect_of(lever: Any, **changes: Any) -> Effect:
    given = {"lever": lever.name, "knobs": lever().knobs(), "saved_row_bytes": MIB / 4, "added_seconds_per_row": 1e-5}
    return Effect(**(given | changes))


@pytest.mark.parametrize("lever", LEVERS)
def test_a_lever_that_was_not_traced_is_not_offered_and_not_predicted(lever: Any) -> None:
    step = footprint(refusals={})
    assert list(lever.candidates(step, 10**12)) == []
    with pytest.raises(BadInput, match=f"{lever.name}.*\n.*not traced"):
        lever().predict(step)


@pytest.mark.parametrize("lever", LEVERS)
def test_every_traced_setting_is_offered(lever: Any) -> None:
    effects = (effect_of(lever), effect_of(lever, saved_fixed_bytes=1.0))
    step = footprint(refusals={}, effects=(*effects, Effect(lever="another", knobs={"unknown": 1})))
    assert list(lever.candidates(step, 1)) == [lever(), lever()]


def test_the_plain_step_holds_less_where_the_effect_holds() -> None:
    step = footprint(refusals={}, effects=(effect_of(Autocast, phases=(Phase.BACKWARD,), saved_fixed_bytes=MIB),))
    taken = Autocast().predict(step)
    rows = step.batch_rows
    plain = {law.phase: law.peak_bytes(rows=rows, batch_rows=rows) for law in step.plain_laws}
    assert taken.origin is Origin.PREDICTED and taken.rows == rows
    assert taken.by_phase[Phase.OPTIMIZER] == plain[Phase.OPTIMIZER]
    assert taken.by_phase[Phase.BACKWARD] == plain[Phase.BACKWARD] - MIB - rows * MIB // 4
    assert taken.peak_allocated_bytes == max(taken.by_phase.values())
    assert taken.predicted_peak_bytes(rows=rows) == pytest.approx(taken.peak_allocated_bytes, abs=2)
    assert taken.seconds == pytest.approx(step.predicted_seconds(rows=rows) + 1e-5 * rows)
    assert step == footprint(refusals={}, effects=step.effects)


def test_state_on_the_host_does_not_lower_the_optimizers_own_peak() -> None:
    step = footprint(
        refusals={}, plain_laws=(law(Phase.BACKWARD, 21 * MIB, 0.0), law(Phase.OPTIMIZER, 30 * MIB, 0.0)),
        effects=(effect_of(OptimizerState, phases=RUNNING, saved_fixed_bytes=10 * MIB, saved_row_bytes=0.0),),
    )  # fmt: skip
    taken = OptimizerState().predict(step)
    assert taken.by_phase[Phase.BACKWARD] == 11 * MIB
    assert taken.peak_allocated_bytes == step.predicted_peak_bytes(rows=step.batch_rows) == 30 * MIB


@given(
    st.integers(1, 999), st.floats(0, MIB / 2), st.floats(0, 10 * MIB), st.sets(st.sampled_from(Phase), min_size=1),
    st.floats(-1e-5, 1e-3), st.floats(-1e-5, 1e-2),
)  # fmt: skip
def test_before_a_split_or_after_it_is_the_same(
    rows: int, row: float, fixed: float, phases: set[Phase], per_row: float, per_chunk: float
) -> None:
    effect = effect_of(
        OffloadSaved, saved_row_bytes=row, saved_fixed_bytes=fixed, phases=tuple(phases),
        added_seconds_per_row=per_row, added_seconds_per_chunk=per_chunk,
    )  # fmt: skip
    step = footprint(refusals={}, effects=(effect,))
    before = SplitRows(rows).predict(OffloadSaved().predict(step))
    after = OffloadSaved().predict(SplitRows(rows).predict(step))
    assert before.rows == after.rows == rows
    assert before.peak_allocated_bytes == pytest.approx(after.peak_allocated_bytes, abs=2)
    assert before.seconds == pytest.approx(after.seconds)
    for phase, peak in after.by_phase.items():
        assert before.by_phase[phase] == pytest.approx(peak, abs=2)


def test_ways_to_run_parts_in_chunks_hold_less_as_well() -> None:
    variant = Variant(lever="segments", knobs={"paths": {"0": 1}}, laws=(law(Phase.BACKWARD, 25 * MIB, MIB / 2),),
                      seconds_per_row=1e-4, seconds_per_chunk=1e-3)  # fmt: skip
    step = footprint(refusals={}, variants=(variant,), effects=(effect_of(Autocast),))
    [taken] = Autocast().predict(step).variants
    assert taken.laws[0].per_chunk_row_bytes == MIB / 4
    assert taken.seconds_per_row == pytest.approx(1.1e-4)


def test_host_memory_is_in_powers_of_two_for_each_buffer() -> None:
    effect = effect_of(OffloadSaved, host_buffer_bytes=(1000, 4096), host_buffer_row_bytes=(100.0, 0.0))
    assert effect.host_bytes(rows=10) == 1024 + 4096 + 1024
    assert effect.host_bytes(rows=11) == 1024 + 4096 + 2048
    step = footprint(refusals={}, effects=(effect, effect_of(Layout, host_buffer_bytes=(3,))))
    assert Layout().predict(OffloadSaved().predict(SplitRows(10).predict(step))).host_bytes == 6144 + 4


@given(st.lists(st.integers(1, 10**6), max_size=5), st.integers(1, 100))
def test_host_memory_is_never_less_than_its_buffers_and_less_than_twice_them(sizes: list[int], rows: int) -> None:
    effect = effect_of(OffloadSaved, host_buffer_bytes=tuple(sizes))
    assert sum(sizes) <= effect.host_bytes(rows=rows) < 2 * sum(sizes) + (not sizes)


def test_a_footprint_with_effects_comes_back_from_a_file() -> None:
    step = dataclasses.replace(
        footprint(effects=(effect_of(OffloadSaved, host_buffer_row_bytes=(1.5,)), effect_of(Autocast))), host_bytes=7
    )
    assert Footprint.from_json(step.to_json()) == step


@pytest.mark.parametrize("lever", LEVERS)
def test_not_needed_says_when_nothing_was_measured_and_only_then(lever: Any) -> None:
    whole = Plan(levers={}, exactness=Exactness.SAME_BITS, batch_rows=1000)
    for effects, said in (((), True), ((effect_of(lever, phases=(Phase.BACKWARD,)),), False)):
        step = footprint(refusals={}, effects=effects)
        reasons = Reasons(step, Exactness.ROUNDED, {}).of(whole)
        assert reasons[lever.name].startswith("not needed: the plain step fits")
        assert reasons[lever.name].endswith("what it would save was not measured") is said
        assert not reasons["split_rows"].endswith("not measured")
