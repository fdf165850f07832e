"""The small runs that a footprint is made of: how many rows each has, so that what depends on them is told apart."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence
from typing import Any

from samegrad import trees
from samegrad.declared import DeclaredStep
from samegrad.exact.mapped import MappedStep
from samegrad.exact.split import SplitStep
from samegrad.exact.step_draws import StepDraws
from samegrad.measure.probe import TIMED_RUNS, Probe, probe_plain, probe_split, time_forward
from samegrad.measure.within_memory import WithinMemory
from samegrad.trees import RowLayout

# Rows of a probe's chunk; few enough for any card, enough for the law to show.
_PROBE_CHUNK_ROWS = 8
# Rows of a forward without a graph: so many times those of a probe with one.
_MANY_ROWS = 8 * 4 * _PROBE_CHUNK_ROWS
# Of what a forward of many rows says that a row takes, from which on another figure is not about rows.
_FAR_MORE = 2.0
# What a backward takes, in forwards.
BACKWARD_FORWARDS = 2.0
# What to do where too little fits to measure anything.
MORE_ROOM = "free memory on the device (other processes, tensors kept between steps), or raise its allocator's cap"


def plain_probes(
    declared: DeclaredStep,
    batch: Any,
    layout: RowLayout,
    draws: StepDraws,
    *,
    whole_only: bool = False,
    timed_runs: int = TIMED_RUNS,
) -> list[Probe]:
    """The plain step at a few rows; ``whole_only`` where it cannot run on fewer than all. Raises OutOfMemory."""
    rows = min(_PROBE_CHUNK_ROWS // 2, max(fewest_rows(layout), layout.rows // 4))
    shapes = [layout.rows] if whole_only else [rows, 2 * rows, 4 * rows]
    return probes_on(declared, batch, layout, shapes, draws, timed_runs)


def probes_on(
    declared: DeclaredStep,
    batch: Any,
    layout: RowLayout,
    rows: Sequence[int],
    draws: StepDraws | None = None,
    timed_runs: int = TIMED_RUNS,
) -> list[Probe]:
    """The plain step at each number of ``rows``, or all there are; on fewer where memory runs out.

    Raises OutOfMemory where there is no memory for as many probes as say what rows take: two, or the only one.
    """
    wanted = sorted({min(n, layout.rows) for n in rows})
    enough, fewest = min(2, len(wanted)), fewest_rows(layout)
    probes: dict[int, Probe] = {}
    while wanted:
        n = wanted.pop(0)
        with WithinMemory(declared) as memory:
            probes[n] = probe_plain(
                declared, batch, layout, batch_rows=n, draws=draws, timed_runs=timed_runs, is_warm=bool(probes)
            )
            continue
        fewer = [few for few in (fewest, fewest + 1) if few < n and few not in probes]
        wanted = fewer[: max(0, enough - len(probes))] if enough > 1 else []
        if len(probes) + len(wanted) < enough:
            raise memory.refusal(asked=f"measure the plain step on {n} of its {layout.rows} rows", do=MORE_ROOM)
    return [probes[n] for n in sorted(probes)]


def fewest_rows(layout: RowLayout) -> int:
    """Not one row where there are more: batch normalisation in training mode refuses it."""
    return min(2, layout.rows)


def split_probes(
    split: SplitStep, batch: Any, layout: RowLayout, timed_runs: int = TIMED_RUNS
) -> list[Probe]:
    """Two chunks at two sizes; for two passes more, which tell the rows of a chunk from those of the batch.

    The first and the last are timed, which is what ``times`` asks for.
    Of fewer rows where memory runs out. Raises OutOfMemory where there is none for a row at a time.
    """
    two_passes = split.examination.passes == 2
    rows = _few_rows(layout) if two_passes else max(1, min(_PROBE_CHUNK_ROWS, layout.rows // 4))
    while True:
        shapes = _few_shapes(layout, rows) if two_passes else _two_chunks(layout, rows)
        with WithinMemory(split.declared) as memory:
            runs = [timed_runs if index in (0, len(shapes) - 1) else 0 for index in range(len(shapes))]
            return [
                probe_split(split, batch, layout, trees.even_sizes(n, r), often, is_warm=(r, n) != shapes[0])
                for (r, n), often in zip(shapes, runs)
            ]
        if rows == 1:
            raise memory.refusal(asked="measure the step in chunks of a row", do=MORE_ROOM)
        rows //= 2


def mapped_probes(
    step: MappedStep, batch: Any, layout: RowLayout, *, in_chunks: bool, timed_runs: int = TIMED_RUNS
) -> list[Probe]:
    """Chunks of few rows, or all rows at once where the parts of the model see all of them; fewer, or OutOfMemory, as
    in ``split_probes``. The last is timed."""
    rows = _few_rows(layout)
    while True:
        shapes = _few_shapes(layout, rows)
        if not in_chunks:
            shapes = list(dict.fromkeys((n, n) for _, n in shapes))
        runs = [0] * (len(shapes) - 1) + [timed_runs]
        with WithinMemory(step.declared) as memory:
            return [
                probe_split(step, batch, layout, trees.even_sizes(n, r), often, is_warm=(r, n) != shapes[0])
                for (r, n), often in zip(shapes, runs)
            ]
        if rows == 1:
            raise memory.refusal(asked=f"measure the step on {shapes[-1][1]} of its rows, in parts", do=MORE_ROOM)
        rows //= 2


def _few_rows(layout: RowLayout) -> int:
    return max(1, min(_PROBE_CHUNK_ROWS // 2, layout.rows // 8))


def _few_shapes(layout: RowLayout, rows: int) -> list[tuple[int, int]]:
    """Rows of a chunk and of the batch: each at several sizes of the other, and three batches for pairs of rows."""
    shapes = [(rows, 2 * rows), (rows, 4 * rows), (2 * rows, 4 * rows), (2 * rows, 8 * rows)]
    return list(dict.fromkeys((r, min(n, layout.rows)) for r, n in shapes))


def _two_chunks(layout: RowLayout, rows: int) -> list[tuple[int, int]]:
    return list(dict.fromkeys((r, min(2 * r, layout.rows)) for r in (rows, 2 * rows)))


def kept_row_bytes(probes: Sequence[Probe]) -> float | None:
    """What one row's graph holds after its forward in the second pass, from two chunks of one batch.

    Of one batch, since what the loss leaves behind depends on the batch's rows and goes meanwhile.
    """
    for small, large in itertools.combinations(probes, 2):
        if small.batch_rows != large.batch_rows or small.rows == large.rows:
            continue
        held = []
        for probe in (small, large):
            # First pass, loss, then forward and backward of each chunk.
            before, forward = probe.moments[probe.chunks], probe.moments[probe.chunks + 1]
            if not before or not forward:
                return None
            held.append(forward[-1][1] - before[-1][1])
        return max(0.0, (held[1] - held[0]) / (large.rows - small.rows))
    return None


def times(probes: Sequence[Probe], row_seconds: float | None = None) -> tuple[float | None, float | None]:
    """Seconds a row and a chunk take, through the first and last probe.

    ``row_seconds``: what a row takes of a device that has many of them, if that is known. Where two probes say several
    times that, they tell apart launches that took longer once than another time, and nothing of rows.
    """
    if len(probes) < 2:
        return None, None
    small, large = probes[0], probes[-1]
    # Of as many chunks as the larger one has.
    as_many = small.seconds * large.chunks / small.chunks
    more_rows = large.batch_rows - small.batch_rows * large.chunks / small.chunks
    per_row = max(0.0, large.seconds - as_many) / max(1.0, more_rows)
    if row_seconds is not None and per_row > _FAR_MORE * row_seconds:
        per_row = row_seconds
    return per_row, max(0.0, (large.seconds - per_row * large.batch_rows) / large.chunks)


def row_seconds(
    declared: DeclaredStep, batch: Any, layout: RowLayout, draws: StepDraws, *, forwards: int
) -> float | None:
    """What a row takes a device that has many: from a forward without a graph, which holds about what probes hold.

    ``forwards``: how often a row is run forward. None where there is nothing to launch, or no memory for that.
    """
    rows = min(layout.rows, _MANY_ROWS)
    if declared.device.type != "cuda":
        return None
    # One that differentiates within itself needs a graph.
    with contextlib.suppress(RuntimeError), WithinMemory(declared):
        forward = time_forward(declared, batch, layout, batch_rows=rows, draws=draws) / rows
        return (forwards + BACKWARD_FORWARDS) * forward
    return None
