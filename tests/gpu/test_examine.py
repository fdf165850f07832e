"""What is examined on a card is judged by the numbers that its kernels compute with."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import samegrad as sg
from samegrad.errors import CannotSplit

pytestmark = pytest.mark.gpu


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


@pytest.mark.parametrize("tf32", [False, True])
def test_convolutions_in_tf32_are_split_by_rows(tf32: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", tf32)
    torch.manual_seed(0)
    model, batch = Up().cuda(), torch.randn(8, 3, 128, 128, device="cuda")
    with sg.Step(model, squared, rows=2) as step:
        step.backward(batch)


@pytest.mark.parametrize("tf32", [False, True])
def test_planted_hooks_that_are_not_linear_are_named_all_the_same(tf32: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", tf32)
    torch.manual_seed(0)
    model, batch = Up().cuda(), torch.randn(8, 3, 64, 64, device="cuda")
    model.body[9].register_full_backward_hook(lambda module, grads, _: tuple(g.clamp(-1e-3, 1e-3) for g in grads))
    with sg.Step(model, squared, rows=2) as step, pytest.raises(CannotSplit, match=r"body\.9"):
        step.backward(batch)
