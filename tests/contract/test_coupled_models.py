"""Budgets for models that couple rows: the way that fits is taken, predicted as it is measured, and the plain step."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import samegrad as sg
from samegrad.errors import BudgetTooSmall, CannotSplit, WrongPlan
from samegrad.levers.exact_batchnorm import ExactBatchNorm
from samegrad.plan.choose import choose_plan
from samegrad.plan.explain import explain_plan
from samegrad.plan.floor import floor_bytes
from samegrad.plan.options import Options
from samegrad.records import Budget, Counting, Exactness, Footprint, Plan
from samegrad.settle import settle_plan

from ..crossed import crossed
from ..exact import coupled_zoo as zoo
from ..exact.coupled_zoo import CASES, made, step_of

ROWS = 64
# What a prediction may be off by.
WITHIN = 0.03


def optimised(name: str, **how: Any) -> sg.Step:
    model = made(name, torch.float32)
    return step_of(model, name, optimizer=torch.optim.SGD(model.parameters(), 0.05, momentum=0.9), **how)


def batch(rows: int = ROWS) -> Any:
    return zoo.batch(rows, dtype=torch.float32)


@pytest.fixture(scope="module")
def footprints() -> dict[str, Footprint]:
    return {}


def measured(footprints: dict[str, Footprint], name: str) -> Footprint:
    if name not in footprints:
        footprints[name] = sg.measure_step(optimised(name, segments=CASES[name].segments), batch())
    return footprints[name]


def really_needed(step: sg.Step, rows: Any) -> int:
    """The counted peak of the second of two real steps: the first creates the optimizer's state."""
    *_, last = sg.train(step, [rows, rows], counter=sg.count_bytes(step))
    assert last.peak_allocated_bytes is not None
    return last.peak_allocated_bytes


@pytest.mark.parametrize(("name", "share"), crossed(CASES, [0.25, 0.75]))
def test_a_budget_between_the_smallest_and_the_plain_peak_is_kept_and_predicted(
    name: str, share: float, footprints: dict[str, Footprint]
) -> None:
    found = measured(footprints, name)
    low, high = floor_bytes(found), found.predicted_peak_bytes(rows=ROWS)
    assert low < high
    budget = int(1.02 * low + share * (high - low))
    step = optimised(name, budget=budget, segments=CASES[name].segments)
    plan = step.prepare(batch())
    assert plan.levers and plan.predicted_peak_bytes is not None
    needed = really_needed(step, batch())
    assert needed <= budget
    assert abs(needed - plan.predicted_peak_bytes) <= WITHIN * needed, (needed, plan)
    # Small chunks of convolutions take their time to verify.
    assert share < 0.5 or sg.verify_step(step, batch()).same


@pytest.mark.parametrize("name", CASES)
def test_the_plain_peak_is_predicted_too(name: str, footprints: dict[str, Footprint]) -> None:
    """What a model holds for each pair of rows is most of the peak of some of them."""
    step = optimised(name, budget="1GiB", segments=CASES[name].segments)
    plan = step.prepare(batch())
    needed = really_needed(step, batch())
    assert plan.levers == {} and plan.predicted_peak_bytes is not None
    assert abs(needed - plan.predicted_peak_bytes) <= WITHIN * needed, (needed, plan)


IN_LOCKSTEP: list[tuple[str, int | str]] = [(ExactBatchNorm.name, how) for how in (1, 4, "5 together")]


