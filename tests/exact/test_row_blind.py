"""Code that could count its rows is never taken for code that could not."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from samegrad.declared import declare
from samegrad.exact.row_blind import is_row_blind

from . import zoo

BATCH = zoo.batch()


class Layered(nn.Module):
    """Layers in a list, a switch, a part that may be missing: nothing that depends on rows."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.head, self.skip, self.doubled = nn.Linear(6, 7), None, True

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.activated(layer(x))
        if self.skip is not None:
            x = x + self.skip(x)
        if self.doubled:
            x = 2 * x
        return self.head(torch.flatten(x, 1))

    def activated(self, x: Tensor) -> Tensor:
        return F.relu(x)


class Asks(Layered):
    """The same, one method of which looks."""

    def activated(self, x: Tensor) -> Tensor:
        return super().activated(x) * x.shape[0]


class Replaced(Layered):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.training else x[16:]


def _helper(z: Tensor) -> Tensor:
    return z * len(z)


def _hooked() -> nn.Module:
    model = Layered()
    model.head.register_forward_hook(lambda part, args, out: out * len(out))
    return model


MODELS: dict[str, tuple[Callable[[], nn.Module], bool]] = {
    "layers of torch": (zoo.mlp, True),
    "layers and switches": (Layered, True),
    "a method that looks": (Asks, False),
    "a slice": (Replaced, False),
    "a hook": (_hooked, False),
}
LOSSES: dict[str, tuple[Any, bool]] = {
    "of torch": (lambda z, b: F.cross_entropy(z, b["y"]), True),
    "a sum": (lambda z, b: ((z - b["t"]).pow(2).sum(1) * b["w"]).mean() + 0.1 * z.abs().mean(), True),
    "a length": (lambda z, b: z.sum() / len(z), False),
    "a shape": (lambda z, b: z.sum() / z.shape[0], False),
    "a helper": (lambda z, b: _helper(z).mean(), False),
    "a loop": (lambda z, b: sum(row.sum() for row in z), False),
    "a decision": (lambda z, b: z.mean() if z.sum() > 0 else -z.mean(), False),
    "a slice": (lambda z, b: z[16:].sum(), False),
    "pieces": (lambda z, b: torch.stack(z.split(16)[:1]).sum(), False),
    "stars": (lambda z, b: torch.add(*z).sum(), False),
    "an object": (functools.partial(lambda z, b, scale: z.sum() * scale, scale=2), False),
    "a module of torch": (nn.MSELoss(), True),
}


@pytest.mark.parametrize("name", MODELS)
def test_models(name: str) -> None:
    make, blind = MODELS[name]
    assert is_row_blind(declare(make(), LOSSES["of torch"][0], forward=zoo_forward), BATCH) is blind


def zoo_forward(model: nn.Module, rows: Any) -> Tensor:
    return model(rows["x"])  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", LOSSES)
def test_losses(name: str) -> None:
    loss_fn, blind = LOSSES[name]
    assert is_row_blind(declare(zoo.mlp(), loss_fn), BATCH) is blind


class Counted(NamedTuple):
    x: Tensor

    @property
    def rows(self) -> int:
        return len(self.x)


def test_a_batch_of_its_own_class_may_count() -> None:
    declared = declare(zoo.mlp(), lambda z, b: z.sum() / b.rows, forward=lambda m, b: m(b.x))
    assert not is_row_blind(declared, Counted(BATCH["x"]))


def test_a_forward_that_was_replaced_may_count() -> None:
    model = zoo.mlp()
    model[0].forward = lambda x: F.linear(x, model[0].weight) * len(x)  # type: ignore[union-attr,operator]
    assert not is_row_blind(declare(model, LOSSES["of torch"][0]), BATCH)
