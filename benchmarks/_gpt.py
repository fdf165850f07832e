"""A GPT-2 as its paper has it: pre-norm blocks, learnt positions, the head tied to the embedding."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class Shape:
    """``length``: positions of a row."""

    layers: int
    width: int
    heads: int
    classes: int
    length: int


SMALL = Shape(layers=12, width=768, heads=12, classes=50257, length=1024)
TINY = Shape(layers=4, width=64, heads=4, classes=8192, length=128)


class Block(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.before_attention, self.before_mlp = nn.LayerNorm(shape.width), nn.LayerNorm(shape.width)
        self.attention, self.joined = nn.Linear(shape.width, 3 * shape.width), nn.Linear(shape.width, shape.width)
        self.mlp = nn.Sequential(
            nn.Linear(shape.width, 4 * shape.width), nn.GELU("tanh"), nn.Linear(4 * shape.width, shape.width)
        )

    def forward(self, x: Tensor) -> Tensor:
        parts = self.attention(self.before_attention(x)).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.joined(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.before_mlp(x))


class GPT(nn.Module):
    """(rows, length) tokens to (rows, length, classes) logits."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(shape.classes, shape.width), nn.Embedding(shape.length, shape.width)
        self.blocks = nn.Sequential(*(Block(shape) for _ in range(shape.layers)))
        self.norm, self.head = nn.LayerNorm(shape.width), nn.Linear(shape.width, shape.classes, bias=False)
        for part in self.modules():
            if isinstance(part, (nn.Linear, nn.Embedding)):
                nn.init.normal_(part.weight, std=0.02)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        return self.head(self.norm(self.blocks(self.tokens(tokens) + self.places(places))))


def next_token(logits: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The ordinary loss; ``batch`` is (tokens, the tokens that follow)."""
    return F.cross_entropy(logits.view(-1, logits.size(-1)), batch[1].view(-1))


def random_batch(shape: Shape, rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(0, shape.classes, (rows, shape.length + 1), generator=generator).to(device)
    return text[:, :-1].contiguous(), text[:, 1:].contiguous()
