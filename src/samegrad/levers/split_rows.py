"""A few rows at a time, gradients summed and handed over once.

Saves: the activations of all rows but one chunk's.
Costs: launches for every chunk; a second forward when the loss couples rows. Totals of gradients while chunks run.
Why the gradient is the same: the gradient of a sum over rows is the sum of the chunks' gradients, each weighted by
its own count; for coupled losses the loss sees all output rows and only the model's rows are split.
Refuses: models whose rows see each other, draw random numbers or change state (named when the step is examined).
Source: Gao et al. 2021, arXiv:2101.06983, section 3, for coupled losses.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar, Self

from samegrad.errors import BadInput
from samegrad.levers._lever import Execution, Slot
from samegrad.records import Exactness, Footprint, Origin, Phase


@dataclasses.dataclass(frozen=True)
class SplitRows:
    """``rows``: how many at a time (the last chunk may be shorter), or the rows of every chunk as a list."""

    rows: int | list[int]

    name: ClassVar[str] = "split_rows"
    slot: ClassVar[Slot] = Slot.SPLIT
    exactness: ClassVar[Exactness] = Exactness.SAME_SUM

    def __post_init__(self) -> None:
        listed = self.rows if isinstance(self.rows, list) else [self.rows]
        if not listed or any(not isinstance(n, int) or isinstance(n, bool) or n < 1 for n in listed):
            raise BadInput(
                asked=f"split_rows with rows={self.rows!r}",
                found="not a positive whole number, nor a list of them",
                do="plan again, or correct the plan file",
            )

    @classmethod
    def refusal(cls, footprint: Footprint) -> str | None:
        return footprint.refusals.get(cls.name)

    @classmethod
    def candidates(cls, footprint: Footprint, budget_bytes: int) -> Iterator[Self]:
        """The most rows predicted to fit, chunks evened out, then rungs of nine tenths down to one row."""
        rows = cls._most_rows(footprint, budget_bytes)
        while rows >= 1:
            chunks = -(-footprint.batch_rows // rows)
            # As many chunks as that takes, but even ones: the same time and a lower peak.
            even = -(-footprint.batch_rows // chunks)
            yield cls(even)
            rows = min(even - 1, even * 9 // 10)

    @staticmethod
    def _most_rows(footprint: Footprint, budget_bytes: int) -> int:
        most = footprint.batch_rows - 1
        for law in footprint.laws:
            left = budget_bytes - law.fixed_bytes - law.per_batch_row_bytes * footprint.batch_rows
            if law.per_chunk_row_bytes > 0:
                most = int(max(0, min(most, left // law.per_chunk_row_bytes)))
            elif left < 0:
                most = 0
        return most

    def largest_chunk(self) -> int:
        return self.rows if isinstance(self.rows, int) else max(self.rows)

    def predict(self, footprint: Footprint) -> Footprint:
        rows = self.largest_chunk()
        by_phase: dict[Phase, int] = {}
        for law in footprint.laws:
            peak = law.peak_bytes(rows=rows, batch_rows=footprint.batch_rows)
            by_phase[law.phase] = max(peak, by_phase.get(law.phase, 0))
        return dataclasses.replace(
            footprint,
            origin=Origin.PREDICTED,
            rows=rows,
            peak_allocated_bytes=max(by_phase.values()),
            peak_reserved_bytes=None,
            by_phase=by_phase,
            seconds=footprint.predicted_seconds(rows=rows),
            timeline=(),
            by_category={},
        )

    @contextlib.contextmanager
    def apply(self, execution: Execution) -> Iterator[Execution]:
        yield dataclasses.replace(execution, sizes=tuple(self.sizes(execution.batch_rows)))

    def sizes(self, batch_rows: int) -> list[int]:
        """The rows of each chunk of a batch of ``batch_rows``. Raises BadInput when a list does not add up."""
        if isinstance(self.rows, int):
            full, rest = divmod(batch_rows, self.rows)
            return [self.rows] * full + [rest] * bool(rest)
        if sum(self.rows) != batch_rows:
            raise BadInput(
                asked=f"chunks of {self.rows} rows",
                found=f"they add up to {sum(self.rows)}, the batch has {batch_rows} rows",
                do="give chunk sizes that add up to the batch, or one number",
            )
        return list(self.rows)

    def knobs(self) -> dict[str, Any]:
        return {"rows": self.rows}
