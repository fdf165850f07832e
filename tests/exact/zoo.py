"""Models, losses and a comparison with plain PyTorch that the engine's tests share."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from samegrad.declared import declare
from samegrad.exact.aliases import GradientMagnitudes
from samegrad.exact.examine import examine
from samegrad.exact.findings import Examination
from samegrad.exact.split import SplitStep
from samegrad.settle import aliases_for
from samegrad.verify import tolerance

ROWS = 29
CLASSES = 7


def mlp(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 24), nn.GELU(), nn.Linear(24, CLASSES)).to(dtype)


def batch(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """29 rows (a prime): x (29, 6), y (29,) of 7 classes with a stretch ignored, t (29, 7), w (29,)."""
    generator = torch.Generator().manual_seed(3)
    y = torch.randint(0, CLASSES, (ROWS,), generator=generator)
    ignored = y.clone()
    ignored[8:16] = -100
    return {
        "x": torch.randn(ROWS, 6, generator=generator, dtype=dtype),
        "y": y,
        "y_ignored": ignored,
        "t": torch.randn(ROWS, CLASSES, generator=generator, dtype=dtype),
        "w": torch.rand(ROWS, generator=generator, dtype=dtype),
    }


def forward(model: nn.Module, rows: dict[str, Tensor]) -> Any:
    return model(rows["x"])


Loss = Callable[[Any, Any], Tensor]
CLASS_WEIGHTS = torch.linspace(0.2, 3.0, CLASSES, dtype=torch.float64)


def _info_nce(z: Tensor, b: Any) -> Tensor:
    z = F.normalize(z, dim=1)
    return F.cross_entropy(z @ z.T * 3, torch.arange(len(z), device=z.device))


def _sliced_wasserstein(z: Tensor, b: Any) -> Tensor:
    directions = torch.randn(CLASSES, 5, dtype=z.dtype, generator=torch.Generator().manual_seed(1))
    return ((z @ directions).sort(0).values - (b["t"] @ directions).sort(0).values).pow(2).mean()


def _vicreg(z: Tensor, b: Any) -> Tensor:
    centred = z - z.mean(0)
    covariance = centred.T @ centred / (len(z) - 1)
    return (1 - centred.pow(2).mean(0).add(1e-4).sqrt()).relu().mean() + covariance.pow(2).sum()


# Losses and whether one pass is right for them.
LOSSES: dict[str, tuple[Loss, str]] = {
    "mse": (lambda z, b: F.mse_loss(z, b["t"]), "ROW_MEAN"),
    "mse sum": (lambda z, b: 3 * F.mse_loss(z, b["t"], reduction="sum"), "ROW_SUM"),
    "l1": (lambda z, b: F.l1_loss(z, b["t"]), "ROW_MEAN"),
    "huber": (lambda z, b: F.huber_loss(z, b["t"]), "ROW_MEAN"),
    "bce": (lambda z, b: F.binary_cross_entropy_with_logits(z, b["t"].sigmoid()), "ROW_MEAN"),
    "weighted rows": (lambda z, b: ((z - b["t"]).pow(2).sum(1) * b["w"]).mean(), "ROW_MEAN"),
    "two means": (lambda z, b: F.mse_loss(z, b["t"]) + 0.1 * z.abs().mean(), "ROW_MEAN"),
    "cross entropy": (lambda z, b: F.cross_entropy(z, b["y"]), "COUNTED"),
    "ignored targets": (lambda z, b: F.cross_entropy(z, b["y_ignored"]), "COUNTED"),
    "class weights": (lambda z, b: F.cross_entropy(z, b["y"], weight=CLASS_WEIGHTS.to(z.dtype)), "COUNTED"),
    "label smoothing": (lambda z, b: F.cross_entropy(z, b["y"], label_smoothing=0.1), "COUPLED"),
    "smoothing and weights": (
        lambda z, b: F.cross_entropy(z, b["y_ignored"], weight=CLASS_WEIGHTS.to(z.dtype), label_smoothing=0.1),
        "COUPLED",
    ),
    "two counts": (lambda z, b: F.cross_entropy(z, b["y_ignored"]) + z.pow(2).mean(), "COUPLED"),
    "masked mean": (lambda z, b: (z.sum(1) * (b["w"] > 0.5)).sum() / (b["w"] > 0.5).sum(), "COUPLED"),
    "detached scale": (lambda z, b: (z / z.detach().std()).pow(2).mean(), "COUPLED"),
    "hard examples": (lambda z, b: z.pow(2).sum(1).topk(3).values.mean(), "COUPLED"),
    "max over batch": (lambda z, b: z.max(), "COUPLED"),
    "rmse": (lambda z, b: F.mse_loss(z, b["t"]).sqrt(), "COUPLED"),
    "batch mean of kl": (
        lambda z, b: F.kl_div(z.log_softmax(1), b["t"].softmax(1), reduction="batchmean"),
        "COUPLED",
    ),
    "centred": (lambda z, b: (z - z.mean(0)).pow(2).mean(), "COUPLED"),
    "centred constant": (lambda z, b: (z - b["t"].mean(0)).pow(2).mean(), "COUPLED"),
    "pairs in a broadcast": (lambda z, b: (z.sum(1) - z.sum(1)[:, None]).pow(2).mean(), "COUPLED"),
    "info nce": (_info_nce, "COUPLED"),
    "sliced wasserstein": (_sliced_wasserstein, "COUPLED"),
    "vicreg": (_vicreg, "COUPLED"),
}


def split_step(
    model: nn.Module, loss_fn: Loss, rows: Any, *, forward: Any = forward, **declared: Any
) -> tuple[SplitStep, Any]:
    """A split step on ``rows`` and its layout, magnitudes kept for the contract."""
    step = declare(model, loss_fn, forward=forward, **declared)
    layout = step.layout(rows)
    aliases = aliases_for(step)
    examination: Examination = examine(step, aliases, rows, layout)
    return SplitStep(step, aliases, examination, sums_of=GradientMagnitudes), layout


def plain_gradients(model: nn.Module, loss_fn: Loss, rows: Any, *, forward: Any = forward) -> tuple[Tensor, list[Any]]:
    """Loss and gradients of the plain step on a copy of ``model``."""
    twin = copy.deepcopy(model)
    loss = loss_fn(forward(twin, rows), rows)
    loss.backward()
    return loss.detach(), [p.grad for p in twin.parameters()]


def worst_error(split: SplitStep, rows: Any, layout: Any, parts: Sequence[int], reference: Sequence[Any]) -> float:
    """Largest entry difference in the contract's scale, over its allowance: at most 1 means within the contract."""
    totals = split.totals(rows, layout, parts)
    worst = 0.0
    sizes = [0.0 if size is None else size.max().item() for size in totals.magnitudes or []]
    for mine, plain, size in zip(totals.totals, reference, sizes):
        assert (mine is None) == (plain is None)
        if mine is not None:
            allowed = tolerance.entry_allowed(mine.dtype) * tolerance.entry_scale(size, max(sizes))
            worst = max(worst, (mine - plain).abs().max().item() / allowed)
    return worst