class Deep(nn.Module):
    """Two long blocks: what one of them holds for all rows is more than lockstep keeps of both."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 6, 3, padding=1, bias=False)
        self.blocks = nn.Sequential(*(self._block() for _ in range(2)))
        self.fc = nn.Linear(6, zoo.CLASSES)

    @staticmethod
    def _block() -> nn.Module:
        layers = [(nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.SiLU()) for _ in range(4)]
        return nn.Sequential(*(part for layer in layers for part in layer), nn.Dropout(0.1))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(self.stem(x)).mean((2, 3)))


def deep(**how: Any) -> sg.Step:
    torch.manual_seed(0)
    model = Deep()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    forward = lambda model, batch: model(batch["image"])
    return sg.Step(model, CASES["mlp with batchnorm"].loss, forward=forward, optimizer=optimizer, **how)


@pytest.fixture(scope="module")
def deep_footprint() -> Footprint:
    """Bytes as measured; times by the forwards alone, so that a busy machine changes no order."""
    found = sg.measure_step(deep(), batch())
    variants = [
        dataclasses.replace(v, seconds_per_row=1e-3 * (v.forwards_per_step + 2) / 3, seconds_per_chunk=1e-3)
        for v in found.variants
    ]
    return dataclasses.replace(found, variants=tuple(variants), seconds_per_row=1e-3, seconds_per_chunk=1e-3)


def bytes_of(total: int) -> Budget:
    return Budget(total_bytes=total, device="cpu", counting=Counting.TENSOR_BYTES, source="given")


def taken(plan: Plan) -> tuple[str, int | str]:
    """The lever of a plan, and its keep_every (0 where it has none), or how many layers it takes together."""
    for name, knobs in plan.levers.items():
        return name, f"{knobs['together']} together" if knobs.get("together", 1) > 1 else knobs.get("keep_every", 0)
    return "plain", 0


def test_the_ladder_goes_from_plain_over_recomputation_to_lockstep_and_falls(deep_footprint: Footprint) -> None:
    ladder = choose_plan(deep_footprint, Options(), bytes_of(2**30))
    peaks = [plan.predicted_peak_bytes or 0 for plan in ladder]
    assert peaks == sorted(set(peaks), reverse=True)
    order = list(dict.fromkeys(map(taken, ladder)))
    wanted = [("plain", 0), ("recompute", 0), *IN_LOCKSTEP]
    assert order[:3] == wanted[:3] and set(order) == set(wanted), order
    assert ladder[-1].predicted_peak_bytes == floor_bytes(deep_footprint)


@pytest.mark.parametrize("lever", [("recompute", 0), *IN_LOCKSTEP], ids=str)
def test_each_way_for_batchnorm_needs_what_it_was_predicted_to(
    lever: tuple[str, int | str], deep_footprint: Footprint
) -> None:
    ladder = choose_plan(deep_footprint, Options(), bytes_of(2**30))
    plan = next(plan for plan in ladder if taken(plan) == lever)
    step = deep(plan=sg.Plan.from_json(plan.to_json()))
    needed = really_needed(step, batch())
    assert abs(needed - (plan.predicted_peak_bytes or 0)) <= WITHIN * needed
    verdict = sg.verify_step(step, batch())
    # Blocks that run again are not the plain call: they are compared as what runs.
    assert verdict.same and not any(check.name == "plain run twice" for check in verdict.checks)


def test_a_block_run_again_with_other_buffers_is_caught(
    deep_footprint: Footprint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lever has one chunk, and the verifier once took that for the plain call."""
    from samegrad.exact import part_state

    ladder = choose_plan(deep_footprint, Options(), bytes_of(2**30))
    step = deep(plan=next(plan for plan in ladder if taken(plan) == ("recompute", 0)))
    step.backward(batch())
    monkeypatch.setattr(part_state.PartState, "keep_changed", lambda self: self._kept.clear())
    assert not sg.verify_step(step, batch()).same


def test_the_explanation_says_which_scheme_runs_and_what_it_costs(deep_footprint: Footprint) -> None:
    expected = {
        ("plain", 0): "It runs whole: the plain call",
        ("recompute", 0): "all rows at once: parts of the model by recompute, 2 forwards a row",
        ("exact_batchnorm", 1): "by exact_batchnorm (scheme_name lockstep, keep_every 1, together 1), 2 forwards a row",
        ("exact_batchnorm", 4): "by exact_batchnorm (scheme_name lockstep, keep_every 4, together 1), 3 forwards a row",
        ("exact_batchnorm", "5 together"): "(scheme_name lockstep, keep_every 1, together 5), 10 forwards a row",
    }
    for plan in choose_plan(deep_footprint, Options(), bytes_of(2**30)):
        text = explain_plan(plan, deep_footprint)
        assert expected[taken(plan)] in text and "normalises with the statistics of all rows" in text
    pinned = deep(rows=60)
    pinned.backward(batch())
    assert "exact_batchnorm: 2 forwards a row" in pinned.explain()


