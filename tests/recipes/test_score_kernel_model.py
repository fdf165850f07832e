"""The kernel model's closed forms against automatic differentiation of the mixture itself, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from samegrad.recipes.score_kernel import judging, model
from samegrad.recipes.score_kernel.model import (
    FactorNet,
    draw_samples,
    implicit_matching,
    kernel_terms,
    log_density,
    score_implicit_matching_stable,
    score_of,
    softmax_means,
    unpacked,
)

D = torch.float64
CENTERS, SAMPLES, DIM, STABILITY = 7, 5, 4, 0.01


def network(dim: int = DIM, seed: int = 0) -> FactorNet:
    drawn = torch.Generator().manual_seed(seed)
    made = FactorNet(dim, hidden=8, depth=2, generator=drawn, dtype=D)
    with torch.no_grad():
        made.last.weight.normal_(0, 0.3, generator=drawn)
        made.last.bias.normal_(0, 0.3, generator=drawn)
    return made


def points(rows: int, seed: int, dim: int = DIM) -> Tensor:
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed), dtype=D)


def precisions(factornet: FactorNet, centers: Tensor) -> Tensor:
    diagonal, below = unpacked(factornet(centers), factornet.dim, STABILITY)
    factor = below + torch.diag_embed(diagonal)
    return factor @ factor.mT


def mixture(factornet: FactorNet, centers: Tensor) -> torch.distributions.Distribution:
    kernels = torch.distributions.MultivariateNormal(centers, precision_matrix=precisions(factornet, centers))
    even = torch.distributions.Categorical(torch.ones(len(centers), dtype=D))
    return torch.distributions.MixtureSameFamily(even, kernels)


def differentiated_loss(factornet: FactorNet, samples: Tensor, centers: Tensor) -> Tensor:
    """mean |s|² + 2 div s with the score from torch's own mixture, differentiated twice."""
    density = mixture(factornet, centers)
    x = samples.clone().requires_grad_()
    (score,) = torch.autograd.grad(density.log_prob(x).sum(), x, create_graph=True)
    divergence = sum(
        torch.autograd.grad(score[:, i].sum(), x, create_graph=True)[0][:, i] for i in range(samples.shape[1])
    )
    return (score.square().sum(1) + 2 * divergence).mean()


def error_of(loss: Callable[..., Tensor]) -> float:
    """The largest error of value and gradients of ``loss`` against the differentiated one."""
    ours, plain = network(), network()
    samples, centers = points(SAMPLES, 1), points(CENTERS, 2)
    mine, theirs = loss(ours, samples, centers, STABILITY), differentiated_loss(plain, samples, centers)
    mine.backward()
    theirs.backward()
    found = [float((mine - theirs).detach().abs() / theirs.detach().abs())]
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None
        found.append(float((a.grad - b.grad).abs().max() / b.grad.abs().max()))
    return max(found)


def test_loss_and_gradient_are_those_of_the_differentiated_mixture() -> None:
    assert error_of(score_implicit_matching_stable) < 1e-11


def test_density_and_score_are_those_of_the_mixture() -> None:
    factornet, samples, centers = network(), points(SAMPLES, 1), points(CENTERS, 2)
    lse, means = softmax_means(*kernel_terms(factornet, samples, centers, STABILITY))
    density = mixture(factornet, centers)
    torch.testing.assert_close(log_density(lse, CENTERS, DIM), density.log_prob(samples), rtol=1e-12, atol=1e-12)
    x = samples.clone().requires_grad_()
    (score,) = torch.autograd.grad(density.log_prob(x).sum(), x)
    torch.testing.assert_close(score_of(means), score, rtol=1e-11, atol=1e-11)


def clamped(factornet: Any, samples: Tensor, centers: Tensor, stab: float) -> Tensor:
    """The document's clamp before the softmax, at a place that these log-weights pass."""
    log_weights, values = kernel_terms(factornet, samples, centers, stab)
    return implicit_matching(softmax_means(log_weights.clamp(-2, 2), values)[1]).mean()


def squared_force(factornet: Any, samples: Tensor, centers: Tensor, stab: float) -> Tensor:
    """The document's |P d|² in place of dᵀ P d."""
    _, values = kernel_terms(factornet, samples, centers, stab)
    log_determinant = unpacked(factornet(centers), DIM, stab)[0].log().sum(1)[:, None]
    wrong = log_determinant - 0.5 * values["force"].square().sum(-1)
    return implicit_matching(softmax_means(wrong, values)[1]).mean()


