"""The compiled loss of a chunk against Python's: gradients, draws, counts, and what it refuses."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._inductor.config
import torch.nn.functional as F
from torch import Tensor, nn

from samegrad.declared import declare
from samegrad.errors import CannotSplit
from samegrad.exact import compiled, compiled_runs, sums_in_backward
from samegrad.exact.aliases import GradientTotals
from samegrad.exact.compiled import CompiledLoss
from samegrad.exact.compiler import CompilerSettings
from samegrad.exact.draws import StepKey
from samegrad.exact.examine import examine
from samegrad.exact.pass_programs import EagerPrograms
from samegrad.exact.split import SplitStep
from samegrad.settle import aliases_for

from ..contract.lever_zoo import MODELS
from ..contract.plain import cross_entropy

# Everything but the last stage, which writes kernels: that one is slow, and tried once below.
TRACED = CompilerSettings(backend="aot_eager", fullgraph=True)
SIZES = [6, 1, 4, 2]
KEY = 11


def steps(
    model: nn.Module, loss_fn: Any, batch: Any, settings: CompilerSettings = TRACED
) -> tuple[SplitStep, SplitStep, CompiledLoss]:
    """The step in Python, the same one compiled, and what compiles it."""
    declared = declare(model, loss_fn)
    aliases, layout = aliases_for(declared), declared.layout(batch)
    split = SplitStep(declared, aliases, examine(declared, aliases, batch, layout))
    loss_for = CompiledLoss(settings)
    return split, dataclasses.replace(split, programs=EagerPrograms(loss_for)), loss_for


def totals(split: SplitStep, batch: Any, key: int = KEY) -> tuple[Tensor, list[Tensor | None]]:
    found = split.totals(batch, split.declared.layout(batch), SIZES, key=StepKey.fixed(key))
    return found.loss, found.totals


def weighted(outputs: Tensor, batch: Any) -> Tensor:
    weight = torch.tensor([0.5, 2.0, 1.0], dtype=outputs.dtype)
    return F.cross_entropy(outputs, batch[1], weight=weight)


def ignoring(outputs: Tensor, batch: Any) -> Tensor:
    return F.nll_loss(F.log_softmax(outputs, -1), batch[1], ignore_index=2)


def squares(outputs: Tensor, batch: Any) -> Tensor:
    return (outputs.sum(-1) - batch[1]).pow(2).mean()


def assert_same(found: tuple[Tensor, list[Tensor | None]], expected: tuple[Tensor, list[Tensor | None]]) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=1e-13, atol=0)
    largest = max(float(t.abs().max()) for t in expected[1] if t is not None)
    for mine, plain in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(mine, plain, rtol=0, atol=1e-13 * largest)


# A mean over valid targets, weighted, is the others' general case; each is compiled anew.
@pytest.mark.parametrize(
    "loss_fn",
    [pytest.param(loss, marks=[pytest.mark.slow] * (loss is not weighted), id=loss.__name__)
     for loss in (cross_entropy, weighted, ignoring, squares)],
)  # fmt: skip
def test_a_compiled_chunk_has_pythons_gradients_under_its_draws(loss_fn: Callable[..., Tensor]) -> None:
    model, batch = MODELS["mlp"](dropout=0.4)
    python, traced, loss_for = steps(model, loss_fn, batch)
    for key in (KEY, KEY + 1):
        assert_same(totals(traced, batch, key), totals(python, batch, key))
    # One for each size of chunk; a new key and new aliases of the weights are no reason to compile again.
    assert loss_for.compiler.compilations == len(set(SIZES)) and loss_for.compiler.graph_breaks == 0
    assert "4 graphs compiled, 0 graph breaks" in loss_for.notes()[0]


def test_a_model_that_breaks_the_graph_under_draws_computes_the_same() -> None:
    model, batch = MODELS["transformer"](dropout=0.4)
    python, traced, _ = steps(model, cross_entropy, batch, dataclasses.replace(TRACED, fullgraph=False))
    assert_same(totals(traced, batch), totals(python, batch))


@pytest.mark.slow
def test_with_kernels_written_it_is_the_same_too() -> None:
    model, batch = MODELS["cnn"](dropout=0.4)
    python, traced, _ = steps(model, weighted, batch, CompilerSettings())
    assert_same(totals(traced, batch), totals(python, batch))


def test_a_value_that_changes_between_steps_is_compiled_again() -> None:
    model, batch = MODELS["mlp"](dropout=0.4)
    python, traced, loss_for = steps(model, squares, batch)
    totals(traced, batch)
    before = loss_for.compiler.compilations
    model[2].p = 0.1
    assert_same(totals(traced, batch), totals(python, batch))
    assert loss_for.compiler.compilations > before


class Blocks(nn.Module):
    """Three wide blocks with draws in a row, and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 64), nn.GELU(), nn.Dropout(0.3), nn.Linear(64, 6)) for _ in range(3)
        )
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


