"""Optimizer state is foreseen by the byte, and nothing is touched to foresee it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import nn

import samegrad as sg
from samegrad import trees
from samegrad.declared import declare
from samegrad.measure.census import count_residents, state_tensors
from samegrad.measure.counting import ByteCounter
from samegrad.records import Category, Phase

from ..contract.plain import cross_entropy, labelled, left_alone, mlp

Parameters = Iterable[nn.Parameter]
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": functools.partial(torch.optim.SGD, lr=0.1),
    "sgd with momentum": functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "adam": torch.optim.Adam,
    "adamw with amsgrad": functools.partial(torch.optim.AdamW, amsgrad=True),
    "adam in one call": functools.partial(torch.optim.Adam, foreach=True),
    "rmsprop": functools.partial(torch.optim.RMSprop, momentum=0.9, centered=True),
    "adagrad": torch.optim.Adagrad,
    "nadam": torch.optim.NAdam,
    "adamax": torch.optim.Adamax,
    "adafactor": torch.optim.Adafactor,
    "asgd": torch.optim.ASGD,
    "rprop": torch.optim.Rprop,
}


class Remembering(torch.optim.SGD):
    """A user's optimizer with attributes of its own."""

    def __init__(self, parameters: Parameters, lr: float = 0.1) -> None:
        self.every = 2
        super().__init__(parameters, lr=lr, momentum=0.5)

    def step(self, closure: Any = None) -> Any:
        assert self.every == 2
        return super().step(closure)


def one_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    batch = labelled(8)
    cross_entropy(model(batch[0]), batch).backward()
    optimizer.step()


@pytest.mark.parametrize("name", [*OPTIMIZERS, "a user's own"])
def test_the_state_foreseen_is_the_state_after_a_real_step(name: str) -> None:
    make = OPTIMIZERS.get(name, Remembering)
    model = mlp()
    optimizer = make(model.parameters())
    foreseen = count_residents(declare(model, cross_entropy, optimizer=optimizer))
    before = trees.storage_bytes(state_tensors(optimizer))
    one_step(model, optimizer)
    real = trees.storage_bytes(state_tensors(optimizer))
    assert foreseen.by_category[Category.OPTIMIZER_STATE] == real
    assert foreseen.missing_state_bytes == real - before
    after = count_residents(declare(model, cross_entropy, optimizer=optimizer))
    assert after.by_category[Category.OPTIMIZER_STATE] == real and after.missing_state_bytes == 0


@pytest.mark.parametrize("name", ["sgd with momentum", "adam", "adamw with amsgrad", "rmsprop", "adam in one call"])
def test_what_the_optimizers_own_step_takes_besides_is_foreseen(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 20)).double()
    optimizer = OPTIMIZERS[name](model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    foreseen = count_residents(declare(model, cross_entropy, optimizer=optimizer))
    counter = ByteCounter(torch.device("cpu"))
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    counter.claim([*model.parameters(), *grads, *state_tensors(optimizer)], Category.PARAMETERS)
    counter.reset_peaks()
    held = counter.live_bytes
    counter.announce(Phase.OPTIMIZER)
    with counter:
        optimizer.step()
    real = counter.peak_bytes - held
    assert abs(foreseen.optimizer_temporary_bytes - real) <= 0.05 * real + 256


@pytest.mark.parametrize("name", [*OPTIMIZERS, "a user's own"])
@pytest.mark.parametrize("started", [False, True])
def test_foreseeing_touches_nothing(name: str, started: bool) -> None:
    model = mlp()
    optimizer = OPTIMIZERS.get(name, Remembering)(model.parameters())
    fired: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: fired.append("pre"))
    optimizer.register_step_post_hook(lambda *_: fired.append("post"))
    # A scheduler wraps the optimizer's step, which must not reach the real one.
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    if started:
        optimizer.step()
        fired.clear()
    attributes = dict(vars(optimizer))
    with left_alone(model, optimizer=optimizer):
        count_residents(declare(model, cross_entropy, optimizer=optimizer))
    assert fired == []
    assert vars(optimizer).keys() == attributes.keys()


def test_a_forward_that_raises_leaves_everything_as_it_was() -> None:
    class Fails(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3), nn.Dropout()).double()
            self.calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            if self.calls == 2:
                raise ZeroDivisionError
            return self.inner(x)

    model = Fails()
    optimizer = torch.optim.Adam(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    with left_alone(model, optimizer=optimizer), pytest.raises(ZeroDivisionError):
        sg.measure_step(sg.Step(model, cross_entropy, optimizer=optimizer), labelled(29))


def test_parameters_gradients_and_buffers_are_counted_once() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 6), nn.Linear(6, 3))
    model[2].weight = model[0].weight
    model[3].requires_grad_(False)
    residents = count_residents(declare(model, cross_entropy)).by_category
    tied, frozen = (6 * 6 + 6 + 6 + 6 + 6) * 4, (6 * 3 + 3) * 4
    assert residents[Category.PARAMETERS] == tied + frozen
    assert residents[Category.GRADIENTS] == tied
    assert residents[Category.BUFFERS] == 6 * 4 * 2 + 8
    assert residents[Category.OPTIMIZER_STATE] == 0


def test_the_parameters_of_the_loss_are_counted_with_the_models() -> None:
    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(100))

        def forward(self, outputs: Any, batch: Any) -> torch.Tensor:
            return cross_entropy(outputs, batch) * self.scale.mean()

    model = mlp(torch.float32)
    without = count_residents(declare(model, cross_entropy)).by_category
    with_loss = count_residents(declare(model, Loss())).by_category
    assert with_loss[Category.PARAMETERS] - without[Category.PARAMETERS] == 400
    assert with_loss[Category.GRADIENTS] - without[Category.GRADIENTS] == 400


def test_frozen_parameters_get_no_state() -> None:
    model = mlp()
    model[0].requires_grad_(False)
    optimizer = torch.optim.Adam(model.parameters())
    foreseen = count_residents(declare(model, cross_entropy, optimizer=optimizer))
    one_step(model, optimizer)
    assert foreseen.by_category[Category.OPTIMIZER_STATE] == trees.storage_bytes(state_tensors(optimizer))


def test_a_group_added_later_is_still_missing_its_state() -> None:
    model = mlp()
    optimizer = torch.optim.Adam(model[0].parameters())
    one_step(model, optimizer)
    optimizer.add_param_group({"params": list(model[2].parameters())})
    foreseen = count_residents(declare(model, cross_entropy, optimizer=optimizer))
    before = trees.storage_bytes(state_tensors(optimizer))
    one_step(model, optimizer)
    real = trees.storage_bytes(state_tensors(optimizer))
    assert foreseen.missing_state_bytes == real - before > 0


def test_an_optimizer_that_cannot_be_foreseen_says_so() -> None:
    model = mlp()
    optimizer = torch.optim.LBFGS(model.parameters())
    with left_alone(model):
        residents = count_residents(declare(model, cross_entropy, optimizer=optimizer))
    assert "LBFGS" in residents.note
    footprint = sg.measure_step(sg.Step(model, cross_entropy, optimizer=optimizer), labelled(8))
    assert "LBFGS" in footprint.facts["optimizer"]
