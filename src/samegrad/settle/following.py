"""The footprint of a step by following it without running it: on a card that is not at hand, say.

The step is traced on the whole batch and on fewer rows; what it does at any other number of rows lies on lines through
the two. Nothing of the user's changes, and no data is needed: a model on the meta device will do.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from samegrad import trees
from samegrad.data.prefetch import stream_chunks
from samegrad.declared import DeclaredStep, checked_loss
from samegrad.errors import BadInput, CannotSplit
from samegrad.exact import losses
from samegrad.exact.aliases import ParameterAliases
from samegrad.exact.batchnorm import has_batchnorm
from samegrad.exact.dataless import has_data
from samegrad.exact.find_head import Head, find_head
from samegrad.exact.findings import Examination
from samegrad.exact.losses import Form, LossForm
from samegrad.exact.recomputed import find_blocks
from samegrad.exact.split import sliced_chunks
from samegrad.exact.step_draws import StepDraws
from samegrad.exact.unit_chain import UnitChain, find_units
from samegrad.execute.apply import chunked_step, in_force
from samegrad.execute.ways import Ways, find_ways
from samegrad.levers import unsuited_levers
from samegrad.levers.chunk_loss import ChunkLoss
from samegrad.levers.recompute import Recompute
from samegrad.measure.census import count_residents
from samegrad.measure.events import Trace
from samegrad.measure.target import Target
from samegrad.measure.trace import in_chunks, look_at, plainly, trace_step
from samegrad.measure.trace_laws import trace_at
from samegrad.measure.trace_reading import (
    CUDA_BLOCK_BYTES,
    by_module_at,
    find_peak,
    peak_by_phase,
    tensors_at,
    timeline,
    total_flops,
)
from samegrad.measure.units import units_of
from samegrad.records import Category, Counting, Exactness, Footprint, Origin, Phase, PhaseLaw, Plan
from samegrad.trees import RowLayout
from samegrad.unit_tables import TracedWay, UnitTable
from samegrad.units import format_bytes

# Rows that the second trace has, of the batch's.
_FEWER = 4
# Rows that a look at the step has.
_LOOKED_AT_ROWS = 8
# Numbers of chunks that are planned for; between them time hardly differs, and few bytes.
_CHUNK_COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
# And where every number of rows is a trace of its own.
_TRACED_CHUNK_COUNTS = (1, 2, 4, 8)
# Parts that the positions of a batch's logits are cut into, and the fewest of a part: fewer would save few bytes.
_LOGIT_PARTS = (4, 32)
_FEWEST_POSITIONS = 512
# Chunks of a planned step that are followed: what the later ones do repeats.
_FOLLOWED_CHUNKS = 4
# Operations of an examination that a host does in a few seconds.
_EXAMINED_FLOPS = 4e11
_EXAMINATION_RUNS = 16
# Of the plain step's peak, from which on logits are worth traces of their own.
_WORTH_FRACTION = 0.05


@dataclasses.dataclass(frozen=True)
class Look:
    """What one look at the step without data shows: the loss's form, the units of the model, and its head."""

    form: LossForm
    units: UnitChain
    head: Head | str


@dataclasses.dataclass(frozen=True)
class FollowedStep:
    """A step that is planned for ``target``. ``ways``: to run it in chunks, as examined or, without data, assumed."""

    declared: DeclaredStep
    aliases: ParameterAliases
    batch: Any
    layout: RowLayout
    target: Target
    ways: Ways

    def trace_plainly(self) -> Trace:
        return self.trace(_plan({}, self.layout.rows))

    def trace(self, plan: Plan) -> Trace:
        """The step under ``plan``, its first chunks where it has many alike. Raises CannotTrace."""
        with in_force(plan, self.declared, self.layout.rows) as execution:
            if execution.runs_whole or execution.sizes is None:
                return trace_step(execution.declared, self.batch, run=plainly(StepDraws(self.ways.sites)))
            sizes = self.followed_sizes(execution.sizes, whole=execution.scheme is not None)
            batch = trees.first_rows(self.batch, self.layout, sum(sizes))
            step = chunked_step(execution, self.aliases, self.ways, stream_chunks)
            return trace_step(execution.declared, batch, run=in_chunks(step, sizes), sizes=sizes)

    def followed_sizes(self, sizes: Sequence[int], *, whole: bool) -> tuple[int, ...]:
        """The chunks that are followed: all of few, and the first and last of many alike."""
        two_passes = self.ways.by_rows is not None and self.ways.by_rows.passes == 2
        if whole or two_passes or len(sizes) <= _FOLLOWED_CHUNKS + 1:
            return tuple(sizes)
        return (*sizes[:_FOLLOWED_CHUNKS], sizes[-1])

    def unfollowed_bytes(self, trace: Trace) -> int:
        """What stands on the device of rows that were not followed."""
        beside = self.layout.rows - trace.batch_rows
        return beside * trees.row_bytes(self.batch, self.layout) if stands_on_device(self.declared, self.batch) else 0


