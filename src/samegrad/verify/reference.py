"""What a planned step is compared with: a ladder, since the plain step often does not fit.

1. the plain step on the device, on the whole batch, where it fits;
2. the plain step on the CPU in float64, on the whole batch, where the host has the memory and it takes seconds;
   rounding is then compared on the device, on as many rows as fit;
3. the plain step on the device, on as many rows as fit.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import torch
from torch import Tensor

from samegrad import trees
from samegrad.declared import DeclaredStep
from samegrad.errors import UsageError
from samegrad.exact.float64 import float64_declared, widened
from samegrad.exact.undisturbed import step_undisturbed
from samegrad.measure import counters
from samegrad.measure.laws import fit_laws
from samegrad.measure.probe import timed
from samegrad.measure.probe_sets import probes_on
from samegrad.records import PhaseLaw
from samegrad.trees import RowLayout
from samegrad.verify.sides import Planned, plain_gradients

Where = Literal["device", "cpu"]

# Up to so many rows a verification takes seconds whatever the step; for more its time is estimated first.
_USUAL_ROWS = 4096
_LONGEST_SECONDS = 20.0
# By a first run, which may take some times as long as the next: more than this is more than the longest.
_HOPELESS_SECONDS = 200.0
# Plain steps that a verification is worth, in time: both sides, in two dtypes, a second pass, sizes of small parts.
_WORTH_STEPS = 12
# The plain step in float64, and twice more where its own unrest must be known.
_CPU_STEPS = 3
_TIMED_ROWS = 256


@dataclasses.dataclass(frozen=True)
class Reference:
    """``rows`` are compared on the device; ``cpu_rows``, where not 0, against the CPU. ``words`` say which it is."""

    rows: int
    words: str
    cpu_rows: int = 0

    @property
    def rows_checked(self) -> int:
        return max(self.rows, self.cpu_rows)

    def on_fewer(self, rows: int) -> Reference:
        """The same on ``rows`` rows, on more of which memory ran out."""
        words = self.words.partition(", on as many rows")[0]
        return dataclasses.replace(self, rows=rows, words=f"{words}, on as many rows as fit")

    def with_cpu(self, wanted_rows: int) -> Reference:
        words = "the plain step on cpu in float64"
        if self.rows < wanted_rows:
            words += f" (rounding: {self.words}, {self.rows} rows)"
        return dataclasses.replace(self, words=words, cpu_rows=wanted_rows)


def checked_rows(layout: RowLayout, rows: int | None) -> int | None:
    """``rows`` as asked for. Raises UsageError when the batch has fewer."""
    if rows is None or 1 <= rows <= layout.rows:
        return rows
    raise UsageError(
        asked=f"verify on {rows} rows",
        found=f"the batch has {layout.rows} rows",
        do=f"give a number between 1 and {layout.rows}",
        option="--rows",
    )


def on_device(planned: Planned, batch: Any, layout: RowLayout, rows: int | None) -> Reference:
    """The plain step on the device: on the whole batch or ``rows`` of it where that fits, else on as many as do."""
    declared = planned.declared.as_plain
    name = f"{planned.rounding.plain_step} on {counters.device_name(declared.device)}"
    if rows is not None and declared.device.type == "cpu":
        return Reference(rows, name)
    laws = _laws(declared, batch, layout)
    # Beside the plain step: its gradients, the split step's, their magnitudes, and all of it in float64 again.
    free = counters.free_now(declared.device)[0] - 12 * _weight_bytes(declared)
    wanted = layout.rows if rows is None else rows
    fit = _largest_that_fits(laws, wanted, free)
    if fit < wanted and rows is not None:
        return Reference(fit, f"{name}, on as many rows as fit")
    if fit > _USUAL_ROWS and rows is None and _seconds(declared, batch, layout) > _LONGEST_SECONDS:
        return Reference(_USUAL_ROWS, f"{name}, on as many rows as take seconds")
    return Reference(fit, name if fit == wanted else f"{name}, on as many rows as fit")


def cpu_is_possible(declared: DeclaredStep, batch: Any, layout: RowLayout, rows: int) -> bool:
    """Whether the host has the memory for ``rows`` rows of the plain step in float64, and it takes seconds."""
    needed = 2 * _peak(_laws(declared, batch, layout), rows) + 12 * _weight_bytes(declared)
    needed += 4 * trees.row_bytes(batch, layout) * rows
    if needed > counters.free_now(torch.device("cpu"))[0]:
        return False
    try:
        twin = float64_declared(declared, torch.device("cpu"))
        with step_undisturbed(declared), torch.autocast(declared.device.type, enabled=False):
            # A convolution takes seconds for eight rows there; two rows tell, first runs and all, where it is hopeless.
            if _CPU_STEPS * rows * _row_seconds(twin, batch, layout, min(2, rows), runs=1) > _HOPELESS_SECONDS:
                return False
            return _CPU_STEPS * rows * _row_seconds(twin, batch, layout, min(8, rows), runs=2) <= _LONGEST_SECONDS
    except (RuntimeError, TypeError):
        # Code that fixes a device or a dtype cannot be copied to the CPU in float64.
        return False


def _row_seconds(twin: DeclaredStep, batch: Any, layout: RowLayout, rows: int, *, runs: int) -> float:
    few = widened(_copied_rows(batch, layout, rows))
    return min(timed(lambda: plain_gradients(twin, few), twin.device).seconds for _ in range(runs)) / rows


def _laws(declared: DeclaredStep, batch: Any, layout: RowLayout) -> tuple[PhaseLaw, ...]:
    return fit_laws(probes_on(declared, batch, layout, (2, 4, 8), timed_runs=0), missing_bytes=0)


def _largest_that_fits(laws: tuple[PhaseLaw, ...], wanted: int, free_bytes: int) -> int:
    rows = wanted
    while rows > 1 and 2 * _peak(laws, rows) > free_bytes:
        rows //= 2
    return rows


def _peak(laws: tuple[PhaseLaw, ...], rows: int) -> int:
    return max(law.peak_bytes(rows=rows, batch_rows=rows) for law in laws)


def _weight_bytes(declared: DeclaredStep) -> int:
    return trees.storage_bytes(list(declared.network.parameters()))


def _copied_rows(batch: Any, layout: RowLayout, rows: int) -> Any:
    """The first rows, not the user's own: a forward may write on its input."""
    return trees.map_tensors(trees.slice_rows(batch, layout, 0, rows), Tensor.clone)


def _seconds(declared: DeclaredStep, batch: Any, layout: RowLayout) -> float:
    """What a verification on all rows would take, from the time of a few: an upper bound where launches dominate."""
    rows = min(_TIMED_ROWS, layout.rows)
    few = _copied_rows(batch, layout, rows)
    with step_undisturbed(declared):
        seconds = timed(lambda: plain_gradients(declared, few), declared.device).seconds
    return _WORTH_STEPS * seconds / rows * layout.rows
