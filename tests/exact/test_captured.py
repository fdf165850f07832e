"""What a loss holds in a closure, a global, a default or a partial is widened in the float64 copy of the step."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import samegrad as sg
from samegrad.exact.captured import in_float64
from samegrad.exact.split import SplitStep
from samegrad.records import Same

from ..contract.plain import cross_entropy, labelled, mlp

N = 61
CLASS_WEIGHTS = torch.tensor([0.5, 1.0, 2.5])
CALLS = 0
CPU = torch.device("cpu")

Loss = Callable[[Tensor, Any], Tensor]


def from_a_closure() -> Loss:
    weights = CLASS_WEIGHTS.clone()
    return lambda outputs, batch: F.cross_entropy(outputs, batch[1], weight=weights)


def of_a_global(outputs: Tensor, batch: Any) -> Tensor:
    return F.cross_entropy(outputs, batch[1], weight=CLASS_WEIGHTS)


def of_a_default(outputs: Tensor, batch: Any, weights: Tensor = CLASS_WEIGHTS) -> Tensor:
    return F.cross_entropy(outputs, batch[1], weight=weights)


def of_a_keyword(outputs: Tensor, batch: Any, *, weights: Tensor = CLASS_WEIGHTS) -> Tensor:
    return F.cross_entropy(outputs, batch[1], weight=weights)


def of_another_function(outputs: Tensor, batch: Any) -> Tensor:
    return of_a_global(outputs, batch)


def of_a_function_within(outputs: Tensor, batch: Any) -> Tensor:
    return sum(F.cross_entropy(outputs, batch[1], weight=CLASS_WEIGHTS) for _ in range(1))  # type: ignore[return-value]


LOSSES: dict[str, Loss] = {
    "closure": from_a_closure(),
    "global": of_a_global,
    "default": of_a_default,
    "keyword": of_a_keyword,
    "partial": functools.partial(of_a_keyword, weights=CLASS_WEIGHTS),
    "another function": of_another_function,
    "a function within": of_a_function_within,
}


@pytest.mark.parametrize("name", LOSSES)
def test_the_step_is_compared_in_float64(name: str) -> None:
    step = sg.Step(mlp(torch.float32), LOSSES[name], rows=8)
    verdict = sg.verify_step(step, labelled(N, torch.float32))
    assert verdict.same and verdict.tiers == (0, 1, 2, 3)
    assert CLASS_WEIGHTS.dtype is torch.float32


def test_half_a_percent_in_bfloat16_is_seen_then(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = CLASS_WEIGHTS.bfloat16()
    step = sg.Step(mlp(torch.bfloat16), lambda outputs, batch: (outputs * weights).square().mean(), rows=8)
    assert sg.verify_step(step, labelled(N, torch.bfloat16)).same
    right = SplitStep._shares
    monkeypatch.setattr(SplitStep, "_shares", lambda *args: [share * 1.005 for share in right(*args)])
    assert sg.verify_step(step, labelled(N, torch.bfloat16)).answer is Same.DIFFERS


def test_what_holds_no_floating_tensor_is_itself() -> None:
    indices = torch.arange(3)
    weight = torch.ones(3, requires_grad=True)
    for loss_fn in (F.cross_entropy, lambda z, b: z[indices].sum(), lambda z, b: (z * weight).sum(), nothing_of(None)):
        assert in_float64(loss_fn, CPU) is loss_fn


def nothing_of(later: Any) -> Loss:
    def loss_fn(outputs: Tensor, batch: Any) -> Tensor:
        return outputs.sum() if later is None else loss_fn(outputs, batch)

    return loss_fn


def test_the_rest_is_shared_with_the_copy() -> None:
    seen: list[int] = []
    scale, count = torch.ones(3), 0

    def loss_fn(outputs: Tensor, batch: Any) -> Tensor:
        nonlocal count
        count += 1
        seen.append(len(outputs))
        return (outputs * scale).sum()

    wide = in_float64(loss_fn, CPU)
    assert wide(torch.ones(2, 3, dtype=torch.float64), None).dtype is torch.float64
    assert seen == [2] and count == 1 and scale.dtype is torch.float32


def counting(outputs: Tensor, batch: Any) -> Tensor:
    global CALLS
    CALLS += 1
    return (outputs * CLASS_WEIGHTS).sum()


def test_a_function_that_assigns_to_a_global_keeps_its_globals() -> None:
    assert in_float64(counting, CPU) is counting


def test_a_forward_is_widened_as_well() -> None:
    mean, deviation = torch.ones(6), torch.full((6,), 2.0)
    step = sg.Step(
        mlp(torch.float32), of_a_global, rows=8, forward=lambda model, batch: model((batch[0] - mean) / deviation)
    )
    assert sg.verify_step(step, labelled(N, torch.float32)).tiers == (0, 1, 2, 3)


def _weights_made(outputs: Tensor, batch: Any) -> Tensor:
    return F.cross_entropy(outputs, batch[1], weight=torch.tensor([0.5, 1.0, 2.5]))


def _cast(outputs: Tensor, batch: Any) -> Tensor:
    return F.cross_entropy(outputs.float().square(), batch[1])


NARROWED = {
    # The loss, and what the verdict says of it.
    "a tensor of its own": (_weights_made, "float64 cannot run: RuntimeError"),
    "a cast": (_cast, "a cast (test_captured.py"),
    "nothing": (of_a_global, ""),
}


@pytest.mark.parametrize("name", NARROWED)
def test_what_keeps_the_step_from_float64_is_named_with_its_line(name: str) -> None:
    loss_fn, words = NARROWED[name]
    verdict = sg.verify_step(sg.Step(mlp(torch.float32), loss_fn, rows=8), labelled(N, torch.float32))
    assert verdict.same
    assert words in verdict.narrowed_by and bool(words) == bool(verdict.narrowed_by)
    assert ("test_captured.py:" in verdict.narrowed_by) == bool(words)
    assert (verdict.compared_dtype == "float64") == (not words)


def test_a_forward_that_closes_over_the_model_is_named() -> None:
    model = mlp(torch.bfloat16)
    step = sg.Step(model, cross_entropy, rows=8, forward=lambda _, batch: model(batch[0]))
    verdict = sg.verify_step(step, labelled(N, torch.bfloat16))
    assert verdict.answer is Same.UNPROVEN and "float64 cannot run" in verdict.narrowed_by
