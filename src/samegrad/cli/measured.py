"""A planned step as measured on its device, and as followed without running it; nothing of the user's changes."""

from __future__ import annotations

import dataclasses
from typing import Any

import samegrad as sg
from samegrad import trees
from samegrad.errors import UsageError
from samegrad.execute.apply import applied, in_force
from samegrad.execute.undone import undone
from samegrad.measure import counters
from samegrad.measure.counting import ByteCounter
from samegrad.measure.events import Trace
from samegrad.measure.probe import probe_plain, probe_split
from samegrad.measure.target import Target
from samegrad.measure.trace import handed_over, in_chunks, plainly, trace_step
from samegrad.measure.trace_reading import (
    CUDA_BLOCK_BYTES,
    by_module_at,
    find_peak,
    peak_by_phase,
    tensors_at,
    timeline,
)
from samegrad.records import Category, Counting, Footprint, Origin

# Enough chunks for the steady state of a long step, few enough to cost less than an epoch.
_MOST_CHUNKS = 8
# A step of more takes longer to follow than it tells: what the later chunks do repeats.
MOST_FOLLOWED_CHUNKS = 64
# Steps whose shortest is the time that is told; the one before them makes the optimizer's state.
_TIMED_STEPS = 2


def measure_real_steps(step: sg.Step, batch: Any, footprint: Footprint) -> Footprint:
    """The planned step measured whole, with its optimizer's turn: a few real steps, all undone. Closes ``step``.

    Without an optimizer the step is measured up to its gradients.
    """
    if step.declared.optimizer is None:
        return measured_footprint(step, batch, footprint)
    rows = max(step.sizes_for(batch))
    counter = ByteCounter(step.declared.device, gradients_of=[step.declared.network], with_timeline=True)
    with undone(step.declared):
        try:
            timed = list(sg.train(step, [batch] * (1 + _TIMED_STEPS)))[1:]
            # No tensor shows what a library keeps; what it takes and gives back inside an operation is not seen.
            counter.stand(counters.kept_workspace_bytes(step.declared.device), Category.WORKSPACES)
            # Counting takes the host's time, so this step is not timed.
            [counted] = sg.train(step, [batch], counter=counter)
        finally:
            step.close()
    whole = step.declared.layout(batch).rows
    peaks = [r.peak_allocated_bytes for r in timed if r.peak_allocated_bytes is not None]
    return dataclasses.replace(
        footprint,
        origin=Origin.MEASURED,
        basis=f"{2 + _TIMED_STEPS} real steps on the whole batch, undone",
        rows=rows,
        batch_rows=whole,
        peak_allocated_bytes=max([counted.peak_allocated_bytes or counter.peak_bytes, *peaks]),
        peak_reserved_bytes=max((r.peak_reserved_bytes for r in timed if r.peak_reserved_bytes), default=None),
        steady_cap_bytes=None,
        smallest_cap_bytes=None,
        seconds=min(result.seconds for result in timed),
        by_category=counter.peak_by_category,
        by_phase=counter.peak_by_phase,
        by_module={},
        at_peak=(),
        timeline=counter.timeline(),
    )


def followed_footprint(step: sg.Step, batch: Any, footprint: Footprint) -> Footprint:
    """The planned step followed without running it, as on its own device. Raises CannotTrace."""
    trace = _followed(step, batch)
    facts = footprint.facts | trace.notes
    target = None
    if footprint.counting is Counting.CUDA_ALLOCATOR:
        try:
            target = Target.at_hand(step.declared.device)
        except UsageError as error:
            facts |= {"reserved": f"not predicted: {error.found}"}
    shown = trace if target is None else target.with_workspaces(trace)
    block = CUDA_BLOCK_BYTES if trace.device == "cuda" else 1
    peak = find_peak(shown, round_to=block)
    followed = dataclasses.replace(
        footprint,
        origin=Origin.PREDICTED,
        basis=f"the planned step followed without running it on {trace.batch_rows} rows",
        rows=max(trace.sizes),
        batch_rows=trace.batch_rows,
        peak_allocated_bytes=peak.live_bytes,
        peak_reserved_bytes=None,
        steady_cap_bytes=None,
        smallest_cap_bytes=None,
        by_category={category: amount for category, amount in peak.by_category.items() if amount},
        by_phase=peak_by_phase(shown, round_to=block),
        by_module=by_module_at(shown, peak),
        at_peak=tensors_at(shown, peak),
        module_classes=trace.module_classes,
        timeline=timeline(shown),
        facts=facts,
    )
    return followed if target is None else _reserved(followed, trace, target)


