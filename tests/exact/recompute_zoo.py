"""Models whose blocks can run again, float64, and what is to be recomputed of each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from samegrad.exact.recomputed import Blocks

D = torch.float64
ROWS = 11
CLASSES = 5


class Residual(nn.Module):
    """torchvision's basic block, in place where that is."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        other = before != after
        self.downsample = nn.Sequential(nn.Conv2d(before, after, 1), nn.BatchNorm2d(after)) if other else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += x if self.downsample is None else self.downsample(x)
        return self.relu(y)


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(2)
        self.layer1 = nn.Sequential(Residual(8, 8), Residual(8, 8))
        self.layer2 = nn.Sequential(Residual(8, 12), Residual(12, 12))
        self.fc = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.fc(self.layer2(self.layer1(x)).mean((2, 3)))


class Attention(nn.Module):
    def __init__(self, width: int, drop: float) -> None:
        super().__init__()
        self.mix, self.out, self.drop = nn.Linear(width, 3 * width), nn.Linear(width, width), nn.Dropout(drop)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = self.mix(x).chunk(3, -1)
        weights = q @ k.mT / q.shape[-1] ** 0.5
        weights = weights if mask is None else weights.masked_fill(mask, float("-inf"))
        return self.out(self.drop(weights.softmax(-1)) @ v)


class Block(nn.Module):
    """A pre-norm block of a GPT or a ViT, with what it is handed beside the tokens."""

    def __init__(self, width: int = 12, drop: float = 0.3) -> None:
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(width), Attention(width, drop)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 3 * width), nn.GELU(), nn.Linear(3 * width, width), nn.Dropout(drop)
        )

    def forward(self, x: Tensor, mask: Tensor | None = None, *, scale: Tensor | float = 1.0) -> Tensor:
        x = x + self.attn(self.ln_1(x), mask) * scale
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """(rows, 6) floats, cut into tokens; the mask and a learnt scale go to every block."""

    def __init__(self, drop: float = 0.3, block: Callable[[], nn.Module] | None = None) -> None:
        super().__init__()
        self.wte, self.drop = nn.Linear(2, 12), nn.Dropout(drop)
        self.h = nn.ModuleList((block or (lambda: Block(drop=drop)))() for _ in range(3))
        self.ln_f, self.lm_head = nn.LayerNorm(12), nn.Linear(12, CLASSES)
        self.scale = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        z = self.drop(self.wte(x.reshape(len(x), 3, 2)))
        mask = torch.ones(3, 3, dtype=torch.bool, device=x.device).triu(1)
        for block in self.h:
            z = self.called(block, z, mask)
        return self.lm_head(self.ln_f(z).mean(1))

    def called(self, block: nn.Module, z: Tensor, mask: Tensor) -> Tensor:
        return block(z, mask, scale=self.scale)


class TupleBlock(nn.Module):
    """As transformers' blocks: a tuple comes back, and a cache may be handed in."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Block()

    def forward(self, hidden: Tensor, attention_mask: Tensor | None = None, cache: Any = None) -> tuple[Any, ...]:
        return self.inner(hidden, attention_mask), {"weights": hidden.mean()}, None


class HuggingFaceLike(GPT):
    """``cache``: what every block is handed as such."""

    def __init__(self, cache: Any = None) -> None:
        super().__init__(block=TupleBlock)
        self.cache = cache

    def called(self, block: nn.Module, z: Tensor, mask: Tensor) -> Tensor:
        return block(z, attention_mask=mask, cache=self.cache)[0]


class Convolutions(nn.Module):
    def __init__(self, before: int, after: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(before, after, 3, padding=1), norm(after), nn.ReLU(inplace=True),
            nn.Conv2d(after, after, 3, padding=1), norm(after), nn.ReLU(inplace=True),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class UNet(nn.Module):
    """Skip connections cross the middle."""

    def __init__(self, norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        self.e1, self.e2 = Convolutions(3, 4, norm), Convolutions(4, 8, norm)
        self.mid, self.up2 = Convolutions(8, 8, norm), nn.ConvTranspose2d(8, 8, 2, 2)
        self.d2, self.up1 = Convolutions(16, 4, norm), nn.ConvTranspose2d(4, 4, 2, 2)
        self.d1, self.out = Convolutions(8, 4, norm), nn.Conv2d(4, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.e1(x)
        b = self.e2(F.max_pool2d(a, 2))
        y = self.up2(self.mid(F.max_pool2d(b, 2)))
        y = self.up1(self.d2(torch.cat([y, b], 1)))
        return self.out(self.d1(torch.cat([y, a], 1))).mean((2, 3))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.LSTM(width, 6, batch_first=True) for width in (2, 6, 6))
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        z = x.reshape(len(x), 3, 2)
        for layer in self.layers:
            z, _ = layer(z)
        return self.head(z[:, -1])


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens_norm, self.tokens = nn.LayerNorm(4), nn.Sequential(nn.Linear(3, 7), nn.GELU(), nn.Linear(7, 3))
        self.width_norm, self.width = nn.LayerNorm(4), nn.Sequential(nn.Linear(4, 7), nn.GELU(), nn.Linear(7, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.tokens_norm(x).mT).mT
        return x + self.width(self.width_norm(x))


class MixerNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.blocks = nn.Linear(2, 4), nn.Sequential(*(Mixer() for _ in range(3)))
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x.reshape(len(x), 3, 2))).mean(1))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.2, batch_first=True)
        self.stem, self.encoder, self.head = nn.Linear(2, 8), nn.TransformerEncoder(layer, 3), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.stem(x.reshape(len(x), 3, 2))).mean(1))


class Normed(nn.Module):
    """Spectral norm in both forms improves its buffers in every forward, and they enter the result."""

    def __init__(self) -> None:
        super().__init__()
        old = nn.utils.spectral_norm(nn.Linear(9, 9))
        new = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 9))
        self.blocks = nn.ModuleList([nn.Sequential(new, nn.Dropout(0.3), nn.Tanh()), nn.Sequential(old, nn.Tanh())])
        self.head = nn.Linear(9, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Counting(nn.Module):
    """Attributes that a forward writes: a counter, a moving tensor, a list, and one that is made on the way."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 6)
        self.calls, self.moving, self.seen = 0, torch.zeros((), dtype=D), [0.0]

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.moving.mul_(0.9).add_(0.1)
        self.seen[0] += 1.0
        self.last = self.linear(x) * (1 + self.moving) + 0.1 * self.calls + self.seen[0]
        return self.last.tanh() * self.moving


