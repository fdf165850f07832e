"""The plans of the kinds of batches that came, and which of them holds for one that is new.

A batch that is nowhere longer than one that was planned for (a shorter text, a smaller picture) needs no plan of its
own: it holds less under the same plan. Its code is tried all the same, since it may do something else for other
lengths.

Chunks that are compiled or captured are of one shape, and only those of one plan are there at a time. One kind after
another may have its own; where kinds come back, or come again and again, they would be made anew at every turn, which
takes longer than they win. Then such plans are given up, and others are made without them.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable

from samegrad.execute.examined import Kind
from samegrad.levers.compile import Compile
from samegrad.levers.graphs import Graphs
from samegrad.records import Footprint, Plan
from samegrad.trees import Extents, covers

_log = logging.getLogger("samegrad")

# Kinds one after another that may each be compiled or captured.
_MOST_PROGRAMMED = 3


@dataclasses.dataclass(frozen=True)
class Kept:
    """A plan, what it came from, and the batch that it was made for."""

    plan: Plan
    footprint: Footprint
    extents: Extents

    @property
    def programmed(self) -> bool:
        """Whether its chunks are compiled or captured."""
        return bool({Compile.name, Graphs.name} & self.plan.levers.keys())


class KeptPlans:
    """Plans by the kind of batch. ``varied``: kinds come in turns, so that further plans are to be of any shape."""

    def __init__(self) -> None:
        self.varied = False
        self._plans: dict[Kind, Kept] = {}
        self._latest: Kind | None = None

    def of(self, kind: Kind, extents: Extents, rows: int, accept: Callable[[Plan], bool]) -> Kept | None:
        """The plan for ``rows`` of batches like this one; None where one is to be made.

        ``accept``: whether a plan that was made for a larger kind can run this one; asked once.
        """
        known = self._plans.get(kind)
        if self._latest not in (None, kind) and self._come_in_turns(known):
            self._vary()
            known = None
        self._latest = kind
        if known is not None:
            return known if rows <= known.plan.batch_rows else None
        larger = [
            kept
            for (_, mode), kept in self._plans.items()
            if mode == kind[1]
            and rows <= kept.plan.batch_rows
            and covers(kept.extents, extents)
            and not kept.programmed
        ]
        # The nearest one: it splits no more than it must.
        for kept in sorted(larger, key=lambda kept: sum(math.prod(leaf.lengths) for leaf in kept.extents)):
            if accept(kept.plan):
                return self.keep(kind, kept)
        return None

    def keep(self, kind: Kind, kept: Kept) -> Kept:
        self._plans[kind] = kept
        return kept

    def _come_in_turns(self, known: Kept | None) -> bool:
        """Whether a kind that is not the latest one comes back to a plan of one shape, or is one of many such."""
        if known is not None:
            return known.programmed
        return sum(kept.programmed for kept in self._plans.values()) >= _MOST_PROGRAMMED

    def _vary(self) -> None:
        self.varied = True
        self._plans = {kind: kept for kind, kept in self._plans.items() if not kept.programmed}
        _log.warning(
            "samegrad: batches of several shapes come in turns. What is compiled or captured is of one shape, so plans "
            "are made without that from now on; batches of one shape (padded, or sorted by length) would keep it"
        )