def stands_on_device(declared: DeclaredStep, batch: Any) -> bool:
    """Whether the whole batch lies on the device that is planned for: where the model is, but for one on the CPU."""
    leaves = trees.leaves_of(batch)
    return declared.device.type != "cpu" and any(isinstance(t, Tensor) and t.device == declared.device for t in leaves)


def follow(
    declared: DeclaredStep, aliases: ParameterAliases, batch: Any, target: Target
) -> tuple[FollowedStep, Footprint]:
    """The step, ready to be followed under any plan, and its footprint on ``target``. Raises CannotTrace."""
    layout = declared.layout(batch)
    look = look_at_step(declared, batch, layout)
    plain = trace_step(declared, batch)
    ways, examined = _ways(declared, aliases, batch, layout, look, total_flops(plain) / layout.rows)
    step = FollowedStep(declared, aliases, batch, layout, target, ways)
    if ways.sites is not None:
        plain = step.trace_plainly()
    traced, refusals = traced_ways(step, plain, look)
    # Levers are asked about the step on the card, wherever the model is.
    unsuited = unsuited_levers(dataclasses.replace(declared, device=torch.device("cuda", 0)))
    return step, _footprint(step, plain, traced, ways.refusals | refusals | unsuited, examined)


def look_at_step(declared: DeclaredStep, batch: Any, layout: RowLayout) -> Look:
    """A look at a few rows of the step. Raises CannotTrace."""
    return look_at(declared, trees.first_rows(batch, layout, min(_LOOKED_AT_ROWS, layout.rows)), _look)


def _look(declared: DeclaredStep, rows: Any) -> Look:
    # A batch may start on the host; a chunk of it reaches the step on its device.
    [few] = sliced_chunks(rows, declared.layout(rows), [declared.layout(rows).rows], declared.device)
    outputs = declared.forward(declared.network, few)
    leaves, spec = trees.flatten(outputs)
    leaves = [
        leaf.detach().requires_grad_() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf
        for leaf in leaves
    ]
    live = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
    loss = checked_loss(declared.loss_fn(trees.unflatten(leaves, spec), few))
    layout = declared.layout(few)
    form = losses.recognise(loss, live, layout.rows)
    del outputs, leaves, live, loss
    try:
        head: Head | str = find_head(declared, few, layout)
    except CannotSplit as refused:
        head = refused.found
    return Look(form, find_units(declared, few), head)


def _ways(
    declared: DeclaredStep, aliases: ParameterAliases, batch: Any, layout: RowLayout, look: Look, row_flops: float
) -> tuple[Ways, bool]:
    """The ways that an examination finds where there is data and time, else those that what was seen allows."""
    there = [*declared.network.parameters(), *(t for t in trees.leaves_of(batch) if isinstance(t, Tensor))]
    rows = min(_LOOKED_AT_ROWS, layout.rows)
    if all(map(has_data, there)) and row_flops * rows * _EXAMINATION_RUNS < _EXAMINED_FLOPS and layout.rows > 1:
        return find_ways(declared, aliases, batch, layout), True
    if has_batchnorm(declared.network):
        refusal = CannotSplit(
            asked="split the rows of a step",
            found="BatchNorm in training mode normalises with the statistics of all rows",
            do="let blocks run again in backward, or use a normalisation that treats rows alone",
        )
        blocks = find_blocks(declared.network)
        return Ways(None, refusal, (Recompute([*blocks]),) if blocks else ()), False
    form = look.form.form
    if declared.normalise is not None:
        return Ways(Examination(Form.ROW_SUM, "declared by normalise=", declared=True)), False
    return Ways(Examination(form, look.form.reason)), False


