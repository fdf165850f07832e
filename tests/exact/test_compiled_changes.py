"""What a training loop changes between two steps, beside chunks that were compiled before it changed."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from samegrad.declared import DeclaredStep, declare
from samegrad.errors import CannotSplit
from samegrad.exact.compiled import CompiledLoss
from samegrad.exact.compiler import CompilerSettings
from samegrad.exact.draws import StepKey
from samegrad.exact.examine import examine
from samegrad.exact.find_head import HeadInChunks
from samegrad.exact.pass_programs import EagerPrograms, Programs
from samegrad.exact.split import SplitStep
from samegrad.settle import aliases_for

from ..contract.lever_zoo import MODELS
from ..contract.plain import cross_entropy
from .head_zoo import Words, flat, words

TRACED = CompilerSettings(backend="aot_eager", recompile_limit=32)
SIZES = [6, 1, 4, 2]


class Branching(nn.Module):
    """A part that a training loop switches off."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.beside, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.with_beside = True

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).tanh()
        return self.head(hidden + self.beside(x) if self.with_beside else hidden)


def totals(declared: DeclaredStep, batch: Any, programs: Programs, sizes: list[int] = SIZES) -> list[Tensor | None]:
    aliases, layout = aliases_for(declared), declared.layout(batch)
    split = SplitStep(declared, aliases, examine(declared, aliases, batch, layout), programs=programs)
    return split.totals(batch, layout, sizes, key=StepKey.fixed(3)).totals


def assert_same(found: list[Tensor | None], plain: list[Tensor | None]) -> None:
    for mine, theirs in zip(found, plain, strict=True):
        assert (mine is None) is (theirs is None)
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-15)


def test_a_part_that_is_switched_off_has_no_gradient_from_then_on() -> None:
    model, batch = Branching().double(), MODELS["mlp"]()[1]
    declared = declare(model, cross_entropy)
    compiled = EagerPrograms(CompiledLoss(TRACED))
    for with_beside in (True, False, True, False):
        model.with_beside = with_beside
        assert_same(totals(declared, batch, compiled), totals(declared, batch, EagerPrograms()))


def test_another_loss_is_another_function() -> None:
    model, batch = Branching().double(), MODELS["mlp"]()[1]
    declared = declare(model, cross_entropy)
    compiled = EagerPrograms(CompiledLoss(TRACED))
    totals(declared, batch, compiled)
    smoothed = dataclasses.replace(declared, loss_fn=lambda z, rows: 0.5 * cross_entropy(z, rows))
    assert_same(totals(smoothed, batch, compiled), totals(smoothed, batch, EagerPrograms()))


class Capped(Words):
    """Logits that a training loop begins to cap."""

    cap: float | None = None

    def forward(self, tokens: Tensor) -> Tensor:
        logits = super().forward(tokens)
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)


def test_logits_that_the_model_begins_to_change_are_refused() -> None:
    model, batch = Capped().double(), words()
    declared = declare(model, lambda z, rows: flat(z, rows[1]), forward=lambda network, rows: network(rows[0]))
    head = HeadInChunks("head", 10)
    compiled = EagerPrograms(CompiledLoss(TRACED, head))
    deferred = head.deferred_in(declared)
    assert_same(totals(deferred, batch, compiled, [3, 3]), totals(declared, batch, EagerPrograms(), [3, 3]))
    model.cap = 2.0
    with pytest.raises(CannotSplit, match="does not give the logits of head out once and as they are"):
        totals(deferred, batch, compiled, [3, 3])
    assert "forward" not in vars(model.head)


@pytest.mark.parametrize("head", [None, HeadInChunks("head", 10)], ids=["whole", "head in chunks"])
def test_nothing_is_tried_again_where_nothing_changed(
    head: HeadInChunks | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[int] = []
    right = CompiledLoss._try
    monkeypatch.setattr(CompiledLoss, "_try", lambda self, *given: (tried.append(1), right(self, *given))[1])
    model, batch = Words().double(), words()
    declared = declare(model, lambda z, rows: flat(z, rows[1]), forward=lambda network, rows: network(rows[0]))
    compiled = EagerPrograms(CompiledLoss(TRACED, head))
    for _ in range(3):
        # As each step of a plan declares it anew, and as optimizers move weights.
        stepped = declared if head is None else head.deferred_in(declared)
        totals(stepped, batch, compiled, [3, 3])
        with torch.no_grad():
            model.head.weight.mul_(0.9)
    assert len(tried) == 1