def _reserved(followed: Footprint, trace: Trace, target: Target) -> Footprint:
    """With what the allocator is predicted to reserve on ``target``."""
    reserved = target.reserve(trace)
    return dataclasses.replace(
        followed,
        basis=f"{followed.basis} ({target.in_words()})",
        peak_allocated_bytes=reserved.free_running.peak_allocated_bytes,
        peak_reserved_bytes=reserved.free_running.peak_reserved_bytes,
        steady_cap_bytes=reserved.steady.cap_bytes,
        smallest_cap_bytes=reserved.smallest.cap_bytes,
    )


def _followed(step: sg.Step, batch: Any) -> Trace:
    layout, device = step.declared.layout(batch), step.declared.device.type
    sizes, draws = step.sizes_for(batch), step.draws_for(batch, layout)
    assert step.plan is not None
    with applied(step.plan, step.declared, layout.rows) as execution:
        whole = execution.runs_whole
    # Examined first: what levers put on the model is not the user's.
    split = None if whole else step.split_for(batch, layout)
    undoable = step.whole_for(batch, layout)
    with in_force(step.plan, step.declared, layout.rows) as running:
        if split is None:
            run = plainly(draws) if undoable is None else handed_over(undoable)
            return trace_step(running.declared, batch, device=device, run=run)
        chunked = dataclasses.replace(split, declared=running.declared)
        return trace_step(running.declared, batch, device=device, run=in_chunks(chunked, sizes), sizes=sizes)


def measured_footprint(step: sg.Step, batch: Any, footprint: Footprint) -> Footprint:
    """The planned step measured on ``batch`` (at most its first chunks), up to the optimizer's turn.

    Nothing of the user's changes, so optimizer state that does not exist yet is not in it: measure after a step.
    """
    layout = step.declared.layout(batch)
    sizes = step.sizes_for(batch)
    assert step.plan is not None
    with applied(step.plan, step.declared, layout.rows) as execution:
        # What sees the whole batch is measured on it.
        most = layout.rows if execution.scheme is not None else _MOST_CHUNKS * max(sizes)
    measured_rows = min(layout.rows, most)
    whole = measured_rows == layout.rows
    if execution.runs_whole:
        draws = step.draws_for(batch, layout)
        with in_force(step.plan, step.declared, layout.rows) as running:
            probe = probe_plain(running.declared, batch, layout, batch_rows=layout.rows, draws=draws)
    else:
        shown = sizes if whole else trees.even_sizes(measured_rows, max(sizes))
        chunked = step.split_for(batch, layout)
        with in_force(step.plan, step.declared, layout.rows) as running:
            probe = probe_split(dataclasses.replace(chunked, declared=running.declared), batch, layout, shown)
    return dataclasses.replace(
        footprint,
        origin=Origin.MEASURED,
        basis="the planned step on the whole batch" if whole else f"the planned step on {measured_rows} rows",
        rows=max(sizes),
        batch_rows=measured_rows,
        peak_allocated_bytes=probe.peak_bytes,
        peak_reserved_bytes=probe.reserved_bytes,
        seconds=probe.seconds,
        by_category=probe.by_category,
        by_phase=probe.by_phase,
        timeline=probe.timeline,
    )
