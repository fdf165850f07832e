"""How far a stage of a chain reaches above what stands before it, unit by unit.

A step is a chain of units, cut into stages: a unit that keeps what its backward needs, one that sends it to the host,
or a stretch that keeps its input only and runs again in backward, whole or in chunks of its rows. What a stage needs
depends on the stages before it only through the bytes they keep, so heights are counted from there. The prediction and
the solvers read the same numbers, those of all stretches with one beginning at a time.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from samegrad.errors import BadInput
from samegrad.unit_tables import Unit

Bytes = NDArray[np.int64]
Seconds = NDArray[np.float64]


class Way(enum.Enum):
    """How a stage gets through the step."""

    KEEP = "keep"
    OFFLOAD = "offload"
    RECOMPUTE = "recompute"
    CHUNKED = "chunked"


@dataclasses.dataclass(frozen=True)
class Stage:
    """Units ``first`` to ``last``, both included. ``chunks``: into how many parts CHUNKED cuts the rows."""

    first: int
    last: int
    way: Way
    chunks: int = 1


@dataclasses.dataclass(frozen=True)
class Heights:
    """Bytes above what stands before a stage, at each of its units, while it runs forward, again, and backward."""

    forward: Bytes
    recompute: Bytes
    backward: Bytes


@dataclasses.dataclass(frozen=True, eq=False)
class Chain:
    """The columns of a table of units, one entry a unit. Bytes are whole, times are seconds."""

    units: tuple[Unit, ...]
    kept: Bytes
    output: Bytes
    crossing: Bytes
    forward_extra: Bytes
    backward_extra: Bytes
    arrival_extra: Bytes
    incoming: Bytes
    gradients: Bytes
    later_gradients: Bytes
    forward_seconds: Seconds
    backward_seconds: Seconds
    chunk_seconds: Seconds

    @classmethod
    def of(cls, units: Sequence[Unit]) -> Chain:
        """Raises BadInput for a table that cannot be."""
        _check(units)
        gradients = _column(units, "gradient_bytes")
        return cls(
            units=tuple(units),
            kept=_column(units, "kept_bytes"),
            output=_column(units, "output_bytes"),
            crossing=_column(units, "crossing_bytes"),
            forward_extra=_column(units, "forward_extra_bytes"),
            backward_extra=_column(units, "backward_extra_bytes"),
            arrival_extra=_column(units, "arrival_extra_bytes"),
            incoming=_column(units, "incoming_bytes"),
            gradients=gradients,
            later_gradients=gradients.sum() - gradients.cumsum(),
            forward_seconds=np.array([unit.forward_seconds for unit in units]),
            backward_seconds=np.array([unit.backward_seconds for unit in units]),
            chunk_seconds=np.array([unit.chunk_seconds for unit in units]),
        )

    def __len__(self) -> int:
        return len(self.units)

    @property
    def plain_seconds(self) -> float:
        """Every unit forward and backward once."""
        return float(self.forward_seconds.sum() + self.backward_seconds.sum())

    def kept_heights(self, unit: int) -> Heights:
        """Of a stage of one unit whose backward finds everything on the device."""
        at = slice(unit, unit + 1)
        backward = self.kept[at] + self.arrival_extra[at] + self.backward_extra[at]
        return Heights(self.forward_extra[at], self.kept[:0], backward)

    def stretch_from(self, first: int) -> Stretch:
        """Everything about stages that begin at ``first`` and run again in backward."""
        stop = first
        while stop < len(self) and self.units[stop].recomputable:
            stop += 1
        return Stretch(self, first, stop)

    def heights(self, stage: Stage) -> Heights:
        if stage.way in (Way.KEEP, Way.OFFLOAD):
            return self.kept_heights(stage.first)
        stretch = self.stretch_from(stage.first)
        if stage.way is Way.RECOMPUTE:
            return stretch.recomputed_heights(stage.last)
        return stretch.chunked_heights(stage.last, stage.chunks)

    def left_bytes(self, stage: Stage) -> int:
        """What stands after the forward of ``stage`` because of it, until its backward."""
        if stage.way is Way.KEEP:
            return int(self.kept[stage.first])
        if stage.way is Way.OFFLOAD:
            return int(self.kept[stage.first]) - self.units[stage.first].offloadable_bytes
        return int(self.output[stage.last] + self.crossing[stage.first : stage.last].sum())

    def extra_seconds(self, stage: Stage) -> float:
        """Beyond the plain step's forward and backward; waiting for the host is not in it."""
        if stage.way in (Way.KEEP, Way.OFFLOAD):
            return 0.0
        inside = slice(stage.first, stage.last + 1)
        launches = (stage.chunks - 1) * float(self.chunk_seconds[inside].sum())
        return float(self.forward_seconds[inside].sum()) + launches


