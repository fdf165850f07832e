"""The backbones of the published tables, in plain PyTorch: convolutional ones, and residual networks without pooling.

Source: Nguyen et al. 2023, "Enhancing Few-Shot Image Classification With Cosine Transformer", arXiv:2211.06828.
"""

from __future__ import annotations

import itertools
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

BackboneName = Literal["Conv4", "Conv6", "ResNet18", "ResNet34"]


class ConvBackbone(nn.Sequential):
    """Conv4 or Conv6: 3x3 convolution, BatchNorm and ReLU, 64 channels wide; the first four halve the picture.

    Embeddings (N, d) of images (N, channels, height, width).
    """

    def __init__(self, depth: int, *, channels: int = 3, width: int = 64) -> None:
        super().__init__()
        for number, (wide_in, wide_out) in enumerate(itertools.pairwise([channels, *[width] * depth]), start=1):
            layers = [nn.Conv2d(wide_in, wide_out, 3, padding=1), nn.BatchNorm2d(wide_out), nn.ReLU()]
            if number <= 4:
                layers.append(nn.MaxPool2d(2))
            self.add_module(f"layer{number}", nn.Sequential(*layers))
        self.flatten = nn.Flatten()


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut, which is a 1x1 convolution where the shape changes."""

    def __init__(self, wide_in: int, wide_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(wide_in, wide_out, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(wide_out)
        self.conv2 = nn.Conv2d(wide_out, wide_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(wide_out)
        self.shortcut = nn.Sequential()
        if stride != 1 or wide_in != wide_out:
            self.shortcut.append(nn.Conv2d(wide_in, wide_out, 1, stride=stride, bias=False))
            self.shortcut.append(nn.BatchNorm2d(wide_out))

    def forward(self, x: Tensor) -> Tensor:
        inner = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(inner + self.shortcut(x))


class ResNetBackbone(nn.Module):
    """ResNet without its last pooling: the maps are flattened, 512 · 7 · 7 = 25,088 numbers of a 224-pixel image."""

    def __init__(self, blocks: tuple[int, int, int, int], *, channels: int = 3, width: int = 64) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        # A layer, so that the whole stem can run again as one.
        self.relu = nn.ReLU()
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)
        wide_in = width
        for number, count in enumerate(blocks):
            wide_out = width * 2**number
            layer = nn.Sequential(
                ResidualBlock(wide_in, wide_out, 1 if number == 0 else 2),
                *(ResidualBlock(wide_out, wide_out, 1) for _ in range(count - 1)),
            )
            self.add_module(f"layer{number + 1}", layer)
            wide_in = wide_out
        for part in self.modules():
            if isinstance(part, nn.Conv2d):
                nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Embeddings (N, d) of images (N, channels, height, width)."""
        x: Tensor = self.pool(self.relu(self.bn1(self.conv1(images))))
        for number in range(1, 5):
            x = getattr(self, f"layer{number}")(x)
        return x.flatten(1)


def make_backbone(name: BackboneName, *, channels: int = 3) -> ConvBackbone | ResNetBackbone:
    """The backbone called ``name``, for images of ``channels``; weights from torch's default generator."""
    match name:
        case "Conv4" | "Conv6":
            return ConvBackbone(int(name[-1]), channels=channels)
        case "ResNet18":
            return ResNetBackbone((2, 2, 2, 2), channels=channels)
        case "ResNet34":
            return ResNetBackbone((3, 4, 6, 3), channels=channels)
