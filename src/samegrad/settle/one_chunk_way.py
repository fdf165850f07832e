"""One way to run chunks by a program: its levers, what following the step predicts of it, and what fitted."""

from __future__ import annotations

import dataclasses

from samegrad.levers.compile import Compile
from samegrad.levers.graphs import Graphs
from samegrad.levers.recompute import Recompute
from samegrad.levers.split_rows import SplitRows
from samegrad.plan.traced import FollowedPlan, predict_traced
from samegrad.records import Plan
from samegrad.settle.candidates import Search, Tried
from samegrad.settle.edits import Levers, even_rows, rows_of, with_levers

# Below this a line through measurements is no promise.
ROOM_FRACTION = 0.97
# Of the time of a step whose blocks all run again, what is left at least when none does: one forward fewer on about
# three.
LEAST_KEPT_SHARE = 0.75


@dataclasses.dataclass
class Way:
    """``levers`` beside the compiler; ``blocks``: those of them that run again.

    ``predicted``: of Python's step, by the rows at a time, where it was followed.
    """

    levers: Levers
    blocks: list[str | list[str]]
    predicted: dict[int, FollowedPlan]
    fitted: list[Tried] = dataclasses.field(default_factory=list)

    @classmethod
    def of(cls, levers: Levers, blocks: list[str | list[str]], settled: Plan, search: Search) -> Way:
        followed_levers = {name: knobs for name, knobs in levers.items() if name != Compile.name}
        again: Levers = {Recompute.name: {"blocks": blocks}} if blocks else {}
        footprint, predicted = search.measurement.footprint, dict[int, FollowedPlan]()
        for followed in footprint.traced:
            if followed.levers.keys() != followed_levers.keys():
                continue
            for rows in [table.rows for table in followed.tables]:
                split: Levers = {} if rows == settled.batch_rows else {SplitRows.name: {"rows": rows}}
                found = predict_traced(footprint, followed.levers | split | again)
                if found is not None:
                    predicted[rows] = found
        return cls(levers | again, blocks, predicted)

    @property
    def largest(self) -> Tried:
        return max(self.fitted, key=tried_rows)

    def first_rows(self, settled: Plan, search: Search) -> int:
        """The rows to begin with: those that Python's step fits with, as predicted, or those of the settled plan."""
        room_bytes = search.most * ROOM_FRACTION
        fitting = [rows for rows, held in self.predicted.items() if held.peak_bytes <= room_bytes]
        return even_rows(settled.batch_rows, max(fitting, default=rows_of(settled)))

    def row_bytes(self, found: Tried, search: Search) -> float:
        """What a row more takes: as predicted, or by a line from what stands under every plan through ``found``.

        That line is too steep: what a compiled chunk holds at any size is counted to its rows.
        """
        standing_bytes = sum(search.measurement.footprint.resident_bytes.values())
        by_line = (found.rung.peak_bytes - standing_bytes) / tried_rows(found)
        if len(self.predicted) < 2:
            return max(1.0, by_line)
        fewest, most = min(self.predicted), max(self.predicted)
        risen = self.predicted[most].peak_bytes - self.predicted[fewest].peak_bytes
        return max(1.0, min(by_line, risen / (most - fewest)))


def measured_captured(plan: Plan, search: Search) -> Tried | None:
    """``plan`` captured. One that is compiled, as it is where that does not fit, since a pool of its own holds more, or
    cannot be: without launches it is no slower, and compiled for that, since otherwise gradients add up in another way.
    """
    captured = None if Graphs.name in search.reasons else search.measured(with_levers(plan, {Graphs.name: {}}))
    if captured is not None or Compile.name not in plan.levers or Compile.name in search.reasons:
        return captured
    return search.measured(plan)


def tried_rows(one: Tried) -> int:
    return rows_of(one.plan)
