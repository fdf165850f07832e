"""A batch of which no target counts is bad input, by whichever number the loss leaves targets out; nothing else is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import samegrad as sg

ROWS = 24
X = torch.randn(ROWS, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(ROWS) % 3


def stepped(index: int = -100, **how: Any) -> sg.Step:
    torch.manual_seed(0)
    model = nn.Linear(6, 3).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def loss(outputs: Tensor, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(outputs, batch[1], ignore_index=index)

    return sg.Step(model, loss, optimizer=optimizer, **how)


@pytest.mark.parametrize("index", [-100, 255, 0])
@pytest.mark.parametrize("how", [{"budget": "1GiB"}, {"rows": 7}, {"rows": ROWS}])
def test_training_stops_at_such_a_batch_with_the_weights_as_they_were(index: int, how: dict[str, Any]) -> None:
    step = stepped(index, **how)
    loop = sg.train(step, [(X, LABELS), (X, torch.full_like(LABELS, index))])
    next(loop)
    before = step.declared.network.weight.detach().clone()
    with pytest.raises(sg.BadInput, match=rf"step 1\n.*batch\[1\] is {index} in every row.*no target counts") as raised:
        next(loop)
    assert raised.value.exit_code == 3 and "leave out batches" in raised.value.do
    assert torch.equal(step.declared.network.weight, before)


@pytest.mark.parametrize("index", [-100, 255])
@pytest.mark.parametrize("how", [{"budget": "1GiB"}, {"rows": 7}])
def test_no_verdict_is_given_on_such_a_batch(index: int, how: dict[str, Any]) -> None:
    step = stepped(index, **how)
    step.prepare((X, LABELS))
    with pytest.raises(sg.BadInput, match="no target counts"):
        sg.verify_step(step, (X, torch.full_like(LABELS, index)))


def test_no_plan_is_made_for_such_a_batch() -> None:
    with pytest.raises(sg.BadInput, match="no target counts"):
        stepped(budget="2KiB").prepare((X, torch.full_like(LABELS, -100)))


def test_targets_that_a_second_term_lacks_are_no_reason() -> None:
    """Labels that only a part of the rows' loss would use, by a sum, are all missing in many a batch."""
    model = nn.Linear(6, 3).double()

    def loss(outputs: Tensor, batch: Any) -> Tensor:
        return outputs.square().mean() + nn.functional.cross_entropy(outputs, batch[1], reduction="sum")

    step = sg.Step(model, loss, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), budget="1GiB")
    batch = X, torch.full_like(LABELS, -100)
    assert sg.verify_step(step, batch).same
    next(sg.train(step, [batch]))


def test_rows_that_are_not_finite_are_told_as_that() -> None:
    bad = X.clone()
    bad[3] = float("nan")
    with pytest.raises(sg.NonFinite, match=r"row 3 of batch\[0\]"):
        next(sg.train(stepped(rows=7), [(bad, LABELS)]))
