"""The quick walk against torch's own."""

from __future__ import annotations

import torch
from torch import nn

from samegrad.module_walk import parameters_of, parts_of


class Shared(nn.Module):
    """A module in two places, a slot without one, a tied weight, and a parameter beside the layers."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2))
        self.first = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2, bias=False), nn.GELU()))
        self.again = self.first[1]
        self.nothing = None
        self.register_module("empty", None)
        self.last = nn.ModuleDict({"a": nn.Linear(2, 2), "b": self.first})
        self.last["a"].weight = self.first[0].weight


def test_modules_and_parameters_come_as_torch_orders_them() -> None:
    model, beside = Shared(), nn.Linear(3, 3)
    assert parts_of([model]) == list(model.modules())
    assert parts_of([model, beside, model.first]) == [*model.modules(), beside]
    for mine, theirs in zip(parameters_of([model]), model.parameters(), strict=True):
        assert mine is theirs
