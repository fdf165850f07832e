"""Networks that memory is predicted for, in plain PyTorch: the shapes that papers and this project's tables use."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def convolution(inputs: int, outputs: int, size: int = 3, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)


def normalisation(kind: str, channels: int) -> nn.Module:
    return nn.BatchNorm2d(channels) if kind == "batch" else nn.GroupNorm(32, channels)


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions around a shortcut (He et al. 2015)."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int, kind: str) -> None:
        super().__init__()
        self.conv1, self.norm1 = convolution(inputs, width, 3, stride), normalisation(kind, width)
        self.conv2, self.norm2 = convolution(width, width), normalisation(kind, width)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = shortcut(inputs, width, stride, kind)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.norm1(self.conv1(x)))
        return self.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3 and 1 x 1 convolutions around a shortcut (He et al. 2015)."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int, kind: str) -> None:
        super().__init__()
        outputs = width * self.expansion
        self.conv1, self.norm1 = convolution(inputs, width, 1), normalisation(kind, width)
        self.conv2, self.norm2 = convolution(width, width, 3, stride), normalisation(kind, width)
        self.conv3, self.norm3 = convolution(width, outputs, 1), normalisation(kind, outputs)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = shortcut(inputs, outputs, stride, kind)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.norm1(self.conv1(x)))
        y = self.relu(self.norm2(self.conv2(y)))
        return self.relu(self.norm3(self.conv3(y)) + self.shortcut(x))


def shortcut(inputs: int, outputs: int, stride: int, kind: str) -> nn.Module:
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    return nn.Sequential(convolution(inputs, outputs, 1, stride), normalisation(kind, outputs))


class ResNet(nn.Module):
    """(n, 3, h, w) to (n, classes). ``kind``: "batch" or "group" normalisation."""

    def __init__(
        self, block: type[BasicBlock] | type[Bottleneck], depths: list[int], kind: str = "batch", classes: int = 1000
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            convolution(3, 64, 7, 2), normalisation(kind, 64), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        )
        width, blocks = 64, []
        for stage, depth in enumerate(depths):
            for index in range(depth):
                stride = 2 if stage and not index else 1
                blocks.append(block(width, 64 * 2**stage, stride, kind))
                width = 64 * 2**stage * block.expansion
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class Attention(nn.Module):
    """Multi-head self-attention of (n, t, width)."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, width = x.shape
        q, k, v = self.qkv(x).view(n, t, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(mixed.transpose(1, 2).reshape(n, t, width))


class TransformerBlock(nn.Module):
    """Pre-norm attention and a multilayer perceptron."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads, causal)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """(n, t) int64 tokens to (n, t, vocabulary) logits; the head is tied to the embedding (Radford et al. 2019)."""

    def __init__(self, depth: int = 12, width: int = 768, heads: int = 12, vocabulary: int = 50257) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(1024, width)
        self.blocks = nn.ModuleList(TransformerBlock(width, heads, True) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.places(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class VisionTransformer(nn.Module):
    """(n, 3, side, side) to (n, classes), patches of 16 (Dosovitskiy et al. 2020)."""

    def __init__(
        self, depth: int = 12, width: int = 768, heads: int = 12, side: int = 224, classes: int = 1000
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 16, 16)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.places = nn.Parameter(torch.zeros(1, (side // 16) ** 2 + 1, width))
        self.blocks = nn.ModuleList(TransformerBlock(width, heads, False) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.places
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


class UNetBlock(nn.Module):
    """Two normalised convolutions around a 1 x 1 shortcut."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            convolution(inputs, outputs), nn.GroupNorm(32, outputs), nn.SiLU(),
            convolution(outputs, outputs), nn.GroupNorm(32, outputs), nn.SiLU(),
        )  # fmt: skip
        self.shortcut = convolution(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + self.shortcut(x)


class UNet(nn.Module):
    """(n, 3, side, side) to the same shape: down, up, and what is carried over (Ronneberger et al. 2015)."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        widths = [width, 2 * width, 4 * width, 4 * width]
        self.first = convolution(3, width)
        self.down = nn.ModuleList(UNetBlock(a, b) for a, b in zip([width, *widths], widths))
        carried = widths[-2::-1]
        self.up = nn.ModuleList(UNetBlock(a + b, b) for a, b in zip([widths[-1], *carried], carried))
        self.last = nn.Conv2d(width, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x, carried = self.first(x), []
        for block in self.down:
            x = block(x)
            carried.append(x)
            x = F.avg_pool2d(x, 2) if block is not self.down[-1] else x
        carried.pop()
        for block in self.up:
            x = block(torch.cat([F.interpolate(x, scale_factor=2.0), carried.pop()], 1))
        return self.last(x)


class Recurrent(nn.Module):
    """(n, t, features) to (n, classes) through an LSTM."""

    def __init__(self, features: int = 256, width: int = 1024, depth: int = 2, classes: int = 1000) -> None:
        super().__init__()
        self.lstm = nn.LSTM(features, width, depth, batch_first=True)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


class Perceptron(nn.Module):
    """(n, features) to (n, classes)."""

    def __init__(self, features: int = 1024, width: int = 4096, depth: int = 6, classes: int = 1000) -> None:
        super().__init__()
        widths = [features] + [width] * depth
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(a, b), nn.LayerNorm(b), nn.GELU()) for a, b in itertools.pairwise(widths)
        )
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)
