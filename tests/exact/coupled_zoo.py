"""Models that couple rows inside, their batches and losses, and what training steps leave behind."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import samegrad as sg

from .batchnorm_zoo import MLP

D = torch.float64
ROWS = 29
CLASSES = 4


def encoder(width: int = 6, out: int = 8, drop: float = 0.0) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 24), nn.GELU(), nn.Dropout(drop), nn.Linear(24, out))


class ConvNet(nn.Module):
    """Blocks of convolution, BatchNorm and Dropout after a stem: what a ResNet has, in small."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 6, 3, padding=1, bias=False)
        self.blocks = nn.Sequential(*(self._block() for _ in range(3)))
        self.fc = nn.Linear(6, CLASSES)

    @staticmethod
    def _block() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.3),
            nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.SiLU(),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(self.stem(x)).mean((2, 3)))


class Codebook(nn.Module):
    """The nearest of 5 codes, kept by an exponential mean of what was assigned to each (arXiv:1711.00937, A.1)."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codes", torch.randn(5, 8))
        self.register_buffer("counts", torch.ones(5))
        self.register_buffer("sums", self.codes.clone())

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        nearest = torch.cdist(z.detach(), self.codes).argmin(1)
        quantised = self.codes[nearest]
        if self.training:
            assigned = F.one_hot(nearest, len(self.codes)).to(z.dtype)
            self.counts.mul_(0.9).add_(0.1 * assigned.sum(0))
            self.sums.mul_(0.9).add_(0.1 * (assigned.T @ z.detach()))
            self.codes.copy_(self.sums / self.counts.clamp_min(1e-3)[:, None])
        return z + (quantised - z).detach(), 0.25 * F.mse_loss(z, quantised)


class VectorQuantised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.codebook, self.decoder = encoder(drop=0.2), Codebook(), encoder(8, 6)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        code, commitment = self.codebook(self.encoder(x))
        return {"reconstruction": self.decoder(code), "commitment": commitment}


class Prototypes(nn.Module):
    """Queries against the class means of a labelled support set (arXiv:1703.05175); one encoder sees both."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = encoder()
        self.log_scale = nn.Parameter(torch.tensor(0.3))

    def forward(self, support: Tensor, classes: Tensor, queries: Tensor) -> Tensor:
        z = self.encoder(support)
        means = torch.stack([z[classes == k].mean(0) for k in range(CLASSES)])
        # Not cdist, whose kernels are others from 26 rows on.
        return -(self.encoder(queries)[:, None] - means).square().sum(2) * self.log_scale.exp()


class SelfSimilarity(nn.Module):
    """Each row's similarity to all rows of the batch: an output as wide as the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = encoder(drop=0.2)

    def forward(self, x: Tensor) -> Tensor:
        z = F.normalize(self.encoder(x), dim=1)
        return z @ z.T


class AttendingRows(nn.Module):
    """Rows attend to rows."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.keys, self.head = encoder(), nn.Linear(8, 8), encoder(8, CLASSES, 0.2)

    def forward(self, x: Tensor) -> Tensor:
        z = self.encoder(x)
        weights = torch.softmax(z @ self.keys(z).T / 8**0.5, dim=1)
        return self.head(z + weights @ z)


class Routed(nn.Module):
    """Three experts that take at most so many rows each; rows that find no room pass by (arXiv:2101.03961)."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.router, self.head = encoder(), nn.Linear(8, 3), encoder(8, CLASSES)
        self.experts = nn.ModuleList(encoder(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        z = self.encoder(x)
        probability = self.router(z).softmax(1)
        chosen, room, out = probability.argmax(1), -(-len(x) // 3), z
        for index, expert in enumerate(self.experts):
            rows = (chosen == index).nonzero()[:room, 0]
            out = out.index_add(0, rows, probability[rows, index, None] * expert(z[rows]))
        share = F.one_hot(chosen, 3).to(z.dtype).mean(0)
        return {"logits": self.head(out), "balance": 3 * (share * probability.mean(0)).sum()}


class OwnLoss(nn.Module):
    """Returns its loss itself; one head is not used, one layer is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head, self.unused = encoder(drop=0.2), nn.Linear(8, CLASSES), nn.Linear(8, 2)
        self.encoder[0].requires_grad_(False)

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        return {"loss": F.cross_entropy(self.head(self.encoder(x)), y)}


