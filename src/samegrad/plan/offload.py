"""Choices for a chain when the way to the host is limited: an integer program for HiGHS.

Waiting on the host costs no computation, but the host has only so many bytes and the bus only so many a second, so what
a unit costs depends on what its neighbours send. That is a second resource, which the program over budgets alone does
not see. Here stages are arcs of a path through the chain, and bytes queue for the copy engine, forward and backward;
the longest queue counts against the budget at every position.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from samegrad.errors import EnvironmentProblem
from samegrad.plan.chain import ChainChoice, HostLink, predicted_choice
from samegrad.plan.heights import Chain, Stage, Way
from samegrad.plan.stage_options import options_from

# HiGHS holds bounds to 1e-6; so much of the budget stays free, that no choice exceeds it.
_SLACK_FRACTION = 1e-5
# Of the plain step's time: among choices as fast as each other the one with the smaller peak.
_PEAK_WEIGHT = 1e-4
# Of the whole step's time.
_GAP_FRACTION = 5e-3
# A limit in seconds would make the answer depend on the machine.
_MOST_NODES = 200


def choices_with_offload(
    chain: Chain,
    budgets_bytes: Sequence[int],
    resident_bytes: int,
    chunk_counts: Sequence[int],
    link: HostLink,
    worth_taking: Collection[Stage],
) -> list[ChainChoice]:
    """For each budget that can be held the fastest choice found, the longest queue taken as always there.

    ``worth_taking``: which stages of more than one unit may be taken; others only lengthen the search.
    Raises EnvironmentProblem where scipy is missing.
    """
    options = [options_from(chain, k, chunk_counts, may_offload=True) for k in range(len(chain))]
    every = _Arcs(
        stages=[stage for own in options for stage in own.stages],
        heights=np.concatenate([own.heights for own in options]),
        left=np.concatenate([own.left for own in options]),
        seconds=np.concatenate([own.seconds for own in options]),
    )
    arcs = every.taken([stage.first == stage.last or stage in worth_taking for stage in every.stages])
    found = []
    for budget_bytes in budgets_bytes:
        if budget_bytes <= resident_bytes:
            continue
        room_bytes = budget_bytes - resident_bytes
        answer = _solved(chain, arcs.taken(arcs.heights <= room_bytes), room_bytes, link)
        if answer is not None:
            stages, in_flight_bytes = answer
            choice = predicted_choice(
                chain, stages, resident_bytes=resident_bytes, link=link, in_flight_bytes=in_flight_bytes
            )
            found += [choice] if choice.peak_bytes <= budget_bytes else []
    return found


@dataclasses.dataclass(frozen=True)
class _Arcs:
    """All stages that the path may take."""

    stages: list[Stage]
    heights: NDArray[np.int64]
    left: NDArray[np.int64]
    seconds: NDArray[np.float64]

    def taken(self, which: Sequence[bool] | NDArray[np.bool_]) -> _Arcs:
        [inside] = np.nonzero(np.asarray(which))
        return _Arcs([self.stages[k] for k in inside], self.heights[inside], self.left[inside], self.seconds[inside])


def _solved(chain: Chain, arcs: _Arcs, room_bytes: int, link: HostLink) -> tuple[list[Stage], int] | None:
    """The stages and the longest queue; None where nothing fits."""
    optimize, sparse = _scipy()
    program = _Program(len(arcs.stages))
    base = program.columns(len(chain) + 1, lower=-math.inf)
    queue, peak = program.columns(1)[0], program.columns(1, upper=1 - _SLACK_FRACTION)[0]
    time_unit = chain.plain_seconds or 1.0
    moved = [
        chain.units[s.first].moved_bytes / room_bytes if s.way is Way.OFFLOAD else 0.0 for s in arcs.stages
    ]  # fmt: skip

    begins: list[list[int]] = [[] for _ in range(len(chain) + 1)]
    ends: list[list[int]] = [[] for _ in range(len(chain) + 1)]
    for arc, stage in enumerate(arcs.stages):
        begins[stage.first].append(arc)
        ends[stage.last + 1].append(arc)
    program.row({base[0]: 1.0}, 0.0, 0.0)
    for unit in range(len(chain)):
        through = dict.fromkeys(begins[unit], 1.0) | dict.fromkeys(ends[unit], -1.0)
        program.row(through, float(unit == 0), float(unit == 0))
        heights = {arc: arcs.heights[arc] / room_bytes for arc in begins[unit]}
        program.row(heights | {base[unit]: 1.0, queue: 1.0, peak: -1.0}, -math.inf, 0.0)
        left = {arc: -arcs.left[arc] / room_bytes for arc in ends[unit + 1]}
        program.row(left | {base[unit + 1]: 1.0, base[unit]: -1.0}, 0.0, 0.0)
    program.cost(peak, _PEAK_WEIGHT)
    # The plain step's time, so that the gap is one of the whole step.
    program.cost(program.columns(1, lower=1.0, upper=1.0)[0], 1.0)
    for arc, seconds in enumerate(arcs.seconds):
        program.cost(arc, seconds / time_unit)
    if link.host_bytes is not None:
        program.row(dict(enumerate(moved)), -math.inf, link.host_bytes / room_bytes)
    if not math.isinf(link.bytes_per_second):
        rate = link.bytes_per_second * time_unit / room_bytes
        again = arcs.seconds / time_unit
        for seconds, extra in ((chain.forward_seconds, 0 * again), (chain.backward_seconds, again)):
            _add_queue(program, begins, seconds / time_unit, extra, moved, rate, queue)

    answer = program.solved(optimize, sparse)
    if answer is None:
        return None
    taken = [stage for stage, share in zip(arcs.stages, answer) if share > 0.5]
    return sorted(taken, key=lambda stage: stage.first), math.ceil(answer[queue] * room_bytes)


def _add_queue(
    program: _Program, begins: list[list[int]], seconds: NDArray[np.float64], extra_seconds: NDArray[np.float64],
    moved: list[float], rate: float, longest: int,
) -> None:  # fmt: skip
    """Bytes wait for the engine while units run; the step waits where they would be more than ``longest``."""
    queued = program.columns(len(seconds) + 1)
    waited = program.columns(len(seconds) + 1)
    program.row({queued[0]: 1.0}, 0.0, 0.0)
    for unit, duration in enumerate(seconds):
        handed_over = {arc: -moved[arc] for arc in begins[unit] if moved[arc]}
        served = {arc: rate * extra_seconds[arc] for arc in begins[unit] if extra_seconds[arc]}
        queues = {queued[unit + 1]: 1.0, queued[unit]: -1.0, waited[unit]: rate}
        program.row(queues | served | handed_over, -rate * duration, math.inf)
        program.row({queued[unit + 1]: 1.0} | handed_over, 0.0, math.inf)
        program.row({queued[unit + 1]: 1.0, longest: -1.0}, -math.inf, 0.0)
    program.row({waited[-1]: rate, queued[-1]: -1.0}, 0.0, math.inf)
    for column in waited:
        program.cost(column, 1.0)


class _Program:
    """A mixed-integer program as it is put together: the first ``choices`` columns are yes or no."""

    def __init__(self, choices: int) -> None:
        self._lower, self._upper = [0.0] * choices, [1.0] * choices
        self._choices = choices
        self._costs: dict[int, float] = {}
        self._rows: list[tuple[dict[int, float], float, float]] = []

    def columns(self, count: int, *, lower: float = 0.0, upper: float = math.inf) -> list[int]:
        """Numbers of ``count`` new columns that take any value between the bounds."""
        start = len(self._lower)
        self._lower += [lower] * count
        self._upper += [upper] * count
        return list(range(start, start + count))

    def row(self, coefficients: dict[int, float], lower: float, upper: float) -> None:
        self._rows.append((coefficients, lower, upper))

    def cost(self, column: int, amount: float) -> None:
        self._costs[column] = amount

    def solved(self, optimize: Any, sparse: Any) -> NDArray[np.float64] | None:
        entries = [(k, column, value) for k, (row, _, _) in enumerate(self._rows) for column, value in row.items()]
        rows, columns, values = zip(*entries)
        matrix = sparse.csr_matrix((values, (rows, columns)), shape=(len(self._rows), len(self._lower)))
        bounds = [row[1] for row in self._rows], [row[2] for row in self._rows]
        costs = [self._costs.get(column, 0.0) for column in range(len(self._lower))]
        answer = optimize.milp(
            costs,
            constraints=optimize.LinearConstraint(matrix, *bounds),
            bounds=optimize.Bounds(self._lower, self._upper),
            integrality=[int(column < self._choices) for column in range(len(self._lower))],
            options={"mip_rel_gap": _GAP_FRACTION, "node_limit": _MOST_NODES},
        )
        return None if answer.x is None else np.asarray(answer.x)


def _scipy() -> tuple[Any, Any]:
    try:
        from scipy import optimize, sparse
    except ImportError:
        raise EnvironmentProblem(
            asked="a plan that offloads to a host with limited room or bandwidth",
            found="the package 'scipy' is not installed, whose HiGHS solves it",
            do="pip install scipy, or plan without offload",
        ) from None
    return optimize, sparse