class Stretch:
    """Stages that begin at ``first`` and end before ``stop``; entry k of each array is for the one that ends k later.

    What is not known is bounded from above: a forward that keeps nothing is given the peak of one that does.
    """

    def __init__(self, chain: Chain, first: int, stop: int) -> None:
        self._chain, self._first, self._inside = chain, first, slice(first, stop)
        kept, extra = chain.kept[self._inside], chain.forward_extra[self._inside]
        sums = kept.cumsum()
        crossing = chain.crossing[self._inside]
        self._crossed = crossing.cumsum() - crossing
        # While a unit runs, its input stands, and what units before the last one left for units further on.
        entering = np.zeros_like(kept)
        entering[1:] = chain.output[self._inside][:-1] + self._crossed[:-1]
        self._forward = entering + extra
        self._recompute = sums - kept + extra
        self._backward = sums + chain.arrival_extra[self._inside] + chain.backward_extra[self._inside]
        # Parameters' gradients do not shrink with the rows; everything else that a chunk holds does.
        arriving = np.maximum(chain.arrival_extra - chain.later_gradients, 0)[self._inside]
        own = np.maximum(chain.backward_extra - chain.gradients, 0)[self._inside]
        self._chunk_backward = sums + arriving + own
        gradients = chain.gradients[self._inside]
        self._gradients = gradients.cumsum()
        self._gradients_before = self._gradients - gradients

    def __len__(self) -> int:
        return len(self._forward)

    @property
    def left_bytes(self) -> Bytes:
        return self._chain.output[self._inside] + self._crossed

    @property
    def row_independent_length(self) -> int:
        """How many units from the first on treat rows alone."""
        units = self._chain.units[self._inside]
        return next((k for k, unit in enumerate(units) if not unit.row_independent), len(units))

    def extra_seconds(self, chunks: int = 1) -> Seconds:
        launches = (chunks - 1) * self._chain.chunk_seconds[self._inside]
        return (self._chain.forward_seconds[self._inside] + launches).cumsum()

    def recomputed_heights(self, last: int) -> Heights:
        upto = slice(0, last - self._first + 1)
        recompute = self._recompute[upto] + self._chain.incoming[last]
        return Heights(self._forward[upto], recompute, self._backward[upto])

    def recomputed_peaks(self) -> tuple[Bytes, Bytes]:
        """The largest height in forward and in backward, of every stage."""
        again = np.maximum.accumulate(self._recompute) + self._chain.incoming[self._inside]
        return np.maximum.accumulate(self._forward), np.maximum(again, np.maximum.accumulate(self._backward))

    def chunked_heights(self, last: int, chunks: int) -> Heights:
        end = last - self._first
        upto = slice(0, end + 1)
        forward = self.left_bytes[end] + _share(self._forward[upto], chunks)
        again = self._borders[end] + _share(self._recompute[upto], chunks)
        fresh = self._gradients[end] - self._gradients_before[upto]
        backward = self._borders[end] + fresh + _share(self._chunk_backward[upto], chunks)
        return Heights(forward, again, backward)

    def chunked_peaks(self, chunks: int) -> tuple[Bytes, Bytes]:
        """The same in chunks: the whole output is put together in forward, the input's whole gradient in backward."""
        forward = self.left_bytes + _share(np.maximum.accumulate(self._forward), chunks)
        again = _share(np.maximum.accumulate(self._recompute), chunks)
        beside_fresh = _share(self._chunk_backward, chunks) - self._gradients_before
        backward = np.maximum.accumulate(beside_fresh) + self._gradients
        return forward, self._borders + np.maximum(again, backward)

    @property
    def _borders(self) -> Bytes:
        """What stands in the backward of chunks: the gradients of output and input, and sums of the parameters'."""
        entering = int(self._chain.output[self._first - 1]) if self._first else 0
        borders: Bytes = self._chain.incoming[self._inside] + entering + self._gradients
        return borders


def _share(of_rows: Bytes, chunks: int) -> Bytes:
    return (of_rows + (chunks - 1)) // np.int64(chunks)


def _column(units: Sequence[Unit], field: str) -> Bytes:
    return np.array([getattr(unit, field) for unit in units], dtype=np.int64)


def _check(units: Sequence[Unit]) -> None:
    wrong = "no units" if not units else None
    for index, unit in enumerate(units):
        place = f"unit {index} ({unit.name or 'between blocks'})"
        times = (unit.forward_seconds, unit.backward_seconds, unit.chunk_seconds)
        if not all(0 <= seconds < float("inf") for seconds in times):
            wrong = f"{place} takes {times} seconds"
        elif unit.offloadable_bytes and unit.offloadable_bytes > unit.kept_bytes - unit.output_bytes:
            wrong = f"{place} may send {unit.offloadable_bytes} bytes to the host and keeps {unit.kept_bytes}, " \
                    f"{unit.output_bytes} of them its output"  # fmt: skip
        elif unit.moved_bytes < unit.offloadable_bytes:
            wrong = f"{place} moves {unit.moved_bytes} bytes to free {unit.offloadable_bytes}"
        elif unit.row_independent and not unit.recomputable:
            wrong = f"{place} treats rows alone but cannot run again"
        if wrong:
            break
    if wrong:
        raise BadInput(asked="plan a chain of units", found=wrong, do="measure the units again, or correct the table")
