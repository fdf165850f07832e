"""``Step(reduce="softmax_mean")``: rows streamed through their softmax, against plain PyTorch, in float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import samegrad as sg
from samegrad.exact.softmax_mean import Streamed
from samegrad.verify import tolerance

D = torch.float64
ROWS, SAMPLES, WIDTH = 37, 5, 3
AXES = {"centers": 0, "samples": None}


class Kernels(nn.Module):
    """A Gaussian at each center, its width from a network: log-densities (centers, 5) and their gradients."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, WIDTH)).to(D)
        self.temperature = nn.Parameter(torch.tensor(0.7, dtype=D))

    def forward(self, centers: Tensor, samples: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        width = self.network(centers).exp()
        away = (samples[None] - centers[:, None]) * width[:, None]
        scores = width.log().sum(1)[:, None] - 0.5 * away.square().sum(-1)
        return scores * self.temperature, {"gradient": -away * width[:, None], "size": away.square().sum(-1)}


def called(model: nn.Module, batch: dict[str, Tensor]) -> Any:
    return model(batch["centers"], batch["samples"])


def of_means(reduced: Any, batch: Any) -> Tensor:
    lse, means = reduced
    value: Tensor = (2 * means["size"] - means["gradient"].square().sum(1) + lse).mean()
    return value


def points(rows: int = ROWS) -> dict[str, Tensor]:
    drawn = torch.Generator().manual_seed(1)
    return {
        "centers": torch.randn(rows, WIDTH, generator=drawn, dtype=D),
        "samples": torch.randn(SAMPLES, WIDTH, generator=drawn, dtype=D),
    }


def plain(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The same loss of all rows, written out, and its gradients."""
    scores, values = called(model, batch)
    shares = scores.softmax(0)
    gradient = torch.einsum("kb,kbd->bd", shares, values["gradient"])
    size = torch.einsum("kb,kb->b", shares, values["size"])
    loss = (2 * size - gradient.square().sum(1) + scores.logsumexp(0)).mean()
    return loss.detach(), list(torch.autograd.grad(loss, list(model.parameters())))


def step_of(model: nn.Module, **options: Any) -> sg.Step:
    return sg.Step(model, of_means, forward=called, batch_axes=AXES, reduce="softmax_mean", **options)


def errors(model: nn.Module, step: sg.Step, batch: dict[str, Tensor]) -> Iterator[float]:
    loss, gradients = plain(model, batch)
    model.zero_grad()
    yield float((step.backward(batch) - loss).abs() / loss.abs())
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert parameter.grad is not None
        yield float((parameter.grad - gradient).abs().max() / gradient.abs().max())


@pytest.mark.parametrize("rows", [1, 4, [30, 1, 6], 18, ROWS])
def test_every_split_has_the_plain_gradient(rows: Any) -> None:
    model = Kernels()
    assert max(errors(model, step_of(model, rows=rows), points())) < 1e-12


@pytest.mark.parametrize("kept", [1, 3, 10])
def test_chunks_whose_graph_is_kept_have_it_too(kept: int) -> None:
    model = Kernels()
    plan = sg.Plan(
        levers={"split_rows": {"rows": 4, "kept_chunks": kept}}, exactness=sg.Exactness.SAME_SUM, batch_rows=ROWS
    )
    assert max(errors(model, step_of(model, plan=plan), points())) < 1e-12


def test_the_whole_step_is_the_plain_one() -> None:
    model = Kernels()
    assert max(errors(model, step_of(model, rows=ROWS), points())) < 1e-13


def test_it_is_verified_against_the_plain_step() -> None:
    verdict = sg.verify_step(step_of(Kernels(), rows=5), points())
    assert verdict.same
    assert any(check.name == "second pass" for check in verdict.checks)


def test_a_softmax_restricted_to_the_chunk_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Streamed.pulled_back

    def restricted(self: Streamed, scores: Tensor, *rest: Any) -> Any:
        return right(Streamed.of(scores.detach(), ()), scores, *rest)

    monkeypatch.setattr(Streamed, "pulled_back", restricted)
    model = Kernels()
    assert max(errors(model, step_of(model, rows=5), points())) > 1e-3
    assert not sg.verify_step(step_of(model, rows=5), points()).same


def test_a_second_pass_that_is_another_function_is_refused() -> None:
    model = Kernels()
    step = step_of(model, rows=5)
    step.prepare(points())
    right, calls = model.network.forward, []

    def drifting(x: Tensor) -> Tensor:
        calls.append(len(x))
        value: Tensor = right(x) * (1 + 1e-9 * len(calls))
        return value

    step.backward(points())
    model.network.forward = drifting  # type: ignore[method-assign]
    with pytest.raises(sg.GradientsDiffer, match="second pass"):
        step.backward(points())


def held_bytes(rows: int) -> tuple[int, float]:
    """Counted peak of a step of ``rows`` rows, five at a time, and its centers' bytes."""
    model, batch = Kernels(), points(rows)
    step = step_of(model, rows=5, optimizer=torch.optim.SGD(model.parameters(), lr=0.0))
    step.prepare(batch)
    [*_, result] = sg.train(step, [batch, batch], counter=sg.count_bytes(step))
    assert result.peak_allocated_bytes is not None
    return result.peak_allocated_bytes, batch["centers"].nbytes


def test_the_peak_grows_by_nothing_but_the_rows_themselves() -> None:
    (few, few_rows), (many, many_rows) = held_bytes(40), held_bytes(400)
    assert many - few == many_rows - few_rows


def test_a_budget_is_planned_for_and_kept() -> None:
    model, batch = Kernels(), points(400)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    whole = sg.measure_step(step_of(model, optimizer=optimizer), batch).predicted_peak_bytes(rows=400)
    step = step_of(model, optimizer=optimizer, budget=f"{whole // 3}B")
    step.prepare(batch)
    assert len(step.sizes_for(batch)) > 1
    [*_, result] = sg.train(step, [batch, batch], counter=sg.count_bytes(step))
    assert result.peak_allocated_bytes is not None and result.peak_allocated_bytes <= whole // 3
    assert max(errors(model, step, batch)) <= tolerance.entry_allowed(D)


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"reduce": "mean"}, "not a reduction"),
        ({"reduce": "softmax_mean", "normalise": "mean"}, "no sum over them"),
    ],
)
def test_what_does_not_go_together_is_refused(options: dict[str, Any], found: str) -> None:
    with pytest.raises(sg.UsageError, match=found):
        sg.Step(Kernels(), of_means, forward=called, batch_axes=AXES, **options)


def test_outputs_that_are_not_scores_and_values_are_refused() -> None:
    step = sg.Step(nn.Linear(WIDTH, 2, dtype=D), of_means, reduce="softmax_mean", rows=5)
    with pytest.raises(sg.UsageError, match="returned a Tensor"):
        step.backward(points()["centers"])


def test_a_card_is_planned_for_as_if_no_rows_were_kept() -> None:
    model, batch = Kernels().float(), {name: leaf.float() for name, leaf in points(4000).items()}
    step = step_of(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.0))
    [way] = [way for way in sg.measure_step(step, batch, device="NVIDIA H200").traced if not way.levers]
    assert way.output_bytes == way.loss_bytes == 0
