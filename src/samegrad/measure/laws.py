"""Bytes as a function of rows, from two or three small probes of the real step.

A step runs the same operations whatever its rows, so the probes are laid over each other moment by moment, and at each
moment the live bytes are affine in the rows of a chunk and of the batch. The peak is the largest of those lines. A
line through the *peaks* would mislead: at a few rows a weight's gradient is the peak, at many an activation is.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from samegrad.measure.probe import Probe
from samegrad.records import Phase, PhaseLaw

_Floats = NDArray[np.float64]


def fit_laws(probes: Sequence[Probe], *, missing_bytes: int) -> tuple[PhaseLaw, ...]:
    """The lines that are the largest somewhere, for each phase.

    ``missing_bytes``: optimizer state that does not exist yet. With one ratio of batch to chunk rows over all probes
    the bytes are put on the chunk's rows.
    """
    courses = [_course(probe) for probe in probes]
    phases = [phase for phase, _ in courses[0]]
    beyond = max(probe.beyond_counted_bytes for probe in probes)
    if any([phase for phase, _ in course] != phases for course in courses):
        # The operations depend on the rows; only each phase's own peak can be compared.
        shared = [phase for phase in Phase if all(phase in probe.by_phase for probe in probes)]
        courses = [[(phase, probe.by_phase[phase]) for phase in shared] for probe in probes]
        phases = shared
    ratios = {probe.batch_rows / probe.rows for probe in probes}
    matrix = np.array([[1.0, p.rows, p.batch_rows if len(ratios) > 1 else 0.0] for p in probes])
    peaks = np.array([[float(live) for _, live in course] for course in courses])
    solution, *_ = np.linalg.lstsq(matrix, peaks, rcond=None)
    residuals = np.abs(matrix @ solution - peaks).max(axis=0)
    # Whole bytes a row: what is left of a thousandth of a byte is the solver's rounding.
    solution = np.where(np.abs(solution - solution.round()) < 1e-3, solution.round(), solution)
    laws = []
    for phase in dict.fromkeys(phases):
        at = np.array([p is phase for p in phases])
        lines, left = solution[:, at].T, residuals[at]
        for index in _largest_somewhere(lines):
            fixed, per_chunk_row, per_batch_row = (float(v) for v in lines[index])
            laws.append(
                PhaseLaw(
                    phase=phase,
                    fixed_bytes=fixed + missing_bytes + beyond,
                    per_chunk_row_bytes=per_chunk_row,
                    per_batch_row_bytes=per_batch_row,
                    largest_residual_bytes=float(left[index]),
                )
            )
    return tuple(laws)


def _course(probe: Probe) -> list[tuple[Phase, int]]:
    """The moments of the probe's first and last chunk, so that probes of any number of chunks lie over each other.

    A single pass announces forward, loss, backward for each chunk. Two passes announce forward for each chunk, the
    loss once, then forward and backward for each chunk.
    """
    stretches = list(probe.moments)
    named = [stretch[0][0] for stretch in stretches]
    chunks = probe.chunks
    two_passes = chunks > 1 and named[1] is Phase.FORWARD
    if two_passes:
        last = chunks - 1
        second = chunks + 1
        kept = [0, last, chunks, second, second + 1, second + 2 * last, second + 2 * last + 1]
    elif chunks > 1:
        kept = [0, 1, 2, *range(len(stretches) - 3, len(stretches))]
    else:
        kept = list(range(len(stretches)))
    return [moment for index in kept for moment in stretches[index]]


def _largest_somewhere(lines: _Floats) -> list[int]:
    """Indices of the lines that no other line is at least as large as in every coefficient."""
    unique, first = np.unique(lines, axis=0, return_index=True)
    kept = []
    for i, line in enumerate(unique):
        above = np.all(unique >= line, axis=1)
        above[i] = False
        if not above.any():
            kept.append(int(first[i]))
    return sorted(kept)
