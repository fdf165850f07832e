"""Lockstep that keeps less is tried and probed only where nothing quicker is within the budget."""

from __future__ import annotations

import copy
import dataclasses
import functools

import pytest
import torch
from torch import Tensor, nn

import samegrad as sg
from samegrad.errors import BudgetTooSmall
from samegrad.plan.margin import budget_for, usable_bytes
from samegrad.plan.options import Options
from samegrad.records import Budget, Counting, Footprint
from samegrad.settle import Measurement, aliases_for, measure_for, settle, untried_ways

from .steps import cross_entropy

ROWS, WIDTH, LAYERS = 24, 6, 6


class Deep(nn.Module):
    """One block of convolutions: run again as a whole, it peaks where the plain step does."""

    def __init__(self) -> None:
        super().__init__()
        layers = [(nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.BatchNorm2d(WIDTH), nn.SiLU()) for _ in range(LAYERS)]
        self.stem = nn.Conv2d(3, WIDTH, 3, padding=1)
        self.body = nn.Sequential(*(part for layer in layers for part in layer))
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, pictures: Tensor) -> Tensor:
        made: Tensor = self.head(self.body(self.stem(pictures)).mean((2, 3)))
        return made


def stepped(**given: object) -> tuple[sg.Step, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    step = sg.Step(Deep().double(), cross_entropy, **given)
    return step, (torch.randn(ROWS, 3, 8, 8, dtype=torch.float64), torch.arange(ROWS) % 10)


@functools.cache
def footprint() -> Footprint:
    """For no one budget: every way is in it."""
    step, batch = stepped()
    return sg.measure_step(step, batch)


WAYS = {"all boundaries": (1, 1), "every fourth": (4, 1), "together": (1, 5)}


def least_bytes(way: str) -> int:
    """What the way is predicted to hold a row at a time."""
    [laws] = [v.laws for v in footprint().variants if lockstep_of(v.knobs) == WAYS[way]]
    return max(law.peak_bytes(rows=1, batch_rows=ROWS) for law in laws)


def lockstep_of(knobs: dict[str, object]) -> tuple[object, object]:
    return knobs.get("keep_every"), knobs.get("together")


def budget_of(usable: int) -> Budget:
    counting = Counting.TENSOR_BYTES
    return Budget(total_bytes=budget_for(usable, counting), device="cpu", counting=counting, source="test")


def measured(usable: int) -> Measurement:
    step, batch = stepped()
    return measure_for(step.declared, batch, aliases_for(step.declared), budget_of(usable), Options())


known = functools.cache(measured)


def settled(usable: int, measurement: Measurement | None = None) -> sg.Plan:
    step, batch = stepped()
    measurement = known(usable) if measurement is None else measurement
    given = step.declared, aliases_for(step.declared), measurement, batch
    return settle(*given, budget=budget_of(usable), options=Options())[0]


def probed(measurement: Measurement) -> list[tuple[object, object]]:
    return [lockstep_of(v.knobs) for v in measurement.footprint.variants if v.lever == "exact_batchnorm"]


def test_a_footprint_for_no_one_budget_has_every_way() -> None:
    found = [lockstep_of(v.knobs) for v in footprint().variants if v.lever == "exact_batchnorm"]
    assert found == list(WAYS.values())
    plain = footprint().predicted_peak_bytes(rows=ROWS)
    assert least_bytes("together") < least_bytes("every fourth") < least_bytes("all boundaries") < plain


def test_a_budget_that_the_plain_step_or_few_chunks_fit_has_none_of_the_others() -> None:
    plain = footprint().predicted_peak_bytes(rows=ROWS)
    assert probed(measured(2 * plain)) == [WAYS["all boundaries"]]
    [variant] = [v for v in footprint().variants if lockstep_of(v.knobs) == WAYS["all boundaries"]]
    two_chunks = max(law.peak_bytes(rows=ROWS // 2, batch_rows=ROWS) for law in variant.laws)
    measurement = measured(two_chunks + 1000)
    assert probed(measurement) == [WAYS["all boundaries"]] and len(measurement.ways.untried) == 2


@pytest.mark.parametrize(("way", "above"), [("every fourth", "all boundaries"), ("together", "every fourth")])
def test_one_after_the_other_is_probed_as_the_budget_falls(way: str, above: str) -> None:
    # A hair below what the way that keeps more needs at least.
    usable = int(0.98 * least_bytes(above))
    measurement = known(usable)
    assert WAYS[way] in probed(measurement)
    plan = settled(usable)
    assert lockstep_of(plan.levers["exact_batchnorm"]) in list(WAYS.values())[list(WAYS).index(way) :]
    assert (plan.predicted_peak_bytes or 0) <= usable_bytes(budget_of(usable))


def test_what_is_probed_late_has_the_laws_that_it_has_anyhow() -> None:
    found = known(int(0.98 * least_bytes("every fourth"))).footprint.variants
    assert {(v.lever, str(v.knobs)): v.laws for v in found} == {
        (v.lever, str(v.knobs)): v.laws for v in footprint().variants
    }
    # Times by how often a row runs.
    first, *others = [v for v in found if v.lever == "exact_batchnorm"]
    for other in others:
        for field in ("seconds_per_row", "seconds_per_chunk"):
            ratio = (other.forwards_per_step + 2) / (first.forwards_per_step + 2)
            assert getattr(other, field) == pytest.approx(ratio * getattr(first, field))


@pytest.mark.parametrize("way", ["every fourth", "together"])
def test_its_gradients_are_those_of_the_plain_step(way: str) -> None:
    plan = settled(int(0.98 * least_bytes({"every fourth": "all boundaries", "together": "every fourth"}[way])))
    step, batch = stepped(plan=dataclasses.replace(plan, signature=""))
    model, twin = step.declared.network, copy.deepcopy(step.declared.network)
    cross_entropy(twin(batch[0]), batch).backward()
    with step:
        assert sg.verify_step(step, batch).same
        step.backward(batch)
    for ours, theirs in zip(model.buffers(), twin.buffers()):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_planted_that_nothing_more_is_tried_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    usable = int(0.98 * least_bytes("every fourth"))
    assert settled(usable).levers
    monkeypatch.setattr(untried_ways, "_needs_more", lambda *_: False)
    with pytest.raises(BudgetTooSmall):
        settled(usable, measured(usable))


def test_a_way_that_is_another_step_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from samegrad.errors import CannotSplit

    def refused(*_: object) -> None:
        raise CannotSplit(asked="planted", found="planted", do="nothing")

    monkeypatch.setattr(untried_ways, "examine_mapped", refused)
    measurement = measured(int(0.98 * least_bytes("all boundaries")))
    assert probed(measurement) == [WAYS["all boundaries"]] and not measurement.ways.untried
    assert "exact_batchnorm" not in measurement.footprint.refusals
    assert [lockstep_of(lever.knobs()) for lever in measurement.ways.mapped if "rows" in lever.knobs()] == [(1, 1)]


def test_where_blocks_one_by_one_keep_too_much_runs_of_them_are_tried_before_lockstep() -> None:
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU()) for _ in range(9)]
    model = nn.Sequential(*blocks, nn.Linear(16, 3)).double()
    batch = torch.randn(400, 16, dtype=torch.float64), torch.arange(400) % 3
    footprint = sg.measure_step(sg.Step(model, cross_entropy), batch)
    again = [
        (variant.knobs["blocks"], max(law.peak_bytes(rows=400, batch_rows=400) for law in variant.laws))
        for variant in footprint.variants if variant.lever == "recompute"
    ]  # fmt: skip
    (single, most), (runs, least) = again
    assert single == [str(place) for place in range(9)] and runs == [["0", "1", "2"], ["3", "4", "5"], ["6", "7", "8"]]
    assert least < 0.9 * most
    ours, plain = copy.deepcopy(model), copy.deepcopy(model)
    step = sg.Step(ours, cross_entropy, budget=budget_for((least + most) // 2, Counting.TENSOR_BYTES))
    step.backward(batch)
    assert step.plan is not None and step.plan.levers == {"recompute": {"blocks": runs}}
    cross_entropy(plain(batch[0]), batch).backward()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(ours.parameters(), plain.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(ours.buffers(), plain.buffers()))
