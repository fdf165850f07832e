"""``verify_step``: right steps are the same, planted wrong ones differ, the rest is unproven."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import samegrad as sg
from samegrad.exact.split import SplitStep
from samegrad.records import Same, Verdict
from samegrad.verify import tolerance

from ..contract.plain import cross_entropy, labelled, left_alone, mlp, spread

N = 61
D = torch.float64


class Planted:
    """A step whose engine is exchanged for one with a fault."""

    def __init__(self, step: sg.Step, fault: type[SplitStep]) -> None:
        self.step, self.fault = step, fault
        self.verdict: Verdict | None = None

    @property
    def declared(self) -> Any:
        return self.step.declared

    @property
    def plan(self) -> Any:
        return self.step.plan

    def sizes_for(self, batch: Any) -> tuple[int, ...]:
        return self.step.sizes_for(batch)

    def draws_for(self, batch: Any, layout: Any) -> Any:
        return self.step.draws_for(batch, layout)

    def put_back(self) -> None:
        self.step.put_back()

    def split_for(self, batch: Any, layout: Any) -> SplitStep:
        right = self.step.split_for(batch, layout)
        return self.fault(**{f.name: getattr(right, f.name) for f in dataclasses.fields(SplitStep)})


class MeanOfMeans(SplitStep):
    """Every chunk weighs the same, however many targets it has."""

    def totals(self, batch: Any, layout: Any, sizes: Sequence[int], *args: Any, **kwargs: Any) -> Any:
        totals = super().totals(batch, layout, sizes, *args, **kwargs)
        parts = []
        start = 0
        for size in sizes:
            part = tuple(leaf[start : start + size] for leaf in batch)
            outputs = self.declared.forward(self.declared.network, part)
            loss = self.declared.loss_fn(outputs, part) / len(sizes)
            parts.append(torch.autograd.grad(loss, list(self.declared.network.parameters())))
            start += size
        totals.totals = [sum(grads) for grads in zip(*parts)]
        return totals


def altered(change: Callable[[Any], None]) -> type[SplitStep]:
    class Altered(SplitStep):
        def totals(self, *args: Any, **kwargs: Any) -> Any:
            totals = super().totals(*args, **kwargs)
            change(totals)
            return totals

    return Altered


def _half_a_percent(totals: Any) -> None:
    totals.totals = [None if t is None else t * 1.005 for t in totals.totals]


def _half_a_percent_of_one(totals: Any) -> None:
    totals.totals[2] = totals.totals[2] * 1.005


def _sign_of_one(totals: Any) -> None:
    totals.totals[1] = -totals.totals[1]


def _missing(totals: Any) -> None:
    totals.totals[3] = None


def _zero(totals: Any) -> None:
    totals.totals[3] = torch.zeros_like(totals.totals[3])


def _not_a_number(totals: Any) -> None:
    totals.totals[0] = totals.totals[0].clone()
    totals.totals[0][0, 0] = torch.nan


def _loss(totals: Any) -> None:
    totals.loss = totals.loss * 1.000001


class DroppedChunk(SplitStep):
    def totals(self, batch: Any, layout: Any, sizes: Sequence[int], *args: Any, **kwargs: Any) -> Any:
        kept = tuple(leaf[: -sizes[-1]] for leaf in batch)
        fewer = dataclasses.replace(layout, rows=layout.rows - sizes[-1])
        return super().totals(kept, fewer, sizes[:-1], *args, **kwargs)


class ChangedBuffer(SplitStep):
    def totals(self, *args: Any, **kwargs: Any) -> Any:
        totals = super().totals(*args, **kwargs)
        next(self.declared.network.buffers()).add_(1)
        return totals


class ChangedAttribute(SplitStep):
    def totals(self, *args: Any, **kwargs: Any) -> Any:
        totals = super().totals(*args, **kwargs)
        self.declared.network.calls = 1  # type: ignore[assignment]
        return totals


FAULTS: dict[str, tuple[type[SplitStep], str]] = {
    "mean of means": (MeanOfMeans, "gradient"),
    "half a percent": (altered(_half_a_percent), "gradient"),
    "half a percent of one parameter": (altered(_half_a_percent_of_one), "gradient"),
    "sign of one parameter": (altered(_sign_of_one), "gradient"),
    "missing gradient": (altered(_missing), "which parameters"),
    "gradient of zero": (altered(_zero), "gradient"),
    "not a number": (altered(_not_a_number), "gradient"),
    "dropped chunk": (DroppedChunk, "gradient"),
    "loss": (altered(_loss), "loss"),
    "changed buffer": (ChangedBuffer, "buffers"),
    "changed attribute": (ChangedAttribute, "buffers"),
}


class Buffered(nn.Module):
    """The small network, with a buffer that it reads and does not write."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.inner = mlp(dtype)
        self.register_buffer("offset", torch.zeros(6, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x + self.offset)


def unevenly_labelled(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    x, y = labelled(N, dtype)
    y[10:17] = -100
    return x, y


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("loss_fn", [cross_entropy, spread], ids=["one pass", "two passes"])
@pytest.mark.parametrize("rows", [1, 7, 8, [30, 1, 30]], ids=str)
def test_a_right_step_is_the_same(dtype: torch.dtype, loss_fn: Any, rows: Any) -> None:
    batch = unevenly_labelled(dtype)
    step = sg.Step(Buffered(dtype), loss_fn, rows=rows)
    verdict = sg.verify_step(step, batch)
    assert verdict.answer is Same.SAME and verdict.same and step.verdict is verdict
    assert all(check.passed == (check.error <= check.allowed) for check in verdict.checks)
    assert verdict.parameters_checked == 4 and verdict.buffers_checked == 1
    assert verdict.dtype == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_differs_in_every_dtype(name: str, dtype: torch.dtype) -> None:
    fault, check = FAULTS[name]
    step = Planted(sg.Step(Buffered(dtype), cross_entropy, rows=8), fault)
    verdict = sg.verify_step(step, unevenly_labelled(dtype))
    assert verdict.answer is Same.DIFFERS and not verdict.same
    assert any(c.name.startswith(check) for c in verdict.checks if not c.passed)


def test_the_wrong_parameter_is_named() -> None:
    for fault, name in ((_half_a_percent_of_one, "inner.2.weight"), (_sign_of_one, "inner.0.bias")):
        step = Planted(sg.Step(Buffered(D), cross_entropy, rows=8), altered(fault))
        assert sg.verify_step(step, unevenly_labelled(D)).worst_parameter == name


def test_half_a_percent_would_pass_in_bfloat16_alone() -> None:
    # Why float64 is asked first: the contract's own bfloat16 allowance is a hundred times the fault.
    assert tolerance.entry_allowed(torch.bfloat16) > 0.005
    assert tolerance.entry_allowed(D) < 1e-3 * 0.005


@pytest.mark.parametrize(("dtype", "answer"), [(torch.float32, Same.SAME), (torch.bfloat16, Same.UNPROVEN)])
def test_what_runs_in_one_dtype_only_is_proven_in_float32_and_unproven_below(dtype: torch.dtype, answer: Same) -> None:
    model = Buffered(dtype)
    # A forward that closes over the model cannot be given a copy in float64.
    step = sg.Step(model, cross_entropy, rows=8, forward=lambda _, batch: model(batch[0]))
    assert sg.verify_step(step, unevenly_labelled(dtype)).answer is answer


def test_a_forward_that_closes_over_an_integer_model_proves_nothing_by_comparing_nothing() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 3)).to(torch.bfloat16)
    ids = torch.arange(N) % 9

    def forward(_: Any, batch: Any) -> Any:
        return model(batch[0])

    step = sg.Step(model, cross_entropy, rows=8, forward=forward)
    assert sg.verify_step(step, (ids, labelled(N)[1])).answer is Same.UNPROVEN
    planted = Planted(sg.Step(model, cross_entropy, rows=8, forward=forward), altered(_sign_of_one))
    assert sg.verify_step(planted, (ids, labelled(N)[1])).answer is Same.DIFFERS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_that_fixes_a_dtype_inside_is_judged_in_it(dtype: torch.dtype) -> None:
    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.inner = nn.Linear(6, 6)
            self.gain = nn.Parameter(torch.linspace(0.5, 2, 6))
            self.head = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.inner(x).float()
            h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-6) * self.gain.float()
            return self.head(h.type_as(x))

    batch = unevenly_labelled(dtype)
    step = sg.Step(Norm().to(dtype), cross_entropy, rows=8)
    verdict = sg.verify_step(step, batch)
    assert verdict.answer is Same.SAME
    for fault in (_half_a_percent, _sign_of_one):
        assert sg.verify_step(Planted(step, altered(fault)), batch).answer is Same.DIFFERS


