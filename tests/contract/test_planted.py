"""Faults that real tools have shipped, planted into the running engine: ``verify_step`` says DIFFERS and names each.

Nothing here is told to the verifier: what is exchanged is the engine's own code, while a ``Step`` runs it.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import samegrad as sg
from samegrad.exact import losses
from samegrad.exact import passes as engine
from samegrad.exact.split import SplitStep
from samegrad.levers import Execution
from samegrad.levers.host_rows import HostRows
from samegrad.levers.split_rows import SplitRows
from samegrad.records import Exactness, Plan, Same, Verdict

from .plain import cross_entropy, labelled, left_alone, mlp, spread

N = 61
Patch = pytest.MonkeyPatch
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


class Buffered(nn.Module):
    """The small network, with a buffer that it reads and does not write."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.inner = mlp(dtype)
        self.register_buffer("offset", torch.zeros(6, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x + self.offset)


class Temperature(nn.Module):
    """A contrastive loss that owns its temperature."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(0.7, dtype=dtype))

    def forward(self, outputs: Tensor, batch: Any) -> Tensor:
        z = F.normalize(outputs.double(), dim=1)
        return F.cross_entropy(z @ z.T * self.log_scale.double().exp(), torch.arange(len(z)))


def squares(outputs: Tensor, batch: Any) -> Tensor:
    """A mean over rows: chunks are weighted by their rows. A cross-entropy brings its own count instead."""
    return F.mse_loss(outputs, F.one_hot(batch[1], 3).to(outputs.dtype))


def changed_totals(monkeypatch: Patch, change: Callable[[Any, SplitStep], None]) -> None:
    right = SplitStep.totals

    def wrong(self: SplitStep, *args: Any, **kwargs: Any) -> Any:
        totals = right(self, *args, **kwargs)
        change(totals, self)
        return totals

    monkeypatch.setattr(SplitStep, "totals", wrong)


def half_a_percent(monkeypatch: Patch) -> None:
    right = SplitStep._shares
    monkeypatch.setattr(SplitStep, "_shares", lambda *args: [share * 1.005 for share in right(*args)])


def mean_of_means(monkeypatch: Patch) -> None:
    monkeypatch.setattr(SplitStep, "_shares", lambda self, batch, layout, sizes: [1 / len(sizes)] * len(sizes))


def mean_of_counted_means(monkeypatch: Patch) -> None:
    monkeypatch.setattr(losses, "count_of", lambda loss: torch.ones_like(loss))


def dropped_chunk(monkeypatch: Patch) -> None:
    right = SplitStep._shares
    monkeypatch.setattr(SplitStep, "_shares", lambda *args: [*right(*args)[:-1], 0.0])


def handed_over_twice(monkeypatch: Patch) -> None:
    right = engine.hand_over

    def twice(model: nn.Module, parameters: Sequence[Any], totals: list[Any], agreement: Any) -> None:
        copies = [None if t is None else t.clone() for t in totals]
        right(model, parameters, totals, agreement)
        right(model, parameters, copies)

    monkeypatch.setattr(engine, "hand_over", twice)


def changed_buffer(monkeypatch: Patch) -> None:
    changed_totals(monkeypatch, lambda _, split: next(split.declared.network.buffers()).add_(1))


def one_draw_more(monkeypatch: Patch) -> None:
    changed_totals(monkeypatch, lambda *_: torch.rand(1))


def temperature_once_a_chunk(monkeypatch: Patch) -> None:
    def change(totals: Any, split: SplitStep) -> None:
        totals.totals[-1] = totals.totals[-1] * 8

    changed_totals(monkeypatch, change)


def assert_named(verdict: Verdict, check: str, *words: str) -> None:
    assert verdict.answer is Same.DIFFERS and not verdict.same
    assert any(c.name.startswith(check) for c in verdict.checks if not c.passed), verdict.checks
    for word in words:
        assert word in verdict.fault


# Each with the loss it needs, the check that must fail, and what the fault's sentence must hold.
FAULTS: dict[str, tuple[Callable[[Patch], None], Any, str, tuple[str, ...]]] = {
    "half a percent": (half_a_percent, squares, "gradient", ("split_rows",)),
    "mean of means": (mean_of_means, squares, "gradient", ("split_rows",)),
    "mean of counted means": (mean_of_counted_means, cross_entropy, "gradient", ("split_rows",)),
    "a chunk dropped": (dropped_chunk, cross_entropy, "gradient", ("split_rows",)),
    "handed over twice": (handed_over_twice, cross_entropy, "gradient", ("split_rows",)),
    "a buffer changed": (changed_buffer, cross_entropy, "buffers", ("split_rows", "(Buffered), which holds offset")),
    "a draw more": (one_draw_more, cross_entropy, "generators", ("split_rows",)),
    "handed over twice, two passes": (handed_over_twice, spread, "gradient", ("split_rows",)),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_differs_and_is_named(name: str, dtype: torch.dtype, monkeypatch: Patch) -> None:
    plant, loss_fn, check, words = FAULTS[name]
    model = Buffered(dtype)
    step = sg.Step(model, loss_fn, rows=[30, 8, 23])
    assert sg.verify_step(step, labelled(N, dtype)).fault == ""
    plant(monkeypatch)
    with left_alone(model):
        assert_named(sg.verify_step(step, labelled(N, dtype)), check, *words)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_temperature_counted_once_a_chunk_is_named(dtype: torch.dtype, monkeypatch: Patch) -> None:
    step = sg.Step(mlp(dtype), Temperature(dtype), rows=8)
    assert sg.verify_step(step, labelled(N, dtype)).same
    temperature_once_a_chunk(monkeypatch)
    verdict = sg.verify_step(step, labelled(N, dtype))
    assert_named(verdict, "gradient", "lever split_rows", "module loss_fn (Temperature)")
    assert verdict.worst_parameter == "loss_fn.log_scale"


def test_a_half_percent_in_bfloat16_hides_from_the_direct_comparison_and_not_from_float64(monkeypatch: Patch) -> None:
    half_a_percent(monkeypatch)
    verdict = sg.verify_step(sg.Step(mlp(torch.bfloat16), squares, rows=8), labelled(N, torch.bfloat16))
    failed = {check.tier for check in verdict.checks if not check.passed}
    assert verdict.answer is Same.DIFFERS and 1 in failed and 2 not in failed
    assert verdict.tiers == (0, 1, 2, 3)


# The lever that is at fault


def wrong_apply(lever: type, monkeypatch: Patch) -> None:
    """``lever`` as it is, but that the loss of its chunks is half a percent larger."""
    right = lever.apply

    @contextlib.contextmanager
    def wrong(self: Any, execution: Execution) -> Iterator[Execution]:
        with right(self, execution) as inner:
            loss_fn = inner.declared.loss_fn
            declared = dataclasses.replace(inner.declared, loss_fn=lambda out, b: loss_fn(out, b) * 1.005)
            yield dataclasses.replace(inner, declared=declared)

    monkeypatch.setattr(lever, "apply", wrong)


@pytest.mark.parametrize("lever", [HostRows, SplitRows])
@pytest.mark.parametrize("rows", [None, 40], ids=["whole batch", "40 rows"])
def test_the_lever_with_a_wrong_apply_is_named(lever: type, rows: int | None, monkeypatch: Patch) -> None:
    wrong_apply(lever, monkeypatch)
    plan = Plan(levers={"host_rows": {}, "split_rows": {"rows": 9}}, exactness=Exactness.SAME_SUM, batch_rows=N)
    verdict = sg.verify_step(sg.Step(mlp(), cross_entropy, plan=plan), labelled(N), rows=rows)
    assert_named(verdict, "gradient", f"lever {lever.name}: without it the step passes")


# The module that is at fault


class Flips(nn.Module):
    """Another function when few rows run, once it is switched on; the examination saw the right one."""

    on = False

    def forward(self, x: Tensor) -> Tensor:
        return x * 1.01 if Flips.on and len(x) < 20 else x


class Code(nn.Module):
    """The same fault in a module's own code between its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        return self.second(hidden + 0.01 if Flips.on and len(x) < 20 else hidden)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("loss_fn", [cross_entropy, spread], ids=["one pass", "two passes"])
def test_the_module_whose_rows_differ_is_named(dtype: torch.dtype, loss_fn: Any, monkeypatch: Patch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), Flips(), nn.Tanh(), nn.Linear(5, 3)).to(dtype)
    step = sg.Step(model, loss_fn, rows=[30, 8, 23])
    assert sg.verify_step(step, labelled(N, dtype)).same
    monkeypatch.setattr(Flips, "on", True)
    verdict = sg.verify_step(step, labelled(N, dtype))
    assert_named(verdict, "gradient", "lever split_rows", "module 1 (Flips), the first whose rows are others")


