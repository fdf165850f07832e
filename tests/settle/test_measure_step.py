"""What ``measure_step`` tells is of the whole step, however few rows it was probed on."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import samegrad as sg
from samegrad.records import Same

ROWS = 512


def mean_loss(outputs: Tensor, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(outputs, batch[1])


def pair_loss(outputs: Tensor, batch: Any) -> Tensor:
    return torch.cdist(outputs, outputs).square().mean()


class Centred(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


CASES: dict[str, tuple[Any, Any]] = {
    "split by rows": (lambda: nn.Linear(64, 10), mean_loss),
    "two passes": (lambda: nn.Linear(64, 10), pair_loss),
    "whole": (lambda: nn.Sequential(nn.Linear(64, 10), Centred()), mean_loss),
    "coupled": (lambda: nn.Sequential(nn.Linear(64, 96), nn.BatchNorm1d(96), nn.Linear(96, 10)), mean_loss),
}


def stepped(name: str) -> sg.Step:
    torch.manual_seed(0)
    make, loss = CASES[name]
    model = make()
    return sg.Step(model, loss, optimizer=torch.optim.Adam(model.parameters()), budget="1GiB")


def batch(rows: int = ROWS) -> Any:
    return torch.randn(rows, 64), torch.arange(rows) % 10


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("rows", [ROWS, 8])
def test_the_peak_is_the_plain_steps_on_all_rows(name: str, rows: int) -> None:
    step = stepped(name)
    found = sg.measure_step(step, batch(rows))
    whole = sg.Step(step.declared.model, step.declared.loss_fn,
                    optimizer=step.declared.optimizer, rows=rows)  # fmt: skip
    counter = sg.count_bytes(whole)
    list(sg.train(whole, [batch(rows)], counter=counter))
    counted = next(sg.train(whole, [batch(rows)], counter=counter)).peak_allocated_bytes
    assert counted is not None
    assert found.peak_allocated_bytes == pytest.approx(counted, rel=0.02)


@pytest.mark.parametrize("name", CASES)
def test_all_that_is_told_is_of_that_step_and_called_predicted(name: str) -> None:
    step = stepped(name)
    found = sg.measure_step(step, batch())
    assert (found.rows, found.batch_rows, found.origin.value) == (ROWS, ROWS, "predicted")
    assert found.peak_allocated_bytes == found.predicted_peak_bytes(rows=ROWS) == max(found.by_phase.values())
    # What lived at a probe's peak did not live at this one.
    assert found.by_category == {} and found.timeline == () and found.peak_reserved_bytes is None
    assert sg.Footprint.from_json(found.to_json()) == found


def test_the_footprint_that_a_plan_came_from_is_the_same_steps() -> None:
    step = stepped("split by rows")
    alone = sg.measure_step(step, batch())
    plan, footprint = sg.settle_plan(step, batch(), budget=int(0.9 * alone.peak_allocated_bytes))
    assert plan.levers and footprint.peak_allocated_bytes == pytest.approx(alone.peak_allocated_bytes, rel=0.02)
    step.prepare(batch())
    assert step.footprint is not None and step.footprint.rows == ROWS


class Reads(nn.Module):
    """A model that looks at a value of its rows, or at how many there are that count."""

    def __init__(self, reads: str) -> None:
        super().__init__()
        self.inner, self.reads = nn.Linear(6, 3), reads

    def forward(self, rows: Tensor) -> Tensor:
        if self.reads == "number" and rows.abs().max().item() > 1e6:
            rows = rows * 0.1
        if self.reads == "truth" and (rows.abs() > 1e6).any():
            rows = rows * 0.1
        if self.reads == "count" and int((rows[:, 0] > 1e6).sum()) > 10**6:
            rows = rows * 0.1
        made: Tensor = self.inner(rows)
        return made


@pytest.mark.parametrize(("reads", "is_told"), [("truth", True), ("count", False), ("nothing", False)])
def test_a_forward_that_reads_a_truth_is_told_by_its_line(reads: str, is_told: bool) -> None:
    step = sg.Step(Reads(reads), lambda outputs, batch: outputs.square().mean(), rows=8)
    facts = sg.measure_step(step, torch.randn(64, 6)).facts
    assert ("values of the batch" in facts) is is_told
    if is_told:
        assert re.search(r"test_measure_step\.py:\d+", facts["values of the batch"])


@pytest.mark.parametrize("is_loud", [True, False])
def test_a_truth_that_turns_one_chunk_alone_is_told_and_found_by_the_verifier(is_loud: bool) -> None:
    """Split all the same, since most truths check a mask; the line is told, and the verifier sees what it does."""
    batch = torch.randn(512, 6)
    if is_loud:
        batch[300] = 1e7
    step = sg.Step(Reads("truth"), lambda outputs, batch: outputs.square().mean())
    footprint = sg.measure_step(step, batch)
    assert "values of the batch" in footprint.facts
    split = sg.Step(copy.deepcopy(step.declared.model), lambda outputs, batch: outputs.square().mean(), rows=256)
    verdict = sg.verify_step(split, batch)
    assert (verdict.answer is Same.DIFFERS) is is_loud


def test_rows_are_not_split_unasked_where_the_forward_reads_a_number_of_them() -> None:
    """One loud row turns its whole batch down; in chunks it would turn down its own chunk, without an error."""
    batch = torch.randn(512, 6)
    batch[300] = 1e7
    plain = Reads("number")
    step = sg.Step(copy.deepcopy(plain), lambda outputs, batch: outputs.square().mean())
    footprint = sg.measure_step(step, batch)
    assert re.search(r"reads a number of its rows \(test_measure_step\.py:\d+\)", footprint.refusals["split_rows"])
    with pytest.raises(sg.CannotSplit, match="reads a number of its rows"):
        sg.settle_plan(step, batch, budget=footprint.predicted_peak_bytes(rows=512) // 2)
    # Pinned by somebody who knows, it runs; and what it does then is what verify_step is for.
    pinned = sg.Step(copy.deepcopy(plain), lambda outputs, batch: outputs.square().mean(), rows=256)
    assert sg.verify_step(pinned, batch).answer is Same.DIFFERS
