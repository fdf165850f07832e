"""Small models of four kinds, each with a ragged batch, and plans that force a lever on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import samegrad as sg
from samegrad.levers import find_levers
from samegrad.records import Exactness, Plan

from .plain import Batch

ROWS = 13
Make = Callable[..., tuple[nn.Module, Batch]]


class Last(nn.Module):
    """The last outputs of a recurrent layer, (rows, features)."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0][:, -1]


class Mean(nn.Module):
    """(rows, …, features at ``axis``) to (rows, features)."""

    def __init__(self, *axes: int) -> None:
        super().__init__()
        self.axes = axes

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(self.axes)


def _with_batch(network: nn.Module, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[nn.Module, Batch]:
    generator = torch.Generator().manual_seed(ROWS)
    x = torch.randn(ROWS, *shape, generator=generator, dtype=torch.float64).to(dtype)
    return network.to(dtype), (x, torch.randint(0, 3, (ROWS,), generator=generator))


def mlp(dtype: torch.dtype = torch.float64, dropout: float = 0.0) -> tuple[nn.Module, Batch]:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 17), nn.GELU(), nn.Dropout(dropout), nn.Linear(17, 11), nn.Tanh(),
                            nn.Dropout(dropout), nn.Linear(11, 3))  # fmt: skip
    return _with_batch(network, (6,), dtype)


def cnn(dtype: torch.dtype = torch.float64, dropout: float = 0.0) -> tuple[nn.Module, Batch]:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU(), nn.Dropout(dropout), nn.Conv2d(8, 6, 3, stride=2),
        nn.SiLU(), nn.Dropout(dropout), nn.ConvTranspose2d(6, 4, 2), Mean(2, 3), nn.Linear(4, 3),
    )  # fmt: skip
    return _with_batch(network, (3, 9, 7), dtype)


def volumes(dtype: torch.dtype = torch.float64, dropout: float = 0.0) -> tuple[nn.Module, Batch]:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv3d(2, 4, 3), nn.ReLU(), nn.Dropout(dropout), Mean(2, 3, 4), nn.Linear(4, 3))
    return _with_batch(network, (2, 5, 4, 6), dtype)


def transformer(dtype: torch.dtype = torch.float64, dropout: float = 0.0) -> tuple[nn.Module, Batch]:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout, batch_first=True)
    network = nn.Sequential(nn.Linear(5, 8), layer, Mean(1), nn.Linear(8, 3))
    return _with_batch(network, (7, 5), dtype)


def lstm(dtype: torch.dtype = torch.float64, dropout: float = 0.0) -> tuple[nn.Module, Batch]:
    torch.manual_seed(0)
    network = nn.Sequential(Last(nn.LSTM(5, 6, batch_first=True)), nn.Dropout(dropout), nn.Linear(6, 3))
    return _with_batch(network, (4, 5), dtype)


def normalised(dtype: torch.dtype = torch.float64, dropout: float = 0.0) -> tuple[nn.Module, Batch]:
    """Two blocks with BatchNorm, which couples the rows: nothing is split through the whole model here."""
    torch.manual_seed(0)

    def block(narrow: int, wide: int) -> nn.Module:
        layers = nn.Conv2d(narrow, wide, 3, padding=1), nn.BatchNorm2d(wide), nn.Sigmoid(), nn.Dropout(dropout)
        return nn.Sequential(*layers)

    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))
    return _with_batch(nn.Sequential(block(3, 8), block(8, 6), head), (3, 9, 7), dtype)


MODELS: dict[str, Make] = {"mlp": mlp, "cnn": cnn, "transformer": transformer, "lstm": lstm}

# Knobs under which a lever does something on models of a few numbers.
KNOBS: dict[str, dict[str, Any]] = {
    "autocast": {"dtype": "bfloat16", "full_precision": []},
    "layout": {},
    "offload_saved": {"smallest_bytes": 0, "modules": None},
    "optimizer_state": {},
}


def plan_with(**levers: dict[str, Any]) -> Plan:
    """A plan that takes these levers, whatever they are refused for, on batches of any size."""
    exactness = max((find_levers()[name].exactness for name in levers), default=Exactness.SAME_BITS)
    return Plan(levers=levers, exactness=exactness, batch_rows=2**20)


def forced(model: nn.Module, loss_fn: Any, *, optimizer: Any = None, **levers: dict[str, Any]) -> sg.Step:
    """A step under ``plan_with(**levers)``."""
    return sg.Step(model, loss_fn, plan=plan_with(**levers), optimizer=optimizer, allow=Exactness.ROUNDED)


# Planted


def stale(copy_of: Callable[..., Any], taken: list[int]) -> Callable[..., Any]:
    """The first copy of a size stands for all others of it; ``taken`` grows where that is another tensor."""
    first: dict[int, Any] = {}

    def wrong(self: Any, tensor: Tensor) -> Any:
        copy = copy_of(self, tensor)
        old = first.setdefault(copy._bytes.numel(), copy)
        taken.extend([1] * (not torch.equal(old._bytes, copy._bytes)))
        return old

    return wrong