@pytest.mark.parametrize("loss_fn", [cross_entropy, spread], ids=["one pass", "two passes"])
def test_draws_are_not_taken_for_the_fault(loss_fn: Any, monkeypatch: Patch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.Dropout(0.3), Flips(), nn.Linear(9, 3)).double()
    step = sg.Step(model, loss_fn, rows=[30, 8, 23])
    assert sg.verify_step(step, labelled(N)).same
    monkeypatch.setattr(Flips, "on", True)
    assert_named(sg.verify_step(step, labelled(N)), "gradient", "module 2 (Flips), the first whose rows are others")


def test_code_between_two_modules_is_named_as_such(monkeypatch: Patch) -> None:
    torch.manual_seed(0)
    step = sg.Step(Code().double(), cross_entropy, rows=[30, 8, 23])
    assert sg.verify_step(step, labelled(N)).same
    monkeypatch.setattr(Flips, "on", True)
    assert_named(sg.verify_step(step, labelled(N)), "gradient", "code of the model before second (Linear)")


def test_a_second_pass_that_is_another_function_is_an_answer_and_not_an_exception(monkeypatch: Patch) -> None:
    class Drifts(nn.Module):
        # Not state that a snapshot sees: a number outside the module.
        calls = [0]
        on = False

        def forward(self, x: Tensor) -> Tensor:
            self.calls[0] += 1
            return x + (1e-3 * self.calls[0] if Drifts.on else 0)

    torch.manual_seed(0)
    step = sg.Step(nn.Sequential(nn.Linear(6, 3), Drifts()).double(), spread, rows=8)
    assert sg.verify_step(step, labelled(N)).same
    Drifts.on = True
    verdict = sg.verify_step(step, labelled(N))
    assert_named(verdict, "second pass", "module 1 (Drifts)")
