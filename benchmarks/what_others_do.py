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


def make_model(middle: str = "") -> nn.Module:
    torch.manual_seed(0)
    layers: dict[str, list[nn.Module]] = {
        "": [],
        "batch norm": [nn.BatchNorm1d(24)],
        # Two, since one alone draws the same numbers in chunks by luck.
        "dropout": [nn.Dropout(0.3), nn.Linear(24, 24), nn.Dropout(0.3)],
    }
    return nn.Sequential(nn.Linear(6, 24), *layers[middle], nn.GELU(), nn.Linear(24, 7)).double()


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


def compare(loss_fn: Callable[[Tensor, Batch], Tensor], batch: Batch, middle: str = "") -> dict[str, object]:
    """Error of accumulated means over chunks of eight rows, and of samegrad, against one backward of all rows.

    All from the same seed; what samegrad draws is the same for every split, so it is compared with itself whole.
    """
    plain, usual, whole, ours = (make_model(middle) for _ in range(4))
    torch.manual_seed(1)
    loss_fn(plain(batch[0]), batch).backward()
    torch.manual_seed(1)
    mean_of_means(usual, loss_fn, batch, 8)
    for model, rows in ((whole, ROWS), (ours, 8)):
        torch.manual_seed(1)
        sg.Step(model, loss_fn, rows=rows).backward(batch)
    return {
        "accumulated_means": float((gradients(usual) - gradients(plain)).norm() / gradients(plain).norm()),
        "samegrad": float((gradients(ours) - gradients(whole)).norm() / gradients(whole).norm()),
        "samegrad_whole_is_plain": bool(torch.equal(gradients(whole), gradients(plain))),
    }


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
            "batch norm": compare(lambda o, b: F.cross_entropy(o, b[1]), batch, "batch norm"),
            "dropout": compare(lambda o, b: F.cross_entropy(o, b[1]), batch, "dropout"),
        },
    )


if __name__ == "__main__":
    main()