def kept_numbers(
    again: tuple[tuple[str, ...], ...], batch: Any, sizes: list[int]
) -> tuple[list[Tensor | None], int]:
    """Gradients, and how many numbers as wide as a block's inside the first compiled chunk keeps for backward."""
    model = Blocks().double()
    _, traced, loss_for = steps(model, cross_entropy, batch, CompilerSettings(again=again, fullgraph=True))
    kept: list[int] = []
    right = loss_for.compiler.compiled

    def seeing(function: Any, device: Any) -> Any:
        made = right(function, device)

        def run(*given: Any) -> Any:
            found = made(*given)
            kept.append(sum(t.numel() for t in found[0].grad_fn.saved_tensors if t.dim() == 2 and 64 in t.shape[1:]))
            return found

        return run

    loss_for.compiler.compiled = seeing  # type: ignore[method-assign]
    found = traced.totals(batch, traced.declared.layout(batch), sizes, key=StepKey.fixed(KEY))
    return found.totals, kept[0]


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [[sum(SIZES)], [9, 4]], ids=["all rows", "chunks that share sums"])
def test_blocks_that_run_again_keep_less_and_draw_the_same(sizes: list[int]) -> None:
    batch = MODELS["mlp"]()[1]
    plain, all_kept = kept_numbers((), batch, sizes)
    # Chunks that share the sums of their gradients hold these too.
    weights = 3 * 6 * 64 * (1 if len(sizes) == 1 else 2)
    for again in ((("layers.0",), ("layers.1",), ("layers.2",)), (("layers.0", "layers.1", "layers.2"),)):
        mine, kept = kept_numbers(again, batch, sizes)
        assert kept <= weights < all_kept
        for a, b in zip(mine, plain, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)


@pytest.mark.slow
def test_a_compiler_that_names_its_blocks_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a word the plan would keep what it promised to run again."""
    monkeypatch.setattr(compiled_runs, "_below_network", lambda place: f"renamed.{place}")
    monkeypatch.setattr(torch._inductor.config, "force_disable_caches", True)
    with pytest.raises(CannotSplit, match=r"(?s)layers\.0 runs again.*does not say which"):
        kept_numbers((("layers.0",), ("layers.1",)), MODELS["mlp"]()[1], [9, 4])


class Broken(nn.Module):
    """A part that no compiler takes in one piece."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return self.layer(x)


def test_a_broken_graph_is_counted_and_computes_the_same() -> None:
    model, batch = Broken().double(), MODELS["mlp"]()[1]
    python, traced, loss_for = steps(model, cross_entropy, batch, dataclasses.replace(TRACED, fullgraph=False))
    assert_same(totals(traced, batch), totals(python, batch))
    assert loss_for.compiler.graph_breaks > 0


def test_planted_count_that_forgets_ignored_targets_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        compiled, "_count", lambda input, target, *_, **__: torch.tensor(float(len(target)), dtype=input.dtype)
    )
    model, batch = MODELS["mlp"]()
    _, traced, _ = steps(model, ignoring, batch)
    with pytest.raises(CannotSplit, match="what the loss is divided by"):
        totals(traced, batch)


def test_planted_draws_outside_the_key_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    right = compiled._loss_of
    monkeypatch.setattr(
        compiled, "_loss_of", lambda work: lambda chunk, ids, key, sums: right(work)(chunk, ids, key * 0 + 5, sums)
    )
    model, batch = MODELS["mlp"](dropout=0.4)
    python, traced, _ = steps(model, squares, batch)
    with pytest.raises(AssertionError):
        assert_same(totals(traced, batch), totals(python, batch))