class Warming(nn.Module):
    """A counter and a moving tensor that enter the result and are the same for every chunk."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.calls, self.moving = 0, torch.zeros((), dtype=D)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.moving = 0.9 * self.moving + 0.1
        return (self.linear(x) * self.calls).tanh() * self.moving


IMAGES, VECTORS = (3, 8, 8), (6,)
# Model, the shape of a row, blocks one by one, and blocks with runs.
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], Blocks, Blocks]] = {
    "resnet": (
        ResNet, IMAGES, ["layer1.0", "layer1.1", "layer2.0", "layer2.1"],
        [["conv1", "bn1", "relu", "maxpool"], ["layer1.0", "layer1.1", "layer2.0"], "layer2.1"],
    ),
    "gpt": (GPT, VECTORS, ["h.0", "h.1", "h.2"], [["wte", "drop"], ["h.0", "h.1"], ["h.2", "ln_f"]]),
    "hugging face": (HuggingFaceLike, VECTORS, ["h.0", "h.2"], [["h.0", "h.1", "h.2"]]),
    "unet": (UNet, IMAGES, ["e1", "e2", "mid", "d2", "d1"], [["e1", "e2", "mid", "up2"], ["d2", "up1", "d1", "out"]]),
    "lstm": (Recurrent, VECTORS, ["layers.0", "layers.1", "layers.2"], [["layers.0", "layers.1", "layers.2"]]),
    "mixer": (MixerNet, VECTORS, ["blocks.0", "blocks.1", "blocks.2"], [["stem", "blocks.0", "blocks.1"], "blocks.2"]),
    "encoder": (
        Encoder, VECTORS, ["encoder.layers.0", "encoder.layers.1"], [["encoder.layers.0", "encoder.layers.1"]]
    ),
    "spectral norm": (Normed, VECTORS, ["blocks.0", "blocks.1"], [["blocks.0", "blocks.1", "head"]]),
    "attributes": (
        lambda: nn.Sequential(Counting(6), Counting(6), nn.Linear(6, CLASSES)), VECTORS, ["0", "1"], [["0", "1"]],
    ),
    "warming up": (
        lambda: nn.Sequential(Warming(), Warming(), nn.Linear(6, CLASSES)), VECTORS, ["0", "1"], [["0", "1"]],
    ),
}  # fmt: skip
ATTRIBUTES = ("calls", "moving", "seen")
# Those in which rows do not see each other.
BY_ROWS = ("gpt", "hugging face", "lstm", "mixer", "encoder", "spectral norm", "warming up")
# Those without tensors that ``to`` leaves behind.
ON_ANY_DEVICE = [name for name in MODELS if name not in ("attributes", "warming up")]


def made(name: str) -> tuple[nn.Module, Tensor]:
    """The model and (11, ...) rows."""
    make, shape = MODELS[name][:2]
    torch.manual_seed(0)
    model = make().to(D)
    return model, torch.randn(ROWS, *shape, dtype=D, generator=torch.Generator().manual_seed(1))


def row_loss(outputs: Tensor) -> Tensor:
    return F.cross_entropy(outputs, torch.arange(len(outputs), device=outputs.device) % CLASSES)
