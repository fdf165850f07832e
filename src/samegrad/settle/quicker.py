"""Can the chunks of a settled plan be compiled, captured and replayed, or run by other kernels, and is that quicker?

Other kernels are those of convolutions, and of the loss of a large head, which is faster in chunks than whole.

Each candidate is measured as the ladder measures its rungs, under the same cap, and taken only where it fits and wins.
Compilation is paid once, so it is tried only where it is known how many steps there will be, and taken where
they pay it back. ``chunk_ways.py`` looks for the rows at a time and the blocks that run again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from samegrad.data.prefetch import stream_chunks
from samegrad.declared import DeclaredStep
from samegrad.errors import CannotSplit
from samegrad.exact.aliases import ParameterAliases
from samegrad.exact.step_draws import StepDraws
from samegrad.execute.apply import applied, chunked_step
from samegrad.levers.chunk_loss import ChunkLoss
from samegrad.levers.compile import Compile
from samegrad.levers.convolution_algorithms import ConvolutionAlgorithms
from samegrad.levers.expandable_segments import ExpandableSegments
from samegrad.levers.graphs import Graphs
from samegrad.levers.layout import Layout
from samegrad.levers.recompute import Recompute
from samegrad.measure.rungs import Rung, measure_whole
from samegrad.plan.options import Options
from samegrad.records import Budget, Counting, Plan
from samegrad.settle.candidates import Search, Tried
from samegrad.settle.captured_ways import captured_with_blocks_again
from samegrad.settle.chunk_ways import captured_candidates, compiled_candidates
from samegrad.settle.edits import Levers, even_rows, rows_of, with_levers
from samegrad.settle.ladder import LAUNCHING_SHARE
from samegrad.settle.probing import Measurement
from samegrad.units import format_bytes, format_seconds

# A plan that is no faster than this fraction of the settled one is not worth its warm-up.
_WORTH_FRACTION = 0.97
_NO_FASTER = "not needed: measured, and no faster within the budget"
_MANY_SHAPES = "not tried: batches of several shapes come in turns, and each would be compiled or captured anew"
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
    chunks_are_work = options.one_shape and not _refused(settled, search)
    if not options.one_shape:
        search.reasons |= dict.fromkeys((Compile.name, Graphs.name), _MANY_SHAPES)
    laid_out, convolves = (_may_be_tried(lever, search, options) for lever in (Layout, ConvolutionAlgorithms))
    head = search.head() if ChunkLoss.exactness <= options.allow else {}
    may_run_again = options.one_shape and options.rows is None
    tries = chunks_are_work or may_run_again or laid_out or convolves or head
    before = _before(settled, search) if tries else None
    if before is None:
        return _told(settled, search)
    best = Tried(settled, before, 0.0)
    if head and not head.keys() & settled.levers.keys():
        best = _with_kernels(head, best, search, options)
    # Rows in another layout are what is compiled and captured then.
    if laid_out and Layout.name not in settled.levers:
        best = _with_kernels({Layout.name: {}}, best, search, options)
    launched = best
    if chunks_are_work:
        for candidate in _candidates(best, search, options):
            if _pays(candidate, best, options) or _is_steadier(candidate, best, search):
                best = candidate
    # A capture that was refused would be again; one that fitted was as fast as it is.
    if may_run_again and Graphs.name not in search.fitted and not (chunks_are_work and Graphs.name in search.reasons):
        for candidate in captured_with_blocks_again(best.plan, search, slower_seconds=best.rung.seconds):
            if _pays(candidate, best, options):
                best = candidate
    # What launches hid of another layout shows in replays; a compiler lays out what it compiles by itself.
    if laid_out and best is not launched and not best.plan.levers.keys() & {Layout.name, Compile.name}:
        best = _with_kernels({Layout.name: {}}, best, search, options)
    if convolves:
        best = _with_kernels({ConvolutionAlgorithms.name: {}}, best, search, options)
    if Graphs.name not in best.plan.levers:
        search.forget_captures()
    return _told(_as_measured(best, settled, before), search)


def _may_be_tried(lever: type[Layout | ConvolutionAlgorithms], search: Search, options: Options) -> bool:
    """Whether there are convolutions that may take other kernels; the reason is kept where they may not."""
    if options.allow < lever.exactness:
        search.reasons[lever.name] = f"not allowed: {lever.exactness.explained()} ({lever.exactness.name})"
        return False
    return lever.name not in search.measurement.footprint.refusals


def _with_kernels(lever: Levers, best: Tried, search: Search, options: Options) -> Tried:
    """``best``, or the same by the other kernels of ``lever``, one alone, where that fits and is faster."""
    [name] = lever
    found = search.measured(with_levers(best.plan, lever))
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
    plan = with_levers(settled, {Graphs.name: {}})
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


def _candidates(best: Tried, search: Search, options: Options) -> Iterator[Tried]:
    settled = best.plan
    even, captured = _in_even_chunks(settled, options), list[Tried]()
    # What a head in chunks saves the device, launches may hide; a replay shows it.
    for more in [{}, *_slower_head(search)]:
        found = search.measured(with_levers(even, {Graphs.name: {}, **more}))
        if found is not None:
            captured.append(found)
    yield from captured
    fastest = min([best, *captured], key=lambda one: one.rung.seconds)
    if options.allow < Compile.exactness:
        search.reasons[Compile.name] = f"not allowed: {Compile.exactness.explained()} ({Compile.exactness.name})"
    elif options.expected_steps is None:
        search.reasons[Compile.name] = (
            "not tried: compiling costs seconds to minutes, and how many steps would pay it back is not known; "
            "say expected_steps="
        )
    else:
        search.all_steps_seconds = options.expected_steps * fastest.rung.seconds
        # Compiled chunks are captured too.
        yield from compiled_candidates(settled, search, options)
        return
    # Fewer rows at a time cost nothing in replays; what was settled without them is the best only where it fits so too.
    may_be_better = not captured or Recompute.name in settled.levers
    may_take_others = options.rows is None and search.measurement.ways.by_rows is not None
    if may_be_better and may_take_others and Graphs.name not in search.reasons:
        yield from captured_candidates(settled, search, options, slower_seconds=fastest.rung.seconds)


def _slower_head(search: Search) -> list[Levers]:
    """The head's loss in chunks where it ran and was no faster by itself."""
    return [search.head()] if search.reasons.get(ChunkLoss.name) == _NO_FASTER else []


