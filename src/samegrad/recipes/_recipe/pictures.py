"""How the pictures of a run look, whatever they show.

Drawn on canvases of their own: no matplotlib backend is chosen and no global state is touched.
"""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

INK, BLUE, ACCENT, FAINT = "#1f2937", "#7aa6c2", "#c2410c", "#9ca3af"


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, so many inches wide and high."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def open_frame(axes: Axes) -> None:
    """A chart's axes to the left and below, and nothing above or to the right."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(colors=INK, length=3)


def no_frame(axes: Axes) -> None:
    """Nothing round a picture."""
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
