"""The two pictures of a run: how well rows are reconstructed, and what that looks like.

Drawn on a canvas of their own: no matplotlib backend is chosen and no global state is touched.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

HISTOGRAM_BINS = 50
_INK, _BARS, _ACCENT, _FAINT = "#1f2937", "#7aa6c2", "#c2410c", "#9ca3af"


def draw_histogram(row_errors: npt.NDArray[np.float64], *, pca_mse: float) -> Figure:
    """How many rows have which mean squared error: 50 bins over (N,) errors, their mean and that of the PCA."""
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.hist(row_errors, bins=HISTOGRAM_BINS, color=_BARS, edgecolor="white", linewidth=0.4)
    mean = float(row_errors.mean())
    axes.axvline(mean, color=_ACCENT, linewidth=1.6, label=f"mean {mean:.3g}")
    axes.axvline(pca_mse, color=_INK, linewidth=1.2, linestyle=(0, (4, 3)), label=f"PCA of the same rank {pca_mse:.3g}")
    axes.set_xlabel("mean squared error of a row", color=_INK)
    axes.set_ylabel("test rows", color=_INK)
    axes.set_title(f"Reconstruction error of {len(row_errors):,} test rows", color=_INK, loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_FAINT)
    axes.tick_params(colors=_INK, length=3)
    axes.legend(frameon=False, labelcolor=_INK)
    return figure


def draw_reconstructions(
    originals: npt.NDArray[np.float64], reconstructed: npt.NDArray[np.float64]
) -> Figure:
    """(n, D) rows above their reconstructions, as squares of side √D. Raises ValueError when D is no square."""
    rows, width = originals.shape
    side = math.isqrt(width)
    if side * side != width:
        raise ValueError(f"rows of {width} numbers are not squares")
    figure = Figure(figsize=(1.05 * rows, 2.45), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(2, rows, squeeze=False)
    for column, (above, below) in enumerate(zip(originals, reconstructed)):
        # One grey scale a column: the eye should compare the two, not two stretches of contrast.
        low, high = float(above.min()), float(above.max())
        for axes, values in zip(grid[:, column], (above, below)):
            axes.imshow(values.reshape(side, side), cmap="gray", vmin=low, vmax=high, interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_visible(False)
    grid[0, 0].set_ylabel("row", color=_INK)
    grid[1, 0].set_ylabel("rebuilt", color=_INK)
    return figure


def save(figure: Figure, path: Path) -> Path:
    """The figure as PNG at ``path``, without date or version in it: the same picture is the same file."""
    figure.savefig(path, dpi=120, metadata={"Software": None})
    return path
