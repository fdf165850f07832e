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


class Norms(nn.Linear):
    """Writes its weights in the forward, by ``data`` where torch counts no version."""

    def forward(self, input: Tensor) -> Tensor:
        self.weight.data.div_(self.weight.data.norm())
        return super().forward(input)


def test_weights_that_the_step_writes_are_as_before_and_it_is_refused() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Norms(4, 4), nn.BatchNorm1d(4))
    batch = torch.randn(ROWS, 4), torch.randint(0, 4, (ROWS,))
    before, step = model[0].weight.detach().clone(), sg.Step(model, coupled)
    with pytest.raises(CannotSplit, match="writes its parameters"), whole_forward(step).warming_up():
        model(batch[0])
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize("with_batchnorm", [False, True])
def test_a_model_that_is_not_to_be_tried_is_not_warmed_up(with_batchnorm: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Norms(4, 4), *[nn.BatchNorm1d(4)] * with_batchnorm)
    batch = torch.randn(ROWS, 4), torch.randint(0, 4, (ROWS,))
    before = model[0].weight.detach().clone()
    plan = sg.Plan(levers={"graphs": {}}, exactness=sg.Exactness.SAME_BITS, batch_rows=ROWS)
    with sg.Step(model, coupled, plan=plan) as step, pytest.raises(CannotSplit):
        step.backward(batch)
    assert torch.equal(model[0].weight, before)


class LossThatCounts(nn.Module):
    """Its buffer has the name of what the model keeps in Python."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, outputs: Tensor, batch: Any) -> Tensor:
        self.calls.add_(1)
        return coupled(outputs, batch)


class CountsItself(nn.Linear):
    calls = 0

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.calls = 0

    def forward(self, input: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(input)


def test_a_buffer_of_the_loss_does_not_hide_state_of_the_model_in_python() -> None:
    model, loss = CountsItself(), LossThatCounts()
    batch = torch.randn(ROWS, 4), torch.randint(0, 4, (ROWS,))
    forward = whole_forward(sg.Step(model, loss))
    with pytest.raises(CannotSplit, match="changes calls in Python"), forward.warming_up():
        loss(model(batch[0]), batch)
    assert model.calls == 0 and float(loss.calls) == 0


def whole_forward(step: sg.Step) -> StepForward:
    from samegrad.exact.one_chunk import _WholeForward
    from samegrad.exact.step_draws import StepDraws

    return _WholeForward.of(step.declared, 2, StepDraws(are_all=True))
