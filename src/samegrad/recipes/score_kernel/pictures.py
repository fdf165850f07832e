"""The pictures of a run: how the loss went, what the model draws, and in two dimensions its density."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from samegrad.recipes._recipe.pictures import ACCENT, BLUE, INK, new_figure, no_frame, open_frame

Values = npt.NDArray[np.float64]
# Below the highest density by so many e-folds nothing is drawn.
_SHOWN_DECAY = 9.0
# Up to so many points of a line are marked.
_MARKED_POINTS = 12


def draw_losses(
    iterations: Sequence[int], history: Sequence[tuple[float, float]], optimum: float | None = None
) -> Figure:
    """The matching loss on training and validation samples after so many ``iterations``; lower is better.

    ``optimum``: that of the true score on the validation samples, where it is known.
    """
    figure = new_figure(7.2, 4.4)
    axes = figure.subplots()
    training, validation = zip(*history)
    best = int(np.argmin(validation))
    # A line of one point is none, and one of few hides where they are.
    marker = "o" if len(history) <= _MARKED_POINTS else ""
    for values, colour, label in (
        (training, BLUE, f"training samples, last {_number(training[-1])}"),
        (validation, ACCENT, f"validation, best {_number(validation[best])}"),
    ):
        axes.plot(iterations, values, color=colour, linewidth=1.6, label=label, marker=marker, markersize=3)
    if optimum is not None:
        label = f"true score in validation, {_number(optimum)}"
        axes.axhline(optimum, color=INK, linewidth=1.0, linestyle="--", label=label)
    axes.plot(iterations[best], validation[best], "o", color=ACCENT, markersize=5)
    axes.set_xlabel("iterations", color=INK)
    axes.set_ylabel("implicit score matching loss (lower is better)", color=INK)
    axes.set_title("Matching loss", color=INK, loc="left", fontsize=11)
    open_frame(axes)
    _legend_below(figure, axes)
    return figure


def draw_samples(drawn: Values, test: Values, centers: Values) -> Figure:
    """Held-out points and the model's samples side by side, in their first two dimensions, centers on both."""
    figure = new_figure(8.4, 5.0)
    pair = figure.subplots(1, 2, sharex=True, sharey=True)
    extent = 1.15 * float(np.abs(test[:, :2]).max())
    for axes, points, colour, title in (
        (pair[0], test, BLUE, f"{len(test):,} held-out points"),
        (pair[1], drawn, ACCENT, f"{len(drawn):,} samples of the model"),
    ):
        axes.scatter(points[:, 0], points[:, 1], s=6, color=colour, alpha=0.6, linewidths=0)
        axes.scatter(centers[:, 0], centers[:, 1], s=14, color=INK, marker="+", linewidths=0.8, label="centers")
        # Told, since it is not seen.
        outside = int((np.abs(points[:, :2]) > extent).any(1).sum())
        axes.set_title(title + (f", {outside} outside" if outside else ""), color=INK, loc="left", fontsize=11)
        _plane(axes, extent)
    pair[1].set_ylabel("")
    if test.shape[1] > 2:
        figure.suptitle(f"The first 2 of {test.shape[1]} coordinates", color=INK, fontsize=11)
    _legend_below(figure, pair[0])
    return figure


def draw_density(log_density: Values, extent: float, test: Values, centers: Values) -> Figure:
    """Contours of the model's log-density on a square of side 2 ``extent``, held-out points and centers over it."""
    figure = new_figure(5.8, 5.4)
    axes = figure.subplots()
    line = np.linspace(-extent, extent, len(log_density))
    top = float(log_density.max())
    # Below the lowest level by far, not on it: contours lose a plateau that lies on a level, and leave a hole.
    shown = axes.contourf(
        line, line, np.clip(log_density - top, -2 * _SHOWN_DECAY, 0), levels=np.linspace(-_SHOWN_DECAY, 0, 10),
        cmap="Blues", extend="min",
    )  # fmt: skip
    axes.scatter(test[:, 0], test[:, 1], s=5, color=ACCENT, alpha=0.7, linewidths=0, label="held-out points")
    axes.scatter(centers[:, 0], centers[:, 1], s=14, color=INK, marker="+", linewidths=0.8, label="centers")
    bar = figure.colorbar(shown, ax=axes, shrink=0.85)
    bar.set_label(f"log-density below its highest; beyond {_SHOWN_DECAY:g} one shade", color=INK, fontsize=9)
    axes.set_title("Density of the model", color=INK, loc="left", fontsize=11)
    _plane(axes, extent)
    _legend_below(figure, axes)
    return figure


def _plane(axes: Axes, extent: float) -> None:
    """A square of the first two coordinates, of side 2 ``extent``."""
    axes.set_xlim(-extent, extent)
    axes.set_ylim(-extent, extent)
    axes.set_aspect("equal")
    axes.set_xlabel("first coordinate", color=INK)
    axes.set_ylabel("second coordinate", color=INK)
    open_frame(axes)


def _legend_below(figure: Figure, axes: Axes) -> None:
    """The legend of ``axes`` under the chart, where it can lie over no data."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, labelcolor=INK, fontsize=9,
        markerscale=1.5,
    )


def _number(value: float) -> str:
    """With the minus sign that the axis has."""
    return f"{value:.4g}".replace("-", "−")


def draw_pictures(drawn: Values, nearest: Any, shape: tuple[int, ...]) -> Figure:
    """Samples (n, D) above the training points nearest to them, as pictures of ``shape`` (H, W) or (3, H, W)."""
    count = len(drawn)
    figure = new_figure(1.05 * count, 2.75)
    figure.suptitle("Samples of the model, and the known points next to them", color=INK, fontsize=11)
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
