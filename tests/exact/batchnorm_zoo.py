"""Networks with BatchNorm, and what a step leaves behind, for comparison with the plain step."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from samegrad.verify import tolerance

D = torch.float64
# Measured on float64 networks with BatchNorm; deep chains of statistics amplify rounding more than plain layers do.
NORM_UNITS = 256.0


class Block(nn.Module):
    """Two 3 x 3 convolutions and a shortcut, which has a BatchNorm of its own where the shape changes."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample: nn.Module | None = None
        if stride != 1 or channels != width:
            self.downsample = nn.Sequential(nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    """He et al. 2016, arXiv:1512.03385: ``depths`` blocks of ``widths`` channels after a stem of stride 4."""

    def __init__(self, depths: tuple[int, ...], widths: tuple[int, ...], classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        stages, channels = [], widths[0]
        for number, (depth, width) in enumerate(zip(depths, widths)):
            blocks = []
            for index in range(depth):
                blocks.append(Block(channels, width, 2 if number and not index else 1))
                channels = width
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.fc(torch.flatten(self.avgpool(self.stages(x)), 1))


def resnet18(classes: int = 10) -> nn.Module:
    return ResNet((2, 2, 2, 2), (64, 128, 256, 512), classes)


class Tied(nn.Module):
    """One BatchNorm, used at two depths."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 12), nn.Linear(12, 12), nn.Linear(12, 5)
        self.norm = nn.BatchNorm1d(12)

    def forward(self, x: Tensor) -> Tensor:
        h = F.silu(self.norm(self.first(x)))
        return self.last(h + F.silu(self.norm(self.second(h))))


class Dense(nn.Module):
    """Each layer sees all layers before it (Huang et al. 2017, arXiv:1608.06993)."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm2d(3 + 4 * i) for i in range(3))
        self.convs = nn.ModuleList(nn.Conv2d(3 + 4 * i, 4, 3, padding=1) for i in range(3))
        self.head = nn.Linear(15, 5)

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for norm, conv in zip(self.norms, self.convs):
            features.append(conv(F.relu(norm(torch.cat(features, 1)))))
        return self.head(torch.cat(features, 1).mean((2, 3)))


class ManyViews(nn.Module):
    """Rows of three views each, which meet in one BatchNorm; a gate of the weights alone; a shape across a cut."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode = nn.Linear(4, 8), nn.Linear(8, 5)
        self.norm, self.after = nn.BatchNorm1d(8), nn.BatchNorm1d(5)
        self.gate = nn.Parameter(torch.linspace(-1, 1, 8))
        self.register_buffer("shift", torch.linspace(0, 1, 8))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        rows, views, width = x.shape
        h = self.norm(self.encode(x.reshape(rows * views, width))) * torch.sigmoid(self.gate) + self.shift
        z = self.after(self.decode(h)).reshape(rows, views, 5)
        return {"views": z, "mean": z.mean(1), "gate": self.gate.exp()}


class MLP(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(6, 24), nn.BatchNorm1d(24, **options), nn.ReLU(), nn.Linear(24, 24, bias=False),
            nn.BatchNorm1d(24, **options), nn.GELU(), nn.Linear(24, 5),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def volumes() -> nn.Module:
    return nn.Sequential(
        nn.BatchNorm3d(2), nn.Conv3d(2, 4, 3), nn.BatchNorm3d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 8, 5)
    )


def half_frozen() -> nn.Module:
    """A BatchNorm in eval mode and frozen weights in between."""
    network = MLP()
    network.layers[1].eval().requires_grad_(False)
    network.layers[0].requires_grad_(False)
    return network


ROWS = 23
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "residual": (lambda: ResNet((1, 1), (4, 8), 5), (3, 16, 16)),
    "mlp": (MLP, (6,)),
    "no momentum": (lambda: MLP(momentum=None), (6,)),
    "not affine": (lambda: MLP(affine=False), (6,)),
    "no running statistics": (lambda: MLP(track_running_stats=False), (6,)),
    "half frozen": (half_frozen, (6,)),
    "volumes": (volumes, (2, 4, 4, 4)),
    "tied": (Tied, (6,)),
    "dense": (Dense, (3, 6, 6)),
    "many views": (ManyViews, (3, 4)),
}


def made(name: str) -> tuple[nn.Module, Tensor]:
    """The network in float64, its affine parameters not trivial, and rows."""
    torch.manual_seed(0)
    make, shape = NETWORKS[name]
    network = make().to(D)
    for part in network.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.weight is not None:
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.normal_(part.bias, 0, 0.3)
    generator = torch.Generator().manual_seed(1)
    # A mean that differs from row to row, so that statistics of a chunk are not those of all rows.
    x = torch.randn(ROWS, *shape, dtype=D, generator=generator)
    return network, x + torch.linspace(-2, 2, ROWS, dtype=D).reshape(ROWS, *(1 for _ in shape))


def row_loss(outputs: Any) -> Tensor:
    z = outputs["mean"] + outputs["views"].sum(1) + outputs["gate"].sum() if isinstance(outputs, dict) else outputs
    return F.cross_entropy(z, torch.arange(len(z)) % z.shape[1])


def coupled_loss(outputs: Any) -> Tensor:
    z = outputs["mean"] * outputs["gate"][:5] if isinstance(outputs, dict) else outputs
    z = F.normalize(z, dim=1)
    return F.cross_entropy(z @ z.T * 3, (torch.arange(len(z)) + 1) % len(z)) + z.std(0).sum()


Left = dict[str, Tensor]


def left_by(
    network: nn.Module,
    x: Tensor,
    loss_fn: Callable[[Any], Tensor],
    within: Callable[[nn.Module], AbstractContextManager[Any]] = lambda _: nullcontext(),
) -> Left:
    """Loss, gradients and buffers after one step on a copy of ``network``, called inside ``within``."""
    twin, x = copy.deepcopy(network), x.clone().requires_grad_()
    with within(twin):
        loss = loss_fn(twin(x))
        loss.backward()
    assert x.grad is not None
    found = {"loss": loss.detach(), "gradient of x": x.grad}
    found |= {f"gradient of {n}": p.grad for n, p in twin.named_parameters() if p.grad is not None}
    found |= {f"buffer {n}": b for n, b in twin.named_buffers()}
    assert list(twin.state_dict()) == list(network.state_dict())
    assert all("forward" not in vars(part) for part in twin.modules())
    return found


def worst_share(ours: Left, plain: Left) -> float:
    """The largest difference as a share of what the contract allows: at most 1 means the same step."""
    assert ours.keys() == plain.keys(), ours.keys() ^ plain.keys()
    gradients = [k for k in plain if k.startswith("gradient")]
    largest = max(float(plain[k].abs().max()) for k in gradients)
    worst, squares, differences = 0.0, 0.0, 0.0
    for key, reference in plain.items():
        mine, dtype = ours[key], reference.dtype if reference.is_floating_point() else D
        apart = (mine.double() - reference.double()).abs()
        size = float(reference.double().abs().max())
        if key.endswith("running_mean"):
            # Rounding of a mean is on the scale of the values, which may be far from their mean.
            size += float(plain[key.replace("running_mean", "running_var")].max()) ** 0.5
        if key in gradients:
            # Chunks' absolute gradients add up to several times the gradient itself.
            size = 8 * tolerance.entry_scale(size, largest)
            squares, differences = squares + float(reference.square().sum()), differences + float(apart.square().sum())
        worst = max(worst, float(apart.max()) / (tolerance.entry_allowed(dtype) * max(size, 1e-300)))
    norm = (differences / squares) ** 0.5 / (8 * NORM_UNITS * tolerance.unit_roundoff(plain["loss"].dtype))
    return max(worst, norm)
