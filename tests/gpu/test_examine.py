"""What is examined on a card is judged by the numbers that its kernels compute with."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import samegrad as sg
from samegrad.errors import FalseNormalise

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True, params=[False, True], ids=["float32", "tf32"])
def tf32(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", request.param)
    torch.manual_seed(0)
    return bool(request.param)


class Up(nn.Module):
    """Convolutions between group norms at the size of images, where a bias's gradient is a long sum."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        blocks = [
            layer
            for _ in range(6)
            for layer in (nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(32, width), nn.SiLU())
        ]
        self.body = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), *blocks, nn.Conv2d(width, 3, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


def squared(outputs: Tensor, batch: Tensor) -> Tensor:
    return (outputs - batch).square().mean()


def test_convolutions_in_tf32_are_split_by_rows() -> None:
    model, batch = Up().cuda(), torch.randn(8, 3, 128, 128, device="cuda")
    with sg.Step(model, squared, rows=2) as step:
        step.backward(batch)


def test_planted_hooks_that_are_not_linear_are_named_and_split_around(tf32: bool) -> None:
    model, batch = Up().cuda(), torch.randn(8, 3, 64, 64, device="cuda")
    model.body[9].register_full_backward_hook(lambda module, grads, _: tuple(g.clamp(-1e-3, 1e-3) for g in grads))
    plain = copy.deepcopy(model)
    squared(plain(batch), batch).backward()
    with sg.Step(model, squared, rows=2) as step:
        step.backward(batch)
        assert "the backward of body.9 (SiLU) is no sum over rows" in step.explain()
    # Of the largest: biases before a norm have gradients that are zero by structure.
    gradients: list[list[Any]] = [[p.grad for p in one.parameters()] for one in (model, plain)]
    largest = max(float(g.abs().max()) for g in gradients[1])
    worst = max(float((a - b).abs().max()) for a, b in zip(*gradients))
    assert worst < (1e-2 if tf32 else 1e-4) * largest


class Perceptual(nn.Module):
    """A loss with convolutions of its own, on the images that the model made."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 128, 3, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(128, 256, 3, stride=2, padding=1),
        ).requires_grad_(False)  # fmt: skip

    def forward(self, outputs: Tensor, batch: Tensor) -> Tensor:
        return (self.features(outputs) - self.features(batch)).square().mean()


def weighted(outputs: Tensor, batch: Tensor) -> Tensor:
    """Half a percent from the mean that it is said to be, on all but the whole batch."""
    return squared(outputs, batch) * (1 + 0.005 * (len(outputs) < 8))


def test_a_loss_with_convolutions_is_the_mean_that_it_is_said_to_be(tf32: bool) -> None:
    model, batch = Up(32).cuda(), torch.randn(8, 3, 64, 64, device="cuda")
    with sg.Step(model, Perceptual().cuda(), rows=3, normalise="mean") as step:
        step.backward(batch)
    assert torch.backends.cudnn.allow_tf32 is tf32


def test_planted_a_mean_that_is_half_a_percent_off_is_refused() -> None:
    model, batch = Up(32).cuda(), torch.randn(8, 3, 64, 64, device="cuda")
    with sg.Step(model, weighted, rows=3, normalise="mean") as step, pytest.raises(FalseNormalise):
        step.backward(batch)
