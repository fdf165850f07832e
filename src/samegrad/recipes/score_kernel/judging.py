"""How good a score model is: its matching loss, and how its samples compare with points nobody trained on. Plain torch.

Energy distance: Székely, Rizzo 2013, "Energy statistics: a class of statistics based on distances".
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def energy_distance(a: Tensor, b: Tensor) -> float:
    """2 E|A - B| - E|A - A'| - E|B - B'| of points (N, D) and (M, D), 0 only for one distribution; unbiased."""
    a, b = a.double(), b.double()
    across = torch.cdist(a, b).mean()
    within = sum(torch.cdist(x, x).sum() / (len(x) * (len(x) - 1)) for x in (a, b))
    return float(2 * across - within)


@torch.no_grad()
def nearest_distances(points: Tensor, others: Tensor) -> Tensor:
    """The distance (N,) from each of ``points`` (N, D) to the nearest of ``others`` (M, D)."""
    return torch.cdist(points.double(), others.double()).amin(1)


def memorisation_ratio(samples: Tensor, held_out: Tensor, training: Tensor) -> float:
    """How near samples are to training points, as a share of how near held-out points are: median against median.

    About 1 where nothing is memorised, towards 0 where samples are copies.
    """
    mine = nearest_distances(samples, training).median()
    theirs = nearest_distances(held_out, training).median()
    return float(mine / theirs)


def gaussian_matching(train: Tensor, points: Tensor) -> float:
    """The matching loss of one Gaussian fitted to ``train``, on ``points``: what no kernel model should stay above.

    Its score is -P (x - m), so |s|² + 2 div s = |P (x - m)|² - 2 tr P.
    """
    train, points = train.double(), points.double()
    mean = train.mean(0)
    covariance = torch.cov(train.T) + 1e-6 * torch.eye(train.shape[1], dtype=train.dtype, device=train.device)
    precision = torch.linalg.inv(covariance)
    score = (points - mean) @ precision
    return float(score.square().sum(1).mean() - 2 * precision.trace())
