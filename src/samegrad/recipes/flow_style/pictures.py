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


def draw_grid(
    columns: Sequence[Sequence[Shown]], row_names: Sequence[str], column_names: Sequence[str] = ()
) -> Figure:
    """Pictures in columns, each a source above its styled versions; names stand to the left and above."""
    figure = new_figure(0.5 + 1.5 * len(columns), 0.3 * bool(column_names) + 1.55 * len(row_names))
    # layout="constrained" has this engine, and it takes these; the types are those of any.
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0.02, hspace=0.02)  # type: ignore[union-attr, call-arg]
    grid = figure.subplots(len(row_names), len(columns), squeeze=False)
    for column, pictures in enumerate(columns):
        for row, picture in enumerate(pictures):
            _show(grid[row, column], picture)
    for row, name in enumerate(row_names):
        grid[row, 0].set_ylabel(name, color=INK, fontsize=9)
    for column, name in enumerate(column_names):
        grid[0, column].set_title(name, color=INK, fontsize=9)
    return figure


def draw_side_by_side(pictures: Sequence[Shown], names: Sequence[str]) -> Figure:
    """A few pictures in a row, each with its name above."""
    figure = new_figure(2.9 * len(pictures), 3.2)
    for axes, picture, name in zip(figure.subplots(1, len(pictures), squeeze=False)[0], pictures, names):
        _show(axes, picture)
        axes.set_title(name, color=INK, loc="left", fontsize=10)
    return figure


def draw_curves(history: History) -> Figure:
    """The energy in training and validation by step, and validation's SWD and SSM losses, of which it is made."""
    figure = new_figure(9.6, 3.4)
    left, middle, right = figure.subplots(1, 3)
    steps = [step["step"] for step in history.steps]
    left.plot(steps, history.of_steps("loss"), color=BLUE, linewidth=1.0, label="training, every step")
    validated = [line for line in history.validations if line.get("parts")]
    at, energies = [line["step"] for line in validated], [line["loss"] for line in validated]
    best = int(np.argmin(energies))
    left.plot(at, energies, color=ACCENT, linewidth=1.6, label=f"validation; kept: step {at[best]}")
    _dress(left, "Energy", "energy", headroom=1.35)
    left.legend(frameon=False, labelcolor=INK, fontsize=8, loc="upper right")
    for axes, name, title, label in (
        (middle, "swd_loss", "Style", "SWD loss, validation"), (right, "ssm_loss", "Content", "SSM loss, validation"),
    ):  # fmt: skip
        axes.plot(at, history.part(name), color=ACCENT, linewidth=1.4, marker="o", markersize=3)
        _dress(axes, title, label, headroom=1.1)
    for axes, value in ((left, energies[best]), (middle, history.part("swd_loss")[best]),
                        (right, history.part("ssm_loss")[best])):  # fmt: skip
        # Of which the weights are kept.
        axes.plot(at[best], value, "o", markersize=8, markerfacecolor="none", markeredgecolor=INK)
    return figure


def _show(axes: Axes, picture: Shown) -> None:
    axes.imshow(picture, interpolation="nearest", vmin=0, vmax=1)
    no_frame(axes)


def _dress(axes: Axes, title: str, label: str, *, headroom: float) -> None:
    """``headroom``: how many times the highest value the axis is high."""
    axes.set_title(title, color=INK, loc="left", fontsize=10)
    axes.set_xlabel("optimizer step", color=INK, fontsize=9)
    axes.set_ylabel(label, color=INK, fontsize=9)
    axes.set_ylim(0, headroom * max(float(np.max(line.get_ydata())) for line in axes.lines))
    open_frame(axes)
    axes.tick_params(labelsize=8)
