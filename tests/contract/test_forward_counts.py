"""How often the model runs in a step: no more than its plan says, once it has been examined."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import samegrad as sg

ROWS, CHUNKS = 32, 4


class Model(nn.Module):
    """An encoder, what is between, and a head; ``couple`` makes rows see each other between them."""

    def __init__(self, *, drop: float = 0.0, couple: bool = False) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Dropout(drop))
        self.head, self.couple = nn.Linear(12, 3), couple

    def forward(self, x: Tensor) -> Tensor:
        z = self.encoder(x)
        return self.head(z - z.mean(0) if self.couple else z)


def blocks() -> nn.Module:
    parts = [nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Tanh()) for _ in range(2)]
    return nn.Sequential(*parts, nn.Linear(6, 3))


def mean(outputs: Tensor, batch: Any) -> Tensor:
    return F.cross_entropy(outputs, batch[1])


def spread(outputs: Tensor, batch: Any) -> Tensor:
    return outputs.std(0).sum()


def batch(rows: int = ROWS, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, 6, dtype=dtype), torch.arange(rows) % 3


def counted(model: nn.Module) -> dict[str, int]:
    """Calls of every submodule from now on."""
    calls: dict[str, int] = {}

    def note(name: str) -> Any:
        calls[name] = 0

        def hook(*_: Any) -> None:
            calls[name] += 1

        return hook

    for name, part in model.named_modules():
        part.register_forward_pre_hook(note(name))
    return calls


def steady(step: sg.Step, *batches: Any) -> dict[str, int]:
    """Calls in one step after the first; hooks are there before it, or the step would be examined anew."""
    calls = counted(step.declared.network)
    step.backward(batches[0])
    calls.update(dict.fromkeys(calls, 0))
    for rows in batches:
        step.backward(rows)
    return calls


@pytest.mark.parametrize("drop", [0.0, 0.3])
@pytest.mark.parametrize(("loss_fn", "passes"), [(mean, 1), (spread, 2)])
def test_a_step_by_rows_runs_its_chunks_as_often_as_it_has_passes(loss_fn: Any, passes: int, drop: float) -> None:
    calls = steady(sg.Step(Model(drop=drop), loss_fn, rows=ROWS // CHUNKS), batch())
    assert set(calls.values()) == {passes * CHUNKS}


@pytest.mark.parametrize("drop", [0.0, 0.3])
def test_a_step_that_runs_whole_runs_once(drop: float) -> None:
    for how in ({"rows": ROWS}, {"budget": "1GiB"}, {}):
        assert set(steady(sg.Step(Model(drop=drop), mean, **how), batch()).values()) == {1}


@pytest.mark.parametrize("drop", [0.0, 0.3])
def test_segments_run_twice_in_chunks_and_the_rest_once(drop: float) -> None:
    calls = steady(sg.Step(Model(drop=drop, couple=True), mean, rows=ROWS // CHUNKS), batch())
    assert calls[""] == 1 and calls["encoder.0"] == calls["encoder.2"] == 2 * CHUNKS
    # A replaced forward is called by the segment itself, without the hooks of the part.
    assert calls["encoder"] == calls["head"] == 1


def test_recomputed_blocks_run_twice_and_the_rest_once() -> None:
    levers = {"recompute": {"blocks": ["0", "1"]}}
    plan = sg.Plan(levers=levers, exactness=sg.Exactness.SAME_BITS, batch_rows=ROWS)
    calls = steady(sg.Step(blocks(), mean, plan=plan), batch())
    assert calls[""] == calls["2"] == 1 and calls["0.0"] == calls["1.1"] == 2


def test_other_row_counts_and_modes_that_come_back_are_not_examined_again() -> None:
    step = sg.Step(Model(drop=0.3), mean, rows=8)
    model = step.declared.network
    calls = counted(model)
    for training in (True, False):
        model.train(training)
        step.backward(batch())
    calls.update(dict.fromkeys(calls, 0))
    for training in (False, True, True):
        model.train(training)
        for rows in (ROWS, 9, 24):
            step.backward(batch(rows))
    assert calls["head"] == 3 * (4 + 2 + 3)


def test_another_dtype_is_another_step_and_is_examined() -> None:
    step = sg.Step(Model(), mean, forward=lambda model, b: model(b[0].float()), rows=8)
    calls = counted(step.declared.network)
    step.backward(batch())
    calls.update(dict.fromkeys(calls, 0))
    step.backward(batch(dtype=torch.float64))
    assert calls["head"] > CHUNKS
