"""The plans of the kinds of batches that came, and which of them holds for one that is new.

A batch that is nowhere longer than one that was planned for (a shorter text, a smaller picture) needs no plan of its
own: it holds less under the same plan. Its code is tried all the same, since it may do something else for other
lengths. Chunks that are compiled or captured are of one shape, so those are planned anew.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

from samegrad.execute.examined import Kind
from samegrad.levers.compile import Compile
from samegrad.levers.graphs import Graphs
from samegrad.records import Footprint, Plan
from samegrad.trees import Extents, covers


@dataclasses.dataclass(frozen=True)
class Kept:
    """A plan, what it came from, and the batch that it was made for."""

    plan: Plan
    footprint: Footprint
    extents: Extents


class KeptPlans:
    """Plans by the kind of batch."""

    def __init__(self) -> None:
        self._plans: dict[Kind, Kept] = {}

    def of(self, kind: Kind, extents: Extents, rows: int, accept: Callable[[Plan], bool]) -> Kept | None:
        """The plan for ``rows`` of batches like this one; None where one is to be made.

        ``accept``: whether a plan that was made for a larger kind can run this one; asked once.
        """
        known = self._plans.get(kind)
        if known is not None:
            return known if rows <= known.plan.batch_rows else None
        larger = [
            kept
            for (_, mode), kept in self._plans.items()
            if mode == kind[1]
            and rows <= kept.plan.batch_rows
            and covers(kept.extents, extents)
            and not {Compile.name, Graphs.name} & kept.plan.levers.keys()
        ]
        # The nearest one: it splits no more than it must.
        for kept in sorted(larger, key=lambda kept: sum(math.prod(leaf.lengths) for leaf in kept.extents)):
            if accept(kept.plan):
                return self.keep(kind, kept)
        return None

    def keep(self, kind: Kind, kept: Kept) -> Kept:
        self._plans[kind] = kept
        return kept
