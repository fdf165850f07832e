"""The pictures of a run: an episode with its predictions, accuracy by epoch, a step's memory before and after."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from samegrad.recipes._recipe.pictures import ACCENT, FAINT, INK, new_figure, no_frame, open_frame

from .courses import Course
from .judging import Judged

SHOWN_QUERIES = 10
# What the classes of a split are to a model that was trained on "base".
CLASSES = {"base": "training", "val": "validation", "novel": "new"}
GIB = 2**30
_LINE, _RIGHT = "#3b7ea1", "#2f855a"
_COURSES = ("#c2410c", "#7c3aed", "#3b7ea1", "#2f855a")
# What was judged on the test classes, with its colour and dashes: the first two may lie on each other.
_TESTED: tuple[tuple[str, str, Any, str], ...] = (
    ("accuracy", ACCENT, "-", "test classes"),
    ("embedding_prototype_accuracy", _RIGHT, (0, (6, 3)), "nearest prototype of embeddings"),
    ("prototype_accuracy", FAINT, "-", "nearest prototype of pixels"),
)


def draw_episode(judged: Judged, k_shot: int, *, split: str) -> Figure:
    """A row a class: its support images, then queries, framed by whether they were recognised, and taken for what."""
    queries = min(SHOWN_QUERIES, judged.of_model.shape[1])
    ways, columns = len(judged.images), k_shot + queries
    # At least as wide as its title.
    figure = new_figure(max(5.2, 0.74 * columns + 0.6), 0.92 * ways + 0.7)
    grid = figure.subplots(ways, columns + 1, squeeze=False, width_ratios=[1] * k_shot + [0.25] + [1] * queries)
    for row, line in enumerate(grid):
        for column, axes in enumerate(line):
            no_frame(axes)
            if column == k_shot:
                continue
            image = column if column < k_shot else column - 1
            axes.imshow(*_shown(judged.images[row, image]), interpolation="nearest")
            if column > k_shot:
                _frame(axes, taken_for=int(judged.of_model[row, column - k_shot - 1]), truth=row)
        line[0].set_ylabel(str(row), color=INK, rotation=0, labelpad=9, va="center")
    right = float((judged.of_model == torch.arange(ways).unsqueeze(1)).double().mean())
    grid[0, 0].set_title("support", color=INK, loc="left", fontsize=10)
    shown = "queries" if queries == judged.of_model.shape[1] else f"queries, {queries} of {judged.of_model.shape[1]}"
    grid[0, k_shot + 1].set_title(shown, color=INK, loc="left", fontsize=10)
    told = f"{ways} {CLASSES[split]} classes, {right:.0%} of {judged.of_model.numel()} queries recognised (green)"
    figure.suptitle(told, color=INK, fontsize=11)
    return figure


def draw_accuracy(
    validation: Sequence[float], *, metrics: dict[str, float], ways: int, split: str
) -> Figure:
    """Validation accuracy after each epoch, and the test accuracies with their intervals beside chance."""
    figure = new_figure(7.2, 4.9)
    axes = figure.subplots()
    epochs = range(1, len(validation) + 1)
    told = "validation classes, after each epoch"
    axes.plot(epochs, validation, color=_LINE, marker="o", markersize=3.5, label=told, zorder=3)
    for name, colour, dashes, label in _TESTED:
        mean, half = metrics[name], metrics[f"{name}_ci95"]
        axes.axhspan(mean - half, mean + half, color=colour, alpha=0.2, linewidth=0)
        told = f"{label} {mean:.3f} ± {half:.3f}"
        axes.axhline(mean, color=colour, linewidth=1.4, linestyle=dashes, label=told)
    axes.axhline(1 / ways, color=INK, linewidth=1, linestyle=(0, (1, 2)), label=f"chance {1 / ways:.3f}")
    axes.set_xlabel("epoch", color=INK)
    axes.set_ylabel("accuracy", color=INK)
    axes.set_ylim(0, 1.02)
    axes.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1])
    axes.set_xlim(0.5, max(1, len(validation)) + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_title(f"{ways}-way accuracy on {CLASSES[split]} classes", color=INK, loc="left", fontsize=11)
    _legend(figure, columns=2)
    open_frame(axes)
    return figure


def draw_courses(courses: Sequence[Course]) -> Figure:
    """Live tensor bytes along one step, a line a formulation; its peak is written at it."""
    figure = new_figure(8.0, 4.8)
    axes = figure.subplots()
    largest = max(course.peak_bytes for course in courses)
    unit, name = (GIB, "GiB") if largest >= GIB else (2**20, "MiB")
    for course, colour in zip(courses, _COURSES):
        places = [place for place, _, _ in course.points]
        heights = [live / unit for _, _, live in course.points]
        end = ", then out of memory" if course.out_of_memory else ""
        label = f"{course.label}: peak {course.peak_bytes / unit:.3g} {name}{end}"
        axes.plot(places, heights, color=colour, linewidth=1.5, label=label)
        if course.out_of_memory and places:
            axes.plot(places[-1], heights[-1], marker="x", color=colour)
    axes.set_xlabel("fraction of the step's operations", color=INK)
    axes.set_ylabel(f"live tensors, {name}", color=INK)
    axes.set_ylim(0, 1.05 * largest / unit)
    axes.set_xlim(0, 1)
    axes.set_title("Memory of one episode's step, before and after", color=INK, loc="left", fontsize=11)
    _legend(figure, columns=1)
    open_frame(axes)
    return figure


def _legend(figure: Figure, *, columns: int) -> None:
    """Above the axes, where it hides nothing."""
    figure.legend(loc="outside upper left", ncols=columns, frameon=False, labelcolor=INK, fontsize=9)


def _frame(axes: Any, *, taken_for: int, truth: int) -> None:
    colour = _RIGHT if taken_for == truth else ACCENT
    axes.spines[:].set_visible(True)
    axes.spines[:].set_color(colour)
    axes.spines[:].set_linewidth(1.8)
    if taken_for != truth:
        axes.set_xlabel(f"as {taken_for}", color=colour, fontsize=8, labelpad=1)


def _shown(image: Tensor) -> tuple[Any, str | None]:
    """An image (channels, height, width) with its own smallest and largest value as black and white."""
    low, high = image.min(), image.max()
    scaled = ((image - low) / (high - low).clamp_min(1e-9)).permute(1, 2, 0).numpy()
    return (scaled, None) if scaled.shape[2] == 3 else (scaled[:, :, 0], "gray_r")
