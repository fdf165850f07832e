"""Plans for cards that are not at hand: predicted as they are followed, monotone, pinned, and the plain step's sum."""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import samegrad as sg
from samegrad.errors import BudgetTooSmall, CannotSplit, CannotTrace
from samegrad.levers.split_rows import SplitRows
from samegrad.measure.target import Target
from samegrad.measure.trace_reading import CUDA_BLOCK_BYTES, peak_bytes
from samegrad.plan.choose import choose_plan
from samegrad.plan.floor import floor_bytes
from samegrad.plan.options import Options
from samegrad.plan.predict import predict_plan
from samegrad.plan.traced import Candidate, predict_traced, traced_candidates
from samegrad.records import Category, Counting, Exactness, Footprint, KnobOrigin, Plan
from samegrad.report.at_peak import peak_rows
from samegrad.settle import aliases_for, on_card, plan_ahead
from samegrad.settle.followed_step import FollowedStep
from samegrad.settle.following import follow
from samegrad.units import format_bytes, parse_bytes

from ..contract.plain import assert_close, gradients, left_alone, plain_step
from .steps import CASES, Case, Words, cross_entropy

CARD = "H200"
# What a plan's prediction may be off by from the trace of that very plan.
WITHIN = 0.01
OPTIMIZERS = {"adam": torch.optim.Adam, "sgd": functools.partial(torch.optim.SGD, lr=0.1), "no optimizer": None}


@functools.cache
def followed(name: str, device: str = "cpu", optimizer: str = "adam") -> tuple[FollowedStep, Footprint]:
    case = CASES[name]
    declared = case.step(device, OPTIMIZERS[optimizer]).declared
    return follow(declared, aliases_for(declared), case.batch(device), Target.named(CARD))


def levers_of(candidate: Candidate) -> dict[str, dict[str, Any]]:
    return {lever.name: lever.knobs() for lever in candidate.levers}


# Of more chunks in two passes all are followed, which takes long and shows nothing that these do not.
MOST_CHUNKS = 12


def worth_following(step: FollowedStep, rows: int) -> bool:
    two_passes = step.ways.by_rows is not None and step.ways.by_rows.passes == 2
    return rows * MOST_CHUNKS >= step.layout.rows if two_passes else rows > 4


def smaller_than_faster(candidates: list[Candidate]) -> list[Candidate]:
    """Those that are worth trying whatever lies between their tensors."""
    peaks = [candidate.peak_bytes for candidate in candidates]
    return [c for place, c in enumerate(candidates) if c.peak_bytes < min(peaks[:place], default=2**60)]


