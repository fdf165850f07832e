"""Which programs of a settled plan are tried and taken, on a card that is played: bytes and seconds by a rule."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from samegrad.declared import declare
from samegrad.errors import CannotSplit
from samegrad.exact.captured_chunk import ASKED
from samegrad.levers import find_levers
from samegrad.measure.rungs import Rung
from samegrad.plan.options import Options
from samegrad.records import Budget, Counting, Exactness, Plan
from samegrad.settle import aliases_for, candidates, measure, one_chunk_way
from samegrad.settle.quicker import quicker_plan

from ..contract.plain import cross_entropy, labelled, spread

ROWS = 32
BLOCKS = 3
MIB = 2**20
Rule = Callable[[Plan], "Rung | None"]


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)) for _ in range(BLOCKS))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def rows_of(plan: Plan) -> int:
    return plan.levers.get("split_rows", {"rows": ROWS})["rows"]


def a_card(plan: Plan) -> Rung:
    """Launches take 10 ms a chunk, a tenth of it where they are replayed; compiled kernels halve bytes and time."""
    rows, compiled = rows_of(plan), "compile" in plan.levers
    again = len(plan.levers.get("recompute", {"blocks": []})["blocks"]) / BLOCKS
    launches = (1.0 if "graphs" in plan.levers else 10.0) * -(-ROWS // rows) * (0.5 if compiled else 1.0)
    work = 20.0 * (0.5 if compiled else 1.0) * (1 + 0.3 * again)
    held = rows * (4.0 if compiled else 8.0) * (1 - 0.75 * again)
    static = 2.0 if "graphs" in plan.levers else 0.0
    return Rung(int((10 + held + static) * MIB), (launches + work) / 1e3)


def settled_by(
    budget_mib: float, monkeypatch: pytest.MonkeyPatch, *, rule: Rule = a_card, loss: Any = cross_entropy,
    settled_rows: int = 4, beside: dict[str, Any] | None = None, make: type[Blocks] = Blocks, **options: Any,
) -> tuple[Plan, list[Plan]]:  # fmt: skip
    """The plan that is taken, and all that were measured. ``beside``: levers that were settled with the rows."""
    torch.manual_seed(0)
    step = declare(make(), loss)
    batch = labelled(ROWS, torch.float32)
    aliases = aliases_for(step)
    measurement = measure(step, batch, aliases)
    # Of the ten that a card's fixed part is, so that lines from what stands are too steep, as they are.
    standing = dict.fromkeys(measurement.footprint.resident_bytes, 0)
    standing[next(iter(standing))] = 8 * MIB
    refusals = {name: why for name, why in measurement.footprint.refusals.items() if "CUDA" not in why}
    if make is Blocks:
        refusals["convolution_algorithms"] = "the model has no convolution layer"
    footprint = dataclasses.replace(measurement.footprint, resident_bytes=standing, refusals=refusals)
    budget = Budget(
        total_bytes=int(budget_mib * MIB), device="played", counting=Counting.CUDA_ALLOCATOR, source="played"
    )
    tried: list[Plan] = []

    def played(
        declared: Any, aliases: Any, measurement: Any, batch: Any, plan: Plan, counting: Any, most: int, programs: Any
    ) -> Any:
        tried.append(plan)
        rung = rule(plan)
        return rung if rung is not None and rung.peak_bytes <= most else None

    monkeypatch.setattr(candidates, "measured", played)
    levers = {"split_rows": {"rows": settled_rows, "kept_chunks": 0}} | (beside or {})
    plan = Plan(levers=levers, exactness=Exactness.SAME_SUM, batch_rows=ROWS, budget=budget)
    plan = dataclasses.replace(plan, predicted_seconds=a_card(plan).seconds)
    measurement = dataclasses.replace(measurement, footprint=footprint)
    given = step, aliases, measurement, batch
    return quicker_plan(*given, plan, budget=budget, options=Options(**options)), tried


def test_without_a_number_of_steps_chunks_are_captured_and_compiling_is_not_tried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan, tried = settled_by(100, monkeypatch)
    assert list(plan.levers) == ["split_rows", "graphs"] and len(tried) == 1
    assert plan.reasons["graphs"].startswith("taken: measured 28 ms")
    assert "expected_steps=" in plan.reasons["compile"]
    assert plan.predicted_seconds == a_card(plan).seconds


def test_batches_of_many_shapes_are_neither_captured_nor_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, tried = settled_by(100, monkeypatch, expected_steps=10**6, one_shape=False)
    assert not tried and list(plan.levers) == ["split_rows"]
    assert "several shapes" in plan.reasons["compile"] and plan.reasons["graphs"] == plan.reasons["compile"]


def test_many_steps_compile_take_more_rows_where_they_fit_and_the_fastest_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, tried = settled_by(100, monkeypatch, expected_steps=10**6)
    assert "compile" in plan.levers and "graphs" in plan.levers and rows_of(plan) > 4
    assert plan.predicted_seconds == min(a_card(one).seconds for one in tried if a_card(one).peak_bytes <= 98 * MIB)
    assert plan.exactness is Exactness.SAME_SUM
    assert {name.partition(".")[0] for name in plan.knob_origins} <= set(plan.levers)
    assert list(plan.levers) == sorted(plan.levers, key=lambda name: find_levers()[name].slot)


def test_every_plan_that_is_taken_fits_and_more_budget_is_never_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = [settled_by(b, monkeypatch, expected_steps=10**6)[0] for b in (50, 75, 100, 150, 300)]
    seconds = [plan.predicted_seconds or 0.0 for plan in taken]
    assert seconds == sorted(seconds, reverse=True)
    for budget, plan in zip((50, 75, 100, 150, 300), taken):
        assert a_card(plan).peak_bytes <= budget * MIB


def slow_replays(plan: Plan) -> Rung:
    rung, chunks = a_card(plan), -(-ROWS // rows_of(plan))
    return dataclasses.replace(rung, seconds=rung.seconds + 1e-3 * chunks * ("graphs" in plan.levers))


def test_blocks_run_again_where_that_takes_more_rows_and_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, tried = settled_by(36, monkeypatch, rule=slow_replays, expected_steps=10**6)
    assert "recompute" in plan.levers and rows_of(plan) > 4
    first = next(one for one in tried if "compile" in one.levers)
    assert first.levers["recompute"]["blocks"] == ["layers.0", "layers.1", "layers.2"]


def fastest_there_is(rule: Callable[[Plan], Rung], budget_mib: float, *programs: str) -> float:
    """Seconds of the best plan in even chunks under ``programs``, of all rows and numbers of blocks that run again."""
    found = []
    for rows in (n for n in range(1, ROWS + 1) if ROWS % n == 0):
        for again in range(BLOCKS + 1):
            levers: dict[str, Any] = {"split_rows": {"rows": rows}, **{name: {} for name in programs}}
            levers |= {"recompute": {"blocks": [""] * again}} if again else {}
            rung = rule(Plan(levers=levers, exactness=Exactness.SAME_SUM, batch_rows=ROWS))
            if rung.peak_bytes <= 0.98 * budget_mib * MIB:
                found.append(rung.seconds)
    return min(found)


def a_card_of_its_own(plan: Plan) -> Rung:
    """No straight lines: small chunks are slower a row, and large ones hold more a row."""
    rung, rows = slow_replays(plan), rows_of(plan)
    return Rung(int(rung.peak_bytes * (1 + 0.005 * rows)), rung.seconds * (1 + 1 / (2 + rows)))


@pytest.mark.parametrize("rule", [slow_replays, a_card_of_its_own])
def test_rows_and_blocks_between_the_ways_come_near_to_the_best_there_is(
    rule: Rule, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every budget, after a handful of compilations."""
    over = []
    for budget in range(28, 160, 6):
        plan, tried = settled_by(budget, monkeypatch, rule=rule, expected_steps=10**6)
        assert plan.predicted_peak_bytes is not None and plan.predicted_peak_bytes <= 0.98 * budget * MIB
        compiled = [one.levers for one in tried if "compile" in one.levers]
        assert len({repr({**levers, "graphs": {}}) for levers in compiled}) <= 8
        assert plan.predicted_seconds is not None
        over.append(plan.predicted_seconds / fastest_there_is(rule, budget, "compile", "graphs"))
    assert max(over) < 1.15 and sum(over) / len(over) < 1.03, over