def traced_ways(step: FollowedStep, plain: Trace, look: Look) -> tuple[tuple[TracedWay, ...], dict[str, str]]:
    """The step followed plainly and with the loss of its head in chunks, and why levers were not followed."""
    blocks = [unit.paths[0] for unit in look.units.units if len(unit.paths) == 1 and unit.has_parts]
    refusals = {} if blocks else {Recompute.name: look.units.reason or "single layers keep little inside"}
    found = [_way(step, {}, dict(_plain_traces(step, plain)), blocks)]
    if isinstance(look.head, str):
        return tuple(found), refusals | {ChunkLoss.name: look.head}
    parts = _positions(look.head, step, find_peak(plain).live_bytes)
    if isinstance(parts, str):
        return tuple(found), refusals | {ChunkLoss.name: parts}
    for positions in parts:
        levers = {ChunkLoss.name: {"head": look.head.path, "rows": positions}}
        found.append(_way(step, levers, dict(_traces_with(step, levers)), blocks))
    return tuple(found), refusals


def _positions(head: Head, step: FollowedStep, peak_bytes: int) -> list[int] | str:
    """Positions of logits at a time that are worth a trace, or why none are."""
    positions = head.positions_per_row * step.layout.rows
    logits_bytes = int(positions * head.classes * torch.float32.itemsize)
    if logits_bytes < _WORTH_FRACTION * peak_bytes:
        return f"not needed: the logits of {head.path} are {format_bytes(logits_bytes)} of {format_bytes(peak_bytes)}"
    parts = {1 << (int(positions) // n).bit_length() - 1 for n in _LOGIT_PARTS if positions // n >= _FEWEST_POSITIONS}
    return sorted(parts, reverse=True) or f"{head.path}: its {positions:g} rows of logits are no more than a chunk has"


def _row_counts(batch_rows: int, chunk_counts: Sequence[int]) -> list[int]:
    return list(dict.fromkeys(-(-batch_rows // n) for n in chunk_counts if n <= batch_rows))


def _plain_traces(step: FollowedStep, plain: Trace) -> Iterator[tuple[int, Trace]]:
    """The plain step on the rows of a chunk, for each number of rows that is planned for."""
    batch_rows = step.layout.rows
    yield batch_rows, plain
    low_rows = max(1, batch_rows // _FEWER)
    if low_rows == batch_rows:
        return
    low = step_on(step, {}, low_rows)
    yield low_rows, low
    for rows in _row_counts(batch_rows, _CHUNK_COUNTS):
        if rows not in (batch_rows, low_rows):
            try:
                yield rows, trace_at(low, plain, rows)
            except BadInput:
                # It does something else on other rows, so each number is a trace of its own.
                if rows in _row_counts(batch_rows, _TRACED_CHUNK_COUNTS):
                    yield rows, step_on(step, {}, rows)


def _traces_with(step: FollowedStep, levers: dict[str, dict[str, Any]]) -> Iterator[tuple[int, Trace]]:
    for rows in _row_counts(step.layout.rows, _TRACED_CHUNK_COUNTS):
        yield rows, step_on(step, levers, rows)


def step_on(step: FollowedStep, levers: dict[str, dict[str, Any]], rows: int) -> Trace:
    """The whole step under ``levers`` on its first ``rows`` rows."""
    batch = trees.first_rows(step.batch, step.layout, rows)
    layout = dataclasses.replace(step.layout, rows=rows)
    return dataclasses.replace(step, batch=batch, layout=layout).trace(_plan(levers, rows))


def _plan(levers: dict[str, dict[str, Any]], rows: int) -> Plan:
    return Plan(levers=levers, exactness=Exactness.SAME_SUM, batch_rows=rows)


def _way(
    step: FollowedStep, levers: dict[str, dict[str, Any]], traces: dict[int, Trace], blocks: Sequence[str]
) -> TracedWay:
    tables: list[UnitTable] = []
    for rows in sorted(traces, reverse=True):
        seconds = step.target.seconds_of(traces[rows])
        table = units_of(traces[rows], blocks, seconds, round_to_bytes=CUDA_BLOCK_BYTES)
        tables.append(dataclasses.replace(table, rows=rows))
    whole = traces[step.layout.rows]
    whole_seconds = step.target.seconds_of(whole)
    gradients = sum(p.nbytes for part in step.declared.modules for p in part.parameters() if p.requires_grad)
    last = max(operation.step for operation in whole.operations)
    return TracedWay(
        levers=levers,
        tables=tuple(tables),
        row_bytes=trees.row_bytes(step.batch, step.layout) if stands_on_device(step.declared, step.batch) else 0,
        accumulator_bytes=gradients,
        chunk_seconds=_folding_seconds(step, gradients),
        optimizer_bytes=peak_by_phase(whole, round_to=CUDA_BLOCK_BYTES).get(Phase.OPTIMIZER, 0),
        optimizer_seconds=sum(
            seconds
            for operation, seconds in zip(whole.operations, whole_seconds)
            if operation.step == last and operation.phase is Phase.OPTIMIZER
        ),
    )


def _folding_seconds(step: FollowedStep, gradient_bytes: int) -> float:
    """What adding a chunk's gradients to the sums takes: read twice, written once, a launch each."""
    launches = sum(p.requires_grad for part in step.declared.modules for p in part.parameters())
    calibration = step.target.calibration
    moving = 3 * gradient_bytes / step.target.card.bandwidth_bytes_per_second
    return max(moving, launches * calibration.launch_seconds)


def _footprint(
    step: FollowedStep, plain: Trace, traced: tuple[TracedWay, ...], refusals: dict[str, str], examined: bool
) -> Footprint:
    declared, layout, target, ways = step.declared, step.layout, step.target, step.ways
    reserved = target.reserve(plain)
    peak = find_peak(plain, round_to=CUDA_BLOCK_BYTES)
    residents = count_residents(declared)
    by_phase = peak_by_phase(plain, round_to=CUDA_BLOCK_BYTES)
    # What is not a tensor, on top of what is.
    beyond = max(0, reserved.free_running.peak_allocated_bytes - peak.live_bytes)
    if ways.refusal is not None:
        refusals = {"split_rows": ways.refusal.found} | refusals
    if stands_on_device(declared, step.batch):
        refusals = {"host_rows": "the batch is on the model's device already"} | refusals
    seconds = sum(s for o, s in zip(plain.operations, target.seconds_of(plain)) if o.step == 1)
    facts = dict(plain.notes)
    if not examined:
        facts["not examined"] = (
            "rows were taken to be apart where no layer is known to mix them; the step is examined before it first runs"
        )
    if ways.by_rows is not None:
        facts["loss"] = f"{ways.by_rows.passes} pass(es): {ways.by_rows.reason}"
    return Footprint(
        device=target.card.name,
        counting=Counting.CUDA_ALLOCATOR,
        origin=Origin.PREDICTED,
        basis=f"the step followed without running it on {layout.rows} rows ({target.in_words()})",
        rows=layout.rows,
        batch_rows=layout.rows,
        peak_allocated_bytes=reserved.free_running.peak_allocated_bytes,
        peak_reserved_bytes=reserved.free_running.peak_reserved_bytes,
        steady_cap_bytes=reserved.steady.cap_bytes,
        smallest_cap_bytes=reserved.smallest.cap_bytes,
        seconds=seconds,
        forwards_per_step=ways.by_rows.passes if ways.by_rows is not None else 1,
        seconds_per_row=seconds / layout.rows,
        seconds_per_chunk=0.0,
        by_category={c: n for c, n in peak.by_category.items() if n},
        by_phase=by_phase,
        by_module=by_module_at(plain, peak),
        at_peak=tensors_at(plain, peak),
        resident_bytes={c: n for c, n in residents.by_category.items() if c is not Category.INPUTS},
        plain_laws=tuple(
            PhaseLaw(phase=p, fixed_bytes=float(n + beyond), per_chunk_row_bytes=0.0, per_batch_row_bytes=0.0)
            for p, n in by_phase.items()
        ),
        traced=traced,
        refusals=refusals,
        facts=facts,
        timeline=timeline(plain),
    )
