"""What a step holds, as measured or predicted, and the laws that predict it at other numbers of rows."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from samegrad.json_record import Record
from samegrad.kinds import Category, Counting, Origin, Phase
from samegrad.unit_tables import TracedWay


@dataclasses.dataclass(frozen=True, kw_only=True)
class PhaseLaw(Record):
    """Bytes live at one moment of a phase: ``fixed + per_chunk_row · rows + per_batch_row · n + per_row_pair · n²``.

    ``rows`` are a chunk's, n the batch's; pairs of rows are those of a loss or a model that compares all with all. A
    phase has as many laws as it has moments that are the largest at some number of rows. Fitted on probes of the real
    step; ``largest_residual_bytes`` is what the fit leaves at the probes.
    """

    phase: Phase
    fixed_bytes: float
    per_chunk_row_bytes: float
    per_batch_row_bytes: float
    largest_residual_bytes: float = 0.0
    per_row_pair_bytes: float = 0.0

    def peak_bytes(self, *, rows: int, batch_rows: int) -> int:
        return math.ceil(self.fixed_bytes + (self.per_chunk_row_bytes * rows + self.kept_bytes(batch_rows)))

    def kept_bytes(self, batch_rows: int) -> float:
        """What is there for the whole batch, however few rows run at a time."""
        return self.per_batch_row_bytes * batch_rows + self.per_row_pair_bytes * batch_rows**2



@dataclasses.dataclass(frozen=True, kw_only=True)
class TimelinePoint(Record):
    """Live bytes by category at one moment of a step; ``module``: what ran then, "" where that is not known."""

    position_fraction: float
    phase: Phase
    live_bytes: dict[Category, int]
    module: str = ""



@dataclasses.dataclass(frozen=True, kw_only=True)
class LiveTensors(Record):
    """Tensors alive at the peak that one operation of one module made: how many, and their bytes together.

    ``module`` and ``operation`` are "" for what stood before the step (parameters, optimizer state, the batch).
    """

    size_bytes: int
    category: Category
    count: int = 1
    module: str = ""
    operation: str = ""
    phase: Phase | None = None



@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant(Record):
    """One way to run parts of the model in chunks, as measured: a lever's name, its knobs but for the rows, its laws.

    ``forwards_per_step``: how often a row is run forward. ``seconds_per_row`` and ``seconds_per_chunk`` as in a
    Footprint.
    """

    lever: str
    knobs: dict[str, Any]
    laws: tuple[PhaseLaw, ...]
    forwards_per_step: float = 2.0
    seconds_per_row: float | None = None
    seconds_per_chunk: float | None = None

    def predicted_seconds(self, *, rows: int, batch_rows: int) -> float | None:
        if self.seconds_per_row is None or self.seconds_per_chunk is None:
            return None
        return self.seconds_per_row * batch_rows + self.seconds_per_chunk * -(-batch_rows // min(rows, batch_rows))



@dataclasses.dataclass(frozen=True, kw_only=True)
class ProbedWay(Record):
    """The step as probed on its device under some ``levers`` that leave its chunks as they are.

    The other fields are those of a Footprint, of the step under these levers. Seconds are those of the plain step, in
    the proportion in which the two were measured in turn.
    """

    levers: dict[str, dict[str, Any]]
    plain_laws: tuple[PhaseLaw, ...]
    laws: tuple[PhaseLaw, ...] = ()
    kept_row_bytes: float | None = None
    seconds_per_row: float | None = None
    seconds_per_chunk: float | None = None



@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadLaws(Record):
    """The linear layer whose logits only a loss takes, and what a step holds that makes them a few at a time.

    ``path``: of the layer. ``positions_per_row``: rows of logits that a row of the batch brings. In ``laws`` a chunk's
    rows are such positions, and the batch's rows those that run at a time.
    """

    path: str
    classes: int
    positions_per_row: float
    laws: tuple[PhaseLaw, ...]



@dataclasses.dataclass(frozen=True, kw_only=True)
class Footprint(Record):
    """What a step holds and how long it takes, at a number of rows at a time.

    ``rows`` of ``batch_rows`` at a time: where they are as many, of the plain step. Every peak, and what is told of it,
    is of that whole step, never of the few rows that a probe ran. ``by_category`` is what is live at the peak,
    ``by_phase`` the peak inside each phase. ``laws`` predict the peak of a split step at other row counts,
    ``plain_laws`` that of the plain step; ``variants`` are the ways to run a model in chunks that cannot be split by
    rows, or its blocks again.
    ``kept_row_bytes``: what a row's graph holds when it is kept from the first of two passes. ``head``: what
    ``chunk_loss`` would change.
    ``probed`` and ``traced``: the step as probed and as followed under levers that leave its chunks as they are, the
    latter for plans that choose unit by unit too. ``host_bytes``: pinned host memory that levers take.
    ``refusals`` maps a lever to why this step cannot take it, ``facts`` holds what the examination found, in words.
    ``resident_bytes`` (parameters, gradients, optimizer
    state, buffers) is the floor under every plan; optimizer state that does not exist yet is predicted.
    ``module_classes``: the class of each module that has only a number for a name, by its path.
    ``steady_cap_bytes``, ``smallest_cap_bytes``, ``by_module`` and ``at_peak`` (what lived then, largest first) are
    absent until they are known.
    """

    device: str
    counting: Counting
    origin: Origin
    basis: str
    rows: int
    batch_rows: int
    peak_allocated_bytes: int
    peak_reserved_bytes: int | None = None
    steady_cap_bytes: int | None = None
    smallest_cap_bytes: int | None = None
    seconds: float | None = None
    forwards_per_step: int = 1
    seconds_per_row: float | None = None
    seconds_per_chunk: float | None = None
    by_category: dict[Category, int] = dataclasses.field(default_factory=dict)
    by_phase: dict[Phase, int] = dataclasses.field(default_factory=dict)
    by_module: dict[str, int] = dataclasses.field(default_factory=dict)
    at_peak: tuple[LiveTensors, ...] = ()
    module_classes: dict[str, str] = dataclasses.field(default_factory=dict)
    resident_bytes: dict[Category, int] = dataclasses.field(default_factory=dict)
    laws: tuple[PhaseLaw, ...] = ()
    plain_laws: tuple[PhaseLaw, ...] = ()
    variants: tuple[Variant, ...] = ()
    head: HeadLaws | None = None
    kept_row_bytes: float | None = None
    probed: tuple[ProbedWay, ...] = ()
    host_bytes: int | None = None
    traced: tuple[TracedWay, ...] = ()
    refusals: dict[str, str] = dataclasses.field(default_factory=dict)
    facts: dict[str, str] = dataclasses.field(default_factory=dict)
    timeline: tuple[TimelinePoint, ...] = ()

    def predicted_peak_bytes(self, *, rows: int) -> int:
        """Peak bytes at ``rows`` at a time, by the laws; the largest phase decides. All rows is the plain step."""
        laws = self.plain_laws if rows >= self.batch_rows else self.laws
        return max(law.peak_bytes(rows=min(rows, self.batch_rows), batch_rows=self.batch_rows) for law in laws)

    def predicted_seconds(self, *, rows: int) -> float | None:
        if self.seconds_per_row is None or self.seconds_per_chunk is None:
            return None
        chunks = -(-self.batch_rows // min(rows, self.batch_rows))
        return self.seconds_per_row * self.batch_rows + self.seconds_per_chunk * chunks
