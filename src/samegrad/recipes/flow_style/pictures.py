"""The pictures of a run: sources beside what the flow makes of them, all of that in a grid, and the curves."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from samegrad.recipes._recipe.pictures import ACCENT, BLUE, INK, new_figure, no_frame, open_frame

from .history import History

# (height, width, 3) in [0, 1].
Shown = npt.NDArray[np.float64]


def draw_grid(columns: Sequence[Sequence[Shown]], row_names: Sequence[str]) -> Figure:
    """Pictures in columns, each a source above its styled versions; ``row_names`` stand to the left."""
    figure = new_figure(0.5 + 1.5 * len(columns), 1.55 * len(row_names))
    # layout="constrained" has this engine, and it takes these; the types are those of any.
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0.02, hspace=0.02)  # type: ignore[union-attr, call-arg]
    grid = figure.subplots(len(row_names), len(columns), squeeze=False)
    for column, pictures in enumerate(columns):
        for row, picture in enumerate(pictures):
            _show(grid[row, column], picture)
    for row, name in enumerate(row_names):
        grid[row, 0].set_ylabel(name, color=INK, fontsize=9)
    return figure


def draw_side_by_side(pictures: Sequence[Shown], names: Sequence[str]) -> Figure:
    """A few pictures in a row, each with its name above."""
    figure = new_figure(2.9 * len(pictures), 3.2)
    for axes, picture, name in zip(figure.subplots(1, len(pictures), squeeze=False)[0], pictures, names):
        _show(axes, picture)
        axes.set_title(name, color=INK, loc="left", fontsize=10)
    return figure


def draw_curves(history: History) -> Figure:
    """Training energy by step; SWD and SSM losses of validation by the step they were taken at."""
    figure = new_figure(9.6, 3.2)
    left, middle, right = figure.subplots(1, 3)
    steps = [step["step"] for step in history.steps]
    left.plot(steps, history.of_steps("loss"), color=BLUE, linewidth=1.0)
    _dress(left, "training energy")
    at = [line["step"] for line in history.validations if line.get("parts")]
    for axes, name, title in (
        (middle, "swd_loss", "SWD loss (style), validation"), (right, "ssm_loss", "SSM loss (content), validation")
    ):
        axes.plot(at, history.part(name), color=ACCENT, linewidth=1.4, marker="o", markersize=3, clip_on=False)
        _dress(axes, title)
    return figure


def _show(axes: Axes, picture: Shown) -> None:
    axes.imshow(picture, interpolation="nearest", vmin=0, vmax=1)
    no_frame(axes)


def _dress(axes: Axes, title: str) -> None:
    axes.set_title(title, color=INK, loc="left", fontsize=10)
    axes.set_xlabel("optimizer step", color=INK, fontsize=9)
    axes.set_ylim(bottom=0)
    open_frame(axes)
    axes.tick_params(labelsize=8)
