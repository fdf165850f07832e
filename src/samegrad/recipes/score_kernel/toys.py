"""The toy distributions of the document, in two dimensions but for one in six: endless, drawn anew for each seed.

Plain numpy and scikit-learn. The formulas are those that flow-model papers share (Grathwohl et al. 2018, FFJORD,
arXiv:1810.01367); what they draw is checked by shape, extent and symmetry, not copied.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Points = npt.NDArray[np.float64]
Draws = np.random.Generator

GAUSSIANS = 8
GAUSSIAN_RADIUS = 4 / math.sqrt(2)
GAUSSIAN_DEVIATION = 0.5 / math.sqrt(2)
# Off the plane that swissroll_6D_xy1 lies in: a density on a plane alone has no score across it.
OFF_PLANE_DEVIATION = 0.1


def gaussian_means() -> Points:
    """The means (8, 2) of ``8gaussians``, on a circle."""
    turns = np.arange(GAUSSIANS) * (2 * np.pi / GAUSSIANS)
    return GAUSSIAN_RADIUS * np.stack([np.cos(turns), np.sin(turns)], axis=1)


def _eight_gaussians(rows: int, draws: Draws) -> Points:
    chosen = gaussian_means()[draws.integers(GAUSSIANS, size=rows)]
    return np.asarray(chosen + GAUSSIAN_DEVIATION * draws.standard_normal((rows, 2)))


def _seed(draws: Draws) -> int:
    return int(draws.integers(2**31))


def _swissroll(rows: int, draws: Draws) -> Points:
    from sklearn.datasets import make_swiss_roll

    points, _ = make_swiss_roll(rows, noise=1.0, random_state=_seed(draws))
    return np.asarray(points[:, [0, 2]] / 5, dtype=np.float64)


def _swissroll_6d(rows: int, draws: Draws) -> Points:
    """The swiss roll in a plane of six dimensions, with a little noise off it."""
    # A plane of its own, the same in every run: rows of an orthogonal matrix.
    plane, _ = np.linalg.qr(np.random.default_rng(6).standard_normal((6, 2)))
    return np.asarray(_swissroll(rows, draws) @ plane.T + OFF_PLANE_DEVIATION * draws.standard_normal((rows, 6)))


def _circles(rows: int, draws: Draws) -> Points:
    from sklearn.datasets import make_circles

    points, _ = make_circles(rows, factor=0.5, noise=0.08, random_state=_seed(draws))
    return np.asarray(3 * points, dtype=np.float64)


def _rings(rows: int, draws: Draws) -> Points:
    radius = draws.choice([0.25, 0.5, 0.75, 1.0], size=rows)
    turns = draws.uniform(0, 2 * np.pi, size=rows)
    ring = radius[:, None] * np.stack([np.cos(turns), np.sin(turns)], axis=1)
    return np.asarray(3 * ring + 0.08 * draws.standard_normal((rows, 2)))


def _moons(rows: int, draws: Draws) -> Points:
    from sklearn.datasets import make_moons

    points, _ = make_moons(rows, noise=0.1, random_state=_seed(draws))
    return np.asarray(2 * points + np.array([-1.0, -0.2]), dtype=np.float64)


def _pinwheel(rows: int, draws: Draws) -> Points:
    """Five arms of a Gaussian stretched outwards, turned the more the further out."""
    arms, rate = 5, 0.25
    points = draws.standard_normal((rows, 2)) * [0.3, 0.1] + [1.0, 0.0]
    turns = draws.integers(arms, size=rows) * (2 * np.pi / arms) + rate * np.exp(points[:, 0])
    cos, sin = np.cos(turns), np.sin(turns)
    x, y = points.T
    return np.asarray(2 * np.stack([cos * x - sin * y, sin * x + cos * y], axis=1))


def _two_spirals(rows: int, draws: Draws) -> Points:
    turns = np.sqrt(draws.uniform(size=rows)) * 3 * np.pi
    sign = draws.choice([-1.0, 1.0], size=rows)
    wobble = draws.uniform(0, 0.5, size=(2, rows))
    arm = np.stack([-np.cos(turns) * turns + wobble[0], np.sin(turns) * turns + wobble[1]], axis=1)
    return np.asarray(sign[:, None] * arm / 3 + 0.1 * draws.standard_normal((rows, 2)))


def _checkerboard(rows: int, draws: Draws) -> Points:
    """Uniform on every second of four by four squares of side 2."""
    x = draws.uniform(-4, 4, size=rows)
    column = np.floor(x / 2).astype(np.int64)
    y = draws.uniform(0, 2, size=rows) + 4 * draws.integers(2, size=rows) - 4 + 2 * (column % 2)
    return np.stack([x, y], axis=1)


TOYS: dict[str, Callable[[int, Draws], Points]] = {
    "swissroll": _swissroll,
    "8gaussians": _eight_gaussians,
    "pinwheel": _pinwheel,
    "circles": _circles,
    "moons": _moons,
    "2spirals": _two_spirals,
    "checkerboard": _checkerboard,
    "rings": _rings,
    "swissroll_6D_xy1": _swissroll_6d,
}


def draw_toy(name: str, rows: int, *, seed: int) -> Points:
    """``rows`` points of the toy distribution ``name``, (rows, 2 or 6). Raises KeyError for another name."""
    return TOYS[name](rows, np.random.default_rng(seed))


def eight_gaussians_score(points: Points) -> Points:
    """∇ log p (B, 2) of the distribution that ``8gaussians`` draws from: what the best model would say."""
    shares, away = _shares(points)
    return np.asarray(-(shares[..., None] * away).sum(1) / GAUSSIAN_DEVIATION**2)


def eight_gaussians_optimum(points: Points) -> float:
    """The matching loss of the true score on ``points`` (B, 2), mean |s|² + 2 div s; in expectation none is lower."""
    shares, away = _shares(points)
    precision = 1 / GAUSSIAN_DEVIATION**2
    # As for every mixture 2 r - |s|², with r the Laplacian of the density over the density.
    ratio = (shares * (precision**2 * (away**2).sum(-1) - 2 * precision)).sum(1)
    return float((2 * ratio - (eight_gaussians_score(points) ** 2).sum(1)).mean())


def _shares(points: Points) -> tuple[Points, Points]:
    """The share (B, 8) that each Gaussian has in each point, and the point relative to its mean (B, 8, 2)."""
    away = points[:, None] - gaussian_means()[None]
    logits = -(away**2).sum(-1) / (2 * GAUSSIAN_DEVIATION**2)
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    return shares / shares.sum(axis=1, keepdims=True), away
