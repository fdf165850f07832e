"""State that a loss or a forward keeps in a closure, an object or a global: as after the plain step, or refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import samegrad as sg
from samegrad.errors import FalseNormalise, UsageError
from samegrad.exact import held

from .plain import assert_close, gradients, labelled, mlp

N = 61
COUNTED = {"calls": 0}
Made = tuple[Any, Any, Callable[[], tuple[Tensor, int]]]


def square(outputs: Tensor, batch: Any) -> Tensor:
    return F.mse_loss(outputs, torch.zeros_like(outputs))


def closure() -> Made:
    centre, calls = torch.zeros(3, dtype=torch.float64), [0]

    def loss_fn(outputs: Tensor, batch: Any) -> Tensor:
        loss = F.mse_loss(outputs - centre, torch.zeros_like(outputs))
        centre.mul_(0.9).add_(outputs.detach().mean(0) * 0.1)
        calls[0] += 1
        return loss

    return loss_fn, None, lambda: (centre, calls[0])


def rebound() -> Made:
    centre, calls = torch.zeros(3, dtype=torch.float64), 0

    def loss_fn(outputs: Tensor, batch: Any) -> Tensor:
        nonlocal centre, calls
        loss = F.mse_loss(outputs - centre, torch.zeros_like(outputs))
        centre, calls = centre * 0.9 + outputs.detach().mean(0) * 0.1, calls + 1
        return loss

    return loss_fn, None, lambda: (centre, calls)


class Centred:
    def __init__(self) -> None:
        self.centre, self.calls = torch.zeros(3, dtype=torch.float64), 0

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        loss = F.mse_loss(outputs - self.centre, torch.zeros_like(outputs))
        self.centre, self.calls = self.centre * 0.9 + outputs.detach().mean(0) * 0.1, self.calls + 1
        return loss

    __call__ = loss


def method() -> Made:
    mine = Centred()
    return mine.loss, None, lambda: (mine.centre, mine.calls)


def instance() -> Made:
    mine = Centred()
    return mine, None, lambda: (mine.centre, mine.calls)


def within_a_closure() -> Made:
    mine = Centred()
    return (lambda outputs, batch: mine.loss(outputs, batch)), None, lambda: (mine.centre, mine.calls)


def module_not_given() -> Made:
    norm = nn.BatchNorm1d(3).double().requires_grad_(False)
    return (
        lambda outputs, batch: (norm(outputs) + outputs).square().mean(),
        None,
        lambda: (norm.running_mean.clone(), int(norm.num_batches_tracked)),
    )


def counting(outputs: Tensor, batch: Any) -> Tensor:
    COUNTED["calls"] += 1
    return square(outputs, batch)


def of_a_global() -> Made:
    COUNTED["calls"] = 0
    return counting, None, lambda: (torch.zeros(()), COUNTED["calls"])


def in_forward() -> Made:
    centre, calls = torch.zeros(3, dtype=torch.float64), [0]

    def forward(model: nn.Module, batch: Any) -> Tensor:
        outputs: Tensor = model(batch[0])
        centre.mul_(0.9).add_(outputs.detach().mean(0) * 0.1)
        calls[0] += 1
        return outputs

    return square, forward, lambda: (centre, calls[0])


CASES = [closure, rebound, method, instance, within_a_closure, module_not_given, of_a_global, in_forward]


@pytest.mark.parametrize("options", [{"rows": 8}, {"rows": N}, {"budget": "1GiB"}, {"budget": "22KiB"}], ids=str)
@pytest.mark.parametrize("make", CASES, ids=lambda make: make.__name__)
def test_two_steps_leave_what_plain_steps_leave(make: Callable[[], Made], options: dict[str, Any]) -> None:
    batch, model = labelled(N), mlp()
    plain = copy.deepcopy(model)
    loss_fn, forward, read = make()
    for _ in range(2):
        loss_fn(forward(plain, batch) if forward else plain(batch[0]), batch).backward()
    centre, calls = read()
    loss_fn, forward, read = make()
    step = sg.Step(model, loss_fn, forward=forward, **options)
    for _ in range(2):
        step.backward(batch)
    assert_close(gradients(model), gradients(plain))
    ours, our_calls = read()
    assert our_calls == calls
    torch.testing.assert_close(ours, centre)


@pytest.mark.parametrize("make", CASES, ids=lambda make: make.__name__)
def test_measuring_and_verifying_leave_it_alone(make: Callable[[], Made]) -> None:
    loss_fn, forward, read = make()
    step = sg.Step(mlp(), loss_fn, forward=forward, rows=8)
    before = copy.deepcopy(read())
    verdict = sg.verify_step(step, labelled(N))
    after = read()
    assert verdict.same
    assert torch.equal(after[0], before[0]) and after[1] == before[1]


def test_a_declared_loss_that_keeps_state_is_refused() -> None:
    loss_fn, _, _ = closure()
    with pytest.raises(FalseNormalise, match="loss_fn's centre"):
        sg.Step(mlp(), loss_fn, rows=8, normalise="mean").backward(labelled(N))


@pytest.mark.parametrize("lever", [{}, {"autocast": {}}, {"offload_saved": {"smallest_bytes": 0}}], ids=str)
def test_a_step_that_raises_puts_it_back(lever: dict[str, Any]) -> None:
    loss_fn, _, read = closure()
    model = mlp()
    plan = sg.Plan(levers={"split_rows": {"rows": 8}, **lever}, exactness=sg.Exactness.SAME_SUM, batch_rows=N)
    step = sg.Step(model, loss_fn, plan=plan, allow=sg.Exactness.ROUNDED)
    step.backward(labelled(N))
    before = copy.deepcopy(read())

    def broken(gradient: Tensor) -> Tensor:
        raise RuntimeError("planted")

    def plant(module: nn.Module, args: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(broken)

    handle = model[0].register_forward_hook(plant)
    with pytest.raises(RuntimeError, match="planted"):
        step.backward(labelled(N))
    handle.remove()
    assert torch.equal(read()[0], before[0]) and read()[1] == before[1]


def test_what_is_too_large_to_be_set_aside_is_refused_when_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held, "_LARGEST_BYTES", 8)
    loss_fn, _, _ = closure()
    with pytest.raises(UsageError, match="loss_fn's centre is written"):
        sg.Step(mlp(), loss_fn, rows=8).backward(labelled(N))


def test_the_planted_fault_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held.Place, "restore", lambda place: None)
    batch, model = labelled(N), mlp()
    plain = copy.deepcopy(model)
    loss_fn, _, _ = closure()
    for _ in range(2):
        loss_fn(plain(batch[0]), batch).backward()
    loss_fn, _, _ = closure()
    step = sg.Step(model, loss_fn, rows=8)
    for _ in range(2):
        step.backward(batch)
    with pytest.raises(AssertionError):
        assert_close(gradients(model), gradients(plain))
