"""Recurrent layers in two passes: their kernels without a graph are not those with one, for some numbers of rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import samegrad as sg
from samegrad.exact import examine


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rnn = kind(32, 48, batch_first=True)
        self.head = nn.Linear(48, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


def contrastive(outputs: Tensor, batch: Any) -> Tensor:
    z = F.normalize(outputs, dim=1)
    return F.cross_entropy(z @ z.T, torch.arange(len(z)))


def backward(kind: type[nn.RNNBase], rows: Any) -> sg.Verdict:
    batch = torch.randn(25, 7, 32, generator=torch.Generator().manual_seed(1))
    step = sg.Step(Recurrent(kind), contrastive, rows=rows, forward=lambda model, x: model(x))
    step.backward(batch)
    return sg.verify_step(step, batch)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("rows", [8, 1, [13, 12]], ids=["last chunk of one row", "one row", "two chunks"])
def test_the_second_pass_repeats_the_first_also_for_one_row(kind: type[nn.RNNBase], rows: Any) -> None:
    assert backward(kind, rows).same


def test_without_the_rule_eight_equal_rows_would_be_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, one = Recurrent(nn.LSTM), torch.ones(1, 7, 32)
    with torch.no_grad():
        without_graph = layer(one)
    if torch.equal(layer(one), without_graph):
        pytest.skip("this torch has one LSTM kernel for one row")
    monkeypatch.setattr(examine, "_has_recurrent_layers", lambda network: False)
    with pytest.raises(sg.GradientsDiffer):
        backward(nn.LSTM, 8)
    batch = torch.randn(25, 7, 32, generator=torch.Generator().manual_seed(1))
    verdict = sg.verify_step(sg.Step(layer, contrastive, rows=8, forward=lambda model, x: model(x)), batch)
    assert not verdict.same and "module rnn (LSTM), the first whose second pass is not its first" in verdict.fault
