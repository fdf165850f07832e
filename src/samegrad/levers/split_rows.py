"""A few rows at a time, gradients summed and handed over once.

Saves: the activations of all rows but one chunk's.
Costs: launches for every chunk; a second forward when the loss couples rows, but for the chunks whose graph is kept.
Totals of gradients while chunks run.
Why the gradient is the same: the gradient of a sum over rows is the sum of the chunks' gradients, each weighted by
its own count; for coupled losses the loss sees all output rows and only the model's rows are split.
Refuses: models whose rows see each other, or whose draws or state cannot be taken apart (named when the step is
examined).
Source: Gao et al. 2021, arXiv:2101.06983, section 3, for coupled losses.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any, ClassVar, Self

from samegrad.levers._lever import Execution, Slot
from samegrad.levers._variants import check_rows, chunk_sizes, most_rows, predicted_at, rungs_of
from samegrad.records import Exactness, Footprint, Phase

# A row's first forward of two forwards and a backward, which takes about two.
_FORWARD_SHARE = 0.25


@dataclasses.dataclass(frozen=True)
class SplitRows:
    """``rows``: how many at a time (the last chunk may be shorter), or the rows of every chunk as a list.

    ``kept_chunks``: how many of the last chunks keep their graph from the first of two passes.
    """

    rows: int | list[int]
    kept_chunks: int = 0

    name: ClassVar[str] = "split_rows"
    slot: ClassVar[Slot] = Slot.SPLIT
    exactness: ClassVar[Exactness] = Exactness.SAME_SUM

    def __post_init__(self) -> None:
        check_rows(self.name, self.rows)

    @classmethod
    def refusal(cls, footprint: Footprint) -> str | None:
        return footprint.refusals.get(cls.name)

    @classmethod
    def candidates(cls, footprint: Footprint, budget_bytes: int) -> Iterator[Self]:
        """The most rows predicted to fit, chunks evened out, then rungs of nine tenths down to one row.

        Where a second forward can be spared, each rung keeps as many graphs as fit; the fastest comes first, and
        each next one is smaller.
        """
        most = most_rows(footprint.laws, footprint.batch_rows, budget_bytes)
        rungs = [cls(rows).keeping(footprint, budget_bytes) for rows in rungs_of(most, footprint.batch_rows)]
        if not any(rung.kept_chunks for rung in rungs):
            yield from rungs
            return
        timed = sorted(rungs, key=lambda rung: (rung._seconds(footprint) or 0.0, -rung.largest_chunk()))
        smallest = None
        for rung in itertools.chain(timed, (cls(rows) for rows in rungs_of(most, footprint.batch_rows))):
            peak = rung.predict(footprint).peak_allocated_bytes
            if smallest is None or peak < smallest:
                smallest = peak
                yield rung

    def keeping(self, footprint: Footprint, budget_bytes: int) -> Self:
        """The same rows, with as many graphs kept as are predicted to fit."""
        kept_row = footprint.kept_row_bytes
        if kept_row is None or kept_row <= 0 or footprint.forwards_per_step < 2:
            return self
        rows, chunks = self.largest_chunk(), len(self._sizes(footprint))
        base, loss = self._peaks(footprint)
        room = min((budget_bytes - base) / (rows * kept_row) + 1, (budget_bytes - loss) / (rows * kept_row))
        return dataclasses.replace(self, kept_chunks=max(0, min(chunks, int(room))))

    def _peaks(self, footprint: Footprint) -> tuple[int, int]:
        """The peak without kept graphs, and that while the loss runs."""
        rows = self.largest_chunk()
        peaks = [(law.phase, law.peak_bytes(rows=rows, batch_rows=footprint.batch_rows)) for law in footprint.laws]
        return max(p for _, p in peaks), max((p for phase, p in peaks if phase is Phase.LOSS), default=0)

    def largest_chunk(self) -> int:
        return self.rows if isinstance(self.rows, int) else max(self.rows)

    def _sizes(self, footprint: Footprint) -> tuple[int, ...]:
        rows = self.rows if isinstance(self.rows, list) else min(self.rows, footprint.batch_rows)
        return chunk_sizes(rows, footprint.batch_rows)

    def _seconds(self, footprint: Footprint) -> float | None:
        seconds = footprint.predicted_seconds(rows=self.largest_chunk())
        if seconds is None or not self.kept_chunks:
            return seconds
        return seconds * (1 - _FORWARD_SHARE * self.kept_chunks / len(self._sizes(footprint)))

    def predict(self, footprint: Footprint) -> Footprint:
        rows = self.largest_chunk()
        by_phase: dict[Phase, int] = {}
        # The last chunk that keeps its graph runs beside those kept before it; the loss runs beside all of them.
        kept = int(rows * (footprint.kept_row_bytes or 0.0))
        beside = {Phase.LOSS: kept * self.kept_chunks}
        for law in footprint.laws:
            peak = law.peak_bytes(rows=rows, batch_rows=footprint.batch_rows)
            if law.phase is not Phase.OPTIMIZER:
                peak += beside.get(law.phase, kept * max(0, self.kept_chunks - 1))
            by_phase[law.phase] = max(peak, by_phase.get(law.phase, 0))
        return predicted_at(footprint, rows, by_phase, self._seconds(footprint))

    @contextlib.contextmanager
    def apply(self, execution: Execution) -> Iterator[Execution]:
        sizes = chunk_sizes(self.rows, execution.batch_rows)
        yield dataclasses.replace(execution, sizes=sizes, kept_chunks=min(self.kept_chunks, len(sizes)))

    def knobs(self) -> dict[str, Any]:
        return {"rows": self.rows, "kept_chunks": self.kept_chunks}
