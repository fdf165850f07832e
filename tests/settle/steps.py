"""Small steps that are planned for cards, in plain PyTorch: each with a batch, a loss, and what it is an example of."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import samegrad as sg

Optimizer = Callable[[Any], torch.optim.Optimizer]


class Words(nn.Module):
    """(n, 24) tokens to logits of 3000 words; the head is tied to the embedding."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Embedding(3000, 32)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(32, 4, 128, dropout, batch_first=True, norm_first=True) for _ in range(3)
        )
        self.head = nn.Linear(32, 3000, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens)
        for block in self.blocks:
            hidden = block(hidden)
        made: Tensor = self.head(hidden)
        return made


class Residual(nn.Module):
    """What ``inner`` makes of rows, added to them."""

    def __init__(self, *inner: nn.Module) -> None:
        super().__init__()
        self.inner = nn.Sequential(*inner)

    def forward(self, rows: Tensor) -> Tensor:
        return torch.relu(rows + self.inner(rows))


class UNet(nn.Module):
    """(n, 3, 16, 16) pictures to pictures, with a skip connection over the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.SiLU())
        self.middle = nn.Sequential(nn.Conv2d(16, 16, 3, 2, 1), nn.SiLU(), nn.ConvTranspose2d(16, 16, 2, 2))
        self.up = nn.Sequential(nn.Conv2d(32, 16, 3, padding=1), nn.SiLU(), nn.Conv2d(16, 3, 1))

    def forward(self, pictures: Tensor) -> Tensor:
        down = self.down(pictures)
        made: Tensor = self.up(torch.cat([down, self.middle(down)], 1))
        return made


class Sequences(nn.Module):
    """(n, 20, 12) to 10 classes, by an LSTM's last output."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent = nn.LSTM(12, 48, 2, batch_first=True)
        self.head = nn.Linear(48, 10)

    def forward(self, rows: Tensor) -> Tensor:
        made: Tensor = self.head(self.recurrent(rows)[0][:, -1])
        return made


def pictures_model() -> nn.Module:
    blocks = [
        Residual(
            nn.Conv2d(12, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 12, 3, padding=1),
            nn.BatchNorm2d(12),
        )
        for _ in range(3)
    ]  # fmt: skip
    stem = nn.Conv2d(3, 12, 3, padding=1)
    return nn.Sequential(stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 10))


def perceptron() -> nn.Module:
    blocks = [Residual(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)) for _ in range(4)]
    return nn.Sequential(nn.Linear(20, 64), *blocks, nn.Linear(64, 10))


def cross_entropy(outputs: Tensor, batch: Any) -> Tensor:
    return F.cross_entropy(outputs.flatten(0, -2), batch[1].flatten())


def picture_error(outputs: Tensor, batch: Any) -> Tensor:
    return F.mse_loss(outputs, batch[1])


def contrast(outputs: Tensor, batch: Any) -> Tensor:
    """All rows against all rows."""
    rows = F.normalize(outputs, dim=-1)
    return F.cross_entropy(rows @ rows.T * 5, torch.arange(len(rows), device=rows.device))


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, its loss, and a batch of ``rows`` rows, an odd number."""

    model: Callable[[], nn.Module]
    loss_fn: Callable[[Tensor, Any], Tensor]
    rows: int
    row_shape: tuple[int, ...]
    target_shape: tuple[int, ...] = ()
    vocabulary: int = 0

    def batch(self, device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self.rows)
        shape = (self.rows, *self.row_shape)
        if self.vocabulary:
            tokens = torch.randint(self.vocabulary, shape, generator=generator)
            return tokens.to(device), tokens.roll(-1, 1).to(device)
        rows = torch.randn(shape, generator=generator, dtype=dtype)
        if self.target_shape:
            return rows.to(device), torch.zeros(self.rows, *self.target_shape, dtype=dtype, device=device)
        return rows.to(device), torch.randint(10, (self.rows,), generator=generator).to(device)

    def step(
        self, device: str = "cpu", optimizer: Optimizer | None = torch.optim.Adam, dtype: torch.dtype = torch.float32,
        **given: Any,
    ) -> sg.Step:  # fmt: skip
        torch.manual_seed(0)
        model = self.model().to(device, dtype)
        made = None if optimizer is None else optimizer(model.parameters())
        return sg.Step(model, self.loss_fn, optimizer=made, **given)


CASES = {
    "words": Case(Words, cross_entropy, 65, (24,), vocabulary=3000),
    "words with dropout": Case(lambda: Words(0.1), cross_entropy, 65, (24,), vocabulary=3000),
    "pictures": Case(pictures_model, cross_entropy, 37, (3, 24, 24)),
    "u-net": Case(UNet, picture_error, 21, (3, 16, 16), (3, 16, 16)),
    "perceptron": Case(perceptron, cross_entropy, 1037, (20,)),
    "sequences": Case(Sequences, cross_entropy, 101, (20, 12)),
    "contrast": Case(perceptron, contrast, 301, (20,)),
}
