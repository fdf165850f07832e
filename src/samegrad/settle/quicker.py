"""Can the chunks of a settled plan be compiled, captured and replayed, or convolve otherwise, and is that quicker?

What a compiler keeps and how fast its kernels are is known when it has compiled; so each candidate is measured as the
ladder measures its rungs, under the same cap, and taken only where it fits and wins. With fewer bytes a row, more rows
fit at a time: rows are searched from those of the plan, by a line through what was measured and what stands under
every plan. Compilation is paid once, so it is tried only where it is known how many steps there will be, and taken
where they pay it back. A large head's loss runs in chunks then: logits are most of what its compiled step would hold.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

from samegrad.data.prefetch import stream_chunks
from samegrad.declared import DeclaredStep
from samegrad.errors import CannotSplit
from samegrad.exact.aliases import ParameterAliases
from samegrad.exact.step_draws import StepDraws
from samegrad.execute.apply import applied, chunked_step
from samegrad.levers import find_levers
from samegrad.levers.chunk_loss import ChunkLoss
from samegrad.levers.compile import Compile
from samegrad.levers.convolution_algorithms import ConvolutionAlgorithms
from samegrad.levers.expandable_segments import ExpandableSegments
from samegrad.levers.graphs import Graphs
from samegrad.levers.layout import Layout
from samegrad.levers.recompute import Recompute
from samegrad.measure.probe import Rung, measure_whole
from samegrad.measure.within_memory import WithinMemory
from samegrad.plan.options import Options
from samegrad.records import Budget, Counting, Exactness, KnobOrigin, Plan
from samegrad.settle.again_ways import blocks_of
from samegrad.settle.candidates import TRIED_LEVERS, Search, Tried
from samegrad.settle.probing import Measurement
from samegrad.units import format_bytes, format_seconds

# A plan that is no faster than this fraction of the settled one is not worth its warm-up.
_WORTH_FRACTION = 0.97
# Each size of chunk that is tried is compiled anew; one more where none has fitted yet.
_MOST_ROWS_TRIED = 2
# Logits of a chunk of a head's loss, compiled: they alone are held, 256 MiB of them in bfloat16.
_HEAD_LOGITS = 2**27
# Below this a line through one measurement is no promise.
_ROOM_FRACTION = 0.97
_NO_FASTER = "not needed: measured, and no faster within the budget"
_NONE_FITS = "refused: measured, and the budget holds none of it"


def quicker_plan(
    declared: DeclaredStep,
    aliases: ParameterAliases,
    measurement: Measurement,
    batch: Any,
    settled: Plan,
    *,
    budget: Budget,
    options: Options,
) -> Plan:
    """``settled``, or the same with its chunks captured or compiled where that was measured to fit and to be faster.

    Its reasons say what was tried. Nothing of the user's changes.
    """
    search = Search(declared, aliases, measurement, batch, budget)
    if budget.counting is not Counting.CUDA_ALLOCATOR:
        return _told(settled, search)
    chunks_are_work = not _refused(settled, search)
    laid_out, convolves = (_may_be_tried(lever, search, options) for lever in (Layout, ConvolutionAlgorithms))
    before = _before(settled, search) if chunks_are_work or laid_out or convolves else None
    if before is None:
        return _told(settled, search)
    best = Tried(settled, before, 0.0)
    # Rows in another layout are what is compiled and captured then.
    if laid_out and Layout.name not in settled.levers:
        best = _with_kernels(Layout.name, best, search, options)
    if chunks_are_work:
        for candidate in _candidates(best.plan, search, options):
            if _pays(candidate, best, options):
                best = candidate
    if convolves:
        best = _with_kernels(ConvolutionAlgorithms.name, best, search, options)
    if Graphs.name not in best.plan.levers:
        search.forget_captures()
    return _told(_as_measured(best, settled, before), search)


def _may_be_tried(lever: type[Layout | ConvolutionAlgorithms], search: Search, options: Options) -> bool:
    """Whether there are convolutions that may take other kernels; the reason is kept where they may not."""
    if options.allow < lever.exactness:
        search.reasons[lever.name] = f"not allowed: {lever.exactness.explained()} ({lever.exactness.name})"
        return False
    return lever.name not in search.measurement.footprint.refusals


def _with_kernels(name: str, best: Tried, search: Search, options: Options) -> Tried:
    """``best``, or the same by the other kernels of the lever ``name``, where that fits and is faster."""
    found = search.measured(_with(best.plan, {name: {}}))
    if found is None:
        search.reasons.setdefault(name, _NONE_FITS)
        return best
    found = dataclasses.replace(found, once_seconds=found.once_seconds + best.once_seconds)
    if _pays(found, best, options):
        return found
    search.reasons[name] = _NO_FASTER
    return best


def _refused(settled: Plan, search: Search) -> bool:
    """Whether chunks of ``settled`` are no work that can be captured; the reason is kept."""
    layout = search.declared.layout(search.batch)
    plan = _with(settled, {Graphs.name: {}})
    try:
        with applied(plan, search.declared, layout.rows) as execution:
            chunked_step(execution, search.aliases, search.measurement.ways, stream_chunks)
    except CannotSplit as refused:
        search.reasons |= dict.fromkeys((Compile.name, Graphs.name), f"refused: {refused.found}")
        return True
    return False


def _before(settled: Plan, search: Search) -> Rung | None:
    """The settled plan's own time: measured already where it runs in chunks."""
    if settled.levers and settled.predicted_seconds is not None:
        return Rung(settled.predicted_peak_bytes or 0, settled.predicted_seconds)
    layout, sites = search.declared.layout(search.batch), search.measurement.ways.sites
    return measure_whole(
        search.declared, search.batch, layout, StepDraws(sites), turn=search.measurement.turn
    )


