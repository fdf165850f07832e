"""What a row of ``exact_table.py`` is, and the models and batches that its rows share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import samegrad as sg

D = torch.float64
N, CLASSES = 29, 7  # primes: no split is even
Batch = dict[str, Tensor]
Outputs = list[Tensor]


@dataclasses.dataclass(frozen=True)
class Case:
    """``loss(outputs(), batch)`` is the plain step; ``ours(rows)`` its gradients with that many rows at a time.

    outputs: tensors with one entry a row (or item). parameters: what receives gradients through them. own: what the
    loss uses beside them. naive: gradients the usual way; None means the mean of the chunks' losses, eight rows each.
    """

    parameters: Sequence[Tensor]
    outputs: Callable[[], Outputs]
    loss: Callable[[Outputs, Any], Tensor]
    ours: Callable[[int], Sequence[Tensor | None]]
    batch: Batch = dataclasses.field(default_factory=dict)
    own: Sequence[Tensor] = ()
    naive: Callable[[], Sequence[Tensor]] | None = None


def draws(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=D, generator=torch.Generator().manual_seed(seed))


def network(inputs: int = 6, outputs: int = CLASSES, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(inputs, 24), nn.LayerNorm(24), nn.GELU(), nn.Linear(24, outputs)).to(D)


def batch() -> Batch:
    classes = torch.randint(0, CLASSES, (N,), generator=torch.Generator().manual_seed(3))
    # Every chunk keeps a valid target: what a chunk without one does to a mean of means is no number at all.
    ignored = torch.where(torch.arange(N) % 8 < 1 + torch.arange(N) // 5, classes, -100)
    return {"x": draws(1, N, 6), "t": draws(2, N, CLASSES), "y": classes, "some": ignored, "w": draws(4, N).abs()}


RowsLoss = Callable[[Tensor, Batch], Tensor]


def through_step(loss: RowsLoss, in_chunks: RowsLoss | None = None, **declared: Any) -> Case:
    """A row whose loss is that of one model's outputs, run by ``Step``; ``in_chunks`` is the same loss, streamed."""
    model, rows_of = network(), batch()

    def ours(rows: int) -> list[Tensor | None]:
        model.zero_grad()
        step = sg.Step(model, in_chunks or loss, forward=lambda m, b: m(b["x"]), rows=rows, **declared)
        step.backward(rows_of)
        return [p.grad for p in model.parameters()]

    return Case(list(model.parameters()), lambda: [model(rows_of["x"])], lambda o, b: loss(o[0], b), ours, rows_of)


def differentiated(wanted: Sequence[Tensor], loss_of: Callable[[int], Tensor]) -> Callable[[int], Sequence[Tensor]]:
    return lambda rows: torch.autograd.grad(loss_of(rows), list(wanted))
