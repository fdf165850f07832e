"""The three terms of the loss of an episode, in plain PyTorch.

Axes as in ``model.py``. Source of the variance and covariance terms: Bardes, Ponce, LeCun 2022, VICReg,
arXiv:2105.04906.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .model import EpisodeShape, Head, SupportAndQueries, widened

# Added to a variance before its root, so that the gradient stays finite where all samples are equal (VICReg's).
VARIANCE_EPSILON = 1e-4


class EpisodeLoss(nn.Module):
    """lambda_I · cross-entropy of the queries + lambda_V · variance hinge + lambda_C · covariance of the support.

    A module, because it owns parameters (the head's): they are found where modules are looked through.
    """

    labels: Tensor

    def __init__(self, head: Head, shape: EpisodeShape, *, weights: tuple[float, float, float]) -> None:
        super().__init__()
        self.head, self.shape, self.weights = head, shape, weights
        self.told_apart = SupportAndQueries(shape)
        self.register_buffer("labels", torch.arange(shape.n_way).repeat(shape.n_query), persistent=False)

    def forward(self, embeddings: Tensor, images: Tensor) -> Tensor:
        """The loss of an episode's embeddings (N, d), which come in the order of its ``images``: a scalar."""
        support, queries = self.told_apart(embeddings)
        invariance, variance, covariance = self.weights
        loss = invariance * self.cross_entropy(self.logits(support, queries))
        with torch.autocast(embeddings.device.type, enabled=False):
            if variance:
                loss = loss + variance * variance_hinge(widened(support))
            if covariance:
                loss = loss + covariance * covariance_penalty(widened(support).flatten(0, 1))
        return loss

    def logits(self, support: Tensor, queries: Tensor) -> Tensor:
        """Logits (m, n) of queries (m, d), given the support (n, k, d)."""
        logits: Tensor = self.head(self.head.prototypes(support), queries)
        return logits

    def cross_entropy(self, logits: Tensor) -> Tensor:
        """The mean over queries; 0 where there are none."""
        total = F.cross_entropy(logits, self.labels[: len(logits)], reduction="sum")
        return total / max(1, len(logits))


def variance_hinge(support: Tensor) -> Tensor:
    """How far the deviations within classes fall short of 1: the mean of max(0, 1 − √(variance + 1e-4)), a scalar.

    support: (n, k, d); the variance is over the k images of a class, unbiased, and 0 where there is only one.
    """
    count = support.shape[1]
    centred = support - support.mean(dim=1, keepdim=True)
    variance = centred.square().sum(dim=1) / max(1, count - 1)
    return F.relu(1 - (variance + VARIANCE_EPSILON).sqrt()).mean()


def covariance_penalty(rows: Tensor) -> Tensor:
    """The mean of the squared covariances of different features of (N, d) rows, each pair of features twice: a scalar.

    With fewer rows than features by way of their (N, N) products: with Z centred, the squares of ZᵀZ/(N−1) add up to
    those of ZZᵀ/(N−1), and of the diagonal only the variances are needed. The (d, d) matrix is never made then.
    """
    count, width = rows.shape
    centred = rows - rows.mean(dim=0)
    gram = centred @ centred.t() if count < width else centred.t() @ centred
    variances = centred.square().sum(dim=0)
    return (gram.square().sum() - variances.square().sum()) / ((count - 1) ** 2 * width * max(1, width - 1))
