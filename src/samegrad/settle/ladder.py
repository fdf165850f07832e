"""Down the ladder: the first plan whose measured peak is within the budget.

On a card one that took far longer than was predicted is not believed to be the fastest: the next ones that could be
faster are measured beside it, and where Python is what it waited for, those of fewer chunks. Predictions from a few
rows miss what launches cost.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from samegrad import trees
from samegrad.data.prefetch import stream_chunks
from samegrad.declared import DeclaredStep
from samegrad.errors import BudgetTooSmall
from samegrad.exact.aliases import ParameterAliases
from samegrad.exact.pass_programs import Programs
from samegrad.exact.step_draws import StepDraws
from samegrad.execute.apply import applied, chunked_step, in_force, programs_of
from samegrad.levers import Execution
from samegrad.levers._variants import chunk_sizes, variant_in
from samegrad.levers.optimizer_state import OptimizerState
from samegrad.levers.split_rows import SplitRows
from samegrad.measure import counters
from samegrad.measure.laws import peak_of
from samegrad.measure.rungs import OptimizerTurn, Rung, measure_rung, measure_whole
from samegrad.measure.within_memory import WithinMemory
from samegrad.module_walk import parameters_of
from samegrad.plan.floor import below_floor
from samegrad.plan.options import Options
from samegrad.records import Budget, Category, Counting, Footprint, PhaseLaw, Plan
from samegrad.settle.last_rungs import rungs_to_try
from samegrad.settle.making_room import ChannelsLastWhereNeeded
from samegrad.settle.probing import Measurement
from samegrad.settle.progress import trying
from samegrad.units import format_bytes

# The share of a budget up to which the plain step's prediction is believed as it is.
_BELIEVED_FRACTION = 0.75
# Of a budget, under which a rung must run without an allocator retry: the cap that it is judged by.
_STEADY_FRACTION = 0.98
# Of a budget, from which on memory that the allocator cannot give back is why nothing fits.
_HELD_FRACTION = 0.05
# Of a rung's seconds: what others are predicted to take at most, for which they are measured beside it; and how many.
_RIVAL_FRACTION = 0.8
_MOST_RIVALS = 2
# Of a rung's seconds, how many pass until all is launched where launching is what takes them; and what one of fewer
# chunks may be predicted to take, as a multiple of the prediction for the rung.
LAUNCHING_SHARE = 0.85
_FEWER_CHUNKS_FRACTION = 1.1
# Chunks in the measurement of a rung; an allocator needs a few until its segments lie as they will.
_MEASURED_CHUNKS = {Counting.CUDA_ALLOCATOR: 4, Counting.TENSOR_BYTES: 2}


def settle(
    declared: DeclaredStep,
    aliases: ParameterAliases,
    measurement: Measurement,
    batch: Any,
    *,
    budget: Budget,
    options: Options,
) -> tuple[Plan, Footprint, int | None]:
    """As ``settle_plan``, with a measurement at hand; also the measured peak of the rung (None if not split)."""
    layout = declared.layout(batch)
    footprint = measurement.footprint
    most = most_bytes(budget)
    tried: list[str] = []
    least_bytes: int | None = None
    room = ChannelsLastWhereNeeded(declared, footprint, most, options, budget)
    best: _Fitting | None = None
    rivals_left = _MOST_RIVALS if budget.counting is Counting.CUDA_ALLOCATOR and options.rows is None else 0
    rungs, refusal = rungs_to_try(footprint, options, budget)
    for plan in rungs:
        if best is not None:
            if not rivals_left:
                break
            if not best.has_rival(plan):
                continue
            rivals_left -= 1
        with applied(plan, declared, layout.rows) as execution:
            sizes = execution.sizes
        whole = sizes is None or execution.runs_whole
        # What levers cost a card is measured for its seconds too: others are compared with them.
        is_believed = whole and not (plan.levers and budget.counting is Counting.CUDA_ALLOCATOR)
        if best is None and is_believed and (plan.predicted_peak_bytes or 0) <= _BELIEVED_FRACTION * most:
            return plan, footprint, None

        # Kernels are chosen by the rows as well: small probes may have seen others (distances, recurrent layers).
        run: Callable[[Plan], Rung | None] = (
            functools.partial(measured_whole, declared, batch, measurement, most=most)
            if whole
            else lambda one: measured(declared, aliases, measurement, batch, one, budget.counting, most)
        )
        outcome = trying(plan)
        one, rung = room.measured(plan, run)
        outcome.found(rung, most)
        if rung is not None and rung.peak_bytes <= most:
            if best is None or rung.seconds < best.rung.seconds:
                best = _Fitting(plan, one, rung, None if whole else rung.peak_bytes)
            continue
        rows = "all" if whole else max(sizes or ())
        found = "out of memory" if rung is None else f"measured {format_bytes(rung.peak_bytes)}"
        tried.append(f"{rows} rows: predicted {format_bytes(plan.predicted_peak_bytes or 0)}, {found}")
        if rung is not None:
            least_bytes = min(rung.peak_bytes, least_bytes or rung.peak_bytes)
        if options.rows is not None:
            break
    if best is not None:
        return dataclasses.replace(best.plan, predicted_seconds=best.rung.seconds), footprint, best.peak_bytes
    raise _nothing_fits(declared, footprint, budget, refusal, tried, least_bytes)


def _nothing_fits(
    declared: DeclaredStep,
    footprint: Footprint,
    budget: Budget,
    refusal: BudgetTooSmall | None,
    tried: Sequence[str],
    least_bytes: int | None,
) -> BudgetTooSmall:
    """The refusal of ``budget`` after rungs were measured, of which the smallest held ``least_bytes``.

    ``refusal``: that of the predictions, where they were not believed.
    """
    needed = None if least_bytes is None else math.ceil(1.01 * least_bytes * budget.total_bytes / most_bytes(budget))
    measured_ones = "; ".join(tried[-4:])
    if refusal is not None:
        found = f"tried on the device all the same: {measured_ones}"
        return below_floor(footprint, budget, needed_bytes=needed, found=found)
    held = _held_for_nothing(declared.device)
    if held > _HELD_FRACTION * budget.total_bytes:
        told = below_floor(footprint, budget, needed_bytes=needed)
        return BudgetTooSmall(
            asked=told.asked,
            found=f"{format_bytes(held)} of it are in segments of the allocator that hold small tensors, and cannot be "
            f"given back; every rung measured more than what is left: {measured_ones}; {told.found}",
            do="plan before larger steps run in the process, or in one of its own, or set "
            f"PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True before it starts; {told.do}",
            option=told.option,
        )
    found = f"every rung measured more than that, so predictions were wrong (please report the step): {measured_ones}"
    return below_floor(footprint, budget, needed_bytes=needed, found=found)


@dataclasses.dataclass(frozen=True)
class _Fitting:
    """A plan that was measured to fit, as the ladder had it and as it was measured.

    ``peak_bytes``: of one that does not run whole.
    """

    chosen: Plan
    plan: Plan
    rung: Rung
    peak_bytes: int | None

    def has_rival(self, plan: Plan) -> bool:
        """Whether ``plan``, by other levers, is predicted to be much faster than this one was, or has fewer chunks to
        launch where launching took this one's time."""
        seconds, expected = plan.predicted_seconds, self.chosen.predicted_seconds
        if seconds is None or expected is None:
            return False
        if seconds <= _RIVAL_FRACTION * self.rung.seconds and plan.levers.keys() != self.chosen.levers.keys():
            return True
        waited_for_python = (self.rung.launching_share or 0.0) >= LAUNCHING_SHARE
        has_fewer = _chunks_of(plan) < _chunks_of(self.chosen)
        return waited_for_python and has_fewer and seconds <= _FEWER_CHUNKS_FRACTION * expected


