"""The small runs that a footprint is made of: how many rows each has, so that what depends on them is told apart."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch

from samegrad import trees
from samegrad.declared import DeclaredStep
from samegrad.exact.mapped import MappedStep
from samegrad.exact.split import SplitStep
from samegrad.exact.step_draws import StepDraws
from samegrad.measure.probe import Probe, probe_plain, probe_split
from samegrad.trees import RowLayout

# Rows of a probe's chunk; few enough for any card, enough for the law to show.
_PROBE_CHUNK_ROWS = 8


def plain_probes(
    declared: DeclaredStep, batch: Any, layout: RowLayout, draws: StepDraws, whole_only: bool = False
) -> list[Probe]:
    """The plain step at a few rows; ``whole_only`` where it cannot run on fewer than all."""
    if whole_only:
        return [probe_plain(declared, batch, layout, batch_rows=layout.rows, draws=draws)]
    # Not one row where there are more: batch normalisation in training mode refuses it.
    rows = min(_PROBE_CHUNK_ROWS // 2, max(min(2, layout.rows), layout.rows // 4))
    shapes = dict.fromkeys(min(n, layout.rows) for n in (rows, 2 * rows, 4 * rows))
    probes: list[Probe] = []
    for n in shapes:
        try:
            probes.append(probe_plain(declared, batch, layout, batch_rows=n, draws=draws))
        except torch.OutOfMemoryError:
            # Two say what a third would.
            if len(probes) < 2:
                raise
            break
    return probes


def split_probes(split: SplitStep, batch: Any, layout: RowLayout) -> list[Probe]:
    """Two chunks at two sizes; for two passes more, which tell the rows of a chunk from those of the batch."""
    rows = max(1, min(_PROBE_CHUNK_ROWS, layout.rows // 4))
    shapes = dict.fromkeys((r, min(2 * r, layout.rows)) for r in (rows, 2 * rows))
    two_passes = split.examination.passes == 2
    return [
        probe_split(split, batch, layout, trees.even_sizes(n, r))
        for r, n in (_few_shapes(layout) if two_passes else shapes)
    ]


def mapped_probes(step: MappedStep, batch: Any, layout: RowLayout, *, in_chunks: bool) -> list[Probe]:
    """Chunks of few rows, or all rows at once where the parts of the model see all of them."""
    shapes = _few_shapes(layout)
    if not in_chunks:
        shapes = list(dict.fromkeys((n, n) for _, n in shapes))
    return [probe_split(step, batch, layout, trees.even_sizes(n, r)) for r, n in shapes]


def _few_shapes(layout: RowLayout) -> list[tuple[int, int]]:
    """Rows of a chunk and of the batch: each at several sizes of the other, and three batches for pairs of rows."""
    rows = max(1, min(_PROBE_CHUNK_ROWS // 2, layout.rows // 8))
    shapes = [(rows, 2 * rows), (rows, 4 * rows), (2 * rows, 4 * rows), (2 * rows, 8 * rows)]
    return list(dict.fromkeys((r, min(n, layout.rows)) for r, n in shapes))


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


def times(probes: Sequence[Probe]) -> tuple[float | None, float | None]:
    """Seconds a row and a chunk take, through the first and last probe of two chunks or more."""
    if len(probes) < 2:
        return None, None
    small, large = probes[0], probes[-1]
    per_row = (large.seconds - small.seconds) / max(1, large.batch_rows - small.batch_rows)
    per_row = max(per_row, 0.0)
    chunks = -(-large.batch_rows // large.rows)
    return per_row, max(0.0, (large.seconds - per_row * large.batch_rows) / chunks)
