"""A mixture of Gaussians at fixed centers whose precision matrices a network makes, and its score matching loss.

    η(x) = 1/K Σ_k N(x; μ_k, P_k⁻¹)        P_k = L_k L_kᵀ        L_k lower triangular, made from μ_k

Plain PyTorch, and what every plan must equal: ``score_implicit_matching_stable`` is the whole loss in one piece.
The kernel model: Zhang, Liu, Li, Katsoulakis, Osher 2024, arXiv:2402.06162. Implicit score matching: Hyvärinen 2005,
JMLR 6. With d = x - μ_k, u = P_k d, l = 1/2 log det P_k - 1/2 dᵀ P_k d and w = softmax_k(l) everything is closed:

    score s = -Σ_k w u        Laplacian(η) / η = r = Σ_k w (|u|² - tr P_k)        loss = mean(2 r - |s|²)

P is never formed: u = L (Lᵀ d), dᵀ P d = |Lᵀ d|², tr P = the sum of L's squares, log det P = 2 Σ log L_ii. Nothing is
clamped before the softmax, which is shift-invariant as it is.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

# At the start every P is that of softplus(0.1) on the diagonal, as in the document.
DIAGONAL_BIAS = 0.1
DEFAULT_STABILITY = 0.01

Factors = Callable[[Tensor], Tensor]


def factor_numbers(dim: int) -> int:
    """How many numbers a lower triangle of side ``dim`` has."""
    return dim * (dim + 1) // 2


class FactorNet(nn.Module):
    """Centers (K, D) to the packed factors of their precision matrices, (K, D (D + 1) / 2).

    ``depth`` hidden layers of ``hidden`` units with GELU. Packed are first the D numbers of the diagonal, before
    softplus, then the rows below it. The last layer begins with zero weights, so all centers begin with one P.
    """

    def __init__(
        self, dim: int, *, hidden: int = 64, depth: int = 5, generator: Generator | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        super().__init__()
        self.dim, self.hidden, self.depth = dim, hidden, depth
        widths = [dim, *([hidden] * depth)]
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            layers += [_linear(before, after, generator, dtype), nn.GELU()]
        self.layers = nn.Sequential(*layers)
        self.last = _empty_linear(hidden, factor_numbers(dim), dtype)
        with torch.no_grad():
            self.last.weight.zero_()
            self.last.bias.zero_()
            self.last.bias[:dim] = DIAGONAL_BIAS

    @torch.no_grad()
    def begin_at(self, precision: Tensor, stability: float) -> None:
        """Every center's P becomes ``precision`` (D, D), positive definite; the last layer's weights become zero."""
        factor = torch.linalg.cholesky(precision.double())
        diagonal = (factor.diagonal() - stability).clamp_min(1e-4)
        rows, columns = torch.tril_indices(self.dim, self.dim, offset=-1, device=factor.device)
        self.last.weight.zero_()
        # The inverse of softplus, which is the number itself where that is large.
        self.last.bias[: self.dim] = diagonal + (-(-diagonal).expm1()).log()
        self.last.bias[self.dim :] = factor[rows, columns]

    def forward(self, centers: Tensor) -> Tensor:
        packed: Tensor = self.last(self.layers(centers))
        return packed


def _empty_linear(before: int, after: int, dtype: torch.dtype) -> nn.Linear:
    """A layer whose numbers are still to be written; torch's default generator is not moved."""
    return nn.Linear(before, after, dtype=dtype, device="meta").to_empty(device="cpu")


def _linear(before: int, after: int, generator: Generator | None, dtype: torch.dtype) -> nn.Linear:
    """A layer with torch's own initial distribution, drawn from ``generator``."""
    layer = _empty_linear(before, after, dtype)
    bound = 1 / math.sqrt(before)
    with torch.no_grad():
        layer.weight.uniform_(-bound, bound, generator=generator)
        layer.bias.uniform_(-bound, bound, generator=generator)
    return layer


def unpacked(packed: Tensor, dim: int, stability: float) -> tuple[Tensor, Tensor]:
    """The diagonal (K, D) and what is below it (K, D, D), zero elsewhere, of packed factors (K, D (D + 1) / 2).

    The diagonal is softplus + ``stability``: no entry is smaller, so det P >= ``stability`` ** 2D and its logarithm
    exists, whatever the network says.
    """
    diagonal = F.softplus(packed[:, :dim]) + stability
    rows, columns = torch.tril_indices(dim, dim, offset=-1, device=packed.device)
    below = packed.new_zeros(len(packed), dim * dim).index_copy_(1, rows * dim + columns, packed[:, dim:])
    return diagonal, below.view(-1, dim, dim)


