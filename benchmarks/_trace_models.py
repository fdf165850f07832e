"""Plain networks of known size whose steps are traced: ResNet-34 and GPT, each block recomputed if asked for.

ResNet: He, Zhang, Ren, Sun 2016, arXiv:1512.03385, table 1. GPT: Radford et al. 2019, with tied embeddings.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from samegrad.declared import DeclaredStep, declare


class Residual(nn.Module):
    """Two 3 x 3 convolutions and a shortcut."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.first_norm = nn.BatchNorm2d(outside)
        self.second = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.second_norm = nn.BatchNorm2d(outside)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = None
        if stride > 1 or inside != outside:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside)
            )

    def forward(self, x: Tensor) -> Tensor:
        made = self.relu(self.first_norm(self.first(x)))
        made = self.second_norm(self.second(made))
        made += x if self.shortcut is None else self.shortcut(x)
        return self.relu(made)


class ResNet34(nn.Module):
    """(rows, 3, 224, 224) to 1000 classes."""

    def __init__(self, recomputed: bool = False) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        )
        widths, blocks, inside = (64, 128, 256, 512), (3, 4, 6, 3), 64
        self.blocks = nn.ModuleList()
        for stage, (width, count) in enumerate(zip(widths, blocks)):
            for number in range(count):
                self.blocks.append(Residual(inside, width, 2 if stage and not number else 1))
                inside = width
        self.head = nn.Linear(512, 1000)
        self.recomputed = recomputed

    def forward(self, x: Tensor) -> Tensor:
        for part in (self.stem, *self.blocks):
            x = checkpoint(part, x, use_reentrant=False) if self.recomputed else part(x)
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Block(nn.Module):
    """Causal attention and a feed-forward layer, normalised before each."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.feed_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        rows, length, width = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(rows, length, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(rows, length, width))
        return x + self.down(F.gelu(self.up(self.feed_norm(x))))


class GPT(nn.Module):
    """(rows, length) tokens to logits (rows * length, words)."""

    def __init__(
        self, layers: int = 12, width: int = 768, heads: int = 12, words: int = 50257, length: int = 1024,
        recomputed: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.tokens, self.places = nn.Embedding(words, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, words, bias=False)
        self.head.weight = self.tokens.weight
        self.recomputed = recomputed

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.places(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.recomputed else block(x)
        return self.head(self.norm(x)).flatten(0, 1)


def cross_entropy(outputs: Tensor, batch: Any) -> Tensor:
    return F.cross_entropy(outputs, batch[1].flatten())


def under_autocast(model: nn.Module, batch: Any) -> Any:
    with torch.autocast("cuda", torch.bfloat16):
        return model(batch[0])


def resnet_step(
    rows: int, *, autocast: bool = False, recomputed: bool = False, device: str = "meta"
) -> tuple[DeclaredStep, Any]:
    """SGD with momentum on ``rows`` pictures, model and batch on ``device``."""
    with torch.device(device):
        model = ResNet34(recomputed)
        batch = torch.empty(rows, 3, 224, 224), torch.zeros(rows, dtype=torch.int64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return _declared(model, optimizer, autocast), batch


def gpt_step(
    rows: int, *, autocast: bool = False, recomputed: bool = False, layers: int = 12, width: int = 768,
    heads: int = 12, device: str = "meta",
) -> tuple[DeclaredStep, Any]:  # fmt: skip
    """AdamW on ``rows`` texts of 1024 tokens, model and batch on ``device``."""
    with torch.device(device):
        model = GPT(layers, width, heads, recomputed=recomputed)
        batch = (torch.zeros(rows, 1024, dtype=torch.int64), torch.zeros(rows, 1024, dtype=torch.int64))
    return _declared(model, torch.optim.AdamW(model.parameters(), lr=1e-4), autocast), batch


def _declared(model: nn.Module, optimizer: torch.optim.Optimizer, autocast: bool) -> DeclaredStep:
    def loss_fn(outputs: Tensor, batch: Any) -> Tensor:
        if not autocast:
            return cross_entropy(outputs, batch)
        with torch.autocast("cuda", torch.bfloat16):
            return cross_entropy(outputs, batch)

    return declare(model, loss_fn, optimizer=optimizer, forward=under_autocast if autocast else None)
