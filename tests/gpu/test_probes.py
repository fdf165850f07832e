"""Probes on a card: what launches take is not taken for what rows take."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor, nn

import samegrad as sg

pytestmark = pytest.mark.gpu
ROWS, LAYERS = 4096, 300


def coupled(outputs: Tensor, batch: Tensor) -> Tensor:
    # Two passes: the loss sees all rows at once.
    return (outputs @ outputs.T).logsumexp(1).mean()


def test_a_step_bound_by_launches_is_predicted_from_few_rows() -> None:
    layers = [layer for _ in range(LAYERS) for layer in (nn.Linear(16, 16), nn.Tanh())]
    model, batch = nn.Sequential(*layers).cuda(), torch.randn(ROWS, 16, device="cuda")

    def plain() -> None:
        coupled(model(batch), batch).backward()
        model.zero_grad(set_to_none=True)

    plain()
    torch.cuda.synchronize()
    begun = time.perf_counter()
    plain()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - begun
    predicted = sg.measure_step(sg.Step(model, coupled, rows=64), batch).predicted_seconds(rows=ROWS)
    assert predicted is not None
    # Chunks run forward twice, and hosts are busy now and then. For rows, launches would make it hundreds of times.
    assert predicted < 6 * seconds
