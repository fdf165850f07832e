"""Relative gradient error of common ways to save memory, and of samegrad on the same step (float64)."""

from __future__ import annotations

from collections.abc import Callable

import _results
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import samegrad as sg

ROWS = 29
Batch = tuple[Tensor, Tensor]


def make_model(*, batch_norm: bool = False) -> nn.Module:
    torch.manual_seed(0)
    middle: list[nn.Module] = [nn.BatchNorm1d(24)] if batch_norm else []
    return nn.Sequential(nn.Linear(6, 24), *middle, nn.GELU(), nn.Linear(24, 7)).double()


def make_batch() -> Batch:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(ROWS, 6, dtype=torch.float64, generator=generator)
    return x, torch.randint(0, 7, (ROWS,), generator=generator)


def contrastive(outputs: Tensor, batch: Batch) -> Tensor:
    z = F.normalize(outputs, dim=1)
    return F.cross_entropy(z @ z.T * 3, torch.arange(len(z)))


def with_ignored(batch: Batch) -> Batch:
    targets = batch[1].clone()
    targets[::3] = -100
    return batch[0], targets


def gradients(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def mean_of_means(model: nn.Module, loss_fn: Callable[[Tensor, Batch], Tensor], batch: Batch, rows: int) -> None:
    parts = list(zip(batch[0].split(rows), batch[1].split(rows)))
    for part in parts:
        (loss_fn(model(part[0]), part) / len(parts)).backward()


def compare(loss_fn: Callable[[Tensor, Batch], Tensor], batch: Batch, *, batch_norm: bool = False) -> dict[str, object]:
    """Error of accumulated means over chunks of eight rows, and of samegrad, against one plain backward."""
    plain, usual, ours = (make_model(batch_norm=batch_norm) for _ in range(3))
    loss_fn(plain(batch[0]), batch).backward()
    reference = gradients(plain)
    mean_of_means(usual, loss_fn, batch, 8)
    figures: dict[str, object] = {
        "accumulated_means": float((gradients(usual) - reference).norm() / reference.norm())
    }
    try:
        sg.Step(ours, loss_fn, rows=8).backward(batch)
    except sg.CannotSplit as refusal:
        figures["samegrad"] = f"refused: {refusal.found}"
    else:
        figures["samegrad"] = float((gradients(ours) - reference).norm() / reference.norm())
    return figures


def main() -> None:
    batch = make_batch()
    weights = torch.linspace(0.2, 3.0, 7, dtype=torch.float64)
    _results.write(
        "what_others_do",
        {
            "rows": ROWS,
            "chunk_rows": 8,
            "a shorter last chunk": compare(lambda o, b: F.cross_entropy(o, b[1]), batch),
            "ignored targets": compare(lambda o, b: F.cross_entropy(o, b[1]), with_ignored(batch)),
            "class weights": compare(lambda o, b: F.cross_entropy(o, b[1], weight=weights), batch),
            "contrastive loss": compare(contrastive, batch),
            "batch norm": compare(lambda o, b: F.cross_entropy(o, b[1]), batch, batch_norm=True),
        },
    )


if __name__ == "__main__":
    main()