def some(step: FollowedStep, candidates: list[Candidate], most: int = 4) -> list[Candidate]:
    """Evenly spread over those that take no long time to follow."""
    few = [
        candidate
        for candidate in smaller_than_faster(candidates)
        if worth_following(step, levers_of(candidate).get("split_rows", {"rows": 2**30})["rows"])
    ]
    return [*few[:: -(-len(few) // most)], few[-1]]


# A small step's scalars and the blocks that they round up to.
FEW_BLOCKS = 16 * CUDA_BLOCK_BYTES


def errors(step: FollowedStep, footprint: Footprint, candidates: list[Candidate]) -> list[float]:
    """How far each prediction is from the traced plan's peak, as a fraction of it."""
    found = []
    for candidate in candidates:
        levers = levers_of(candidate)
        predicted = predict_traced(footprint, levers)
        assert predicted is not None
        plan = Plan(levers=levers, exactness=Exactness.SAME_SUM, batch_rows=footprint.batch_rows)
        real = peak_bytes(step.trace(plan), round_to=CUDA_BLOCK_BYTES)
        found.append(max(0, abs(predicted[0] - real) - FEW_BLOCKS) / real)
    return found


# Twins have no data wherever the model is: each case is seen on one of the two, and on both where there is time; words
# take as long as all others together, and those that draw are followed as those that do not.
QUICK = {name: ("cpu", "meta")[place % 2] for place, name in enumerate(CASES) if name != "words with dropout"}


@pytest.mark.parametrize(
    ("name", "device"),
    [
        pytest.param(name, device, marks=[pytest.mark.slow] if device != QUICK.get(name) else [])
        for name in CASES
        for device in ("cpu", "meta")
    ],
)
def test_a_plan_is_predicted_to_hold_what_its_own_trace_holds(name: str, device: str) -> None:
    step, footprint = followed(name, device)
    candidates = traced_candidates(footprint, Options())
    assert candidates[0].levers == () and len(candidates) > 1
    assert max(errors(step, footprint, some(step, candidates))) <= WITHIN


def test_what_a_search_says_of_a_plan_is_what_is_predicted_of_it() -> None:
    for name in ("words", "pictures", "contrast"):
        _, footprint = followed(name)
        for candidate in traced_candidates(footprint, Options()):
            predicted = predict_traced(footprint, levers_of(candidate))
            assert predicted is not None
            assert predicted[:2] == (candidate.peak_bytes, pytest.approx(candidate.seconds))


@pytest.mark.parametrize(
    ("name", "optimizer"),
    [
        pytest.param("words", "no optimizer", marks=pytest.mark.slow),
        ("perceptron", "sgd"), ("perceptron", "no optimizer"), ("contrast", "sgd"),
    ],
)
def test_where_no_optimizers_turn_hides_it_the_rest_is_predicted_as_well(name: str, optimizer: str) -> None:
    step, footprint = followed(name, "cpu", optimizer)
    candidates = some(step, traced_candidates(footprint, Options()))
    assert max(errors(step, footprint, candidates)) <= WITHIN


def planted(footprint: Footprint, **changes: Any) -> Footprint:
    """Every way with another field: the planted fault."""
    return dataclasses.replace(
        footprint, traced=tuple(dataclasses.replace(way, **changes) for way in footprint.traced)
    )


@pytest.mark.parametrize(
    ("name", "optimizer", "forgotten"),
    [
        ("perceptron", "no optimizer", {"accumulator_bytes": 0}),
        ("perceptron", "no optimizer", {"later_tables": ()}),
        ("perceptron", "adam", {"optimizer_bytes": 0}),
        ("sequences", "no optimizer", {"copied_bytes": 0}),
        ("sequences", "no optimizer", {"arriving_row_bytes": 0}),
        ("contrast", "no optimizer", {"output_bytes": 0, "loss_bytes": 0}),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else value,
)
def test_the_check_finds_what_a_prediction_forgets(name: str, optimizer: str, forgotten: dict[str, Any]) -> None:
    step, footprint = followed(name, "cpu", optimizer)
    rows = [table.rows for table in footprint.traced[0].tables if worth_following(step, table.rows)]
    candidates = [Candidate(0.0, 0, (SplitRows(few),)) for few in (rows[5], rows[-1])]
    assert max(errors(step, footprint, candidates)) <= WITHIN
    assert max(errors(step, planted(footprint, **forgotten), candidates)) > WITHIN


def smallest_of(footprint: Footprint) -> Candidate:
    return min(traced_candidates(footprint, Options()), key=lambda candidate: candidate.peak_bytes)


def budgets(footprint: Footprint, count: int = 12) -> list[sg.Budget]:
    """From the smallest plan's to beyond the plain step's."""
    low = smallest_of(footprint).peak_bytes + 80 * 2**20
    high = footprint.predicted_peak_bytes(rows=footprint.batch_rows) + 90 * 2**20
    return [
        sg.Budget(
            total_bytes=low + (high - low) * k // (count - 1), device=CARD, counting=Counting.CUDA_ALLOCATOR,
            source="test",
        )
        for k in range(count)
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["words", "pictures", "perceptron"])
def test_less_memory_is_never_faster_and_never_larger(name: str) -> None:
    _, footprint = followed(name)
    before: Plan | None = None
    for budget in budgets(footprint):
        ladder = choose_plan(footprint, Options(), budget)
        for kind in {frozenset(plan.levers) for plan in ladder}:
            peaks = [plan.predicted_peak_bytes or 0 for plan in ladder if plan.levers.keys() == kind]
            assert peaks == sorted(set(peaks), reverse=True)
        seconds = [plan.predicted_seconds or 0.0 for plan in ladder]
        assert seconds == sorted(seconds)
        first = ladder[0]
        if before is not None:
            assert (first.predicted_seconds or 0.0) <= (before.predicted_seconds or 0.0)
            assert (first.predicted_peak_bytes or 0) >= (before.predicted_peak_bytes or 0)
        before = first
    assert before is not None and before.levers == {}


def test_each_lever_is_chosen_at_some_budget() -> None:
    _, footprint = followed("words")
    chosen = {name for budget in budgets(footprint, 40) for name in choose_plan(footprint, Options(), budget)[0].levers}
    assert {"recompute", "split_rows", "host_rows"} <= chosen


def test_large_logits_are_made_in_chunks_where_that_is_fastest() -> None:
    case = dataclasses.replace(CASES["words"], rows=2001)
    declared = case.step().declared
    _, footprint = follow(declared, aliases_for(declared), case.batch(), Target.named(CARD))
    chosen = [choose_plan(footprint, Options(), budget)[0] for budget in budgets(footprint, 30)]
    assert {"chunk_loss", "recompute", "split_rows"} <= {name for plan in chosen for name in plan.levers}
    plan = next(plan for plan in chosen if {"chunk_loss", "recompute"} <= set(plan.levers))
    without = {name: knobs for name, knobs in plan.levers.items() if name != "recompute"}
    saved = predict_plan(footprint, without).peak_allocated_bytes - (plan.predicted_peak_bytes or 0)
    # Each its own share, not that of all of them.
    assert f"taken: saves {format_bytes(saved)} beside" in plan.reasons["recompute"]
    assert plan.reasons["recompute"] != plan.reasons["chunk_loss"] and "costs" in plan.reasons["recompute"]


@pytest.mark.parametrize("name", ["words", "pictures"])
def test_workspaces_stand_apart_and_no_lever_saves_them(name: str) -> None:
    _, footprint = followed(name)
    parts = footprint.by_category
    # The allocator hands out some blocks that are a little larger than what was asked for.
    assert sum(parts.values()) == pytest.approx(footprint.peak_allocated_bytes, rel=WITHIN)
    tensors = sum(parts.values()) - parts[Category.WORKSPACES]
    assert tensors != pytest.approx(footprint.peak_allocated_bytes, rel=WITHIN)
    assert any("kept by cuBLAS" in row.made_by for row in peak_rows(footprint, most=40))
    plans = (plan for budget in budgets(footprint) for plan in choose_plan(footprint, Options(), budget))
    plan = next(plan for plan in plans if set(plan.levers) == {"recompute"})
    plain, under = predict_traced(footprint, {}), predict_traced(footprint, plan.levers)
    assert plain is not None and under is not None
    assert f"saves {format_bytes(plain.peak_bytes - under.peak_bytes)} of" in plan.reasons["recompute"]
    # The difference to what the plain step needs in all would have them in it.
    in_all = predict_plan(footprint, {}).peak_allocated_bytes
    assert format_bytes(in_all - under.peak_bytes) not in plan.reasons["recompute"]


def test_batch_normalisation_is_only_run_again_and_stays_exact() -> None:
    _, footprint = followed("pictures")
    assert "statistics of all rows" in footprint.refusals["split_rows"]
    taken = {name for candidate in traced_candidates(footprint, Options()) for name in levers_of(candidate)}
    assert taken == {"recompute"}


def test_blocks_may_run_again_beside_rows_that_an_examination_split() -> None:
    _, footprint = followed("perceptron")
    assert "recompute" not in footprint.refusals
    assert any({"split_rows", "recompute"} <= set(levers_of(c)) for c in traced_candidates(footprint, Options()))


TIMES = {"words": 10, "pictures": 20, "sequences": 20}
# The one card that some are settled for where time is short; none for words, which are planned in other tests too.
SETTLED = {"words": "", "pictures": "H200", "sequences": "T4"}


@pytest.mark.parametrize(
    ("name", "card"),
    [
        # Words take as long as all others together, and what depends on the card does so for one step as for another.
        pytest.param(name, card, marks=[pytest.mark.slow] if card != SETTLED.get(name, card) else [])
        for name in TIMES
        for card in ("H200", "RTX 4090 Laptop", "T4")
    ],
)
def test_a_plan_is_settled_for_a_card_and_the_same_each_time(name: str, card: str) -> None:
    # Libraries and the allocator's margin take 64 MiB each, whatever the step.
    case = dataclasses.replace(CASES[name], rows=TIMES[name] * CASES[name].rows)
    plain = sg.measure_step(case.step(), case.batch(), device=card)
    assert plain.steady_cap_bytes is not None
    budget = int(plain.steady_cap_bytes * 0.9)
    ahead = plan_ahead(case.step(), case.batch(), card, budget=budget)
    assert ahead.plan.levers and (ahead.predicted.steady_cap_bytes or 0) <= budget
    again = plan_ahead(case.step(), case.batch(), card, budget=budget)
    assert again.plan == ahead.plan


@pytest.mark.parametrize("name", ["words", "pictures", "u-net", "perceptron", "contrast"])
def test_a_plan_made_for_a_card_keeps_the_gradients_where_it_runs(name: str) -> None:
    case = CASES[name]
    followed_step, footprint = followed(name)
    batch = case.batch(dtype=torch.float64)
    model = case.step(dtype=torch.float64).declared.model
    _, expected = plain_step(model, case.loss_fn, batch)
    for candidate in some(followed_step, traced_candidates(footprint, Options()), 4)[1:]:
        levers = levers_of(candidate)
        plan = Plan(levers=levers, exactness=Exactness.SAME_SUM, batch_rows=case.rows)
        with case.step(dtype=torch.float64, plan=plan) as step:
            step.backward(batch)
            assert_close(gradients(step.declared.model), expected)


def test_rows_that_are_pinned_are_kept_and_planned_round() -> None:
    case = CASES["words"]
    _, footprint = followed("words")
    for budget in budgets(footprint)[3:]:
        for plan in choose_plan(footprint, Options(rows=10), budget):
            assert plan.levers["split_rows"]["rows"] == 10
            assert plan.knob_origins["split_rows.rows"] is KnobOrigin.PINNED
    plan, _ = sg.settle_plan(case.step(), case.batch(), budget="1GiB", rows=[30, 20, 15], device=CARD)
    assert plan.levers["split_rows"]["rows"] == [30, 20, 15]


def test_only_what_is_allowed_is_taken() -> None:
    _, footprint = followed("perceptron")
    for budget in budgets(footprint)[4:]:
        try:
            ladder = choose_plan(footprint, Options(allow=Exactness.SAME_BITS), budget)
        except BudgetTooSmall:
            continue
        assert all(plan.exactness is Exactness.SAME_BITS for plan in ladder)
        assert ladder[0].reasons["autocast"].startswith("not allowed: a narrower dtype")


def test_pinned_rows_that_do_not_fit_say_what_they_need() -> None:
    _, footprint = followed("words")
    tight = dataclasses.replace(budgets(footprint)[0], total_bytes=70 * 2**20)
    with pytest.raises(BudgetTooSmall, match=r"33 rows need .* (MiB|GiB)"):
        choose_plan(footprint, Options(rows=33), tight)


def test_below_the_floor_the_smallest_followed_plan_counts() -> None:
    _, footprint = followed("pictures")
    smallest = smallest_of(footprint)
    with pytest.raises((BudgetTooSmall, CannotSplit)) as raised:
        choose_plan(footprint, Options(), dataclasses.replace(budgets(footprint)[0], total_bytes=66 * 2**20))
    assert "with recompute" in raised.value.found and " 0 B a row" not in raised.value.do
    assert floor_bytes(footprint) == smallest.peak_bytes


def test_where_every_followed_plan_is_too_large_the_budget_that_would_do_is_named() -> None:
    case = dataclasses.replace(CASES["pictures"], rows=740)
    whole = sg.measure_step(case.step(), case.batch(), device=CARD).steady_cap_bytes or 0
    smallest = None
    for share in (0.75, 0.7, 0.65, 0.6, 0.55, 0.5, 0.45):
        try:
            plan_ahead(case.step(), case.batch(), CARD, budget=int(share * whole))
        except BudgetTooSmall as error:
            smallest = error
            break
    assert smallest is not None
    found = re.search(r"raise the budget to ([\d.]+ [KMG]iB)", smallest.do)
    assert found
    assert plan_ahead(case.step(), case.batch(), CARD, budget=found[1].replace(" ", "")).plan.levers
    # As on a device at hand: what the floor is made of, which adds up, and what is kept in reserve of a budget.
    made_of, _, reserve = smallest.found.partition("; beside that ")
    whole, *parts = (parse_bytes(amount) for amount in re.findall(r"[\d.]+ (?:[KMGT]iB|B)\b", made_of))
    assert abs(sum(parts) - whole) <= 0.01 * whole and "parameters" in made_of and "gaps between tensors" in made_of
    assert "(5.5 % of the budget) are kept in reserve" in reserve


def test_below_what_any_plans_tensors_need_the_smallest_is_followed_all_the_same() -> None:
    step, footprint = followed("pictures")

    def settled(budget: str | int) -> Plan:
        return on_card.settle_on_card(step, footprint, budget=step.target.budget(budget), options=Options())[0]

    with pytest.raises(BudgetTooSmall) as far_below:
        settled("1MiB")
    found = re.search(r"raise the budget to ([\d.]+ [KMG]iB)", far_below.value.do)
    assert found and "gaps between tensors" in far_below.value.found
    enough = parse_bytes(found[1])
    assert settled(enough).levers
    with pytest.raises(BudgetTooSmall):
        settled(int(0.9 * enough))


@pytest.mark.slow
def test_what_was_passed_over_and_fits_after_all_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    case = dataclasses.replace(CASES["sequences"], rows=TIMES["sequences"] * CASES["sequences"].rows)
    plain = sg.measure_step(case.step(), case.batch(), device=CARD).steady_cap_bytes or 0
    wanted = plan_ahead(case.step(), case.batch(), CARD, budget=int(0.8 * plain))
    # As if what was learnt of the plain step said that nothing but the smallest fits.
    monkeypatch.setattr(on_card, "_CLEARLY", 1e6)
    found = plan_ahead(case.step(), case.batch(), CARD, budget=int(0.8 * plain))
    assert found.plan.levers == wanted.plan.levers
    monkeypatch.setattr(on_card, "_NEAR", 0.0)
    smallest = plan_ahead(case.step(), case.batch(), CARD, budget=int(0.8 * plain))
    assert (smallest.predicted.seconds or 0.0) > (found.predicted.seconds or 0.0)


class Reads(nn.Module):
    """A model whose shapes depend on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(20, 10)

    def forward(self, rows: Tensor) -> Tensor:
        if rows.sum().item() > 0:
            rows = rows * 2
        made: Tensor = self.inner(rows)
        return made


def test_what_needs_values_is_named() -> None:
    case = Case(Reads, cross_entropy, 11, (20,))
    with pytest.raises(CannotTrace, match=r"item|_local_scalar_dense"):
        plan_ahead(case.step("meta"), case.batch("meta"), CARD)


@pytest.mark.parametrize("fails", [False, True], ids=["as it is", "after an exception"])
def test_nothing_of_the_users_changes(fails: bool) -> None:
    case = CASES["words with dropout"]

    def loss_fn(outputs: Tensor, batch: Any) -> Tensor:
        if fails:
            raise RuntimeError("the user's own")
        return cross_entropy(outputs, batch)

    step = dataclasses.replace(case, loss_fn=loss_fn).step()
    batch = case.batch()
    before = [leaf.clone() for leaf in batch]
    with left_alone(step.declared.model, optimizer=step.declared.optimizer):
        if fails:
            with pytest.raises((CannotTrace, RuntimeError), match="the user's own"):
                plan_ahead(step, batch, CARD)
        else:
            plan_ahead(step, batch, CARD, budget="1GiB")
    assert all(torch.equal(leaf, kept) for leaf, kept in zip(batch, before))


@pytest.mark.parametrize(("card", "says"), [("T4", True), ("H200", False)])
def test_a_card_without_units_for_a_dtype_says_so(card: str, says: bool) -> None:
    def narrow(module: nn.Module, batch: Any) -> Any:
        with torch.autocast("cuda", torch.bfloat16):
            return module(batch[0])

    case = CASES["perceptron"]
    footprint = sg.measure_step(case.step("meta", forward=narrow), case.batch("meta"), device=card)
    assert ("bfloat16" in footprint.facts) is says
    assert not says or "T4 has no units for it" in footprint.facts["bfloat16"]


def test_batches_of_names_are_planned() -> None:
    torch.manual_seed(0)
    model = Words()
    step = sg.Step(
        model,
        lambda outputs, batch: cross_entropy(outputs, (None, batch["labels"])),
        forward=lambda module, batch: module(batch["tokens"]),
        optimizer=torch.optim.Adam(model.parameters()),
    )
    tokens, labels = CASES["words"].batch()
    ahead = plan_ahead(step, {"tokens": tokens, "labels": labels}, CARD, budget="125MiB")
    assert {"recompute", "split_rows", "chunk_loss"} & set(ahead.plan.levers)
