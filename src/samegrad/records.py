"""The nouns between stages: frozen records that go to JSON and come back equal. No torch here.

    DeclaredStep + Budget → Footprint → Plans (a ladder) → Plan → StepResult → Verdict → report

Amounts are bytes, seconds and rows, and every field's name says which. A field that could not be measured is
None, never filled with something similar. A number that was not measured belongs to a record whose ``origin`` is
``Origin.PREDICTED``; both kinds are kept and shown side by side.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from samegrad.json_record import Record
from samegrad.kinds import Category, Counting, Exactness, KnobOrigin, Origin, Phase, Same
from samegrad.unit_tables import TracedWay

__all__ = [
    "Budget", "Category", "Check", "Counting", "Departure", "Exactness", "Footprint", "HeadLaws", "KnobOrigin",
    "Origin", "Phase", "PhaseLaw", "Plan", "ProbedWay", "Same", "StepResult", "TimelinePoint", "Variant", "Verdict",
]  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget(Record):
    """Bytes a step may hold on one device, and where that number was taken from.

    ``counting``: on CUDA what this process's allocator reserves, on the CPU counted tensor bytes.
    ``source``: "--budget 6GiB", or what was free and how that was read.
    """

    total_bytes: int
    device: str
    counting: Counting
    source: str
    host_bytes: int | None = None


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

    ``rows`` of ``batch_rows`` at a time. ``by_category`` is what is live at the peak, ``by_phase`` the peak inside
    each phase. ``laws`` predict the peak of a split step at other row counts, ``plain_laws`` that of the plain step;
    ``variants`` are the ways to run a model in chunks that cannot be split by rows. ``kept_row_bytes``: what a row's
    graph holds when it is kept from the first of two passes. ``head``: what ``chunk_loss`` would change.
    ``probed`` and ``traced``: the step as probed and as followed under levers that leave its chunks as they are, the
    latter for plans that choose unit by unit too. ``host_bytes``: pinned host memory that levers take.
    ``refusals`` maps a lever to why this step cannot take it, ``facts`` holds what the examination found, in words.
    ``resident_bytes`` (parameters, gradients, optimizer
    state, buffers) is the floor under every plan; optimizer state that does not exist yet is predicted.
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan(Record):
    """How a step is run: ``levers`` maps a lever's name to its knobs. A saved plan is a plan re-applied.

    ``knob_origins`` maps ``"lever.knob"`` to who set it; ``reasons`` says in plain words why each lever was taken,
    refused or not needed. ``signature`` is the shape of the batch and the model the plan was made for.
    """

    levers: dict[str, dict[str, Any]]
    exactness: Exactness
    batch_rows: int
    budget: Budget | None = None
    predicted_peak_bytes: int | None = None
    predicted_seconds: float | None = None
    knob_origins: dict[str, KnobOrigin] = dataclasses.field(default_factory=dict)
    reasons: dict[str, str] = dataclasses.field(default_factory=dict)
    signature: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrontPoint(Record):
    """The fastest plan within ``budget_bytes``, which is the least that this plan needs, and its seconds a step."""

    budget_bytes: int
    seconds: float
    plan: Plan


@dataclasses.dataclass(frozen=True, kw_only=True)
class Front(Record):
    """Budgets against step times: the plans that no other one beats in both, fastest first, and what they rest on.

    ``left_out``: plans that could not be judged, each with the reason.
    """

    device: str
    counting: Counting
    basis: str
    batch_rows: int
    points: tuple[FrontPoint, ...]
    left_out: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recovery(Record):
    """One attempt of a step that ran out of memory and was undone, and the plan that ran the same batch after it.

    ``place``: phase, module and line where memory ran out, as far as they are known, and ``found`` the error's first
    line. ``seconds`` went into the attempt and into undoing it. ``left`` and ``taken`` are the levers of both plans,
    with the peaks that they were predicted to need. ``rank``: the rank that ran out, None where there is only one.
    """

    place: str
    found: str
    seconds: float
    left: dict[str, dict[str, Any]]
    taken: dict[str, dict[str, Any]]
    left_predicted_bytes: int | None = None
    taken_predicted_bytes: int | None = None
    rank: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepResult(Record):
    """One optimizer step: its loss, time and memory. Peaks are absent where nothing was counting.

    ``allocator_retries``: how often in this step the allocator had to empty its cache and ask again; a step that fits
    does so never. ``driver_process_bytes``: what the driver says this process holds, context and libraries included.
    ``recoveries``: the attempts that ran out of memory before the one that counts.
    """

    index: int
    loss: float
    seconds: float
    batch_rows: int
    grad_norm: float | None = None
    allocated_bytes: int | None = None
    reserved_bytes: int | None = None
    peak_allocated_bytes: int | None = None
    peak_reserved_bytes: int | None = None
    allocator_retries: int | None = None
    driver_process_bytes: int | None = None
    recoveries: tuple[Recovery, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check(Record):
    """One comparison of a verification: the largest error found, the error the contract allows, and where.

    Errors are relative to the scale the contract names; ``passed`` is ``error <= allowed``. ``tier`` of the contract:
    0 bit for bit, 1 the same function (float64 or float32), 2 directly in the dtype that runs, 3 no further from
    float64 than the plain step is.
    """

    name: str
    passed: bool
    error: float
    allowed: float
    worst: str = ""
    detail: str = ""
    tier: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Departure(Record):
    """How far a planned step is from the declared one where it rounds otherwise: what that costs, not an error.

    ``gradient_norm_fraction``: the norm of the difference of all gradients, as a fraction of the declared step's.
    ``loss_fraction``: the same of the loss. ``levers`` are those that round.
    """

    levers: tuple[str, ...]
    gradient_norm_fraction: float
    loss_fraction: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict(Record):
    """Whether the planned step's gradients, loss and buffers are those of the plain step.

    ``reference`` names what the planned step was compared with, on ``rows_checked`` of ``batch_rows`` rows.
    ``dtype`` is the narrowest that the step's gradients pass through, ``compared_dtype`` the one in which
    ``max_relative_error`` was found. UNPROVEN means that only a low precision could be compared, which proves nothing
    by itself; ``narrowed_by`` is what keeps the step from being compared in float64, where something does. ``fault``:
    where the step differs, which lever and which module, as far as that could be found.

    ``asked`` is how exact the plan is, its weakest lever's; ``found`` how exact it proved on the rows compared, None
    where it is not proven. ``departure``, where the plan rounds otherwise than declared: the answer is then about
    ``reference``, which rounds so too, and this is how far the declared step is.
    """

    answer: Same
    reference: str
    rows_checked: int
    batch_rows: int
    dtype: str
    compared_dtype: str
    max_relative_error: float
    worst_parameter: str
    parameters_checked: int
    buffers_checked: int
    checks: tuple[Check, ...] = ()
    seconds: float | None = None
    fault: str = ""
    narrowed_by: str = ""
    asked: Exactness | None = None
    found: Exactness | None = None
    departure: Departure | None = None

    @property
    def same(self) -> bool:
        return self.answer is Same.SAME

    @property
    def tiers(self) -> tuple[int, ...]:
        """The tiers of the contract that were compared, in order."""
        return tuple(sorted({check.tier for check in self.checks if check.tier is not None}))
