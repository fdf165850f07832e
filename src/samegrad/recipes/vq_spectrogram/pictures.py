"""The pictures of a run: spectrograms and what became of them, scores, ROC curves, and which codes are in use."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from sklearn.metrics import roc_curve

from samegrad.recipes._recipe.pictures import ACCENT, BLUE, FAINT, INK, new_figure, open_frame

from .scores import MAX_FALSE_POSITIVE_RATE, MachineScore, perplexity

_CURVES = ("#1d4e89", "#c2410c", "#2a9d8f", "#8b5cf6", "#b45309", "#4b5563")
BINS = 24

Numbers = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shown:
    """A clip to show: its patches side by side, (H, N · W), as they went in and as they came out.

    ``upwards``: what a row of them is, from below.
    """

    title: str
    upwards: str
    patches: Numbers
    reconstructed: Numbers


def draw_spectrograms(shown: Sequence[Shown]) -> Figure:
    """A row a clip: patches, their reconstruction, and the squared difference; each the lowest row below."""
    figure = new_figure(11, 2.3 * len(shown) + 0.4)
    grid = figure.subplots(len(shown), 3, squeeze=False)
    # One scale for all clips: the eye should compare a normal clip's error with an anomalous one's.
    low, high = np.percentile(np.concatenate([one.patches.ravel() for one in shown]), (1, 99))
    errors = [(one.patches - one.reconstructed) ** 2 for one in shown]
    most = float(np.percentile(np.concatenate([e.ravel() for e in errors]), 99))
    for row, (one, error) in enumerate(zip(shown, errors)):
        for axes, values, scale in zip(
            grid[row], (one.patches, one.reconstructed, error), ((low, high), (low, high), (0, most))
        ):
            colours = "viridis" if values is error else "magma"
            drawn = axes.imshow(
                values, origin="lower", aspect="auto", interpolation="nearest", cmap=colours, vmin=scale[0],
                vmax=scale[1],
            )  # fmt: skip
            axes.set_xticks([])
            axes.set_yticks([0, values.shape[0] - 1])
            axes.tick_params(colors=INK, length=2)
            axes.spines[:].set_visible(False)
            if axes is not grid[row][0]:
                figure.colorbar(drawn, ax=axes, pad=0.01, aspect=12)
        grid[row][0].set_ylabel(f"{one.title}\n{one.upwards}", color=INK)
        grid[row][2].set_title(f"mean {error.mean():.3f}", color=INK, fontsize=9, loc="right")
    for axes, name in zip(grid[0], ("patches, normalised", "reconstruction", "squared difference")):
        axes.set_title(name, color=INK, fontsize=11, loc="left")
    return figure


def draw_histograms(scores: Mapping[str, Numbers], anomalous: Sequence[bool]) -> Figure:
    """For each kind of score, by its name, how normal and anomalous clips are spread over it."""
    figure = new_figure(5.2 * len(scores), 3.6)
    labels = np.array(anomalous)
    for axes, (name, values) in zip(figure.subplots(1, len(scores), squeeze=False)[0], scores.items()):
        edges = np.linspace(values.min(), values.max(), BINS + 1)
        for chosen, colour, label in ((~labels, BLUE, "normal"), (labels, ACCENT, "anomalous")):
            axes.hist(
                values[chosen], bins=edges, color=colour, alpha=0.65, label=f"{label}, {int(chosen.sum())} clips"
            )
        axes.set_xlabel(f"{name.replace('_', ' ')} score", color=INK)
        axes.set_ylabel("test clips", color=INK)
        axes.legend(frameon=False, labelcolor=INK)
        open_frame(axes)
    return figure


def draw_roc(
    scores: Numbers, anomalous: Sequence[bool], machines: Sequence[str], judged: Sequence[MachineScore], title: str
) -> Figure:
    """A curve a machine id, and the strip of false positive rates that pAUC looks at."""
    figure = new_figure(5.6, 5.0)
    axes = figure.subplots()
    axes.axvspan(0, MAX_FALSE_POSITIVE_RATE, color="#f3f4f6")
    axes.plot([0, 1], [0, 1], color=FAINT, linewidth=1, linestyle=(0, (4, 3)))
    axes.text(MAX_FALSE_POSITIVE_RATE + 0.01, 0.02, "pAUC: left of here", color=FAINT, fontsize=9)
    labels, names = np.array(anomalous), np.array(machines)
    for number, one in enumerate(judged):
        mine = names == one.machine
        false_rate, true_rate, _ = roc_curve(labels[mine], scores[mine])
        colour = _CURVES[number % len(_CURVES)]
        told = f"{one.machine}: AUC {one.auc:.3f}, pAUC {one.pauc:.3f}"
        axes.plot(false_rate, true_rate, color=colour, linewidth=1.8, label=told)
    axes.set_xlabel("false positive rate", color=INK)
    axes.set_ylabel("true positive rate", color=INK)
    axes.set_title(f"ROC of the {title} score", color=INK, fontsize=11, loc="left")
    axes.set_xlim(-0.01, 1.01)
    axes.set_ylim(-0.01, 1.01)
    # Of many machine ids the first ones: the figures of all are in scores.csv.
    axes.legend(frameon=False, labelcolor=INK, fontsize=8, loc="lower right", bbox_to_anchor=(1, 0.06))
    open_frame(axes)
    return figure


def draw_codebook(normal: npt.NDArray[np.int64], anomalous: npt.NDArray[np.int64]) -> Figure:
    """How often each code is used in normal and in anomalous test clips, (K,) counts; the most used first."""
    figure = new_figure(8.4, 3.6)
    axes = figure.subplots()
    order = np.argsort(-normal, kind="stable")
    for usage, colour, label in ((normal, BLUE, "normal"), (anomalous, ACCENT, "anomalous")):
        shares = usage / max(1, usage.sum())
        told = f"{label}: perplexity {perplexity(usage):.1f} of {len(usage)}"
        axes.step(np.arange(len(order)), shares[order], where="mid", color=colour, linewidth=1.6, label=told)
    axes.set_xlabel("codes, by their use in normal clips", color=INK)
    axes.set_ylabel("share of all places", color=INK)
    axes.set_title("Codebook usage", color=INK, fontsize=11, loc="left")
    axes.set_xlim(-0.5, len(order) - 0.5)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, labelcolor=INK)
    open_frame(axes)
    return figure
