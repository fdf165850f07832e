"""Kernels that are not the same twice: where they are torch's own doing, a right step raises no alarm for them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import samegrad as sg
from samegrad.levers.recompute import Recompute
from samegrad.measure import counters
from samegrad.records import Same
from samegrad.verify import float64_run
from samegrad.verify.tiers import KEPT_BITS

from ..contract.lever_zoo import forced
from ..contract.plain import cross_entropy, spread
from ..contract.test_planted_levers import failed, half_a_percent


class Kernel(torch.autograd.Function):
    """The identity; in the dtypes where it is ``restless`` it has other last bits in every call."""

    restless: frozenset[torch.dtype] = frozenset()
    _calls = itertools.count()

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        if x.dtype not in Kernel.restless:
            return x.clone()
        return x * (1 + torch.finfo(x.dtype).eps * (1 + next(Kernel._calls) % 3))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


class Restless(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        result: Tensor = Kernel.apply(super().forward(input))  # type: ignore[no-untyped-call]  # torch has no types here
        return result


@pytest.fixture(autouse=True)
def calm() -> Iterator[None]:
    Kernel.restless = frozenset()
    yield
    Kernel.restless = frozenset()


def made() -> tuple[nn.Sequential, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Sequential(Restless(16, 16), nn.Tanh()), nn.Linear(16, 3))
    return model, (torch.randn(13, 16), torch.randint(0, 3, (13,)))


@pytest.mark.parametrize("loss_fn", [cross_entropy, spread], ids=["one pass", "two passes"])
def test_a_step_that_repeats_itself_where_it_runs_is_same(loss_fn: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = made()
    with forced(model, loss_fn, recompute={"blocks": ["1"]}) as step:
        assert sg.verify_step(step, batch).answer is Same.SAME
        Kernel.restless = frozenset({torch.float32, torch.float64})
        assert sg.verify_step(step, batch).answer is Same.SAME
        half_a_percent(Recompute, monkeypatch)
        assert sg.verify_step(step, batch).answer is Same.DIFFERS


def test_copies_in_float64_run_by_algorithms_that_repeat_themselves() -> None:
    model, batch = made()
    found = []
    model[0].register_forward_hook(lambda *_: found.append(bool(torch.backends.cudnn.deterministic)))
    with sg.Step(model, cross_entropy, rows=5) as step, float64_run.repeatable(step.declared):
        model(batch[0])
    model(batch[0])
    assert found == [True, False]


@pytest.mark.parametrize(
    ("short", "convolves"), [(False, True), (True, True), (True, False)],
    ids=["enough memory", "short of memory", "short, without convolutions"],
)  # fmt: skip
def test_bits_are_not_asked_of_convolutions_that_were_refused_memory(
    short: bool, convolves: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = made()
    if convolves:
        model.insert(0, nn.Sequential(nn.Unflatten(1, (1, 16)), nn.Conv1d(1, 1, 1), nn.Flatten()))
    block = "2" if convolves else "1"
    with forced(model, cross_entropy, split_rows={"rows": 5}, recompute={"blocks": [block]}) as step:
        assert sg.verify_step(step, batch).answer is Same.SAME
        monkeypatch.setattr(counters, "retries", lambda _: 1 if short else 0)
        Kernel.restless = frozenset({torch.float32})
        verdict = sg.verify_step(step, batch)
        [kept] = [check for check in verdict.checks if check.name == KEPT_BITS]
        assert ("could not be asked" in kept.detail) is (short and convolves) and kept.passed
        # What a lever does wrong is no kernel's rounding.
        half_a_percent(Recompute, monkeypatch)
        wrong = sg.verify_step(step, batch)
        assert wrong.answer is Same.DIFFERS and KEPT_BITS in failed(wrong)
