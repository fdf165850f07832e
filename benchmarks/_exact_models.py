"""Rows of ``exact_table.py`` whose model couples rows or draws: (e) of the list."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from _exact_case import CLASSES, Batch, Case, D, N, batch
from torch import Tensor, nn

import samegrad as sg


def through_model(*layers: nn.Module) -> Case:
    """A mean over rows of the outputs of linear layers and ``layers`` in turn, the plain step under the same seed."""
    rows_of = batch()
    torch.manual_seed(0)
    parts: list[nn.Module] = [nn.Linear(6, 24)]
    for layer in layers:
        parts += [layer, nn.Tanh(), nn.Linear(24, 24)]
    model = nn.Sequential(*parts, nn.Linear(24, CLASSES)).to(D)

    def loss(z: Tensor, b: Batch) -> Tensor:
        return F.mse_loss(z, b["t"])

    def ours(rows: int) -> list[Tensor | None]:
        twin = copy.deepcopy(model)
        torch.manual_seed(5)
        sg.Step(twin, loss, forward=lambda m, b: m(b["x"]), rows=rows).backward(rows_of)
        return [p.grad for p in twin.parameters()]

    def plainly() -> list[Tensor]:
        torch.manual_seed(5)
        # All rows in one chunk: the plain call, under the draws that every split makes.
        return [sg.rowwise(model, rows=N)(rows_of["x"])]

    def naive() -> list[Tensor]:
        twin = copy.deepcopy(model)
        torch.manual_seed(5)
        for start in range(0, N, 8):
            part = {name: leaf[start : start + 8] for name, leaf in rows_of.items()}
            (loss(twin(part["x"]), part) * len(part["x"]) / N).backward()
        return [p.grad for p in twin.parameters() if p.grad is not None]

    return Case(list(model.parameters()), plainly, lambda o, b: loss(o[0], b), ours, rows_of, naive=naive)


ROWS: dict[str, Callable[[], Case]] = {
    "(e) BatchNorm": lambda: through_model(nn.BatchNorm1d(24), nn.BatchNorm1d(24)),
    "(e) dropout": lambda: through_model(nn.Dropout(0.2), nn.Dropout(0.3)),
    "(e) BatchNorm and dropout": lambda: through_model(nn.BatchNorm1d(24), nn.Dropout(0.3)),
}
