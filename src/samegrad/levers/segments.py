"""Parts of the model a few rows at a time, everything outside them on the whole batch.

Saves: the activations inside the segments of all rows but one chunk's.
Costs: the segments' forward a second time, in backward; launches for every chunk. What crosses a segment's border is
kept for all rows.
Why the gradient is the same: a segment treats rows alone, so the gradient of its inputs is joined over chunks and that
of its parameters summed; everything that couples rows is the plain code on all of them.
Refuses: models in which no part with parameters treats rows alone, or named parts that do not.
Source: Chen, Xu, Zhang, Guestrin 2016, arXiv:1604.06174, for running parts again; the split over rows is our own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, ClassVar, Self

from samegrad.exact.schemes import Scheme
from samegrad.exact.segments import Segment, in_segments
from samegrad.levers._lever import Execution, Slot
from samegrad.levers._variants import candidates_of, check_rows, chunk_sizes, predicted
from samegrad.records import Exactness, Footprint


@dataclasses.dataclass(frozen=True)
class Segments:
    """``rows`` of the batch at a time, inside ``paths``: submodule to rows it is called on for each of the batch."""

    rows: int | list[int]
    paths: dict[str, int]

    name: ClassVar[str] = "segments"
    slot: ClassVar[Slot] = Slot.SPLIT
    exactness: ClassVar[Exactness] = Exactness.SAME_SUM

    def __post_init__(self) -> None:
        check_rows(self.name, self.rows)

    @classmethod
    def refusal(cls, footprint: Footprint) -> str | None:
        return footprint.refusals.get(cls.name)

    @classmethod
    def candidates(cls, footprint: Footprint, budget_bytes: int) -> Iterator[Self]:
        """The most rows predicted to fit, then rungs down to one row."""
        for variant, rows in candidates_of(cls.name, footprint, budget_bytes):
            yield cls(rows, variant.knobs["paths"])

    def predict(self, footprint: Footprint) -> Footprint:
        return predicted(self.name, self.knobs(), footprint, self.rows)

    @property
    def forwards(self) -> float:
        return 2.0

    def scheme(self) -> Scheme:
        parts = [Segment(path, per_row) for path, per_row in self.paths.items()]
        return functools.partial(in_segments, segments=parts)

    @contextlib.contextmanager
    def apply(self, execution: Execution) -> Iterator[Execution]:
        sizes = chunk_sizes(self.rows, execution.batch_rows)
        yield dataclasses.replace(execution, sizes=sizes, scheme=self.scheme())

    def knobs(self) -> dict[str, Any]:
        return {"rows": self.rows, "paths": self.paths}