def _candidates(settled: Plan, search: Search, options: Options) -> Iterator[Tried]:
    captured = search.measured(_with(_in_even_chunks(settled, options), {Graphs.name: {}}))
    if captured is not None:
        yield captured
    if options.allow < Compile.exactness:
        search.reasons[Compile.name] = f"not allowed: {Compile.exactness.explained()} ({Compile.exactness.name})"
    elif options.expected_steps is None:
        search.reasons[Compile.name] = (
            "not tried: compiling costs seconds to minutes, and how many steps would pay it back is not known; "
            "say expected_steps="
        )
    else:
        yield from _compiled(settled, search, options)


def _compiled(settled: Plan, search: Search, options: Options) -> Iterator[Tried]:
    """Compiled chunks; a model that works on its logits keeps them whole."""
    head = _head(search)
    yield from _compiled_beside(head, settled, search, options)
    if head and search.reasons.pop(Compile.name, None) is not None:
        yield from _compiled_beside({}, settled, search, options)


def _compiled_beside(
    head: dict[str, dict[str, Any]], settled: Plan, search: Search, options: Options
) -> Iterator[Tried]:
    """Compiled chunks, with blocks run again and without; of each, those with the most rows also captured."""
    again = _again(search)
    for levers in (head, head | again) if again else (head,):
        found = []
        for one in _by_rows(settled, levers, search, pinned=options.rows is not None):
            yield one
            found.append(one)
        if Compile.name in search.reasons:
            return
        yield from _captured(found, search)
        if any(_rows_of(one.plan) == settled.batch_rows for one in found):
            # All rows at once, and nothing twice: running blocks again can only be slower.
            return


def _captured(compiled: list[Tried], search: Search) -> Iterator[Tried]:
    """The one with the most rows that fits when it is captured: without launches, more at a time are no slower.

    A pool of its own holds more than what Python would need, so that it may be one with fewer rows.
    """
    for one in sorted(compiled, key=lambda one: _rows_of(one.plan), reverse=True):
        captured = search.measured(_with(one.plan, {Graphs.name: {}}))
        if captured is not None:
            # What was compiled a moment ago is captured; a new process pays for it again.
            yield dataclasses.replace(captured, once_seconds=captured.once_seconds + one.once_seconds)
            return


