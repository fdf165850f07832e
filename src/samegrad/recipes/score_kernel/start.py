"""Where training begins: kernels of the shape of all training samples, at the scale that matches them best."""

from __future__ import annotations

import torch
from torch import Tensor

from .model import FactorNet, KernelModel, implicit_matching
from .objective import evaluated_means

# Of the samples' covariance, from the kernels of a fine estimate to those of one Gaussian.
SCALES = (0.003, 0.01, 0.03, 0.1, 0.2, 0.4, 0.7, 1.0)
_TRIED_SAMPLES = 256
# Of the mean variance, so that directions without any keep a finite precision.
_RIDGE_FRACTION = 1e-3


@torch.no_grad()
def begin_at_covariance(model: KernelModel, train: Tensor, centers: Tensor, *, batch_size: int) -> float:
    """Gives every center the precision of ``train`` (N, D), scaled; returns the scale of the covariance, of ``SCALES``.

    The scale is that of the lowest matching loss on the first samples. Needs D x D numbers, like one center does.
    """
    factornet = model.factornet
    assert isinstance(factornet, FactorNet)
    unit = torch.eye(train.shape[1], dtype=torch.float64, device=train.device)
    covariance = torch.cov(train.double().T) if len(train) > 1 else unit
    ridge = _RIDGE_FRACTION * covariance.diagonal().mean().clamp_min(1e-12)
    precision = torch.linalg.inv(covariance + ridge * unit)
    losses = []
    for scale in SCALES:
        factornet.begin_at(precision / scale, model.stability)
        _, means = evaluated_means(
            model, train[:_TRIED_SAMPLES], centers, rows=1, batch_size=batch_size
        )
        losses.append(float(implicit_matching(means).mean()))
    best = SCALES[min(range(len(SCALES)), key=losses.__getitem__)]
    factornet.begin_at(precision / best, model.stability)
    return best
