"""The pictures of a run: spectrograms and what became of them, scores, ROC curves, and which codes are in use."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from sklearn.metrics import roc_curve

from samegrad.recipes._recipe.pictures import ACCENT, BLUE, FAINT, INK, new_figure, open_frame

from .scores import MAX_FALSE_POSITIVE_RATE, MachineScore, perplexity

BINS = 24
_STRIP, _DASHED = "#e5e7eb", (0, (4, 3))
# Panels of machine ids beside each other.
_COLUMNS = 4

Numbers = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shown:
    """A clip to show: some of its patches side by side, (H, N · W), as they went in and as they came out.

    ``upwards``: what a row of them is, from below. ``along``: what they run along, and its unit; ``spans``: from where
    to where each patch lies there, in words.
    """

    title: str
    upwards: str
    along: str
    spans: Sequence[str]
    patches: Numbers
    reconstructed: Numbers


def draw_spectrograms(shown: Sequence[Shown]) -> Figure:
    """A row a clip: patches, their reconstruction, and the squared difference; each the lowest row below."""
    figure = new_figure(12, 2.3 * len(shown) + 0.8)
    grid = figure.subplots(len(shown), 3, squeeze=False)
    # One scale for all clips: the eye should compare a normal clip's error with an anomalous one's.
    low, high = np.percentile(np.concatenate([one.patches.ravel() for one in shown]), (1, 99))
    errors = [(one.patches - one.reconstructed) ** 2 for one in shown]
    most = float(np.percentile(np.concatenate([e.ravel() for e in errors]), 99))
    for row, (one, error) in enumerate(zip(shown, errors)):
        for axes, values, scale in zip(
            grid[row], (one.patches, one.reconstructed, error), ((low, high), (low, high), (0, most))
        ):
            axes.imshow(
                values, origin="lower", aspect="auto", interpolation="nearest", vmin=scale[0], vmax=scale[1],
                cmap="viridis" if values is error else "magma",
            )  # fmt: skip
            _mark_patches(axes, one, values.shape[1])
            axes.set_yticks([0, values.shape[0] - 1])
            axes.tick_params(colors=INK, length=2)
            axes.spines[:].set_visible(False)
        grid[row][0].set_ylabel(f"{one.title}\n{one.upwards}", color=INK)
        grid[row][2].set_title(f"mean {error.mean():.3f}", color=INK, fontsize=9, loc="right")
    for axes in grid[-1]:
        axes.set_xlabel(shown[-1].along, color=INK)
    for axes, name in zip(grid[0], ("patches", "reconstruction", "squared difference")):
        axes.set_title(name, color=INK, fontsize=11, loc="left")
    for columns, label, extend in (
        (slice(0, 2), "deviations from the mean of the row", "both"),
        (slice(2, 3), "squared deviations", "max"),
    ):
        last = grid[0, columns][-1].images[0]
        bar = figure.colorbar(last, ax=grid[:, columns].ravel().tolist(), pad=0.01, aspect=30, extend=extend)
        bar.set_label(label, color=INK)
        bar.ax.tick_params(colors=INK, length=2)
    return figure


def _mark_patches(axes: Axes, shown: Shown, width: int) -> None:
    """Where a patch ends and the next begins, which may be at another time; and from when to when each is."""
    each = width / len(shown.spans)
    for number in range(1, len(shown.spans)):
        axes.axvline(number * each - 0.5, color="white", linewidth=1.5)
    axes.set_xticks([(number + 0.5) * each - 0.5 for number in range(len(shown.spans))], shown.spans, fontsize=9)


def draw_histograms(scores: Mapping[str, Numbers], anomalous: Sequence[bool]) -> Figure:
    """For each kind of score, by its name and unit, how normal and anomalous clips are spread over it."""
    figure = new_figure(4.6 * len(scores), 3.7)
    labels = np.array(anomalous)
    for axes, (name, values) in zip(figure.subplots(1, len(scores), squeeze=False)[0], scores.items()):
        edges = np.linspace(values.min(), values.max(), BINS + 1)
        # A line over bars, since two colours over each other make a third one that nobody explains.
        axes.stairs(np.histogram(values[~labels], edges)[0], edges, fill=True, color=BLUE)
        _outline(axes, np.histogram(values[labels], edges)[0].astype(np.float64), edges)
        axes.set_xlabel(name, color=INK)
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        open_frame(axes)
    figure.axes[0].set_ylabel("test clips", color=INK)
    _legend(
        figure,
        Patch(color=BLUE, label=f"normal, {int((~labels).sum())} clips"),
        Line2D([], [], color=ACCENT, linewidth=1.8, label=f"anomalous, {int(labels.sum())} clips"),
    )
    return figure


def draw_roc(
    scores: Numbers, anomalous: Sequence[bool], machines: Sequence[str], judged: Sequence[MachineScore], title: str
) -> Figure:
    """A panel a machine id with its curve, and the strip of false positive rates that pAUC looks at."""
    columns = min(_COLUMNS, len(judged))
    rows, side = -(-len(judged) // columns), 2.7 if columns > 1 else 4.4
    figure = new_figure(side * columns + 0.5, (side + 0.15) * rows + 0.7)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    labels, names = np.array(anomalous), np.array(machines)
    for axes in grid[len(judged) :]:
        axes.set_visible(False)
    for axes, one in zip(grid, judged):
        mine = names == one.machine
        false_rate, true_rate, _ = roc_curve(labels[mine], scores[mine])
        axes.axvspan(0, MAX_FALSE_POSITIVE_RATE, color=_STRIP)
        axes.plot([0, 1], [0, 1], color=FAINT, linewidth=1, linestyle=_DASHED)
        axes.plot(false_rate, true_rate, color=ACCENT, linewidth=1.8)
        told = f"{one.machine}\nAUC {one.auc:.3f}, pAUC {one.pauc:.3f}"
        axes.set_title(told, color=INK, fontsize=9.5, loc="left")
        axes.set_aspect("equal")
        # So that a curve along the edges is seen beside them.
        axes.set_xlim(-0.04, 1.04)
        axes.set_ylim(-0.04, 1.04)
        axes.set_xticks([0, 0.5, 1])
        axes.set_yticks([0, 0.5, 1])
        open_frame(axes)
    figure.supxlabel("false positive rate", color=INK, fontsize=10)
    figure.supylabel("true positive rate", color=INK, fontsize=10)
    _legend(
        figure,
        Line2D([], [], color=ACCENT, linewidth=1.8, label=f"{title} score"),
        Line2D([], [], color=FAINT, linewidth=1, linestyle=_DASHED, label="chance"),
        Patch(color=_STRIP, label=f"pAUC: up to {MAX_FALSE_POSITIVE_RATE}"),
    )
    return figure


def draw_codebook(normal: npt.NDArray[np.int64], anomalous: npt.NDArray[np.int64]) -> Figure:
    """How often each code is used in normal and in anomalous test clips, (K,) counts; the most used first."""
    figure = new_figure(8.4, 3.9)
    axes = figure.subplots()
    order = np.argsort(-normal, kind="stable")
    edges = np.arange(0.5, len(order) + 1)
    shares = [100 * usage[order] / max(1, usage.sum()) for usage in (normal, anomalous)]
    axes.stairs(shares[0], edges, fill=True, color=BLUE)
    _outline(axes, shares[1], edges)
    axes.set_xlabel("codes, the one most used in normal clips first", color=INK)
    axes.set_ylabel("share of all places, %", color=INK)
    axes.set_xlim(edges[0], edges[-1])
    axes.set_ylim(bottom=0)
    open_frame(axes)
    told = [
        f"{kind}: perplexity {perplexity(usage):.1f} of {len(usage)} codes"
        for kind, usage in (("normal clips", normal), ("anomalous clips", anomalous))
    ]
    _legend(
        figure, Patch(color=BLUE, label=told[0]), Line2D([], [], color=ACCENT, linewidth=1.8, label=told[1])
    )
    return figure


def _outline(axes: Axes, heights: npt.NDArray[np.floating], edges: npt.NDArray[np.floating]) -> None:
    """Bars as a line, with none along the axis where there are none."""
    axes.stairs(np.where(heights > 0, heights, np.nan), edges, color=ACCENT, linewidth=1.8)


def _legend(figure: Figure, *handles: Artist) -> None:
    """Above all panels, where it hides nothing."""
    figure.legend(
        handles=handles, loc="outside upper left", ncols=len(handles), frameon=False, labelcolor=INK, fontsize=9.5,
        handlelength=1.5, columnspacing=1.4,
    )  # fmt: skip