def _head(search: Search) -> dict[str, dict[str, Any]]:
    """The lever that runs the loss of a large head in chunks, where there is one."""
    head = search.measurement.footprint.head
    if head is None:
        return {}
    positions = max(ChunkLoss.fewest_positions, 1 << (_HEAD_LOGITS // head.classes).bit_length() - 1)
    return {ChunkLoss.name: {"head": head.path, "rows": positions}}


def _in_even_chunks(settled: Plan, options: Options) -> Plan:
    """``settled`` in chunks of one size, so that one graph serves all of them; rows that somebody pinned stay."""
    rows = _even(settled.batch_rows, _rows_of(settled))
    if "split_rows" not in settled.levers or options.rows is not None:
        return settled
    return dataclasses.replace(
        settled, levers=settled.levers | {"split_rows": settled.levers["split_rows"] | {"rows": rows}}
    )


def _again(search: Search) -> dict[str, dict[str, Any]]:
    """Every block of the model run again by itself, where it has blocks."""
    # Where there are none or memory runs out, the settled plan stands all the same.
    with WithinMemory(search.declared), contextlib.suppress(CannotSplit):
        return {Recompute.name: {"blocks": blocks_of(search.declared, search.batch)}}
    return {}


def _by_rows(
    settled: Plan, levers: dict[str, dict[str, Any]], search: Search, *, pinned: bool
) -> Iterator[Tried]:
    """From the rows of the settled plan to as many as a line through what was measured puts within the budget."""
    rows, tried, fitted = _rows_of(settled), set[int](), 0
    while rows not in tried and len(tried) < _MOST_ROWS_TRIED + (fitted == 0):
        tried.add(rows)
        found = search.measured(_compiled_plan(settled, levers, rows))
        if found is not None:
            fitted += 1
            yield found
        if pinned or Compile.name in search.reasons:
            return
        batch_rows = settled.batch_rows
        rows = _even(batch_rows, rows // 2) if found is None else _rows_that_fit(found, rows, batch_rows, search)


def _rows_that_fit(found: Tried, rows: int, batch_rows: int, search: Search) -> int:
    """The most rows at a time within the budget, by a line from what stands under every plan through ``found``."""
    standing = sum(search.measurement.footprint.resident_bytes.values())
    per_row = max(1.0, (found.rung.peak_bytes - standing) / rows)
    room = (search.most * _ROOM_FRACTION - standing) / per_row
    return _even(batch_rows, min(batch_rows, int(room)))


def _even(batch_rows: int, rows: int) -> int:
    """As many chunks as ``rows`` at a time make, all of one size where that can be, so that one graph serves them."""
    chunks = -(-batch_rows // max(1, rows))
    dividing = next((n for n in range(chunks, 2 * chunks) if batch_rows % n == 0), chunks)
    return -(-batch_rows // dividing)


def _rows_of(plan: Plan) -> int:
    rows = plan.levers.get("split_rows", {}).get("rows", plan.batch_rows)
    return rows if isinstance(rows, int) else max(rows)


def _compiled_plan(settled: Plan, levers: dict[str, dict[str, Any]], rows: int) -> Plan:
    """The settled plan's batch and layout, ``rows`` at a time, compiled under ``levers``."""
    kept = {n: knobs for n, knobs in settled.levers.items() if n in (Layout.name, ExpandableSegments.name)}
    if rows < settled.batch_rows:
        kept |= {name: knobs for name, knobs in settled.levers.items() if name == "host_rows"}
        kept |= {"split_rows": {"rows": rows, "kept_chunks": 0}}
    origins = {name: origin for name, origin in settled.knob_origins.items() if name.partition(".")[0] in kept}
    bare = dataclasses.replace(settled, levers=kept, knob_origins=origins)
    return _with(bare, {Compile.name: Compile().knobs(), **levers})


def _with(plan: Plan, more: dict[str, dict[str, Any]]) -> Plan:
    known = find_levers()
    levers = dict(sorted((plan.levers | more).items(), key=lambda item: known[item[0]].slot))
    exactness = max((known[name].exactness for name in levers), default=Exactness.SAME_BITS)
    origins = {f"{name}.{knob}": KnobOrigin.CHOSEN for name, knobs in levers.items() for knob in knobs}
    return dataclasses.replace(plan, levers=levers, exactness=exactness, knob_origins=origins | plan.knob_origins)


def _pays(candidate: Tried, best: Tried, options: Options) -> bool:
    """Whether all expected steps together are faster with it. Capturing is a matter of a few steps, and not counted."""
    saved_seconds = (best.rung.seconds - candidate.rung.seconds) * (options.expected_steps or 0)
    more_seconds = _compiling_seconds(candidate) - _compiling_seconds(best)
    return candidate.rung.seconds <= _WORTH_FRACTION * best.rung.seconds and saved_seconds >= more_seconds


def _compiling_seconds(tried: Tried) -> float:
    return tried.once_seconds if Compile.name in tried.plan.levers else 0.0


def _as_measured(best: Tried, settled: Plan, before: Rung) -> Plan:
    if best.once_seconds == 0.0:
        return best.plan
    reasons = dict(best.plan.reasons)
    for name in TRIED_LEVERS:
        if name in best.plan.levers and name not in settled.levers:
            reasons[name] = (
                f"taken: measured {format_seconds(best.rung.seconds)} a step and {format_bytes(best.rung.peak_bytes)}, "
                f"{format_seconds(before.seconds)} without; {format_seconds(best.once_seconds)} once"
            )
    return dataclasses.replace(
        best.plan, predicted_seconds=best.rung.seconds, predicted_peak_bytes=best.rung.peak_bytes, reasons=reasons
    )


def _told(plan: Plan, search: Search) -> Plan:
    """``plan`` with the reasons of what was not taken."""
    why = {}
    for name in (Compile.name, Graphs.name):
        if name in plan.levers:
            continue
        if name in search.reasons:
            why[name] = search.reasons[name]
        elif search.budget.counting is Counting.CUDA_ALLOCATOR:
            fits = name in search.fitted
            why[name] = _NO_FASTER if fits else _NONE_FITS
    for name in (Layout.name, ConvolutionAlgorithms.name):
        if name in search.reasons and name not in plan.levers:
            why[name] = search.reasons[name]
    return dataclasses.replace(plan, reasons=plan.reasons | why)
