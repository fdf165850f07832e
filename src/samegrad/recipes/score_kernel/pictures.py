"""The pictures of a run: how the loss went, what the model draws, and in two dimensions its density."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from samegrad.recipes._recipe.pictures import ACCENT, BLUE, INK, new_figure, no_frame, open_frame

Values = npt.NDArray[np.float64]
# Below the highest density by so many e-folds nothing is drawn.
_SHOWN_DECAY = 9.0


def draw_losses(iterations: Sequence[int], history: Sequence[tuple[float, float]]) -> Figure:
    """The matching loss on training and validation samples after so many ``iterations``; lower is better."""
    figure = new_figure(7.2, 4.2)
    axes = figure.subplots()
    training, validation = zip(*history)
    axes.plot(iterations, training, color=BLUE, linewidth=1.6, label=f"training samples, last {training[-1]:.4g}")
    axes.plot(
        iterations, validation, color=ACCENT, linewidth=1.6, label=f"validation samples, best {min(validation):.4g}"
    )
    best = int(np.argmin(validation))
    axes.plot(iterations[best], validation[best], "o", color=ACCENT, markersize=5)
    axes.set_xlabel("iterations", color=INK)
    axes.set_ylabel("implicit score matching loss", color=INK)
    axes.set_title("Matching loss", color=INK, loc="left", fontsize=11)
    open_frame(axes)
    axes.legend(frameon=False, labelcolor=INK)
    return figure


def draw_samples(drawn: Values, test: Values, centers: Values) -> Figure:
    """Held-out points and the model's samples side by side, in their first two dimensions, centers on both."""
    figure = new_figure(8.4, 4.8)
    pair = figure.subplots(1, 2, sharex=True, sharey=True)
    extent = 1.15 * float(np.abs(test[:, :2]).max())
    for axes, points, colour, title in (
        (pair[0], test, BLUE, f"{len(test):,} held-out points"),
        (pair[1], drawn, ACCENT, f"{len(drawn):,} samples of the model"),
    ):
        axes.scatter(points[:, 0], points[:, 1], s=5, color=colour, alpha=0.6, linewidths=0)
        axes.scatter(centers[:, 0], centers[:, 1], s=14, color=INK, marker="+", linewidths=0.8, label="centers")
        axes.set_title(title, color=INK, loc="left", fontsize=11)
        axes.set_xlim(-extent, extent)
        axes.set_ylim(-extent, extent)
        axes.set_aspect("equal")
        open_frame(axes)
    pair[0].legend(frameon=False, labelcolor=INK, loc="upper right")
    return figure


def draw_density(log_density: Values, extent: float, test: Values, centers: Values) -> Figure:
    """Contours of the model's log-density on a square of side 2 ``extent``, held-out points and centers over it."""
    figure = new_figure(5.6, 5.0)
    axes = figure.subplots()
    line = np.linspace(-extent, extent, len(log_density))
    top = float(log_density.max())
    shown = axes.contourf(
        line, line, np.clip(log_density - top, -_SHOWN_DECAY, 0), levels=np.linspace(-_SHOWN_DECAY, 0, 13), cmap="Blues"
    )
    axes.scatter(test[:, 0], test[:, 1], s=3, color=ACCENT, alpha=0.5, linewidths=0, label="held-out points")
    axes.scatter(centers[:, 0], centers[:, 1], s=14, color=INK, marker="+", linewidths=0.8, label="centers")
    bar = figure.colorbar(shown, ax=axes, shrink=0.85)
    bar.set_label("log-density below its highest", color=INK)
    axes.set_title("Density of the model", color=INK, loc="left", fontsize=11)
    axes.set_aspect("equal")
    open_frame(axes)
    axes.legend(frameon=True, framealpha=0.8, edgecolor="none", labelcolor=INK, loc="upper right", fontsize=8)
    return figure


def draw_pictures(drawn: Values, nearest: Any, shape: tuple[int, ...]) -> Figure:
    """Samples (n, D) above the training points nearest to them, as pictures of ``shape`` (H, W) or (3, H, W)."""
    count = len(drawn)
    figure = new_figure(1.05 * count, 2.45)
    grid = figure.subplots(2, count, squeeze=False)
    for column in range(count):
        for axes, values in zip(grid[:, column], (drawn[column], nearest[column])):
            picture = values.reshape(shape)
            if len(shape) == 3:
                # Standardised pixels, of which nearly all lie within two deviations.
                picture = np.clip((picture.transpose(1, 2, 0) + 2) / 4, 0, 1)
            axes.imshow(picture, cmap="gray_r", vmin=-1, vmax=1, interpolation="nearest")
            no_frame(axes)
    grid[0, 0].set_ylabel("sample", color=INK)
    grid[1, 0].set_ylabel("nearest known", color=INK)
    return figure