def restricted(factornet: Any, samples: Tensor, centers: Tensor, stab: float) -> Tensor:
    """The document's chunks, each with a softmax of its own."""
    parts = [score_implicit_matching_stable(factornet, samples, part, stab) for part in centers.split(3)]
    return torch.stack(parts).mean()


@pytest.mark.parametrize("planted", [clamped, squared_force, restricted])
def test_the_documents_faults_would_be_seen(planted: Callable[..., Tensor]) -> None:
    assert error_of(planted) > 1e-3


def test_log_weights_of_thousands_keep_their_weights_and_gradients() -> None:
    """Where the document clamps at -200 all weights would be equal, and none would have a gradient."""
    factornet, samples = network(), points(SAMPLES, 1)
    centers = points(CENTERS, 2) + 300
    log_weights, _ = kernel_terms(factornet, samples, centers, STABILITY)
    assert log_weights.max() < -200
    assert log_weights.softmax(0).amax(0).min() > 0.5
    score_implicit_matching_stable(factornet, samples, centers, STABILITY).backward()
    assert all(p.grad is not None and float(p.grad.abs().max()) > 0 for p in factornet.parameters())


def test_a_sample_that_is_a_center_is_left_out_there() -> None:
    factornet, centers = network(), points(CENTERS, 2)
    left_out = score_implicit_matching_stable(factornet, centers[:1], centers, STABILITY, leave_one_out=True)
    without = score_implicit_matching_stable(factornet, centers[:1], centers[1:], STABILITY)
    torch.testing.assert_close(left_out, without, rtol=1e-13, atol=0)
    left_out.backward()
    assert all(bool(p.grad.isfinite().all()) for p in factornet.parameters() if p.grad is not None)


def test_without_leaving_out_the_loss_falls_with_the_precision_for_ever() -> None:
    factornet, center = network(2), points(1, 2, 2)
    losses = []
    for precision in (10.0, 100.0, 1e4):
        factornet.begin_at(precision * torch.eye(2, dtype=D), STABILITY)
        losses.append(float(score_implicit_matching_stable(factornet, center, center, STABILITY).detach()))
    assert losses == pytest.approx([-40, -400, -40_000])


def test_it_begins_at_the_precision_that_is_given() -> None:
    factornet, centers = network(), points(CENTERS, 2)
    wanted = torch.cov(points(50, 3).T).inverse()
    factornet.begin_at(wanted, STABILITY)
    torch.testing.assert_close(precisions(factornet, centers), wanted.expand(CENTERS, -1, -1), rtol=1e-10, atol=1e-10)


def test_a_new_network_has_one_precision_and_moves_no_generator() -> None:
    before = torch.get_rng_state()
    factornet = FactorNet(3, generator=torch.Generator().manual_seed(0), dtype=D)
    assert torch.equal(torch.get_rng_state(), before)
    found = precisions(factornet, points(4, 1, 3))
    torch.testing.assert_close(found, found[:1].expand(4, -1, -1), rtol=0, atol=0)
    assert sum(p.numel() for p in factornet.last.parameters()) == 65 * 6


def test_samples_are_of_the_kernels() -> None:
    factornet, center = network(), points(1, 2)
    drawn = draw_samples(factornet, center, 4000, stability=STABILITY, generator=torch.Generator().manual_seed(0))
    diagonal, below = unpacked(factornet(center), DIM, STABILITY)
    white = (drawn - center) @ (below[0] + diagonal[0].diag())
    assert white.mean(0).abs().max() < 0.08
    assert (torch.cov(white.T) - torch.eye(DIM, dtype=D)).abs().max() < 0.1


def test_energy_distance_and_memorisation_tell_alike_from_unlike() -> None:
    one, other = points(400, 1), points(400, 2)
    assert abs(judging.energy_distance(one, other)) < 0.05 < judging.energy_distance(one, other + 1)
    assert judging.memorisation_ratio(points(200, 3), other, one) == pytest.approx(1, abs=0.2)
    assert judging.memorisation_ratio(one[:200] + 1e-6, other, one) < 1e-4


def test_a_gaussians_matching_loss_is_minus_the_trace_of_its_precision() -> None:
    drawn = points(4000, 1)
    precision = torch.linalg.inv(torch.cov(drawn.T))
    assert judging.gaussian_matching(drawn, drawn) == pytest.approx(-float(precision.trace()), rel=1e-2)


def test_the_baseline_imports_nothing_of_ours() -> None:
    assert "samegrad" not in vars(model)
