"""What a step holds whose loss runs a few positions at a time: probes of the real step, and laws through them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from samegrad.declared import DeclaredStep
from samegrad.exact.find_head import Head, HeadInChunks
from samegrad.exact.mapped import MappedStep
from samegrad.measure.laws import fit_head_laws
from samegrad.measure.probe import probe_split
from samegrad.records import HeadLaws, PhaseLaw
from samegrad.trees import RowLayout

# Of a probe's batch. Each has as many chunks as its first and last can be told apart, and none that is shorter.
_PROBE_ROWS = 2


def measure_head(
    step_of: Callable[[DeclaredStep], MappedStep],
    declared: DeclaredStep,
    batch: Any,
    layout: RowLayout,
    head: Head,
    *,
    missing_bytes: int,
    optimizer_law: PhaseLaw,
) -> HeadLaws:
    """Laws in the positions of a chunk and the rows of the batch, with what the optimizer needs.

    ``step_of``: what runs a declared step whole. ``missing_bytes``: optimizer state that does not exist yet.
    """
    few = min(_PROBE_ROWS, layout.rows)
    most = few * head.positions_per_row
    # Two chunks and four: what a position of a chunk holds is told apart from what a row of the batch does.
    shapes = [(most / 2, few), (most / 2, min(2 * few, layout.rows)), (most, min(2 * few, layout.rows))]
    positions = [max(1, math.ceil(chunk)) for chunk, _ in shapes]
    probes = [
        probe_split(
            step_of(HeadInChunks(head.path, chunk).deferred_in(declared)), batch, layout, [rows], timed_runs=0
        )
        for chunk, (_, rows) in zip(positions, shapes)
    ]
    laws = fit_head_laws(probes, positions, missing_bytes=missing_bytes)
    return HeadLaws(
        path=head.path,
        classes=head.classes,
        positions_per_row=head.positions_per_row,
        laws=(*laws, optimizer_law),
    )