def test_autocast_is_verified_as_it_runs() -> None:
    batch = unevenly_labelled(torch.float32)
    step = sg.Step(Buffered(torch.float32), cross_entropy, rows=8)
    with torch.autocast("cpu", torch.bfloat16):
        verdict = sg.verify_step(step, batch)
        planted = sg.verify_step(Planted(step, altered(_half_a_percent)), batch)
    assert verdict.answer is Same.SAME and verdict.dtype == "bfloat16"
    assert planted.answer is Same.DIFFERS


def test_a_loss_that_owns_its_parameters_is_verified_with_them() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(1.3))

        def forward(self, outputs: Tensor, batch: Any) -> Tensor:
            return F.cross_entropy(outputs * self.scale, batch[1])

    batch = unevenly_labelled(torch.float32)
    step = sg.Step(Buffered(torch.float32), Scaled(), rows=8)
    verdict = sg.verify_step(step, batch)
    assert verdict.answer is Same.SAME and verdict.parameters_checked == 5

    def double_the_scale(totals: Any) -> None:
        # What calling the full loss once a chunk does to a temperature.
        totals.totals[-1] = totals.totals[-1] * 8

    planted = sg.verify_step(Planted(step, altered(double_the_scale)), batch)
    assert planted.answer is Same.DIFFERS and planted.worst_parameter == "loss_fn.scale"