def test_a_forward_that_changes_state_is_refused_by_name() -> None:
    model = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(6, 3))).double()
    batch = MODELS["mlp"]()[1]
    _, traced, _ = steps(model, cross_entropy, batch)
    with pytest.raises(CannotSplit, match=r"changes state \(0\.parametrizations"):
        totals(traced, batch)


class Partly(nn.Module):
    """One weight in two places, one frozen, one that nothing reaches."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.second.weight = self.first.weight
        self.unused = nn.Linear(6, 3)
        self.head.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x).tanh()))


def gradients_left(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each chunk that runs from now on, whether its backward handed gradients out."""
    left: list[bool] = []
    right = GradientTotals.fold

    def fold(self: GradientTotals) -> None:
        left.append(any(alias.grad is not None for alias in self._aliases))
        right(self)

    monkeypatch.setattr(GradientTotals, "fold", fold)
    return left


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_compiled_backward_adds_to_the_sums_of_the_step(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = Partly().to(dtype), MODELS["mlp"](dtype)[1]
    python, traced, loss_for = steps(model, cross_entropy, batch)
    expected = totals(python, batch)
    left = gradients_left(monkeypatch)
    found = totals(traced, batch)
    assert left == [False] * len(SIZES) and loss_for.compiler.graph_breaks == 0
    assert [g is None for g in found[1]] == [g is None for g in expected[1]]
    tolerance = 1e-13 if dtype is torch.float64 else 2e-2
    largest = max(float(t.abs().max()) for t in expected[1] if t is not None)
    for mine, plain in zip(found[1], expected[1], strict=True):
        assert mine is None or mine.dtype is dtype
        torch.testing.assert_close(mine, plain, rtol=0, atol=tolerance * largest)


def test_parameters_frozen_and_thawed_between_steps_are_followed() -> None:
    model, batch = Partly().double(), MODELS["mlp"]()[1]
    model.first.bias.requires_grad_(False)
    declared = declare(model, cross_entropy)
    # Each is another function, in each size of chunk.
    loss_for, layout = CompiledLoss(dataclasses.replace(TRACED, recompile_limit=32)), declared.layout(batch)

    def found(programs: EagerPrograms) -> list[Tensor | None]:
        aliases = aliases_for(declared)
        split = SplitStep(declared, aliases, examine(declared, aliases, batch, layout), programs=programs)
        return split.totals(batch, layout, SIZES, key=StepKey.fixed(KEY)).totals

    for frozen in ([model.first.bias], [model.second.bias], [], [model.head.weight, model.first.bias]):
        for parameter in (model.first.bias, model.second.bias, model.head.weight):
            parameter.requires_grad_(all(parameter is not one for one in frozen))
        expected = found(EagerPrograms())
        for mine, plain in zip(found(EagerPrograms(loss_for)), expected, strict=True):
            torch.testing.assert_close(mine, plain, rtol=1e-12, atol=1e-15)


def test_one_chunk_alone_hands_its_gradients_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = Partly().double(), MODELS["mlp"]()[1]
    python, traced, _ = steps(model, cross_entropy, batch)
    layout = traced.declared.layout(batch)
    expected = python.totals(batch, layout, [layout.rows], key=StepKey.fixed(KEY))
    left = gradients_left(monkeypatch)
    found = traced.totals(batch, layout, [layout.rows], key=StepKey.fixed(KEY))
    assert left == [True]
    assert_same((found.loss, found.totals), (expected.loss, expected.totals))


def test_planted_backward_that_adds_too_little_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        ctx.saved_tensors[0].add_(gradient, alpha=0.995)
        return None, None

    monkeypatch.setattr(sums_in_backward._ReadThrough, "backward", staticmethod(backward))
    model, batch = Partly().double(), MODELS["mlp"]()[1]
    python, traced, _ = steps(model, cross_entropy, batch)
    with pytest.raises(AssertionError):
        assert_same(totals(traced, batch), totals(python, batch))


@pytest.mark.slow
def test_with_kernels_written_sums_are_added_to_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = Partly().double(), MODELS["mlp"]()[1]
    python, traced, _ = steps(model, cross_entropy, batch, CompilerSettings())
    expected = totals(python, batch)
    left = gradients_left(monkeypatch)
    assert_same(totals(traced, batch), expected)
    assert left == [False] * len(SIZES)