def test_a_saved_plan_runs_the_same_again_and_no_other_batch_or_model() -> None:
    name = "codebook"
    step = optimised(name)
    plan, _ = settle_plan(step, batch(), budget=floor_between(name))
    assert "segments" in plan.levers
    again = sg.Plan.from_json(plan.to_json())
    assert again == plan
    gradients = []
    for how in (plan, again):
        other = optimised(name, plan=dataclasses.replace(how, signature=""))
        torch.manual_seed(1)
        other.backward(batch())
        gradients.append([p.grad for p in other.declared.model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients) if a is not None)
    prepared = optimised(name, budget=floor_between(name)).prepare(batch())
    with pytest.raises(WrongPlan, match="float64"):
        step_of(made(name), name, plan=prepared).backward(zoo.batch(ROWS))
    with pytest.raises(WrongPlan, match=f"{ROWS + 1} rows"):
        optimised(name, plan=prepared).backward(batch(ROWS + 1))
    with pytest.raises(WrongPlan, match="another model"):
        optimised("self-similarity", plan=prepared).backward(batch())


def floor_between(name: str) -> int:
    footprint = sg.measure_step(optimised(name), batch())
    return (floor_bytes(footprint) + footprint.predicted_peak_bytes(rows=ROWS)) // 2


class Switched(nn.Module):
    """Rows meet in the middle; the encoder has a BatchNorm that may be in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Linear(6, 48), nn.BatchNorm1d(48), nn.Tanh(), nn.Linear(48, 48), nn.BatchNorm1d(48), nn.Tanh(),
            nn.Linear(48, 8),
        )  # fmt: skip
        self.head = nn.Linear(8, zoo.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        z = self.encoder(x)
        return self.head(z - z.mean(0))


def switched(frozen: bool, **how: Any) -> sg.Step:
    torch.manual_seed(0)
    model = Switched()
    for part in (model.encoder[1], model.encoder[4]):
        part.train(not frozen)
    return sg.Step(model, CASES["mlp with batchnorm"].loss, forward=lambda m, b: m(b["x"]), **how)


def test_a_plan_made_in_another_mode_is_tried_in_this_one() -> None:
    frozen = switched(True)
    plan, _ = settle_plan(frozen, batch(), rows=16)
    assert plan.levers["segments"]["paths"] == {"encoder": 1, "head": 1}
    switched(True, plan=plan).backward(batch())
    # In training mode the encoder sees all rows: chunks would compute another function.
    with pytest.raises(CannotSplit, match="normalises with the statistics of all rows"):
        switched(False, plan=plan).backward(batch())


def test_a_layer_that_is_frozen_makes_another_step_which_is_planned_anew() -> None:
    step = switched(False, budget="1GiB")
    before = step.prepare(batch())
    step.declared.network.encoder.eval()
    after = step.prepare(batch())
    assert after is not before
    assert step.footprint is not None and "mixes rows" in next(iter(step.footprint.facts.values()))
    step.declared.network.encoder.train()
    assert step.prepare(batch()) is before


def test_named_segments_are_what_is_measured_and_planned() -> None:
    name = "rows attend to rows"
    for named in (["encoder"], ["encoder", "keys", "head"]):
        footprint = sg.measure_step(optimised(name, segments=named), batch())
        [variant] = footprint.variants
        assert list(variant.knobs["paths"]) == named


def test_a_budget_below_all_ways_says_what_the_smallest_plan_is_made_of() -> None:
    name = "mlp with batchnorm"
    footprint = sg.measure_step(optimised(name), batch())
    with pytest.raises(BudgetTooSmall) as refused:
        optimised(name, budget=floor_bytes(footprint) // 2).backward(batch())
    assert re.search(r"smallest plan needs .*parameters .*gradients .*optimizer state .*one row", str(refused.value))


def test_bits_only_leaves_recomputation_as_the_one_way_down(deep_footprint: Footprint) -> None:
    ladder = choose_plan(deep_footprint, Options(allow=Exactness.SAME_BITS), bytes_of(2**30))
    assert [taken(plan) for plan in ladder] == [("plain", 0), ("recompute", 0)]
