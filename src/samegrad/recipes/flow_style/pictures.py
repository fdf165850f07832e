"""The pictures of a run: sources beside what the flow makes of them, all of that in a grid, and the curves.

Drawn on a canvas of their own: no matplotlib backend is chosen and no global state is touched.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .history import History

_INK, _LINE, _ACCENT, _FAINT = "#1f2937", "#7aa6c2", "#c2410c", "#9ca3af"

# (height, width, 3) in [0, 1].
Shown = npt.NDArray[np.float64]


def draw_grid(columns: Sequence[Sequence[Shown]], row_names: Sequence[str]) -> Figure:
    """Pictures in columns, each a source above its styled versions; ``row_names`` stand to the left."""
    figure = Figure(figsize=(0.5 + 1.5 * len(columns), 1.55 * len(row_names)), layout="constrained")
    FigureCanvasAgg(figure)
    # layout="constrained" has this engine, and it takes these; the types are those of any.
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0.02, hspace=0.02)  # type: ignore[union-attr, call-arg]
    grid = figure.subplots(len(row_names), len(columns), squeeze=False)
    for column, pictures in enumerate(columns):
        for row, picture in enumerate(pictures):
            _show(grid[row, column], picture)
    for row, name in enumerate(row_names):
        grid[row, 0].set_ylabel(name, color=_INK, fontsize=9)
    return figure


def draw_side_by_side(pictures: Sequence[Shown], names: Sequence[str]) -> Figure:
    """A few pictures in a row, each with its name above."""
    figure = Figure(figsize=(2.9 * len(pictures), 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, picture, name in zip(figure.subplots(1, len(pictures), squeeze=False)[0], pictures, names):
        _show(axes, picture)
        axes.set_title(name, color=_INK, loc="left", fontsize=10)
    return figure


def draw_curves(history: History) -> Figure:
    """Training energy by step; held-out SWD and SSM by the step they were taken at."""
    figure = Figure(figsize=(9.6, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3)
    steps = [step["step"] for step in history.steps]
    left.plot(steps, history.of_steps("loss"), color=_LINE, linewidth=1.0)
    _dress(left, "training energy")
    at = [line["step"] for line in history.validations if line.get("parts")]
    for axes, name, title in ((middle, "swd", "held-out SWD (style)"), (right, "ssm", "held-out SSM (content)")):
        axes.plot(at, history.part(name), color=_ACCENT, linewidth=1.4, marker="o", markersize=3, clip_on=False)
        _dress(axes, title)
    return figure


def _show(axes: Axes, picture: Shown) -> None:
    axes.imshow(picture, interpolation="nearest", vmin=0, vmax=1)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)


def _dress(axes: Axes, title: str) -> None:
    axes.set_title(title, color=_INK, loc="left", fontsize=10)
    axes.set_xlabel("optimizer step", color=_INK, fontsize=9)
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_FAINT)
    axes.tick_params(colors=_INK, length=3, labelsize=8)


def save(figure: Figure, path: Path) -> Path:
    """The figure as PNG at ``path``, without date or version in it: the same picture is the same file."""
    figure.savefig(path, dpi=120, metadata={"Software": None})
    return path
