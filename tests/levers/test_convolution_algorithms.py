"""cuDNN's switch: on while the step runs, as it was before and after, whatever happens; and who cannot use it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import samegrad as sg
from samegrad.declared import declare
from samegrad.execute.apply import applied
from samegrad.levers.convolution_algorithms import ConvolutionAlgorithms

from ..contract.lever_zoo import MODELS, plan_with
from ..contract.plain import assert_close, cross_entropy, gradients, plain_step

PLAN = plan_with(convolution_algorithms={})


@pytest.mark.parametrize("before", [False, True])
def test_the_switch_is_on_in_the_step_and_as_it_was_outside(before: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", before)
    step = declare(MODELS["cnn"]()[0], cross_entropy)
    with applied(PLAN, step, 13):
        assert torch.backends.cudnn.benchmark
    assert torch.backends.cudnn.benchmark is before
    with pytest.raises(ZeroDivisionError), applied(PLAN, step, 13):
        raise ZeroDivisionError
    assert torch.backends.cudnn.benchmark is before


def test_off_cuda_without_convolutions_or_with_the_switch_on_it_is_not_for_a_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    convolving = declare(MODELS["cnn"]()[0], cross_entropy)
    on_card = dataclasses.replace(convolving, device=torch.device("cuda", 0))
    assert ConvolutionAlgorithms.unsuited(on_card) is None
    assert "the model is on cpu" in (ConvolutionAlgorithms.unsuited(convolving) or "")
    linear = dataclasses.replace(declare(nn.Linear(6, 3), cross_entropy), device=on_card.device)
    assert ConvolutionAlgorithms.unsuited(linear) == "the model has no convolution layer"
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    assert "is on" in (ConvolutionAlgorithms.unsuited(on_card) or "")


@pytest.mark.parametrize("split", [{}, {"split_rows": {"rows": 5}}], ids=["whole", "split"])
def test_it_is_on_where_the_model_runs_and_the_gradient_is_the_plain_one(
    split: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = MODELS["cnn"]()
    seen: list[bool] = []
    right = nn.Conv2d._conv_forward

    def noted(*args: Any) -> Tensor:
        seen.append(torch.backends.cudnn.benchmark)
        return right(*args)

    with sg.Step(model, cross_entropy, plan=plan_with(convolution_algorithms={}, **split)) as step:
        # Examined in the first, without the plan.
        step.backward(batch)
        model.zero_grad()
        monkeypatch.setattr(nn.Conv2d, "_conv_forward", noted)
        step.backward(batch)
    assert seen and all(seen) and not torch.backends.cudnn.benchmark
    monkeypatch.undo()
    assert_close(gradients(model), plain_step(model, cross_entropy, batch)[1])