def kernel_terms(
    factornet: Factors,
    samples: Tensor,
    centers: Tensor,
    stability: float = DEFAULT_STABILITY,
    leave_one_out: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Of every center and sample log-weights l (K, B), ``force`` u (K, B, D) and ``curvature`` |u|² - tr P (K, B).

    ``factornet(centers)`` returns packed factors. ``leave_one_out``: a sample that is a center has no weight there.
    """
    dim = centers.shape[1]
    packed = factornet(centers)
    diagonal, below = unpacked(packed, dim, stability)
    away = samples[None] - centers[:, None]
    turned = away * diagonal[:, None] + away @ below  # Lᵀ d, one row a sample
    force = turned * diagonal[:, None] + turned @ below.mT  # L (Lᵀ d)
    log_weights = diagonal.log().sum(1)[:, None] - 0.5 * turned.square().sum(-1)
    trace = diagonal.square().sum(1) + _squares(packed[:, dim:])
    curvature = force.square().sum(-1) - trace[:, None]
    if leave_one_out:
        log_weights = log_weights.masked_fill((away == 0).all(-1), -math.inf)
    return log_weights, {"force": force, "curvature": curvature}


def _squares(rows: Tensor) -> Tensor:
    """The sum of squares of each row, without the squares in memory."""
    return torch.einsum("kn,kn->k", rows, rows)


def score_of(means: dict[str, Tensor]) -> Tensor:
    """The score (B, D): the gradient of the log-density."""
    return -means["force"]


def implicit_matching(means: dict[str, Tensor]) -> Tensor:
    """Per sample 2 r - |s|² = |s|² + 2 div s, (B,), of the softmax-weighted ``force`` and ``curvature``."""
    return 2 * means["curvature"] - means["force"].square().sum(-1)


def softmax_means(log_weights: Tensor, values: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The log-sum-exp over the centers (B,), and ``values`` averaged with the softmax over *all* of them."""
    shares = log_weights.softmax(0)
    force = torch.einsum("kb,kbd->bd", shares, values["force"])
    curvature = torch.einsum("kb,kb->b", shares, values["curvature"])
    return log_weights.logsumexp(0), {"force": force, "curvature": curvature}


def score_implicit_matching_stable(
    factornet: Factors,
    samples: Tensor,
    centers: Tensor,
    stab: float = DEFAULT_STABILITY,
    leave_one_out: bool = False,
) -> Tensor:
    """The loss of ``samples`` (B, D) under kernels at ``centers`` (K, D), all at once: the plain loss."""
    _, means = softmax_means(*kernel_terms(factornet, samples, centers, stab, leave_one_out))
    return implicit_matching(means).mean()


class KernelModel(nn.Module):
    """The terms of the mixture as a module, centers first: what a training step is made of."""

    def __init__(self, factornet: nn.Module, *, stability: float, leave_one_out: bool = False) -> None:
        super().__init__()
        self.factornet = factornet
        self.stability, self.leave_one_out = stability, leave_one_out

    def forward(self, centers: Tensor, samples: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return kernel_terms(self.factornet, samples, centers, self.stability, self.leave_one_out)


@torch.no_grad()
def log_density(log_sum_exp: Tensor, centers: int, dim: int) -> Tensor:
    """log η (B,) of the log-sum-exp of the log-weights (B,)."""
    return log_sum_exp - math.log(centers) - dim / 2 * math.log(2 * math.pi)


@torch.no_grad()
def draw_samples(
    factornet: Factors, centers: Tensor, count: int, *, stability: float, generator: Generator | None = None
) -> Tensor:
    """``count`` points (count, D) of the mixture: a center, and L⁻ᵀ z beside it. One center's factor at a time."""
    dim = centers.shape[1]
    chosen = torch.randint(len(centers), (count,), generator=generator)
    noise = torch.randn(count, dim, generator=generator, dtype=centers.dtype).to(centers.device)
    drawn = torch.empty_like(noise)
    for number in sorted(set(chosen.tolist())):
        here = chosen == number
        center = centers[number : number + 1]
        diagonal, below = unpacked(factornet(center), dim, stability)
        factor = below[0] + diagonal[0].diag()
        drawn[here] = center + torch.linalg.solve_triangular(factor.mT, noise[here].mT, upper=True).mT
    return drawn
