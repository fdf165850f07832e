"""The two pictures of a run: how well rows are reconstructed, and what that looks like."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from samegrad.recipes._recipe.pictures import ACCENT, BLUE, INK, new_figure, no_frame, open_frame

HISTOGRAM_BINS = 50


def draw_histogram(row_errors: npt.NDArray[np.float64], *, pca_mse: float) -> Figure:
    """How many rows have which mean squared error: 50 bins over (N,) errors, their mean and that of the PCA."""
    figure = new_figure(7.2, 4.2)
    axes = figure.subplots()
    axes.hist(row_errors, bins=HISTOGRAM_BINS, color=BLUE, edgecolor="white", linewidth=0.4)
    mean = float(row_errors.mean())
    axes.axvline(mean, color=ACCENT, linewidth=1.6, label=f"mean {mean:.3g}")
    axes.axvline(pca_mse, color=INK, linewidth=1.2, linestyle=(0, (4, 3)), label=f"PCA of the same rank {pca_mse:.3g}")
    axes.set_xlabel("mean squared error of a row", color=INK)
    axes.set_ylabel("test rows", color=INK)
    axes.set_title(f"Reconstruction error of {len(row_errors):,} test rows", color=INK, loc="left", fontsize=11)
    open_frame(axes)
    axes.legend(frameon=False, labelcolor=INK)
    return figure


def draw_reconstructions(
    originals: npt.NDArray[np.float64], reconstructed: npt.NDArray[np.float64]
) -> Figure:
    """(n, D) rows above their reconstructions, as squares of side √D. Raises ValueError when D is no square."""
    rows, width = originals.shape
    side = math.isqrt(width)
    if side * side != width:
        raise ValueError(f"rows of {width} numbers are not squares")
    figure = new_figure(1.05 * rows, 2.45)
    grid = figure.subplots(2, rows, squeeze=False)
    for column, (above, below) in enumerate(zip(originals, reconstructed)):
        # One grey scale a column: the eye should compare the two, not two stretches of contrast.
        low, high = float(above.min()), float(above.max())
        for axes, values in zip(grid[:, column], (above, below)):
            axes.imshow(values.reshape(side, side), cmap="gray", vmin=low, vmax=high, interpolation="nearest")
            no_frame(axes)
    grid[0, 0].set_ylabel("row", color=INK)
    grid[1, 0].set_ylabel("rebuilt", color=INK)
    return figure
