"""What is tried on a few rows before a lever is believed: rounding is no difference, and nothing hides behind it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import samegrad as sg
from samegrad.exact.stage_tracing import trace_stages
from samegrad.exact.stages import Untraceable
from samegrad.execute import trial

from ..contract.plain import cross_entropy

LAYERS, WIDTH = 12, 32


def under_autocast(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """A forward that enters autocast by itself, which nobody outside it sees."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found: Tensor = model(batch[0])
    return found


class AcrossRows(nn.Module):
    """Takes from every row a little of what the other rows of its call have."""

    def forward(self, x: Tensor) -> Tensor:
        return x - 0.2 * x.mean(dim=0)


def deep(last: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    hidden = [layer for _ in range(LAYERS) for layer in (nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU())]
    return nn.Sequential(*hidden, last, nn.Linear(WIDTH, 3))


def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(16, WIDTH), torch.randint(0, 3, (16,))


def refused(model: nn.Module, forward: Any = None) -> str:
    return sg.measure_step(sg.Step(model, cross_entropy, forward=forward), batch()).refusals.get("exact_batchnorm", "")


def test_batchnorm_in_chunks_is_believed_where_bfloat16_leaves_few_digits() -> None:
    assert not refused(deep(nn.Identity()))
    assert not refused(deep(nn.Identity()), under_autocast)


@pytest.mark.parametrize("forward", [None, under_autocast])
def test_what_couples_rows_beside_it_is_not(forward: Any) -> None:
    assert "sees other rows" in refused(deep(AcrossRows()), forward)


def test_copies_in_float64_that_do_not_fit_are_made_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[torch.device] = []
    right = trial.float64_declared

    def short(declared: Any, device: torch.device) -> Any:
        tried.append(device)
        if len(tried) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return right(declared, device)

    monkeypatch.setattr(trial, "float64_declared", short)
    assert not refused(deep(nn.Identity()), under_autocast)
    assert len(tried) > 1 and all(device.type == "cpu" for device in tried[1:])


class Dropping(nn.Module):
    """BatchNorm and dropout; ``forgetful``: it computes something else while it is recorded."""

    def __init__(self, forgetful: bool) -> None:
        super().__init__()
        self.norm, self.drop, self.forgetful = nn.BatchNorm1d(WIDTH), nn.Dropout(0.5), forgetful

    def forward(self, x: Tensor) -> Tensor:
        normal: Tensor = self.norm(x)
        return self.drop(normal) * (2 if self.forgetful and type(x) is not Tensor else 1)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_recording_is_compared_under_the_same_draws(device: str) -> None:
    x = torch.randn(6, WIDTH, device=device)
    trace_stages(Dropping(forgetful=False).to(device), (x,), {}, rows=6)
    with pytest.raises(Untraceable, match="another way while it is recorded"):
        trace_stages(Dropping(forgetful=True).to(device), (x,), {}, rows=6)
