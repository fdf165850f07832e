"""What a plan must leave of weights and of the optimizer's state is found where it did not, and put back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import samegrad as sg
from samegrad.verify.kept import PUT_BACK, Kept

from ..contract.lever_zoo import cnn, forced, plan_with
from ..contract.plain import cross_entropy, left_alone

STANDING = plan_with(layout={}, optimizer_state={})


def trained() -> tuple[Any, Any, sg.Step]:
    model, batch = cnn()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    cross_entropy(model(batch[0]), batch).backward()
    optimizer.step()
    return model, optimizer, forced(model, cross_entropy, optimizer=optimizer, **STANDING.levers)


def turned(tensor: Tensor) -> None:
    """The same values at other places in memory."""
    tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)


CHANGES = {
    "a value": ("0.weight", lambda model, state: model[0].weight.data.add_(1)),
    "strides": ("0.weight", lambda model, state: turned(model[0].weight)),
    "not a number": ("9.bias", lambda model, state: model[9].bias.data.fill_(float("nan"))),
    "state": ("momentum_buffer of 0.weight", lambda model, state: state["momentum_buffer"].zero_()),
    "state in another dtype": (
        "momentum_buffer of 0.weight",
        lambda model, state: state.update(momentum_buffer=state["momentum_buffer"].half()),
    ),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_what_was_changed_is_named_and_put_back(change: str) -> None:
    model, optimizer, step = trained()
    name, apply = CHANGES[change]
    strides = [p.stride() for p in model.parameters()]
    with left_alone(model, optimizer=optimizer), Kept.under(STANDING, step.declared) as kept:
        apply(model, optimizer.state[model[0].weight])
        [check] = kept.checks()
        assert not check.passed and check.name == PUT_BACK and check.worst == name and check.tier == 0
        assert kept.checks()[0].passed
    assert strides == [p.stride() for p in model.parameters()]


def test_nothing_is_said_where_nothing_was_changed() -> None:
    model, _, step = trained()
    addresses = [p.data_ptr() for p in model.parameters()]
    with Kept.under(STANDING, step.declared) as kept:
        assert all(check.passed for check in kept.checks())
    assert addresses == [p.data_ptr() for p in model.parameters()]


def test_it_is_put_back_after_an_exception_too() -> None:
    model, optimizer, step = trained()
    with (
        left_alone(model, optimizer=optimizer),
        pytest.raises(ZeroDivisionError),
        Kept.under(STANDING, step.declared),
    ):
        turned(model[0].weight)
        raise ZeroDivisionError


def test_a_plan_that_leaves_them_where_they_are_costs_no_copy() -> None:
    _, _, step = trained()
    with Kept.under(plan_with(split_rows={"rows": 3}), step.declared) as kept:
        assert kept.copies == {} and kept.checks() == []


def test_the_plain_side_has_the_users_strides_whatever_stood_before(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, step = trained()
    step.backward(cnn()[1])
    assert not model[0].weight.is_contiguous()
    seen: list[bool] = []
    forward = type(model[0]).forward

    def noting(self: Any, x: Tensor) -> Tensor:
        seen.append(self.weight.is_contiguous())
        return forward(self, x)

    monkeypatch.setattr(type(model[0]), "forward", noting)
    assert sg.verify_step(step, cnn()[1]).same
    assert seen[0] and not all(seen) and model[0].weight.is_contiguous()
    step.backward(cnn()[1])
    assert not model[0].weight.is_contiguous()
    step.close()
