"""A step as a chain of units, in numbers: what plans are made of that choose block by block. No torch here."""

from __future__ import annotations

import dataclasses
from typing import Any

from samegrad.json_record import Record


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unit(Record):
    """One stretch of a step's forward, a block or the code between two, as the planner sees it. Bytes of all its rows.

    ``name`` is the module's path, "" for code between blocks. ``kept_bytes``: what its forward adds until its backward,
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class UnitTable(Record):
    """The units of a step on ``rows`` rows in forward order, and what is resident while they run."""

    rows: int
    resident_bytes: int
    units: tuple[Unit, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TracedWay(Record):
    """The step as followed under some ``levers`` (none: the plain step), from which rows and recomputation are chosen.

    ``tables``: its units at several rows at a time, most first; the first has the whole batch. ``row_bytes``: what a
    row of the batch holds on the device however few run at a time. ``accumulator_bytes`` stand beside where there is
    more than one chunk, each of which takes ``chunk_seconds`` by itself. ``optimizer_bytes`` and ``optimizer_seconds``:
    the optimizer's turn.
    """

    levers: dict[str, dict[str, Any]]
    tables: tuple[UnitTable, ...]
    row_bytes: int
    accumulator_bytes: int
    chunk_seconds: float
    optimizer_bytes: int
    optimizer_seconds: float
