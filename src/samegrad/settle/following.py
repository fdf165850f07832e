"""The footprint of a step by following it without running it: on a card that is not at hand, say.

The step is traced on the whole batch and on fewer rows; what it does at any other number of rows lies on lines through
the two. Nothing of the user's changes, and no data is needed: a model on the meta device will do.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from samegrad import trees
from samegrad.declared import DeclaredStep
from samegrad.errors import CannotSplit
from samegrad.exact.aliases import ParameterAliases
from samegrad.exact.batchnorm import has_batchnorm
from samegrad.exact.dataless import has_data
from samegrad.exact.findings import Examination
from samegrad.exact.losses import Form
from samegrad.exact.recomputed import find_blocks
from samegrad.execute.ways import Ways, find_ways
from samegrad.levers import unsuited_levers
from samegrad.levers.recompute import Recompute
from samegrad.measure.census import count_residents
from samegrad.measure.events import Trace
from samegrad.measure.second_step import repeats_itself
from samegrad.measure.target import Target
from samegrad.measure.trace import trace_step
from samegrad.measure.trace_reading import (
    CUDA_BLOCK_BYTES,
    by_module_at,
    find_peak,
    peak_by_phase,
    tensors_at,
    timeline,
    total_flops,
)
from samegrad.records import Category, Counting, Footprint, Origin, PhaseLaw
from samegrad.settle.followed_step import LOOKED_AT_ROWS, FollowedStep, Look, look_at_step
from samegrad.settle.progress import working_on
from samegrad.settle.single_layers import with_blocks
from samegrad.settle.traced_ways import traced_ways
from samegrad.trees import RowLayout
from samegrad.unit_tables import TracedWay

# Operations of an examination that a host does in a few seconds.
_EXAMINED_FLOPS = 4e11
_EXAMINATION_RUNS = 16
_NARROW = ("bfloat16", "float16")


def follow(
    declared: DeclaredStep, aliases: ParameterAliases, batch: Any, target: Target
) -> tuple[FollowedStep, Footprint]:
    """The step, ready to be followed under any plan, and its footprint on ``target``. Raises CannotTrace."""
    layout = declared.layout(batch)
    working_on(f"following the step for {target.card.name}")
    look = look_at_step(declared, batch, layout)
    plain = trace_step(declared, batch)
    ways, examined = _ways(declared, aliases, batch, layout, look, total_flops(plain) / layout.rows)
    step = FollowedStep(declared, aliases, batch, layout, target, ways, look, repeats=repeats_itself(plain))
    if ways.sites is not None:
        plain = step.trace_whole({})
    step = with_blocks(step, plain)
    traced, refusals = traced_ways(step, plain)
    # Levers are asked about the step on the card, wherever the model is.
    unsuited = unsuited_levers(dataclasses.replace(declared, device=torch.device("cuda", 0)))
    # Where rows are apart, an examination does not try blocks, which may run again beside a split too.
    untried = ways.by_rows is not None
    tried = {name: why for name, why in ways.refusals.items() if name != Recompute.name or not untried}
    return step, _footprint(step, plain, traced, tried | refusals | unsuited, examined)


def _ways(
    declared: DeclaredStep, aliases: ParameterAliases, batch: Any, layout: RowLayout, look: Look, row_flops: float
) -> tuple[Ways, bool]:
    """The ways that an examination finds where there is data and time, else those that what was seen allows."""
    there = [*declared.network.parameters(), *(t for t in trees.leaves_of(batch) if isinstance(t, Tensor))]
    rows = min(LOOKED_AT_ROWS, layout.rows)
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


def _footprint(
    step: FollowedStep, plain: Trace, traced: tuple[TracedWay, ...], refusals: dict[str, str], examined: bool
) -> Footprint:
    declared, layout, target, ways = step.declared, step.layout, step.target, step.ways
    reserved = target.reserve(plain)
    shown = target.with_workspaces(plain)
    peak = find_peak(shown, round_to=CUDA_BLOCK_BYTES)
    residents = count_residents(declared)
    by_phase = peak_by_phase(shown, round_to=CUDA_BLOCK_BYTES)
    # What the allocator hands out on top of what was asked for.
    beyond = max(0, reserved.free_running.peak_allocated_bytes - peak.live_bytes)
    if ways.refusal is not None:
        refusals = {"split_rows": ways.refusal.found} | refusals
    if step.batch_stands_on_device:
        refusals = {"host_rows": "the batch is on the model's device already"} | refusals
    seconds = sum(s for o, s in zip(plain.operations, target.seconds_of(plain)) if o.step == 1)
    facts = dict(plain.notes)
    if not examined:
        facts["not examined"] = (
            "rows were taken to be apart where no layer is known to mix them; the step is examined before it first runs"
        )
    for dtype in sorted({operation.dtype for operation in plain.operations if operation.flops}):
        if dtype in _NARROW and dtype not in target.card.flops_per_second:
            facts[dtype] = f"{target.card.name} has no units for it; it runs, slower than its memory suggests"
    if ways.by_rows is not None:
        passes = "one pass" if ways.by_rows.passes == 1 else "two passes"
        facts["loss"] = f"split by rows it takes {passes}: {ways.by_rows.reason}"
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
        by_module=by_module_at(shown, peak),
        at_peak=tensors_at(shown, peak),
        module_classes=plain.module_classes,
        resident_bytes={c: n for c, n in residents.by_category.items() if c is not Category.INPUTS},
        plain_laws=tuple(
            PhaseLaw(phase=p, fixed_bytes=float(n + beyond), per_chunk_row_bytes=0.0, per_batch_row_bytes=0.0)
            for p, n in by_phase.items()
        ),
        traced=traced,
        refusals=refusals,
        facts=facts,
        timeline=timeline(shown),
    )
