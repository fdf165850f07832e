"""Bytes as a function of rows, from a few small probes of the real step.

A step runs the same operations whatever its rows, so the probes are laid over each other moment by moment, and at each
moment the live bytes are affine in the rows of a chunk and of the batch, but for what a loss or a coupled model holds
for each pair of rows. The peak is the largest of those lines. A line through the *peaks* would mislead: at a few rows
a weight's gradient is the peak, at many an activation is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from samegrad.measure.probe import Probe
from samegrad.records import Phase, PhaseLaw

_Floats = NDArray[np.float64]
_Moments = list[tuple[Phase, int]]
# A tensor over pairs of rows holds whole bytes for each pair; anything else is the rounding of some other size.
_WHOLE_BYTES_WITHIN = 1e-2


def peak_of(laws: Sequence[PhaseLaw], rows: int, batch_rows: int) -> int:
    """The largest of ``laws`` at ``rows`` at a time."""
    return max(law.peak_bytes(rows=rows, batch_rows=batch_rows) for law in laws)


def fit_laws(probes: Sequence[Probe], *, missing_bytes: int) -> tuple[PhaseLaw, ...]:
    """The lines that are the largest somewhere, for each phase.

    ``missing_bytes``: optimizer state that does not exist yet. With one ratio of batch to chunk rows over all probes
    the bytes are put on the chunk's rows.
    """
    columns = [[1.0, p.rows, p.batch_rows] for p in probes]
    if len({p.batch_rows / p.rows for p in probes}) == 1:
        columns = [column[:2] for column in columns]
    return _fitted([_course(probe) for probe in probes], probes, columns, missing_bytes)


def fit_mapped_laws(probes: Sequence[Probe], *, missing_bytes: int) -> tuple[PhaseLaw, ...]:
    """The same for a step that runs once on all rows, parts of it in chunks; in one chunk all bytes are the batch's."""
    courses = [[moment for stretch in probe.moments for moment in stretch] for probe in probes]
    if all(probe.chunks == 1 for probe in probes):
        laws = _fitted(courses, probes, [[1.0, p.batch_rows] for p in probes], missing_bytes)
        return tuple(
            dataclasses.replace(law, per_chunk_row_bytes=0.0, per_batch_row_bytes=law.per_chunk_row_bytes)
            for law in laws
        )
    return _fitted(courses, probes, [[1.0, p.rows, p.batch_rows] for p in probes], missing_bytes)


def fit_head_laws(probes: Sequence[Probe], positions: Sequence[int], *, missing_bytes: int) -> tuple[PhaseLaw, ...]:
    """The same for a step whose loss runs ``positions[k]`` at a time in ``probes[k]``: a chunk's rows are those."""
    courses = [[moment for stretch in probe.moments for moment in stretch] for probe in probes]
    columns = [[1.0, chunk, probe.batch_rows] for chunk, probe in zip(positions, probes)]
    return _fitted(courses, probes, columns, missing_bytes)


def _fitted(
    courses: Sequence[_Moments], probes: Sequence[Probe], columns: Sequence[Sequence[float]], missing_bytes: int
) -> tuple[PhaseLaw, ...]:
    """Laws of the bytes that ``columns`` multiply: fixed, a chunk's row, and the batch's where that is told apart."""
    phases, peaks = _aligned(courses, probes)
    fit = _Fit.of(np.array(columns), peaks, np.array([float(p.batch_rows) for p in probes]))
    absent = np.zeros((3 - len(fit.lines), peaks.shape[1]))
    beyond_bytes = missing_bytes + max(probe.beyond_counted_bytes for probe in probes)
    return _laws_of(np.vstack([fit.lines, absent, fit.pairs]), fit.residuals, phases, beyond_bytes)


def _aligned(courses: Sequence[_Moments], probes: Sequence[Probe]) -> tuple[list[Phase], _Floats]:
    """The phase of each moment, and (probes, moments) bytes."""
    phases: list[Phase] = []
    found: list[list[int]] = [[] for _ in probes]
    for phase in (phase for phase in Phase if all(phase in probe.by_phase for probe in probes)):
        moments = [[live for p, live in course if p is phase] for course in courses]
        if len({len(own) for own in moments}) > 1 or not moments[0]:
            # The operations depend on the rows; only the phase's own peak can be compared.
            moments = [[probe.by_phase[phase]] for probe in probes]
        phases += [phase] * len(moments[0])
        for all_moments, own in zip(found, moments):
            all_moments += own
    return phases, np.array(found, dtype=np.float64)


@dataclasses.dataclass(frozen=True)
class _Fit:
    """For each moment its coefficients, (columns, moments), bytes for each pair of rows, and what the fit leaves."""

    lines: _Floats
    pairs: _Floats
    residuals: _Floats

    @classmethod
    def of(cls, matrix: _Floats, peaks: _Floats, batch_rows: _Floats) -> _Fit:
        lines, residuals = _solved(matrix, peaks)
        pairs = np.zeros(peaks.shape[1])
        if len(set(batch_rows)) > 2 and len(matrix) > matrix.shape[1]:
            with_pairs, left = _solved(np.column_stack([matrix, batch_rows**2]), peaks)
            found = with_pairs[-1]
            there = (found > 0.5) & (np.abs(found - found.round()) < _WHOLE_BYTES_WITHIN)
            lines, residuals = np.where(there, with_pairs[:-1], lines), np.where(there, left, residuals)
            pairs = np.where(there, found.round(), 0.0)
        return cls(lines, pairs, residuals)


def _solved(matrix: _Floats, peaks: _Floats) -> tuple[_Floats, _Floats]:
    solution, *_ = np.linalg.lstsq(matrix, peaks, rcond=None)
    residuals = np.abs(matrix @ solution - peaks).max(axis=0)
    # Whole bytes a row: what is left of a thousandth of a byte is the solver's rounding.
    return np.where(np.abs(solution - solution.round()) < 1e-3, solution.round(), solution), residuals


def _laws_of(
    coefficients: _Floats, residuals: _Floats, phases: Sequence[Phase], beyond_bytes: int
) -> tuple[PhaseLaw, ...]:
    laws = []
    for phase in dict.fromkeys(phases):
        at = np.array([p is phase for p in phases])
        lines, left = coefficients[:, at].T, residuals[at]
        for index in _largest_somewhere(lines):
            fixed, per_chunk_row, per_batch_row, per_pair = (float(v) for v in lines[index])
            laws.append(
                PhaseLaw(
                    phase=phase,
                    fixed_bytes=fixed + beyond_bytes,
                    per_chunk_row_bytes=per_chunk_row,
                    per_batch_row_bytes=per_batch_row,
                    largest_residual_bytes=float(left[index]),
                    per_row_pair_bytes=per_pair,
                )
            )
    return tuple(laws)


def _course(probe: Probe) -> _Moments:
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