def _chunks_of(plan: Plan) -> int:
    if SplitRows.name not in plan.levers:
        return 1
    return len(chunk_sizes(plan.levers[SplitRows.name]["rows"], plan.batch_rows))


def _held_for_nothing(device: torch.device) -> int:
    """Bytes that the allocator holds, does not use, and cannot give back."""
    counters.release_cached(device)
    reading = counters.read_allocator(device)
    return 0 if reading is None else reading.reserved_bytes - reading.allocated_bytes


def most_bytes(budget: Budget) -> int:
    """What a plan may be measured to need. Counted bytes are what they are; segments still shift as a run goes on."""
    allocator = budget.counting is Counting.CUDA_ALLOCATOR
    return int(budget.total_bytes * _STEADY_FRACTION) if allocator else budget.total_bytes


def measured(
    declared: DeclaredStep,
    aliases: ParameterAliases,
    measurement: Measurement,
    batch: Any,
    plan: Plan,
    counting: Counting,
    most: int,
    programs_for: Callable[[Execution], Programs] = programs_of,
) -> Rung | None:
    """Peak and seconds of a step under ``plan``, which runs in chunks; a few of them stand for all.

    None where it ran out of memory, or had to try again, under a cap of ``most`` bytes. ``programs_for``: what runs the
    chunks, closed afterwards.
    """
    with WithinMemory(declared):
        return _measured(declared, aliases, measurement, batch, plan, counting, most, programs_for)
    return None


