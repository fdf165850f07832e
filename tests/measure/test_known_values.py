"""A trace knows what a model makes of numbers alone, follows it where it looks there, and knows nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from samegrad.declared import DeclaredStep, declare
from samegrad.errors import CannotTrace
from samegrad.measure import trace_reading
from samegrad.measure.known_values import KnownValues
from samegrad.measure.trace import plainly, trace_step

from .traced import counted_peaks

Asks = Callable[[Tensor], Any]
ROWS, WIDTH = 5, 7


class Chooses(nn.Module):
    """(rows, 7) floats; through a wide layer where ``asks(x)`` is true, through a narrow one where it is not."""

    def __init__(self, asks: Asks) -> None:
        super().__init__()
        self.asks = asks
        self.wide = nn.Sequential(nn.Linear(WIDTH, 50), nn.Tanh(), nn.Linear(50, 3))
        self.narrow = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.wide(x) if self.asks(x) else self.narrow(x)
        return scores


def positions(x: Tensor) -> Tensor:
    return torch.arange(x.shape[1], device=x.device).expand(len(x), -1)


def packed(x: Tensor) -> Tensor:
    """Whether several sentences stand in one row, as transformers asks."""
    places = positions(x)
    steps = torch.diff(places, prepend=places[:, :1] - 1, dim=-1)
    return (steps != 1).cumsum(-1)[:, -1].ne(0).any()


def written_in_place(x: Tensor) -> Tensor:
    places = positions(x).clone()
    places[:, 1:].mul_(0)
    places += 1
    return places.sum() == len(x) * WIDTH


def of_ones_alike(x: Tensor) -> Tensor:
    return torch.ones_like(x, dtype=torch.int64).all()


def of_a_list(x: Tensor) -> bool:
    return torch.tensor([3, 1, 2], device=x.device).max().item() == 3


def as_a_list(x: Tensor) -> bool:
    return positions(x)[0].tolist() == [*range(WIDTH)]


KNOWN: dict[str, Asks] = {
    "positions that go up by one": packed,
    "the same the other way round": lambda x: ~packed(x),
    "places written over": written_in_place,
    "ones like a tensor": of_ones_alike,
    "numbers of a list": of_a_list,
    "numbers as a list": as_a_list,
}


def overwritten(x: Tensor) -> Tensor:
    """Known at first, then no more: through a view of the same memory."""
    places = torch.zeros(WIDTH, dtype=torch.int64, device=x.device)
    seen = places.sum()
    places[:2].copy_(x[0, :2])
    return places.sum() + seen > 0


UNKNOWN: dict[str, Asks] = {
    "the batch": lambda x: x.sum() > 0,
    "what is written over with the batch": overwritten,
    "a draw": lambda x: torch.randint(0, 2, (3,), device=x.device).sum() > 1,
    "memory that nobody wrote": lambda x: torch.empty(3, dtype=torch.int64, device=x.device).sum() > 0,
    "positions beside the batch": lambda x: (positions(x) * (x > 0)).sum() > 3,
    "floats": lambda x: torch.zeros(3, device=x.device).sum() > 0,
}


def declared_on(asks: Asks) -> tuple[DeclaredStep, Tensor]:
    torch.manual_seed(0)
    model = Chooses(asks)
    declared = declare(model, lambda outputs, _: outputs.pow(2).mean(), forward=lambda m, batch: m(batch))
    return declared, torch.randn(ROWS, WIDTH)


def traced_peaks(declared: DeclaredStep, batch: Tensor) -> list[int]:
    trace = trace_step(declared, batch, device="cpu")
    return [trace_reading.peak_bytes(trace, step=step) for step in (0, 1)]


@pytest.mark.parametrize("name", KNOWN)
def test_the_way_that_the_real_step_goes_is_followed_to_the_byte(name: str) -> None:
    declared, batch = declared_on(KNOWN[name])
    assert traced_peaks(declared, batch) == counted_peaks(declared, batch, plainly())
    trace_step(declared, batch)


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_depends_on_anything_else_is_refused(name: str) -> None:
    declared, batch = declared_on(UNKNOWN[name])
    for device in ("cpu", "cuda"):
        with pytest.raises(CannotTrace, match=r"_local_scalar_dense.*test_known_values\.py:\d+.*needs the values"):
            trace_step(declared, batch, device=device)


def test_a_planted_memory_that_never_forgets_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KnownValues, "_forget", lambda self, written: None)
    declared, batch = declared_on(overwritten)
    trace_step(declared, batch, device="cpu")


def test_planted_wrong_values_lead_another_way(monkeypatch: pytest.MonkeyPatch) -> None:
    declared, batch = declared_on(packed)
    monkeypatch.setattr(KnownValues, "number", lambda self, tensor: 1)
    assert traced_peaks(declared, batch) != counted_peaks(declared, batch, plainly())


def test_a_library_that_asks_is_told_and_torch_is_as_before() -> None:
    answers: list[bool] = []

    def asks(x: Tensor) -> bool:
        kind: Any = torch._subclasses.FakeTensor
        answers.extend(isinstance(tensor, kind) for tensor in (x, positions(x), x.long()))
        raise ZeroDivisionError

    before = torch._subclasses.FakeTensor
    declared, batch = declared_on(asks)
    with pytest.raises(CannotTrace, match="ZeroDivisionError"):
        trace_step(declared, batch)
    assert answers == [True, False, True] and torch._subclasses.FakeTensor is before
