"""Small steps, and what the byte counter sees of them when they really run twice on the CPU: the truth for traces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from samegrad.declared import DeclaredStep, declare
from samegrad.exact.aliases import ParameterAliases
from samegrad.exact.examine import examine
from samegrad.exact.phases import announce, listening
from samegrad.exact.split import SplitStep
from samegrad.measure import trace_reading
from samegrad.measure.census import state_tensors
from samegrad.measure.counting import ByteCounter
from samegrad.measure.probe import claim_residents
from samegrad.measure.trace import Run, trace_step
from samegrad.records import Category, Phase

ROWS, SIZES = 13, (4, 4, 5)


class Pictures(nn.Module):
    """Convolution, BatchNorm, a residual, dropout: (rows, 3, 9, 9) to 5 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 7, 3, bias=False)
        self.norm = nn.BatchNorm2d(7)
        self.again = nn.Conv2d(7, 7, 3, padding=1)
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(7 * 49, 5)

    def forward(self, pictures: Tensor) -> Tensor:
        hidden: Tensor = torch.relu(self.norm(self.stem(pictures)))
        hidden = hidden + torch.relu(self.again(hidden))
        made: Tensor = self.head(self.drop(hidden.flatten(1)))
        return made


class Words(nn.Module):
    """Tied embedding, attention, LayerNorm: (rows, 11) tokens to logits of 23 words."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Embedding(23, 16)
        self.block = nn.TransformerEncoderLayer(16, 2, 40, dropout, batch_first=True, norm_first=True)
        self.head = nn.Linear(16, 23, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        made: Tensor = self.head(self.block(self.embed(tokens)))
        return made


def pictures(rows: int, device: str = "cpu") -> tuple[Tensor, Tensor]:
    return torch.randn(rows, 3, 9, 9, device=device), torch.zeros(rows, dtype=torch.int64, device=device)


def words(rows: int, device: str = "cpu") -> tuple[Tensor, Tensor]:
    tokens = torch.zeros(rows, 11, dtype=torch.int64, device=device)
    return tokens, tokens.clone()


def cross_entropy(outputs: Tensor, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(outputs.flatten(0, -2), batch[1].flatten())


def counted_peaks(declared: DeclaredStep, batch: Any, run: Run) -> list[int]:
    """Peak bytes of two real steps, counted as ``train`` counts them."""
    counter = ByteCounter(declared.device, gradients_of=declared.modules)
    claim_residents(counter, declared, batch)
    peaks = []
    with counter, listening(counter):
        for _ in range(2):
            counter.reset_peaks()
            announce(Phase.FORWARD)
            loss = run(declared, batch)
            announce(Phase.OPTIMIZER)
            if declared.optimizer is not None:
                declared.optimizer.step()
                counter.claim(state_tensors(declared.optimizer), Category.OPTIMIZER_STATE)
                declared.optimizer.zero_grad(set_to_none=True)
            for part in declared.modules:
                part.zero_grad(set_to_none=True)
            del loss
            peaks.append(counter.peak_bytes)
    return peaks


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer | None]] = {
    "no optimizer": lambda parameters: None,
    "SGD": lambda parameters: torch.optim.SGD(parameters, 0.1, momentum=0.9),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters),
    "AdamW foreach": lambda parameters: torch.optim.AdamW(parameters, foreach=True),
}


def declared_on(
    model: nn.Module, loss_fn: Any = cross_entropy, optimizer: str = "AdamW", **options: Any
) -> DeclaredStep:
    return declare(model, loss_fn, optimizer=OPTIMIZERS[optimizer](model.parameters()), **options)


def split(declared: DeclaredStep, batch: Any, kept: int = 0) -> SplitStep:
    aliases = ParameterAliases({"": declared.network})
    return SplitStep(declared, aliases, examine(declared, aliases, batch, declared.layout(batch)), kept=kept)


def traced_peaks(declared: DeclaredStep, batch: Any, run: Run, device: str = "cpu") -> list[int]:
    trace = trace_step(declared, batch, device=device, run=run)
    return [trace_reading.peak_bytes(trace, step=step) for step in (0, 1)]


def blocks() -> nn.Module:
    """Three blocks with a BatchNorm and a dropout."""
    parts = [nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.Dropout(0.1)) for _ in "abc"]
    return nn.Sequential(nn.Sequential(*parts), nn.Flatten(), nn.Linear(243, 5))
