"""Calls are followed on any number of rows: what is known to be the same has no difference, and nothing changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from samegrad.declared import declare
from samegrad.exact.compare_calls import first_difference
from samegrad.measure.counting import ByteCounter
from samegrad.measure.follow_calls import follow_calls

from ..contract.plain import left_alone
from ..exact import zoo
from ..exact.loss_zoo import LOSSES
from ..exact.module_zoo import BY_ROWS
from ..exact.test_module_zoo import batch, forward, loss_on

ROWS = (1, 2, 5, 8, zoo.ROWS)
# These need values, and are compared up to there.
NEED_VALUES = {"experts without a limit", "a sum over rows", "a loop as long as the row says"}


@pytest.mark.parametrize("name", BY_ROWS)
def test_what_treats_rows_alone_calls_the_same_for_any_number(name: str) -> None:
    torch.manual_seed(0)
    model, rows = BY_ROWS[name](), batch()
    declared = declare(model, loss_on("mse"), forward=forward)
    with left_alone(model):
        runs = follow_calls(declared, rows, declared.layout(rows), ROWS, with_loss=True)
    assert first_difference(runs) is None
    assert all(bool(run.failure) == (name in NEED_VALUES) for run in runs)
    assert all(run.calls for run in runs)


@pytest.mark.parametrize("name", [name for name, (_, form) in LOSSES.items() if form != "COUPLED"])
def test_losses_of_one_pass_call_the_same_for_any_number(name: str) -> None:
    declared, rows = declare(zoo.mlp(), LOSSES[name][0], forward=zoo.forward), zoo.batch()
    runs = follow_calls(declared, rows, declared.layout(rows), ROWS, with_loss=True)
    assert first_difference(runs) is None and not any(run.failure for run in runs)
    assert any(call.place == "the loss" for call in runs[0].calls)


def test_hooks_that_keep_what_they_see_keep_no_twins() -> None:
    seen: list[Any] = []
    model = zoo.mlp()
    model[0].register_forward_hook(lambda part, args, out: seen.append(out))  # type: ignore[union-attr]
    declared, rows = declare(model, lambda z, b: z.mean(), forward=zoo.forward), zoo.batch()
    follow_calls(declared, rows, declared.layout(rows), (8, 29), with_loss=True)
    assert seen == []


def test_whoever_counts_bytes_counts_none_of_them() -> None:
    class Wide(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.repeat(1, 1000)

    declared, rows = declare(nn.Sequential(nn.Linear(6, 6), Wide()), lambda z, b: z.mean()), torch.ones(29, 6)
    counter = ByteCounter(torch.device("cpu"))
    with counter:
        before = counter.peak_bytes
        follow_calls(declared, rows, declared.layout(rows), (29,), with_loss=True)
    assert counter.peak_bytes == before
