"""What a step's own code raises under a lever speaks against the lever, and ends nothing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import samegrad as sg
from samegrad.errors import BadInput, CannotSplit
from samegrad.settle import smaller_plans
from samegrad.settle.own_code import own_code_under

from ..contract.plain import assert_close, gradients, left_alone, plain_step
from ..measure.traced import cross_entropy


class Viewing(nn.Module):
    """Takes a view of what a convolution made, which has other strides with channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8 * 64, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.second(F.relu(self.first(x))))
        made: Tensor = self.head(x.view(len(x), -1))
        return made


def step(**given: str) -> tuple[sg.Step, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    model, batch = Viewing().double(), (torch.randn(37, 3, 12, 12, dtype=torch.float64), torch.arange(37) % 5)
    return sg.Step(model, cross_entropy, optimizer=torch.optim.SGD(model.parameters(), 0.1), **given), batch


def test_a_model_that_takes_views_of_images_is_planned_without_channels_last() -> None:
    mine, batch = step(budget="700KiB")
    _, expected = plain_step(mine.declared.model, cross_entropy, batch)
    with left_alone(mine.declared.model, optimizer=mine.declared.optimizer):
        plan = mine.prepare(batch)
    assert plan.levers and "layout" not in plan.levers
    reason = plan.reasons["layout"]
    assert reason.startswith("refused: the step's own code raises under it, in forward")
    assert "test_own_code.py" in reason and "view" in reason
    mine.backward(batch)
    assert_close(gradients(mine.declared.model), expected)


@pytest.mark.parametrize("error", [kind("its own") for kind in (ZeroDivisionError, RuntimeError, KeyError)], ids=repr)
def test_an_error_of_the_users_code_is_a_reason(error: Exception) -> None:
    declared = step()[0].declared
    with pytest.raises(CannotSplit, match="own code raises under it") as raised, own_code_under(["layout"], declared):
        raise error
    assert "its own" in raised.value.found
    assert raised.value.__cause__ is error and "layout" in raised.value.asked


def test_an_error_of_samegrads_own_goes_on() -> None:
    with pytest.raises(AttributeError), own_code_under(["layout"], step()[0].declared):
        # Raised by a line of samegrad, which no user's code called into by way of torch.
        smaller_plans(None, None, None).__next__()  # type: ignore[arg-type]  # what makes it raise


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("planted"), MemoryError(), BadInput(asked="a", found="b", do="c"), KeyboardInterrupt()],
    ids=repr,
)
def test_what_is_no_error_of_the_users_code_goes_on(error: BaseException) -> None:
    with pytest.raises(type(error)) as raised, own_code_under(["layout"], step()[0].declared):
        raise error
    assert raised.value is error
