"""Memory that runs out on a GPU while a plan is made and verified: fewer rows are tried, and nothing stays."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import samegrad as sg
from samegrad.measure import counters
from samegrad.records import Same

pytestmark = pytest.mark.gpu

ROWS, MIB = 64, 2**20
DEVICE = torch.device("cuda", 0)


class Hungry(nn.Conv2d):
    """From thirteen rows on it asks for a gibibyte that no law of fewer rows foretells."""

    def forward(self, input: Tensor) -> Tensor:
        if len(input) > 12:
            torch.empty(1024 * MIB, dtype=torch.uint8, device=input.device)
        return super().forward(input)


def loss(outputs: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(outputs.flatten(2).mean(2), batch[1])


def made(first: type[nn.Conv2d]) -> tuple[sg.Step, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(first(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU(), nn.Conv2d(32, 10, 3)).to(DEVICE)
    batch = torch.randn(ROWS, 3, 96, 96, device=DEVICE), torch.arange(ROWS, device=DEVICE) % 10
    return sg.Step(model, loss, optimizer=torch.optim.SGD(model.parameters(), 0.1)), batch


@pytest.fixture
def capped() -> Iterator[None]:
    counters.release_cached(DEVICE)
    with counters.capped(DEVICE, 512 * MIB):
        yield
    counters.release_cached(DEVICE)


@pytest.mark.parametrize(("first", "most_rows"), [(Hungry, 12), (nn.Conv2d, ROWS)])
def test_a_plan_is_found_where_rows_that_laws_promised_do_not_fit(
    capped: None, first: type[nn.Conv2d], most_rows: int
) -> None:
    step, batch = made(first)
    counters.take_workspaces(DEVICE)
    before = torch.cuda.memory_allocated(DEVICE)
    plan, _ = sg.settle_plan(step, batch, budget="300MiB")
    # What libraries keep for a stream is theirs: that of the step's own is there before as well.
    counters.take_workspaces(DEVICE)
    assert torch.cuda.memory_allocated(DEVICE) <= before + MIB
    rows = plan.levers["split_rows"]["rows"]
    assert rows <= most_rows
    # Planted: without the hunger more rows fit than Hungry can have.
    assert first is Hungry or rows > 12


def test_a_verification_takes_the_rows_that_fit(capped: None) -> None:
    step, batch = made(Hungry)
    plan, _ = sg.settle_plan(step, batch, budget="300MiB")
    model = step.declared.model
    with sg.Step(model, loss, plan=plan) as planned:
        # Its code asks how many rows there are, which is refused in a run; a verification compares what it computes.
        planned._row_counts.check = lambda *_: None  # type: ignore[method-assign]
        verdict = sg.verify_step(planned, batch, reference="device")
    assert verdict.answer is not Same.DIFFERS and verdict.rows_checked <= 12
