"""Models with checkpoints of their own: what they hide or do twice is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import samegrad as sg
from samegrad.declared import declare
from samegrad.execute.trial import examine_mapped
from samegrad.levers.exact_batchnorm import ExactBatchNorm
from samegrad.settle import aliases_for

from ..contract.plain import assert_close, cross_entropy, labelled

BATCH = labelled(13)


class Checkpointed(nn.Module):
    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.reentrant = reentrant
        self.first, self.inner, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Any = checkpoint(self.inner, self.first(x).tanh(), use_reentrant=self.reentrant)
        outputs: Tensor = self.last(hidden)
        return outputs


def plain_gradients() -> dict[str, Tensor | None]:
    model = Checkpointed(reentrant=True).double()
    cross_entropy(model(BATCH[0]), BATCH).backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("do", ["prepare", "verify"])
def test_a_reentrant_checkpoint_is_refused_with_the_way_out(do: str) -> None:
    model = Checkpointed(reentrant=True).double()
    how: dict[str, Any] = {"budget": "1GiB"} if do == "prepare" else {"rows": 4}
    refused = pytest.raises(sg.CannotSplit, match=r"(?s)use_reentrant=True.*use_reentrant=False")
    with sg.Step(model, cross_entropy, **how) as step, refused:
        step.prepare(BATCH) if do == "prepare" else sg.verify_step(step, BATCH)


def test_rows_at_a_time_its_gradients_are_right_all_the_same() -> None:
    model = Checkpointed(reentrant=True).double()
    with sg.Step(model, cross_entropy, rows=4) as step:
        step.backward(BATCH)
    assert_close({name: p.grad for name, p in model.named_parameters()}, plain_gradients())


def test_the_other_kind_is_planned_and_verified() -> None:
    model = Checkpointed(reentrant=False).double()
    with sg.Step(model, cross_entropy, budget="1GiB") as step:
        step.backward(BATCH)
        assert sg.verify_step(step, BATCH).same
    assert_close({name: p.grad for name, p in model.named_parameters()}, plain_gradients())


class Normed(nn.Module):
    def __init__(self, *, checkpointed: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.checkpointed = checkpointed
        self.first, self.last = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU()), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Any = checkpoint(self.first, x, use_reentrant=False) if self.checkpointed else self.first(x)
        outputs: Tensor = self.last(hidden)
        return outputs


@pytest.mark.parametrize("checkpointed", [True, False])
def test_statistics_that_a_checkpoint_updates_twice_are_refused_in_chunks(checkpointed: bool) -> None:
    """PyTorch's plain step counts every batch twice there; lockstep would count it once."""
    model = Normed(checkpointed=checkpointed).double()
    declared = declare(model, cross_entropy)
    aliases, layout = aliases_for(declared), declared.layout(BATCH)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    if checkpointed:
        with pytest.raises(sg.CannotSplit, match=r"first\.1 runs again in backward.*statistics twice"):
            examine_mapped(declared, aliases, BATCH, layout, ExactBatchNorm(rows=4), None)
    else:
        examine_mapped(declared, aliases, BATCH, layout, ExactBatchNorm(rows=4), None)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
