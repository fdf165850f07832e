"""Output rows that are too many bytes to keep for the whole batch: refused with two ways out, and both are ways out."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import samegrad as sg
from samegrad.errors import BudgetTooSmall

from .plain import assert_close, gradients

ROWS, CLASSES = 512, 600


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, CLASSES))


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(ROWS, 16, generator=generator), torch.randint(0, CLASSES, (ROWS,), generator=generator)


def smoothed(logits: Tensor, b: Any) -> Tensor:
    """A mean over rows that its graph does not show."""
    return F.cross_entropy(logits, b[1], label_smoothing=0.1)


# A quarter of the logits.
BUDGET = ROWS * CLASSES * 4 // 4


def refusal(loss_fn: Any, make: Any = model, **how: Any) -> str:
    with pytest.raises(BudgetTooSmall) as refused:
        sg.Step(make(), loss_fn, budget=BUDGET, **how).backward(batch())
    return str(refused.value)


def test_logits_that_do_not_fit_are_refused_with_the_two_ways_out_and_their_bytes() -> None:
    text = refusal(smoothed)
    assert "normalise= if the loss is a sum over rows over a count" in text
    assert "a loss computed inside the model or a sg.rowwise function" in text
    assert "MiB of output rows" in text


def test_declaring_the_mean_is_a_way_out() -> None:
    ours, plain = model(), model()
    smoothed(plain(batch()[0]), batch()).backward()
    step = sg.Step(ours, smoothed, budget=BUDGET, normalise="mean")
    step.backward(batch())
    assert step.plan is not None and step.plan.levers["split_rows"]["rows"] < ROWS
    assert_close(gradients(ours), gradients(plain))


class WithLoss(nn.Module):
    """One number a row instead of all its logits."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.network(x), y, label_smoothing=0.1, reduction="none")


def of_pairs(losses: Tensor, b: Any) -> Tensor:
    """Couples rows, so that it takes two passes all the same."""
    return losses.mean() + losses.std()


def test_the_loss_of_a_row_inside_the_model_is_a_way_out() -> None:
    ours, plain = WithLoss(model()), WithLoss(model())
    forward = lambda m, b: m(*b)
    of_pairs(forward(plain, batch()), batch()).backward()
    step = sg.Step(ours, of_pairs, forward=forward, budget=BUDGET)
    step.backward(batch())
    assert step.plan is not None and step.plan.levers["split_rows"]["rows"] < ROWS
    assert_close(gradients(ours), gradients(plain))


def test_the_same_by_rowwise_keeps_a_number_a_row() -> None:
    plain = model()
    twin = copy.deepcopy(plain)
    losses = sg.rowwise(WithLoss(twin), rows=16)(*batch())
    of_pairs(losses, batch()).backward()
    of_pairs(WithLoss(plain)(*batch()), batch()).backward()
    assert_close(gradients(twin), gradients(plain))


def test_pairs_of_rows_have_a_way_out_of_their_own() -> None:
    def all_pairs(z: Tensor, b: Any) -> Tensor:
        z = F.normalize(z, dim=1)
        return F.cross_entropy(z @ z.T, torch.arange(len(z)))

    def small() -> nn.Module:
        torch.manual_seed(0)
        return nn.Linear(16, 4)

    text = refusal(all_pairs, small)
    assert "sg.over" in text and "normalise=" not in text


def test_no_advice_on_outputs_where_they_are_not_what_is_large() -> None:
    def deep() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(16, 400), nn.Tanh(), nn.Linear(400, 400), nn.Tanh(), nn.Linear(400, 2))

    def spread(z: Tensor, b: Any) -> Tensor:
        return z.std(0).sum()

    with pytest.raises(BudgetTooSmall) as refused:
        sg.Step(deep(), spread, budget="400KiB").backward(batch())
    assert "normalise=" not in str(refused.value)


class Distances(nn.Module):
    """torch.cdist takes other kernels from 26 rows on, which hold more than small probes see."""

    def __init__(self) -> None:
        super().__init__()
        self.centers = nn.Parameter(torch.randn(20, 64, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: Tensor) -> Tensor:
        return -torch.cdist(x, self.centers)


def test_a_plain_step_that_comes_close_to_the_budget_is_measured_before_it_is_believed() -> None:
    rows = (torch.randn(ROWS, 64, generator=torch.Generator().manual_seed(1)), torch.arange(ROWS) % 20)
    loss_fn = lambda z, b: F.cross_entropy(z, b[1])
    predicted = sg.measure_step(sg.Step(Distances(), loss_fn), rows).predicted_peak_bytes(rows=ROWS)
    model = Distances()
    counter = sg.count_bytes(sg.Step(model, loss_fn))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    *_, last = sg.train(sg.Step(model, loss_fn, rows=ROWS, optimizer=optimizer), [rows, rows], counter=counter)
    needed = last.peak_allocated_bytes
    assert needed is not None and needed > 1.05 * predicted
    budget = int(1.02 * predicted)
    step = sg.Step(Distances(), loss_fn, budget=budget)
    assert step.prepare(rows).levers["split_rows"]["rows"] < ROWS
    # Where it is far below the budget it is not run for that.
    assert sg.Step(Distances(), loss_fn, budget=2 * needed).prepare(rows).levers == {}
