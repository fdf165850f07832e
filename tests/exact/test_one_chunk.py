"""All rows as one chunk: any loss and any model is the plain step, and what a replay would not do is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import samegrad as sg
from samegrad.errors import CannotSplit
from samegrad.exact.aliases import ParameterAliases
from samegrad.exact.forward import StepForward
from samegrad.exact.mapped import MappedExamination
from samegrad.exact.one_chunk import OneChunkStep
from samegrad.exact.pass_programs import EAGER
from samegrad.execute.ways import find_ways

from ..contract.plain import assert_bitwise, gradients

ROWS = 9


def coupled(outputs: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    """No sum over rows: every pair of them counts."""
    return F.cross_entropy(outputs, batch[1]) + 0.1 * (outputs @ outputs.t()).logsumexp(dim=1).mean()


def made() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3)).double()
    return model, (torch.randn(ROWS, 2, 8, dtype=torch.float64), torch.randint(0, 3, (ROWS,)))


def one_chunk(step: sg.Step, batch: Any) -> OneChunkStep:
    declared = step.declared
    ways = find_ways(declared, aliases_of(step), batch, declared.layout(batch))
    return OneChunkStep(declared, aliases_of(step), ways.mapped_examination(), EAGER)


def aliases_of(step: sg.Step) -> ParameterAliases:
    return step._examined.aliases


def buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def test_it_is_the_plain_step_bit_for_bit_buffers_too() -> None:
    model, batch = made()
    plain_loss = coupled(model(batch[0]), batch)
    plain_loss.backward()
    plain, plain_buffers = gradients(model), buffers(model)
    model, batch = made()
    step = sg.Step(model, coupled)
    chunk = one_chunk(step, batch)
    loss = chunk.backward(batch, step.declared.layout(batch), [4, 5])
    assert torch.equal(loss, plain_loss.detach())
    assert_bitwise(gradients(model), plain)
    assert all(torch.equal(buffer, plain_buffers[name]) for name, buffer in model.named_buffers())


def test_its_draws_are_the_plain_steps() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, 3)).double()
    batch = torch.randn(ROWS, 8, dtype=torch.float64), torch.randint(0, 3, (ROWS,))
    found = []
    for _ in range(2):
        torch.manual_seed(5)
        model.zero_grad()
        step = sg.Step(model, coupled, plan=sg.Plan(levers={}, exactness=sg.Exactness.SAME_BITS, batch_rows=ROWS))
        if found:
            one_chunk(step, batch).backward(batch, step.declared.layout(batch), [ROWS])
        else:
            step.backward(batch)
        found.append(gradients(model))
    assert_bitwise(*found)


def test_a_loss_that_reaches_past_the_model_is_refused() -> None:
    model, batch = made()
    strange = torch.ones(3, dtype=torch.float64, requires_grad=True)
    step = sg.Step(model, lambda outputs, batch: coupled(outputs * strange, batch))
    chunk = OneChunkStep(step.declared, aliases_of(step), MappedExamination(""), EAGER)
    before = buffers(model)
    with pytest.raises(CannotSplit, match=r"shape \(3,\) that is no parameter"):
        chunk.totals(batch, step.declared.layout(batch), [ROWS])
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert all(parameter.grad is None for parameter in model.parameters()) and strange.grad is None


class Counts(nn.Module):
    """Keeps state; ``where``: in the memory of its buffer, in another buffer each time, or in Python."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where, self.calls = where, 0
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.where == "memory":
            self.seen.add_(1)
        elif self.where == "another buffer":
            self.seen = self.seen + 1
        elif self.where == "python":
            self.calls += 1
        elif self.where == "a draw":
            torch.rand(())
        return x


@pytest.mark.parametrize(
    ("where", "refused"),
    [("memory", ""), ("another buffer", "changes 1.seen"), ("python", "changes 1.calls"), ("a draw", "draws from")],
)
def test_a_warm_up_leaves_nothing_and_finds_what_a_replay_would_not_do(where: str, refused: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), Counts(where))
    forward = whole_forward(sg.Step(model, coupled))
    state, before = torch.get_rng_state(), model[1].seen
    seen: list[str] = []
    try:
        with forward.warming_up():
            model(torch.randn(2, 4, generator=torch.Generator().manual_seed(0)))
    except CannotSplit as error:
        seen.append(error.found)
    assert len(seen) == bool(refused) and all(refused in found for found in seen)
    assert model[1].seen is before and float(before) == 0 and model[1].calls == 0
    assert torch.equal(torch.get_rng_state(), state)


def whole_forward(step: sg.Step) -> StepForward:
    from samegrad.exact.one_chunk import _WholeForward
    from samegrad.exact.step_draws import StepDraws

    return _WholeForward.of(step.declared, 2, StepDraws(are_all=True))
