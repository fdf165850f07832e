"""A compiled forward beside a head whose loss runs in chunks, against the plain step; and models it is not for."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from samegrad.declared import declare
from samegrad.errors import CannotSplit
from samegrad.exact import find_head
from samegrad.exact.compiled import CompiledLoss
from samegrad.exact.compiler import CompilerSettings
from samegrad.exact.draws import StepKey
from samegrad.exact.examine import examine
from samegrad.exact.find_head import HeadInChunks
from samegrad.exact.pass_programs import EagerPrograms
from samegrad.exact.split import SplitStep
from samegrad.settle import aliases_for

from .head_zoo import CLASSES, LOSSES, LogitLoss, Words, flat, words

TRACED = CompilerSettings(backend="aot_eager", fullgraph=True)
POSITIONS = 10
SIZES = [3, 1, 2]
KEY = 5


def loss_of(function: LogitLoss) -> Any:
    return lambda outputs, batch: function(outputs, batch[1])


def split_step(model: nn.Module, loss_fn: Any, batch: Any) -> SplitStep:
    declared = declare(model, loss_fn, forward=lambda network, rows: network(rows[0]))
    aliases, layout = aliases_for(declared), declared.layout(batch)
    return SplitStep(declared, aliases, examine(declared, aliases, batch, layout))


def compiled_step(split: SplitStep, settings: CompilerSettings = TRACED) -> tuple[SplitStep, CompiledLoss]:
    head = HeadInChunks("head", POSITIONS)
    loss_for = CompiledLoss(settings, head)
    declared = head.deferred_in(split.declared)
    return dataclasses.replace(split, declared=declared, programs=EagerPrograms(loss_for)), loss_for


def totals(split: SplitStep, batch: Any, key: int = KEY) -> tuple[Tensor, list[Tensor | None]]:
    found = split.totals(batch, split.declared.layout(batch), SIZES, key=StepKey.fixed(key))
    return found.loss, found.totals


def assert_same(found: tuple[Tensor, list[Tensor | None]], plain: tuple[Tensor, list[Tensor | None]]) -> None:
    torch.testing.assert_close(found[0], plain[0], rtol=1e-13, atol=0)
    largest = max(float(t.abs().max()) for t in plain[1] if t is not None)
    for mine, theirs in zip(found[1], plain[1], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-13 * largest)


COMPILED = "flat", "next token", "weights", "another index", "likelihood", "capped"


@pytest.mark.parametrize(
    ("name", "tied"),
    [
        # The loss sees logits and never whose weight they came from, so every second pair has seen both.
        pytest.param(
            name, tied, id=f"{name}-{'tied' if tied else 'own weight'}", marks=[pytest.mark.slow] * (at % 2 == tied)
        )
        for at, name in enumerate(COMPILED)
        for tied in (True, False)
    ],
)
def test_it_is_the_step_without_chunks_under_its_draws(name: str, tied: bool) -> None:
    model, batch = Words(tied=tied, bias=not tied, dropout=0.3).double(), words()
    plain = split_step(model, loss_of(LOSSES[name]), batch)
    mine, loss_for = compiled_step(plain)
    for key in (KEY, KEY + 1):
        assert_same(totals(mine, batch, key), totals(plain, batch, key))
    assert loss_for.compiler.graph_breaks == 0
    # The forward for each size of chunk, the loss for whole chunks of positions and what is left of them.
    assert len(SIZES) < loss_for.compiler.compilations <= len(SIZES) + 4


# Only the compiler that writes kernels chooses what to keep.
@pytest.mark.parametrize(
    ("settings", "logits"),
    [(TRACED, None), pytest.param(CompilerSettings(fullgraph=True), torch.bfloat16, marks=pytest.mark.slow)],
    ids=["traced", "with kernels"],
)
def test_a_chunk_of_the_loss_is_one_graph_under_autocast_and_keeps_its_logits_alone(
    settings: CompilerSettings, logits: torch.dtype | None
) -> None:
    model, batch = Words(), words()
    declared = declare(model, loss_of(lambda z, y: flat(z.float(), y)), forward=narrowly)
    aliases, layout = aliases_for(declared), declared.layout(batch)
    plain = SplitStep(declared, aliases, examine(declared, aliases, batch, layout))
    mine, loss_for = compiled_step(plain, settings)
    kept: list[torch.dtype] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: _noted(t, kept), lambda t: t):
        found = totals(mine, batch)
    assert loss_for.compiler.graph_breaks == 0
    assert kept and logits in (None, *set(kept)) and (logits is None or len(set(kept)) == 1)
    expected = totals(plain, batch)
    for a, b in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-2 * max(float(t.abs().max()) for t in expected[1]))


def narrowly(network: nn.Module, batch: Any) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return network(batch[0])


def _noted(tensor: Tensor, kept: list[torch.dtype]) -> Tensor:
    if tensor.dim() == 2 and tensor.shape[1] == CLASSES:
        kept.append(tensor.dtype)
    return tensor


@pytest.mark.slow
def test_with_kernels_written_it_is_the_same_too() -> None:
    model, batch = Words(dropout=0.3).double(), words()
    plain = split_step(model, loss_of(flat), batch)
    assert_same(totals(compiled_step(plain, CompilerSettings())[0], batch), totals(plain, batch))


class Scaled(Words):
    """A model that does something to its logits: what stands in their place in the compiled forward is not them."""

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens) * 0.5


class Shifted(Words):
    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens)[:, 1:]


class Twice(Words):
    def forward(self, tokens: Tensor) -> Any:
        return super().forward(tokens), super().forward(tokens)


@pytest.mark.parametrize("make", [Scaled, Shifted, Twice], ids=lambda make: make.__name__)
def test_a_model_that_works_on_its_logits_is_refused(make: type[Words]) -> None:
    def loss_fn(outputs: Any, batch: Any) -> Tensor:
        logits = outputs[0] if isinstance(outputs, tuple) else outputs
        return F.cross_entropy(logits.reshape(-1, CLASSES), batch[1][:, -logits.shape[1] :].reshape(-1))

    model, batch = make().double(), words()
    mine, _ = compiled_step(split_step(model, loss_fn, batch))
    with pytest.raises(CannotSplit, match="does not give the logits of head out once and as they are"):
        totals(mine, batch)


def test_the_head_is_itself_again_after_an_error() -> None:
    model, batch = Words().double(), words()
    fails: list[bool] = []

    def loss_fn(outputs: Any, rows: Any) -> Tensor:
        if fails:
            raise ZeroDivisionError
        return flat(outputs, rows[1])

    plain = split_step(model, loss_fn, batch)
    mine, _ = compiled_step(plain)
    found = totals(mine, batch)
    fails.append(True)
    with pytest.raises(ZeroDivisionError):
        totals(mine, batch)
    assert "forward" not in vars(model.head) and not model.head._forward_pre_hooks
    fails.clear()
    assert_same(totals(mine, batch), found)
    assert_same(found, totals(plain, batch))


def test_planted_hidden_rows_that_are_not_the_heads_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands in the place of the logits was changed on its way out."""
    monkeypatch.setattr(find_head, "_handed_on", lambda hidden: hidden * 0.995)
    model, batch = Words().double(), words()
    plain = split_step(model, loss_of(flat), batch)
    with pytest.raises(AssertionError):
        assert_same(totals(compiled_step(plain)[0], batch), totals(plain, batch))
