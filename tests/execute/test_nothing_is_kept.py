"""What a step was examined with is gone when it is planned: rows, outputs and the frames that held them."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import samegrad as sg
from samegrad.errors import SamegradError
from samegrad.exact.probes import PROBE_ROWS

from ..contract.plain import cross_entropy, spread

# Of no other tensor in the process.
WIDTH = 61


class Centred(nn.Module):
    """Couples its rows."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


def made(middle: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), middle, nn.ReLU(), nn.Linear(WIDTH, 3))


def examined_rows_alive() -> int:
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if type(thing) is Tensor]
    return sum(tensor.ndim == 2 and tensor.shape[1] == WIDTH and len(tensor) <= PROBE_ROWS for tensor in tensors)


def planned(middle: nn.Module, loss_fn: Any, rows: int) -> sg.Step:
    batch = torch.randn(23, WIDTH), torch.randint(0, 3, (23,))
    step = sg.Step(made(middle), loss_fn, rows=rows)
    step.prepare(batch)
    return step


@pytest.mark.parametrize("loss_fn", [cross_entropy, spread], ids=["one pass", "two passes"])
@pytest.mark.parametrize("middle", [nn.Tanh(), nn.Dropout(0.2), nn.BatchNorm1d(WIDTH), Centred()], ids=repr)
def test_no_row_that_a_step_was_examined_with_lives_on(middle: nn.Module, loss_fn: Any) -> None:
    step = planned(middle, loss_fn, 10)
    assert step.plan is not None and examined_rows_alive() == 0


def test_an_error_that_is_being_handled_keeps_its_frames() -> None:
    """Whoever plans again after a failure may want to look into it."""

    def fails() -> None:
        looked_for = "still here"
        raise ValueError(looked_for)

    try:
        fails()
    except ValueError as error:
        before = error.__traceback__
        planned(nn.BatchNorm1d(WIDTH), cross_entropy, 10)
        assert error.__traceback__ is before and before is not None and before.tb_next is not None
        assert before.tb_next.tb_frame.f_locals["looked_for"] == "still here"


def test_planted_a_refusal_that_keeps_its_frames_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SamegradError, "forget_frames", lambda error: None)
    step = planned(nn.BatchNorm1d(WIDTH), cross_entropy, 10)
    assert step.plan is not None and examined_rows_alive() > 0