def _classified(outputs: Any, batch: Any) -> Tensor:
    return F.cross_entropy(outputs, batch["y"])


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, how it is called, its loss, and what can be named as segments (None: BatchNorm in the way)."""

    make: Callable[[], nn.Module]
    forward: Callable[[nn.Module, Any], Any] = lambda model, batch: model(batch["x"])
    loss: Callable[[Any, Any], Tensor] = _classified
    segments: tuple[str, ...] | None = None


CASES: dict[str, Case] = {
    "convolutions with batchnorm and dropout": Case(ConvNet, lambda model, batch: model(batch["image"])),
    "mlp with batchnorm": Case(MLP),
    "codebook": Case(
        VectorQuantised,
        loss=lambda o, b: F.mse_loss(o["reconstruction"], b["x"]) + o["commitment"],
        segments=("encoder", "decoder"),
    ),
    "prototypes": Case(
        Prototypes, lambda model, batch: model(batch["support"], batch["classes"], batch["x"]), segments=("encoder",)
    ),
    "self-similarity": Case(
        SelfSimilarity, loss=lambda o, b: (o * 3).logsumexp(1).mean() - o.diagonal().mean() + o.std(),
        segments=("encoder",),
    ),
    "rows attend to rows": Case(AttendingRows, segments=("encoder", "head")),
    "experts with room": Case(
        Routed, loss=lambda o, b: F.cross_entropy(o["logits"], b["y"]) + 0.1 * o["balance"],
        segments=("encoder", "head"),
    ),
    "its own loss": Case(
        OwnLoss, lambda model, batch: model(batch["x"], batch["y"]), lambda o, b: o["loss"], ("encoder", "head")
    ),
}  # fmt: skip


def batch(rows: int = ROWS, seed: int = 0, dtype: torch.dtype = D) -> dict[str, Tensor]:
    """x (rows, 6), y (rows,), image (rows, 2, 5, 5), and what all rows share: support (12, 6), classes (12,)."""
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, dtype=D, generator=generator).to(dtype)
    # A mean that differs from row to row, so that statistics of a chunk are not those of all rows.
    drift = torch.linspace(-1, 1, rows, dtype=D).to(dtype)
    return {
        "x": normal(rows, 6) + drift[:, None],
        "y": torch.arange(rows) % CLASSES,
        "image": normal(rows, 2, 5, 5) + drift[:, None, None, None],
        "support": normal(12, 6),
        "classes": torch.arange(12) % CLASSES,
    }


def made(name: str, dtype: torch.dtype = D) -> nn.Module:
    torch.manual_seed(1)
    return CASES[name].make().to(dtype)


def step_of(model: nn.Module, name: str, **how: Any) -> sg.Step:
    case = CASES[name]
    return sg.Step(model, case.loss, forward=case.forward, **how)


def plain_of(model: nn.Module, name: str) -> Callable[[Any], Tensor]:
    """One ordinary step in plain PyTorch."""
    case = CASES[name]

    def backward(rows: Any) -> Tensor:
        loss = case.loss(case.forward(model, rows), rows)
        loss.backward()
        return loss.detach()

    return backward


def draws(model: nn.Module) -> bool:
    return any(isinstance(part, nn.Dropout) and part.p > 0 for part in model.modules())


Left = dict[str, Tensor]


def left_by(
    model: nn.Module, backward: Callable[[Any], Tensor], batches: list[Any], seed: int = 7, rate: float = 0.1
) -> list[Left]:
    """Loss, gradients, buffers and the generator's state after each of several steps of SGD with momentum."""
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    torch.manual_seed(seed)
    left = []
    for rows in batches:
        optimizer.zero_grad()
        loss = backward(rows)
        found = {"loss": loss.clone(), "generator": torch.get_rng_state()}
        found |= {f"gradient of {n}": p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        found |= {f"buffer {n}": b.clone() for n, b in model.named_buffers()}
        left.append(found)
        optimizer.step()
    return left


def plain_and(
    name: str, how: Mapping[str, Any], batches: list[Any], dtype: torch.dtype = D
) -> tuple[list[Left], list[Left], sg.Step]:
    """What plain steps leave, what steps of ``sg.Step(**how)`` leave, and that Step.

    Plain is plain PyTorch where nothing is drawn, and the whole step under the same keyed draws where something is.
    """
    model, twin = made(name, dtype), made(name, dtype)
    plain = step_of(model, name, rows=10**6).backward if draws(model) else plain_of(model, name)
    ours = step_of(twin, name, **how)
    return left_by(model, plain, batches), left_by(twin, ours.backward, batches), ours


def copies(*things: Any) -> tuple[Any, ...]:
    return copy.deepcopy(things)
