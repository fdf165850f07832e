"""Losses of known truth: one pass over the chunks is exact for them, or it is not and they take two.

``z``: outputs (rows, 7); ``b``: the batch of ``zoo.batch``. The forms are those of ``zoo.LOSSES``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import zoo


def _pairs(z: Tensor) -> Tensor:
    return (z[:, None] - z).square().sum(2).add(1e-9).sqrt()


def _hard_triplets(z: Tensor, b: Any) -> Tensor:
    """The farthest of the same class against the nearest of another: Hermans et al. 2017, arXiv:1703.07737."""
    apart, same = _pairs(z), b["y"][:, None] == b["y"]
    farthest = apart.masked_fill(~same, -torch.inf).max(1).values
    nearest = apart.masked_fill(same, torch.inf).min(1).values
    return F.relu(farthest - nearest + 1).mean()


def _dice(z: Tensor, b: Any) -> Tensor:
    p, y = z.sigmoid(), (b["t"] > 0).to(z.dtype)
    return 1 - ((2 * (p * y).sum(0) + 1) / (p.sum(0) + y.sum(0) + 1)).mean()


def _focal(z: Tensor, b: Any) -> Tensor:
    each = F.cross_entropy(z, b["y"], reduction="none")
    return ((1 - (-each).exp()).square() * each).mean()


def _quantile(z: Tensor, b: Any) -> Tensor:
    rest = b["t"] - z
    return torch.maximum(0.9 * rest, -0.1 * rest).mean()


def _balance(z: Tensor, b: Any) -> Tensor:
    """E Σ f_e P_e: Fedus, Zoph, Shazeer 2021, arXiv:2101.03961, equation 4."""
    routed = F.one_hot(z.argmax(1), z.shape[1]).to(z.dtype).mean(0)
    return z.shape[1] * (routed * z.softmax(1).mean(0)).sum()


def _learned_ratio(z: Tensor, b: Any) -> Tensor:
    gate = z[:, 1].sigmoid()
    return (gate * (z[:, 0] - b["t"][:, 0]).square()).sum() / gate.sum()


def _worst_row(z: Tensor, b: Any) -> Tensor:
    """The largest of all rows, in a place that no order and no scale of the outputs moves: one row has a gradient."""
    return (z.square().sum(1) * (b["w"] == b["w"].max())).max()


LOSSES: dict[str, tuple[zoo.Loss, str]] = zoo.LOSSES | {
    "focal": (_focal, "ROW_MEAN"),
    "quantile": (_quantile, "ROW_MEAN"),
    "cosine": (lambda z, b: (1 - F.cosine_similarity(z, b["t"])).mean(), "ROW_MEAN"),
    "log likelihood of a normal": (
        lambda z, b: (z[:, :3] + (b["t"][:, :3] - z[:, 3:6]).square() * (-z[:, :3]).exp()).mean(), "ROW_MEAN",
    ),
    "reconstruction and prior": (
        lambda z, b: F.mse_loss(z, b["t"], reduction="sum") / len(z) + 0.1 * z.square().sum() / len(z), "COUPLED",
    ),
    "dice": (_dice, "COUPLED"),
    "hard triplets": (_hard_triplets, "COUPLED"),
    "variance penalty": (lambda z, b: F.mse_loss(z, b["t"]) + z.var(0).mean(), "COUPLED"),
    "balance of experts": (_balance, "COUPLED"),
    "learned ratio": (_learned_ratio, "COUPLED"),
    "largest of a column": (lambda z, b: z[:, 0].max() + F.mse_loss(z, b["t"]), "COUPLED"),
    "worst row, the same in every order": (_worst_row, "COUPLED"),
    "soft maximum": (lambda z, b: z.logsumexp(0).mean(), "COUPLED"),
    "median": (lambda z, b: z.square().sum(1).median(), "COUPLED"),
    "masked mean of likelihoods": (
        lambda z, b: (F.cross_entropy(z, b["y"], reduction="none") * (b["w"] > 0.5)).sum() / (b["w"] > 0.5).sum(),
        "COUPLED",
    ),
    "mean over a mask": (lambda z, b: (z - b["t"]).square()[b["w"] > 0.5].mean(), "COUPLED"),
    "weighted by a share of the batch": (
        lambda z, b: ((z - b["t"]).square().sum(1) * b["w"] / b["w"].sum()).sum(), "COUPLED",
    ),
    "distance to a prototype": (
        lambda z, b: (z - torch.stack([z[b["y"] == k].mean(0) for k in b["y"].unique()]).mean(0)).square().mean(),
        "COUPLED",
    ),
    "correlation": (lambda z, b: -torch.corrcoef(torch.stack([z[:, 0], b["t"][:, 0]]))[0, 1], "COUPLED"),
    "penalised weights of the batch": (lambda z, b: F.mse_loss(z, b["t"]) + z.norm(), "COUPLED"),
}  # fmt: skip