def _measured(
    declared: DeclaredStep,
    aliases: ParameterAliases,
    measurement: Measurement,
    batch: Any,
    plan: Plan,
    counting: Counting,
    most: int,
    programs_for: Callable[[Execution], Programs],
) -> Rung | None:
    layout = declared.layout(batch)
    with in_force(plan, declared, layout.rows) as running, counters.capped(declared.device, most):
        assert running.sizes is not None
        rows = max(running.sizes)
        # A graph that is kept shows beside one that is not.
        chunks = max(_MEASURED_CHUNKS[counting], running.kept_chunks + 2 if running.kept_chunks else 0)
        # What sees the whole batch is measured on it.
        shown = layout.rows if running.scheme is not None else min(chunks * rows, layout.rows)
        parts = list(running.sizes) if shown == layout.rows else trees.even_sizes(shown, rows)
        if running.programmed and min(running.sizes) < min(parts):
            # A chunk of another size is another program, with memory of its own.
            parts = [*parts[:-1], min(running.sizes)]
            shown = sum(parts)
        programs = programs_for(running)
        chunked = chunked_step(running, aliases, measurement.ways, stream_chunks, programs)
        try:
            rung = measure_rung(chunked, batch, layout, parts, turn=_turn_of(plan, declared, measurement))
        finally:
            # Graphs would hold their pools until somebody collects cycles.
            programs.close()
    if rung is None:
        return None
    # Not there to be measured: what the loss keeps of rows that were left out.
    laws = _laws_of(plan, measurement.footprint)
    unseen = 0
    if shown < layout.rows:
        unseen = peak_of(laws, rows, layout.rows) - peak_of(laws, rows, shown)
    of_all = dataclasses.replace(
        rung, peak_bytes=rung.peak_bytes + unseen, seconds=rung.seconds * layout.rows / shown
    )
    return _with_travel(of_all, plan, measurement)


def measured_whole(
    declared: DeclaredStep, batch: Any, measurement: Measurement, plan: Plan, most: int
) -> Rung | None:
    """Peak and seconds of a step under ``plan``, which runs whole; None as of ``measured``."""
    layout, draws = declared.layout(batch), StepDraws(measurement.ways.sites)
    with (
        WithinMemory(declared),
        in_force(plan, declared, layout.rows) as execution,
        counters.capped(declared.device, most),
    ):
        rung = measure_whole(execution.declared, batch, layout, draws, turn=_turn_of(plan, declared, measurement))
        return None if rung is None else _with_travel(rung, plan, measurement)
    return None


def _turn_of(plan: Plan, declared: DeclaredStep, measurement: Measurement) -> OptimizerTurn:
    """What the optimizer takes under ``plan``: where its state waits on the host, all of it comes for its turn."""
    if OptimizerState.name not in plan.levers:
        return measurement.turn
    state_bytes = measurement.footprint.resident_bytes.get(Category.OPTIMIZER_STATE, 0)
    trained = [p for p in parameters_of(declared.modules) if p.requires_grad]
    return OptimizerTurn(0, measurement.turn.temporary_bytes, OptimizerState.pieces_of(state_bytes, trained))


def _with_travel(rung: Rung, plan: Plan, measurement: Measurement) -> Rung:
    """``rung`` with what the optimizer's turn takes longer under ``plan``, since its state travels then."""
    if OptimizerState.name not in plan.levers:
        return rung
    by_state = {
        OptimizerState.name in way.levers: way.optimizer_seconds for way in reversed(measurement.footprint.traced)
    }
    more_seconds = max(0.0, by_state.get(True, 0.0) - by_state.get(False, 0.0))
    return dataclasses.replace(rung, seconds=rung.seconds + more_seconds)


def _laws_of(plan: Plan, footprint: Footprint) -> Sequence[PhaseLaw]:
    """Those of the variant that ``plan`` takes, or of the step split by rows."""
    variant = variant_in(plan, footprint)
    return footprint.laws if variant is None else variant.laws
