"""A step as a chain of units, in numbers: what plans are made of that choose block by block. No torch here."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from samegrad.json_record import Record


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unit(Record):
    """One stretch of a step's forward, a block or the code between two, as the planner sees it. Bytes of all its rows.

    ``name`` is the module's path, "" for code between blocks; ``paths`` those of several modules that are one unit,
    called one after another. ``kept_bytes``: what its forward adds until its backward,
    the output included, which is ``output_bytes`` of them; ``crossing_bytes`` of the output are read beyond the next
    unit, by a skip connection. ``forward_extra_bytes``: the peak of its forward above what stands before it.
    ``arrival_extra_bytes``: what is live when the gradient of its output arrives, beyond the resident bytes and what
    the units up to and with it keep (below zero where an output is gone by then); ``incoming_bytes``: what of it no
    such unit holds, the gradient itself and what later units left. ``backward_extra_bytes``: the peak of its backward
    above that moment. ``gradient_bytes``: parameters' gradients that its backward makes.

    ``recomputable``: its forward can run again in backward. ``row_independent``: it treats rows alone, so that it can
    run in chunks, each of which costs ``chunk_seconds`` more in a step. ``offloadable_bytes`` of what it keeps, never
    the output, may wait on the host; ``moved_bytes`` then cross the bus each way, more than those where saved tensors
    overlap.
    """

    name: str
    kept_bytes: int
    output_bytes: int
    forward_extra_bytes: int
    backward_extra_bytes: int
    arrival_extra_bytes: int
    incoming_bytes: int
    forward_seconds: float
    backward_seconds: float
    recomputable: bool
    crossing_bytes: int = 0
    gradient_bytes: int = 0
    row_independent: bool = False
    chunk_seconds: float = 0.0
    offloadable_bytes: int = 0
    moved_bytes: int = 0
    paths: tuple[str, ...] = ()

    @property
    def modules(self) -> tuple[str, ...]:
        """The paths of its modules; none for code between blocks."""
        return self.paths or (self.name,) * bool(self.name)


@dataclasses.dataclass(frozen=True, kw_only=True)
class UnitTable(Record):
    """The units of a step on ``rows`` rows in forward order, and what is resident while they run."""

    rows: int
    resident_bytes: int
    units: tuple[Unit, ...]

    @functools.cached_property
    def forward_seconds(self) -> float:
        return sum(unit.forward_seconds for unit in self.units)

    @functools.cached_property
    def plain_seconds(self) -> float:
        """Every unit forward and backward once."""
        return self.forward_seconds + sum(unit.backward_seconds for unit in self.units)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TracedWay(Record):
    """The step as followed under some ``levers`` (none: the plain step), from which rows and recomputation are chosen.

    ``tables``: its units at several rows at a time, most first; the first has the whole batch. ``later_tables``: the
    same for a chunk after the first, which adds its gradients to ``accumulator_bytes`` of sums. In all of them a batch
    on the device is resident as a whole.

    Where there is more than one chunk, each takes ``chunk_seconds`` by itself, and beside it stand ``copied_bytes`` of
    weights that its kernels want in one piece, and ``arriving_row_bytes`` for each row of the next chunk on its way.
    Two passes hold ``output_bytes`` of all rows' outputs and their gradients, and their loss peaks at ``loss_bytes``
    above what is resident. ``optimizer_bytes`` and ``optimizer_seconds``: the optimizer's turn.

    ``host_buffer_bytes``: of each buffer that the forward of the whole batch fills in pinned host memory, and
    ``host_state_bytes`` of each that holds optimizer state there.
    """

    levers: dict[str, dict[str, Any]]
    tables: tuple[UnitTable, ...]
    later_tables: tuple[UnitTable, ...] = ()
    accumulator_bytes: int
    chunk_seconds: float
    copied_bytes: int = 0
    arriving_row_bytes: int = 0
    output_bytes: int = 0
    loss_bytes: int = 0
    optimizer_bytes: int
    optimizer_seconds: float
    host_buffer_bytes: tuple[int, ...] = ()
    host_state_bytes: tuple[int, ...] = ()

    def pinned_bytes(self, *, rows: int) -> int:
        """Pinned host memory at ``rows`` at a time: the allocator rounds every buffer up to a power of two."""
        most = self.tables[0].rows
        sizes = [*(-(-size * rows // most) for size in self.host_buffer_bytes), *self.host_state_bytes]
        return sum(1 << (size - 1).bit_length() for size in sizes)
