"""Gradients of split steps against plain PyTorch in float64, as a share of what rounding may explain."""

from __future__ import annotations

from typing import Any

import _results
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import samegrad as sg

ROWS = 257  # a prime: no split is even


class Signals(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv1d(1, 8, 3), nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv1d(8, 8, 3), nn.SiLU(), nn.Flatten()
        )
        self.head = nn.Linear(8 * 12, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x[:, None]))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x[:, None] * torch.ones(1, 4, 1, dtype=x.dtype)).mean(1))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(4, 12, batch_first=True)
        self.head = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x.reshape(len(x), 4, 4))[0][:, -1])


MODELS = {
    "mlp": lambda: nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 10)),
    "convolutions, group norm": Signals,
    "transformer layer": Attention,
    "lstm": Recurrent,
}


def contrastive(outputs: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    z = F.normalize(outputs, dim=1)
    return F.cross_entropy(z @ z.T * 3, torch.arange(len(z)))


LOSSES = {
    "cross entropy": lambda outputs, batch: F.cross_entropy(outputs, batch[1]),
    "mean squared error": lambda outputs, batch: F.mse_loss(outputs, F.one_hot(batch[1], 10).to(outputs)),
    "root mean squared error": lambda outputs, batch: F.mse_loss(outputs, F.one_hot(batch[1], 10).to(outputs)).sqrt(),
    "contrastive": contrastive,
}


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    batch = (
        torch.randn(ROWS, 16, dtype=torch.float64, generator=generator),
        torch.randint(0, 10, (ROWS,), generator=generator),
    )
    table: dict[str, Any] = {}
    worst = 0.0
    for model_name, make in MODELS.items():
        for loss_name, loss_fn in LOSSES.items():
            torch.manual_seed(0)
            model = make().double()
            for rows in (1, 7, 8, ROWS):
                step = sg.Step(model, loss_fn, rows=rows)
                verdict = sg.verify_step(step, batch, rows=ROWS)
                shares = [check.error / check.allowed for check in verdict.checks if check.allowed]
                share = max(shares, default=0.0) if verdict.same else float("inf")
                table[f"{model_name}; {loss_name}; {rows} rows"] = {
                    "share_of_contract": share,
                    "max_relative_error": verdict.max_relative_error,
                }
                worst = max(worst, share)
    _results.write("exactness", {"rows": ROWS, "worst_share_of_contract": worst, "cases": table})


if __name__ == "__main__":
    main()
