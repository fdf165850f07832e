"""The document's own formulation of the step, in plain PyTorch: what it would take, measured beside ours.

It calls the backbone a second time for the variance and covariance terms, and makes the whole (d, d) covariance matrix:
25,088² numbers for ResNet34 at 224 pixels, 2.35 GiB each time one is made.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .objective import EpisodeLoss, variance_hinge

# Of the document, in bytes: forward, backward and in all; before, and with AMP and four accumulation steps.
BEFORE_BYTES = (8e9, 6e9, 14e9)
AFTER_BYTES = (4e9, 2e9, 6e9)


def called_twice(backbone: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Embeddings (N, d) of one episode, from two forwards: for the queries, and for the other two terms."""
    return backbone(images), backbone(images)


class DocumentLoss(nn.Module):
    """The loss of ``EpisodeLoss``, its last two terms from a second forward and from the whole covariance matrix."""

    def __init__(self, loss: EpisodeLoss) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, embeddings: tuple[Tensor, Tensor], images: Tensor) -> Tensor:
        """The loss of an episode's embeddings (N, d), twice, and images (N, channels, height, width): a scalar."""
        inner = self.loss
        support, queries = inner.told_apart(embeddings[0])
        again, _ = inner.told_apart(embeddings[1])
        invariance, variance, covariance = inner.weights
        loss = invariance * inner.cross_entropy(inner.logits(support, queries))
        with torch.autocast(images.device.type, enabled=False):
            again = again.float() if again.dtype is not torch.float64 else again
            loss = loss + variance * variance_hinge(again)
            return loss + covariance * whole_covariance_penalty(again.flatten(0, 1))


def whole_covariance_penalty(rows: Tensor) -> Tensor:
    """``covariance_penalty`` by way of the (d, d) matrix of (N, d) rows."""
    count, width = rows.shape
    centred = rows - rows.mean(dim=0)
    covariance = centred.t() @ centred / (count - 1)
    off_diagonal = covariance - torch.diag(torch.diag(covariance))
    return off_diagonal.square().sum() / (width * max(1, width - 1))
