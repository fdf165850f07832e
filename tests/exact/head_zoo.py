"""A small language model, and losses of its logits as people write them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES, WIDTH, LENGTH, ROWS = 37, 8, 9, 6
D = torch.float64
Batch = tuple[Tensor, Tensor]
LogitLoss = Callable[[Tensor, Tensor], Tensor]


class Words(nn.Module):
    """(rows, positions) tokens to (rows, positions, CLASSES) logits. ``tied``: head and embedding are one weight."""

    def __init__(self, *, tied: bool = True, bias: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(CLASSES, WIDTH)
        self.body = nn.Sequential(
            nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH),
            nn.Dropout(dropout), nn.LayerNorm(WIDTH),
        )  # fmt: skip
        self.head = nn.Linear(WIDTH, CLASSES, bias=bias)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.body(self.embed(tokens)))


def words(rows: int = ROWS) -> Batch:
    """(rows, LENGTH) tokens and targets; the second row has no valid target, the last some."""
    generator = torch.Generator().manual_seed(rows)
    tokens, targets = torch.randint(0, CLASSES, (2, rows, LENGTH), generator=generator)
    targets[1] = -100
    targets[-1, 3:6] = -100
    return tokens, targets


def flat(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.view(-1, CLASSES), targets.view(-1))


def next_token(logits: Tensor, targets: Tensor) -> Tensor:
    shifted = logits[..., :-1, :].contiguous()
    return F.cross_entropy(shifted.view(-1, shifted.size(-1)), targets[..., 1:].contiguous().view(-1))


def transformers_like(logits: Tensor, targets: Tensor) -> Tensor:
    """As the transformers package has it: float32, labels shifted in place of logits, a count given from outside."""
    labels = F.pad(targets, (0, 1), value=-100)[..., 1:].contiguous().view(-1).to(logits.device)
    total = F.cross_entropy(logits.float().view(-1, CLASSES), labels, ignore_index=-100, reduction="sum")
    return total / 41


def class_weights(like: Tensor) -> Tensor:
    return torch.linspace(0.1, 2, CLASSES, dtype=like.dtype)


# Every one is of logits and targets (rows, positions); all but the last two divide by a count of targets.
LOSSES: dict[str, LogitLoss] = {
    "flat": flat,
    "next token": next_token,
    "module": lambda z, y: nn.CrossEntropyLoss(ignore_index=-100)(z.flatten(0, 1), y.flatten()),
    "classes second": lambda z, y: F.cross_entropy(z.transpose(1, 2), y),
    "classes first of all": lambda z, y: F.cross_entropy(z.permute(2, 0, 1).movedim(0, 1), y),
    "weights": lambda z, y: F.cross_entropy(z.reshape(-1, CLASSES), y.reshape(-1), weight=class_weights(z)),
    "smoothing": lambda z, y: F.cross_entropy(z.mT, y, label_smoothing=0.1),
    "weights and smoothing": lambda z, y: F.cross_entropy(z.mT, y, weight=class_weights(z), label_smoothing=0.2),
    "another index": lambda z, y: F.cross_entropy(z.mT, y.clamp(min=0), ignore_index=0),
    "likelihood": lambda z, y: F.nll_loss(F.log_softmax(z, dim=-1).view(-1, CLASSES), y.view(-1)),
    "likelihood with weights": lambda z, y: F.nll_loss(z.log_softmax(2).mT, y, weight=class_weights(z)),
    "masked": lambda z, y: F.cross_entropy(z[y >= 0], y[y >= 0]),
    "last position": lambda z, y: F.cross_entropy(z[:, -1], y[:, -1].clamp(min=0)),
    "narrowed": lambda z, y: F.cross_entropy(z.narrow(1, 2, 5).mT, y[:, 2:7]),
    "one position": lambda z, y: F.cross_entropy(z[0, 3], y[0, 3].clamp(min=0)),
    "capped": lambda z, y: 3 * F.cross_entropy(((z / 7).tanh() * 7).mT, y),
    "none, masked mean": lambda z, y: (
        (F.cross_entropy(z.mT, y, reduction="none") * (y >= 0)).sum() / (y >= 0).sum().clamp(min=1)
    ),
    "none, weighted rows": lambda z, y: (
        (F.cross_entropy(z.view(-1, CLASSES), y.view(-1), reduction="none").view(y.shape).sum(1) ** 2).mean()
    ),
    "two losses": lambda z, y: F.cross_entropy(z.mT, y) + 0.1 * F.cross_entropy(z.mT, y, reduction="sum"),
    "sum": lambda z, y: F.cross_entropy(z.mT, y, reduction="sum"),
    "transformers": transformers_like,
}


def of_batch(loss: LogitLoss) -> Callable[[Any, Batch], Tensor]:
    """``loss`` as ``Step`` takes it."""
    return lambda logits, batch: loss(logits, batch[1])
