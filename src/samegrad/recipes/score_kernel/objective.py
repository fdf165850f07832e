"""The step that is planned, and its loss through ``sg.over``: centers a few at a time, one softmax over them all."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import samegrad as sg

from .model import Factors, KernelModel, implicit_matching, kernel_terms

# Centers are the rows that a plan cuts; every chunk sees all samples.
BATCH_AXES = {"centers": 0, "samples": None}
# Of the centers and samples evaluated at a time: a quarter of a megabyte.
_EVALUATED_NUMBERS = 2**16
Batch = dict[str, Tensor]
Reduced = tuple[Tensor, dict[str, Tensor]]


def kernel_outputs(model: nn.Module, batch: Batch) -> Any:
    """The terms of the batch's centers, or of a chunk of them."""
    return model(batch["centers"], batch["samples"])


def matching_loss(reduced: Reduced, batch: Batch) -> Tensor:
    """The loss of the softmax means over all centers."""
    return implicit_matching(reduced[1]).mean()


def streamed_means(model: KernelModel, samples: Tensor, centers: Tensor, *, rows: int) -> Reduced:
    """The log-sum-exp (B,) and the means (B, ...) of all centers, ``rows`` of them at a time; differentiable."""

    def terms(some: Tensor, shared: Any) -> Any:
        module, points = shared
        return module(some, points)

    reduced: Reduced = sg.over(terms, centers, shared=(model, samples), reduce="softmax_mean", rows=rows)
    return reduced


def streamed_loss(factornet: Factors, samples: Tensor, centers: Tensor, stab: float, *, rows: int) -> Tensor:
    """``score_implicit_matching_stable``, ``rows`` centers at a time: same value, same gradient, a chunk's bytes."""

    def terms(some: Tensor, shared: Any) -> Any:
        network, points = shared
        return kernel_terms(network, points, some, stab)

    _, means = sg.over(terms, centers, shared=(factornet, samples), reduce="softmax_mean", rows=rows)
    return implicit_matching(means).mean()


@torch.no_grad()
def evaluated_means(
    model: KernelModel, samples: Tensor, centers: Tensor, *, rows: int, batch_size: int
) -> Reduced:
    """The same of any number of samples (N, D): a training step's at a time, or more where a sample is small."""
    at_a_time = max(batch_size, _EVALUATED_NUMBERS // (min(rows, len(centers)) * centers.shape[1]))
    parts = [
        streamed_means(model, part, centers, rows=rows)
        for part in torch.split(samples.to(centers.device), at_a_time)
    ]
    means = {name: torch.cat([found[name] for _, found in parts]) for name in ("force", "curvature")}
    return torch.cat([lse for lse, _ in parts]), means