# What is not split


def drawing() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.Dropout(0.4), nn.Linear(9, 3))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [None, N])
def test_a_step_that_runs_whole_is_the_same_also_when_it_draws_and_keeps_state(
    dtype: torch.dtype, rows: int | None
) -> None:
    verdict = sg.verify_step(sg.Step(drawing().to(dtype), cross_entropy, rows=N), labelled(N, dtype), rows=rows)
    assert verdict.answer is Same.SAME and verdict.max_relative_error == 0
    assert verdict.checks[0].name == "plain run twice"


def test_a_loss_that_keeps_state_and_draws_is_verified_from_the_same_state() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, outputs: Tensor, batch: Any) -> Tensor:
            self.calls += 1
            return cross_entropy(outputs + self.calls * torch.randn_like(outputs), batch)

    loss_fn = Noisy()
    step = sg.Step(Buffered(torch.float32), loss_fn, rows=8)
    assert sg.verify_step(step, unevenly_labelled(torch.float32)).answer is Same.SAME
    assert loss_fn.calls == 0


# What is reported, and what is left alone


def test_the_verdict_names_its_reference_and_rows() -> None:
    batch = labelled(N)
    step = sg.Step(mlp(), cross_entropy, rows=8)
    whole, part = sg.verify_step(step, batch), sg.verify_step(step, batch, rows=20)
    assert whole.reference == part.reference == "the plain step on cpu"
    assert (whole.rows_checked, whole.batch_rows) == (N, N)
    assert (part.rows_checked, part.batch_rows) == (20, N)
    assert (whole.rows_checked, part.rows_checked, part.batch_rows) == (N, 20, N)


@pytest.mark.parametrize("rows", [1, 2, 5, 20])
def test_few_rows_are_still_verified_in_more_than_one_chunk(rows: int) -> None:
    step = Planted(sg.Step(mlp(), cross_entropy, rows=30), DroppedChunk if rows > 1 else altered(_half_a_percent))
    assert sg.verify_step(step, labelled(N), rows=rows).answer is Same.DIFFERS


@pytest.mark.parametrize("rows", [0, N + 1])
def test_more_rows_than_there_are_is_refused(rows: int) -> None:
    with pytest.raises(sg.UsageError, match=f"{N} rows"):
        sg.verify_step(sg.Step(mlp(), cross_entropy, rows=8), labelled(N), rows=rows)


@pytest.mark.parametrize("rows", [8, N])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_verifying_changes_nothing_and_fires_no_hook(rows: int, dtype: torch.dtype) -> None:
    model = drawing().to(dtype) if rows == N else Buffered(dtype)
    fired: list[int] = []
    weight = next(model.parameters())
    weight.register_hook(lambda _: fired.append(1))
    weight.register_post_accumulate_grad_hook(lambda _: fired.append(2))
    weight.grad = torch.ones_like(weight)
    batch = labelled(N, dtype)
    x = batch[0].clone()
    step = sg.Step(model, cross_entropy, rows=rows)
    with left_alone(model):
        sg.verify_step(step, batch)
    assert fired == [] and torch.equal(batch[0], x)


def test_a_forward_that_writes_on_its_input_is_verified_on_copies() -> None:
    class Doubling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x.mul_(2))

    batch = labelled(N)
    x = batch[0].clone()
    assert sg.verify_step(sg.Step(Doubling(), cross_entropy, rows=N), batch).answer is Same.SAME
    assert torch.equal(batch[0], x)


def test_gradients_that_are_zero_by_structure_do_not_raise_an_alarm() -> None:
    # The bias before a loss that only sees differences has no gradient but rounding.
    def shift_free(outputs: Tensor, batch: Any) -> Tensor:
        return (outputs - outputs.mean(0)).square().mean()

    step = sg.Step(mlp(), shift_free, rows=8)
    assert sg.verify_step(step, labelled(N)).answer is Same.SAME


@pytest.mark.parametrize("rows", [1, 7, 400])
def test_a_loss_of_mixed_signs_does_not_raise_an_alarm(rows: int) -> None:
    x, _ = labelled(1009)
    y = torch.randn(1009, 3, dtype=D, generator=torch.Generator().manual_seed(1))
    model = mlp()
    offset = float((model(x) * y).mean().detach())
    step = sg.Step(model, lambda z, b: (z * b[1]).mean() - offset, rows=rows)
    assert sg.verify_step(step, (x, y)).answer is Same.SAME


def test_a_verdict_survives_json() -> None:
    verdict = sg.verify_step(sg.Step(mlp(), cross_entropy, rows=8), labelled(N))
    assert Verdict.from_json(verdict.to_json()) == verdict