def test_blocks_that_are_kept_are_the_last_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """What they hold is gone when the first of the others runs again."""
    again = []
    for budget in (36, 45, 58):
        _, tried = settled_by(budget, monkeypatch, rule=slow_replays, expected_steps=10**6)
        again += [one.levers["recompute"]["blocks"] for one in tried if "recompute" in one.levers]
    assert {len(blocks) for blocks in again} >= {2, 3}
    assert all(blocks == ["layers.0", "layers.1", "layers.2"][: len(blocks)] for blocks in again)


def test_compiling_that_few_steps_do_not_pay_back_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    a_slow_compiler(monkeypatch)
    plan, tried = settled_by(100, monkeypatch, expected_steps=500)
    assert list(plan.levers) == ["split_rows", "graphs"]
    assert [one for one in tried if "compile" in one.levers]
    assert plan.reasons["compile"].startswith("looked for during ") and "14 s" in plan.reasons["compile"]


def a_slow_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 10**6, 30))
    monkeypatch.setattr(candidates.time, "perf_counter", lambda: next(clock))


def test_compiling_is_not_tried_for_steps_that_take_less_in_all(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, tried = settled_by(100, monkeypatch, expected_steps=50)
    assert list(plan.levers) == ["split_rows", "graphs"]
    assert not [one for one in tried if "compile" in one.levers]
    assert plan.reasons["compile"].startswith("not tried: all steps together take 1.4 s")


def test_the_longer_all_steps_take_the_longer_a_faster_one_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled, seconds = [], []
    for steps in (10**3, 10**4, 10**5, 10**6):
        a_slow_compiler(monkeypatch)
        plan, tried = settled_by(36, monkeypatch, rule=slow_replays, expected_steps=steps)
        compiled.append(sum("compile" in one.levers for one in tried))
        seconds.append(plan.predicted_seconds)
    assert compiled[0] == 1 and compiled == sorted(compiled) and compiled[-1] > compiled[1], compiled
    assert seconds == sorted(seconds, reverse=True)


def test_what_keeps_all_rows_at_once_is_looked_for_before_blocks_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's step keeps twice as much as the compiled one, so that it fits with fewer rows."""
    predicted = [rows for rows in (4, 8, 16, 32) if 10 + 8 * rows <= 160]
    monkeypatch.setattr(one_chunk_way.Way, "first_rows", lambda way, settled, search: max(predicted))
    _, tried = settled_by(160, monkeypatch, expected_steps=10**6)
    compiled = [one for one in tried if "compile" in one.levers]
    assert list(dict.fromkeys(map(rows_of, compiled))) == [16, 32]
    assert not any("recompute" in one.levers for one in compiled)


def test_what_is_slower_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def slower(plan: Plan) -> Rung:
        rung = a_card(plan)
        return dataclasses.replace(rung, seconds=rung.seconds * (10 if "graphs" in plan.levers else 1))

    plan, _ = settled_by(100, monkeypatch, rule=slower)
    assert list(plan.levers) == ["split_rows"]
    assert plan.reasons["graphs"] == "not needed: measured, and no faster within the budget"


def test_a_refusal_is_the_reason_and_the_settled_plan_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    def refusing(plan: Plan) -> Rung:
        raise CannotSplit(asked="capture", found="the step waits for the device at model.py:3", do="take it out")

    plan, tried = settled_by(100, monkeypatch, rule=refusing, expected_steps=10**6)
    assert list(plan.levers) == ["split_rows"] and len(tried) == 2
    assert plan.reasons["graphs"] == plan.reasons["compile"] == "refused: the step waits for the device at model.py:3"


def test_chunks_of_two_passes_are_refused_before_anything_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, tried = settled_by(100, monkeypatch, rule=lambda plan: None, loss=spread, expected_steps=10**6)
    assert all("split_rows" not in one.levers for one in tried) and list(plan.levers) == ["split_rows"]
    assert "two passes" in plan.reasons["graphs"] and "two passes" in plan.reasons["compile"]


@pytest.mark.parametrize(("budget_mib", "kept"), [(100, 0), (170, 1), (240, 1), (300, 3)])
def test_two_passes_are_left_for_one_that_is_captured_with_as_many_blocks_again_as_must(
    budget_mib: float, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, tried = settled_by(budget_mib, monkeypatch, loss=spread)
    assert [name for name in plan.levers if name != "expandable_segments"] == ["recompute", "graphs"][kept == BLOCKS :]
    blocks = plan.levers.get("recompute", {"blocks": []})["blocks"]
    assert blocks == ["layers.0", "layers.1", "layers.2"][: BLOCKS - kept]
    assert tried[0].levers["recompute"]["blocks"] == ["layers.0", "layers.1", "layers.2"]
    assert plan.exactness is Exactness.SAME_BITS and plan.predicted_seconds == a_card(plan).seconds
    assert plan.reasons["graphs"].startswith("taken: measured")
    chosen = [name for name in plan.levers if name != "expandable_segments"]
    assert plan.reasons["split_rows"] == f"not needed: measured, and faster with {' and '.join(chosen)} instead"
    if "expandable_segments" in plan.levers:
        assert plan.reasons["expandable_segments"].startswith("taken: without it memory ran out")


def test_what_is_slower_with_blocks_again_is_measured_once_and_left(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow_again(plan: Plan) -> Rung:
        rung = a_card(plan)
        return dataclasses.replace(rung, seconds=rung.seconds * (10 if "recompute" in plan.levers else 1))

    plan, tried = settled_by(100, monkeypatch, loss=spread, rule=slow_again)
    assert list(plan.levers) == ["split_rows"] and len(tried) == 1


def test_a_pool_that_does_not_fit_makes_room_by_blocks_that_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def large_pools(plan: Plan) -> Rung:
        rung, pool = a_card(plan), "graphs" in plan.levers and "recompute" not in plan.levers
        return dataclasses.replace(rung, peak_bytes=rung.peak_bytes + 200 * MIB * pool)

    plan, tried = settled_by(100, monkeypatch, rule=large_pools)
    assert "graphs" in tried[0].levers and "split_rows" in tried[0].levers
    assert {"recompute", "graphs"} <= plan.levers.keys() and "split_rows" not in plan.levers


def test_where_its_own_pool_does_not_fit_fewer_rows_are_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    def pools_by_rows(plan: Plan) -> Rung:
        rung, rows = a_card(plan), rows_of(plan)
        # Blocks that run again cost much, so that rows alone are the way.
        slow = 0.02 * ("recompute" in plan.levers)
        pool = 16.0 * rows * ("graphs" in plan.levers)
        return dataclasses.replace(rung, peak_bytes=int(rung.peak_bytes + pool * MIB), seconds=rung.seconds + slow)

    plan, tried = settled_by(100, monkeypatch, rule=pools_by_rows)
    assert tried[0].levers.keys() == {"split_rows", "graphs"} and rows_of(tried[0]) == 4
    assert "graphs" in plan.levers and "recompute" not in plan.levers and rows_of(plan) < 4
    assert pools_by_rows(plan).peak_bytes <= 98 * MIB
    assert plan.predicted_seconds == pools_by_rows(plan).seconds


@pytest.mark.parametrize("rule", [a_card, a_card_of_its_own])
def test_captured_rows_and_blocks_come_near_to_the_best_there_is(rule: Rule, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where what was settled runs every block again, and replays need no large chunks."""
    settled = {"recompute": {"blocks": [f"layers.{number}" for number in range(BLOCKS)]}}
    over = []
    for budget in range(30, 160, 10):
        plan, tried = settled_by(budget, monkeypatch, rule=rule, beside=settled)
        assert plan.predicted_peak_bytes is not None and plan.predicted_peak_bytes <= 0.98 * budget * MIB
        assert "graphs" in plan.levers and all("compile" not in one.levers for one in tried)
        assert plan.predicted_seconds is not None
        over.append(plan.predicted_seconds / fastest_there_is(rule, budget, "graphs"))
    assert max(over) < 1.35 and sum(over) / len(over) < 1.05, over


def test_where_replays_win_nothing_few_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    def device_bound(plan: Plan) -> Rung:
        again = "recompute" in plan.levers
        pool = 200 * MIB if "graphs" in plan.levers and not again else 0
        return Rung(a_card(plan).peak_bytes + pool, 0.8 if again else 0.5)

    plan, tried = settled_by(100, monkeypatch, rule=device_bound)
    assert list(plan.levers) == ["split_rows"] and len(tried) <= 4


@pytest.mark.parametrize(("share", "replayed", "taken"), [
    (0.95, 0.99, True), (0.95, 1.01, False), (0.5, 0.99, False), (None, 0.99, False),
])  # fmt: skip
def test_what_python_could_just_launch_in_time_is_replayed_where_that_is_no_slower(
    share: float | None, replayed: float, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def in_time(plan: Plan) -> Rung:
        captured = "graphs" in plan.levers
        eager = a_card(dataclasses.replace(plan, levers={k: v for k, v in plan.levers.items() if k != "graphs"}))
        return dataclasses.replace(
            eager, seconds=eager.seconds * (replayed if captured else 1.0), launching_share=0.01 if captured else share
        )

    plan, tried = settled_by(100, monkeypatch, rule=in_time)
    assert ("graphs" in plan.levers) is taken
    assert plan.reasons["graphs"].startswith("taken: measured" if taken else "not needed: measured, and no faster")
    # What was settled is measured once more where that decides.
    assert sum("graphs" not in one.levers for one in tried) == (replayed <= 1)


def test_nothing_else_is_captured_where_what_was_settled_fits_and_runs_nothing_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, tried = settled_by(100, monkeypatch)
    assert len(tried) == 1


def test_rows_that_somebody_pinned_are_not_run_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, tried = settled_by(100, monkeypatch, loss=spread, rows=4)
    assert list(plan.levers) == ["split_rows"] and not tried


def test_only_what_is_allowed_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, tried = settled_by(100, monkeypatch, expected_steps=10**6, allow=Exactness.SAME_BITS)
    assert all("compile" not in one.levers for one in tried)
    assert plan.reasons["compile"].startswith("not allowed")


def test_what_does_not_fit_is_said_to_be_that(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, tried = settled_by(20, monkeypatch, rule=lambda plan: None, settled_rows=1, expected_steps=10**6)
    assert list(plan.levers) == ["split_rows"] and tried
    assert plan.reasons["graphs"] == plan.reasons["compile"] == "refused: measured, and the budget holds none of it"


def with_a_head(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidates.Search, "head", lambda search: {"chunk_loss": {"head": "head", "rows": 4096}})


@pytest.mark.parametrize(("allow", "factor", "taken"), [
    (Exactness.SAME_SUM, 0.7, True), (Exactness.SAME_SUM, 1.0, False), (Exactness.SAME_BITS, 0.7, False),
])  # fmt: skip
def test_the_loss_of_a_large_head_runs_in_chunks_where_that_is_faster(
    allow: Exactness, factor: float, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def swept(plan: Plan) -> Rung:
        rung = a_card(plan)
        return dataclasses.replace(rung, seconds=rung.seconds * (factor if "chunk_loss" in plan.levers else 1.0))

    with_a_head(monkeypatch)
    plan, tried = settled_by(100, monkeypatch, rule=swept, allow=allow)
    assert ("chunk_loss" in plan.levers) is taken
    assert any("chunk_loss" in one.levers for one in tried) is (allow is Exactness.SAME_SUM)
    if taken:
        # And what is captured is captured with it.
        assert plan.reasons["chunk_loss"].startswith("taken: measured") and "graphs" in plan.levers
    elif allow is Exactness.SAME_SUM:
        assert plan.reasons["chunk_loss"] == "not needed: measured, and no faster within the budget"


def test_what_launches_hide_of_a_heads_loss_in_chunks_a_replay_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    def hidden(plan: Plan) -> Rung:
        """Logits are most of what the device does, and of what a capture holds; launches take longer than all of it."""
        rung, captured, in_chunks = a_card(plan), "graphs" in plan.levers, "chunk_loss" in plan.levers
        if not captured:
            return rung
        held = 0 if in_chunks else 200 * MIB
        return Rung(rung.peak_bytes + held, rung.seconds - (0.005 if in_chunks else 0.0))

    with_a_head(monkeypatch)
    plan, tried = settled_by(100, monkeypatch, rule=hidden)
    assert {"chunk_loss", "graphs"} <= plan.levers.keys() and "recompute" not in plan.levers
    assert plan.reasons["chunk_loss"].startswith("taken: measured") and len(tried) <= 4


def test_a_large_heads_loss_runs_in_chunks_beside_compiled_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    with_a_head(monkeypatch)
    plan, tried = settled_by(100, monkeypatch, expected_steps=10**6)
    assert plan.levers["chunk_loss"] == {"head": "head", "rows": 4096}
    assert all("chunk_loss" in one.levers for one in tried if "compile" in one.levers)


def test_a_model_that_works_on_its_logits_is_compiled_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def rule(plan: Plan) -> Rung:
        if "chunk_loss" in plan.levers:
            raise CannotSplit(asked="compile", found="the model works on its logits", do="take one of the two")
        return a_card(plan)

    with_a_head(monkeypatch)
    plan, _ = settled_by(100, monkeypatch, rule=rule, expected_steps=10**6)
    assert "compile" in plan.levers and "chunk_loss" not in plan.levers


def test_compiled_chunks_are_captured_at_once_and_run_as_they_are_where_a_pool_does_not_fit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def large_pools(plan: Plan) -> Rung:
        rung = a_card(plan)
        pool = pool_mib * MIB if "graphs" in plan.levers else 0
        return dataclasses.replace(rung, peak_bytes=rung.peak_bytes + pool)

    pool_mib = 10
    plan, tried = settled_by(100, monkeypatch, rule=large_pools, expected_steps=10**6)
    assert {"graphs", "compile"} <= plan.levers.keys()
    assert all("graphs" in one.levers for one in tried if "compile" in one.levers)
    pool_mib = 100
    plan, _ = settled_by(100, monkeypatch, rule=large_pools, expected_steps=10**6)
    assert "graphs" not in plan.levers and "compile" in plan.levers


def test_where_nothing_can_be_captured_chunks_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The refusal is the capture's, also of a plan that compiles."""

    def refusing(plan: Plan) -> Rung:
        if "graphs" in plan.levers and "compile" in plan.levers:
            raise CannotSplit(asked=ASKED, found="the step waits for the device at model.py:3", do="take it out")
        return a_card(plan)

    plan, tried = settled_by(100, monkeypatch, rule=refusing, expected_steps=10**6)
    assert "compile" in plan.levers and plan.reasons["graphs"].startswith("refused: the step waits")
    assert sum("graphs" in one.levers and "compile" in one.levers for one in tried) == 1


class Convolving(Blocks):
    """Blocks, and a convolution beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(1, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.convolution(x.unsqueeze(1)).squeeze(1))


def with_tried_algorithms(times: float, more_mib: int = 0) -> Rule:
    def rule(plan: Plan) -> Rung:
        rung, tried = a_card(plan), "convolution_algorithms" in plan.levers
        more = more_mib * MIB if tried else 0
        return dataclasses.replace(
            rung, seconds=rung.seconds * (times if tried else 1), peak_bytes=rung.peak_bytes + more
        )

    return rule


class Pictures(Blocks):
    """Blocks, and a convolution of pictures beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(1, 1, (1, 3), padding=(0, 1))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.convolution(x[:, None, None, :]).flatten(1))


def with_a_layout(times: Callable[[Plan], float]) -> Rule:
    def rule(plan: Plan) -> Rung:
        rung = a_card(plan)
        return dataclasses.replace(rung, seconds=rung.seconds * (times(plan) if "layout" in plan.levers else 1))

    return rule


def test_what_launches_hide_of_another_layout_is_seen_in_replays(monkeypatch: pytest.MonkeyPatch) -> None:
    rule = with_a_layout(lambda plan: 0.7 if "graphs" in plan.levers else 1.1)
    plan, tried = settled_by(100, monkeypatch, rule=rule, make=Pictures)
    assert {"layout", "graphs"} <= plan.levers.keys() and plan.reasons["layout"].startswith("taken")
    without = [one for one in tried if "graphs" in one.levers and "layout" not in one.levers]
    assert rule(plan).seconds < min(rule(one).seconds for one in without)


def test_a_compiler_lays_out_what_it_compiles_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, tried = settled_by(100, monkeypatch, rule=with_a_layout(lambda _: 1.1), make=Pictures, expected_steps=10**6)
    assert "compile" in plan.levers
    assert not [one for one in tried if {"compile", "layout"} <= one.levers.keys()]


def test_a_layout_that_is_slower_both_ways_is_left_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, tried = settled_by(100, monkeypatch, rule=with_a_layout(lambda _: 1.1), make=Pictures)
    assert "layout" not in plan.levers and "no faster" in plan.reasons["layout"]
    assert sum("layout" in one.levers for one in tried) == 2


@pytest.mark.parametrize("loss", [cross_entropy, spread], ids=["one pass", "two passes"])
def test_algorithms_are_taken_where_they_are_faster_also_where_chunks_are_no_single_work(
    loss: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, _ = settled_by(100, monkeypatch, loss=loss, rule=with_tried_algorithms(0.5), make=Convolving)
    assert "convolution_algorithms" in plan.levers and plan.reasons["convolution_algorithms"].startswith("taken")
    assert ("split_rows" in plan.levers) is (loss is cross_entropy)


@pytest.mark.parametrize(
    ("rule", "said"),
    [(with_tried_algorithms(0.99), "no faster"), (with_tried_algorithms(0.5, 100), "the budget holds none of it")],
    ids=["as fast", "larger workspaces"],
)
def test_algorithms_that_do_not_pay_are_left_with_the_reason(
    rule: Rule, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, tried = settled_by(100, monkeypatch, rule=rule, make=Convolving)
    assert "convolution_algorithms" not in plan.levers and said in plan.reasons["convolution_algorithms"]
    assert any("convolution_algorithms" in one.levers for one in tried)


def test_without_a_convolution_none_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    _, tried = settled_by(100, monkeypatch)
    assert all("convolution_algorithms" not in one.levers for one in tried)


def test_only_allowed_algorithms_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, tried = settled_by(100, monkeypatch, make=Convolving, allow=Exactness.SAME_BITS)
    assert all("convolution_algorithms" not in one.levers for one in tried)
    assert plan.reasons["convolution_algorithms"].startswith("not allowed")