def _in_even_chunks(settled: Plan, options: Options) -> Plan:
    """``settled`` in chunks of one size, so that one graph serves all of them; rows that somebody pinned stay."""
    rows = even_rows(settled.batch_rows, rows_of(settled))
    if "split_rows" not in settled.levers or options.rows is not None:
        return settled
    return dataclasses.replace(
        settled, levers=settled.levers | {"split_rows": settled.levers["split_rows"] | {"rows": rows}}
    )


def _pays(candidate: Tried, best: Tried, options: Options) -> bool:
    """Whether all expected steps together are faster with it. Capturing is a matter of a few steps, and not counted."""
    saved_seconds = (best.rung.seconds - candidate.rung.seconds) * (options.expected_steps or 0)
    more_seconds = _compiling_seconds(candidate) - _compiling_seconds(best)
    return candidate.rung.seconds <= _WORTH_FRACTION * best.rung.seconds and saved_seconds >= more_seconds


def _is_steadier(candidate: Tried, best: Tried, search: Search) -> bool:
    """Whether ``candidate`` replays, no slower, what Python could just launch in time while it was measured."""
    replays = Graphs.name in candidate.plan.levers and Graphs.name not in best.plan.levers
    if not replays or Compile.name in candidate.plan.levers or candidate.rung.seconds > best.rung.seconds:
        return False
    share = best.rung.launching_share
    if share is None:
        # Of a plan that was settled only its seconds are known.
        again = search.measured(best.plan)
        share = None if again is None else again.rung.launching_share
    # Whatever else the host does makes such a step slower.
    return share is not None and share >= LAUNCHING_SHARE


def _compiling_seconds(tried: Tried) -> float:
    return tried.once_seconds if Compile.name in tried.plan.levers else 0.0


def _as_measured(best: Tried, settled: Plan, before: Rung) -> Plan:
    if best.once_seconds == 0.0:
        return best.plan
    taken, left = best.plan.levers, settled.levers.keys() - best.plan.levers.keys()
    # Why segments grow is said where they were found to.
    new = [name for name in taken if name not in settled.levers and name != ExpandableSegments.name]
    named = " and ".join(new)
    reasons = best.plan.reasons | dict.fromkeys(left, f"not needed: measured, and faster with {named} instead")
    found = f"taken: measured {format_seconds(best.rung.seconds)} a step and {format_bytes(best.rung.peak_bytes)}"
    for name in new:
        reasons[name] = (
            f"{found}, {format_seconds(before.seconds)} without; {format_seconds(best.once_seconds)} once"
        )
    for name in taken.keys() & settled.levers.keys():
        if taken[name] != settled.levers[name]:
            reasons[name] = f"{found}, beside {named}"
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
    for name in (ChunkLoss.name, Layout.name, ConvolutionAlgorithms.name):
        if name in search.reasons and name not in plan.levers:
            why[name] = search.reasons[name]
    return dataclasses.replace(plan, reasons=plan.reasons | why)
