"""The footprint of a step whose device is at hand: probes of the real step at a few rows, and laws for all others."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from samegrad import trees
from samegrad.data.prefetch import stream_chunks
from samegrad.declared import DeclaredStep
from samegrad.errors import IN_THE_DECLARATION, CannotSplit
from samegrad.exact.aliases import ParameterAliases
from samegrad.exact.find_head import Head, find_head
from samegrad.exact.findings import Examination
from samegrad.exact.mapped import MappedStep
from samegrad.exact.out_of_memory import OutOfMemory
from samegrad.exact.schemes import unchanged
from samegrad.exact.sharded import refuse_sharded
from samegrad.exact.softmax_loss import SoftmaxLoss
from samegrad.exact.split import SplitStep
from samegrad.exact.step_draws import StepDraws
from samegrad.exact.undisturbed import FailsOnFewRows, NotToBeTried
from samegrad.execute.trial import MappingLever
from samegrad.execute.ways import Ways, find_ways
from samegrad.levers import unsuited_levers
from samegrad.levers.chunk_loss import ChunkLoss
from samegrad.measure import counters
from samegrad.measure.census import Residents, count_residents
from samegrad.measure.counted_targets import refuse_without_targets_at_sight
from samegrad.measure.head_laws import measure_head
from samegrad.measure.laws import fit_laws, fit_mapped_laws, peak_of
from samegrad.measure.probe import TIMED_RUNS, Probe, standing_batch_bytes
from samegrad.measure.probe_sets import (
    BACKWARD_FORWARDS,
    MORE_ROOM,
    kept_row_bytes,
    mapped_probes,
    plain_probes,
    row_seconds,
    split_probes,
    times,
)
from samegrad.measure.rungs import OptimizerTurn
from samegrad.measure.within_memory import WithinMemory
from samegrad.plan.predict import predict_plan
from samegrad.records import Counting, Footprint, Origin, Phase, PhaseLaw, Variant
from samegrad.settle.progress import working_on
from samegrad.trees import RowLayout
from samegrad.units import format_bytes

# The share of the plain step's peak from which on logits are worth probes of their own.
_WORTH_FRACTION = 0.05
# Runs by which the parts of a model in chunks are timed: rungs of the ladder are timed again.
_TIMED_RUNS = 2


@dataclasses.dataclass(frozen=True)
class Measurement:
    """A footprint and the ways found to run the step in chunks."""

    footprint: Footprint
    ways: Ways
    turn: OptimizerTurn = dataclasses.field(default_factory=OptimizerTurn)


def aliases_for(declared: DeclaredStep) -> ParameterAliases:
    roots = {"": declared.network}
    if declared.loss_module is not None:
        roots["loss_fn"] = declared.loss_module
    return ParameterAliases(roots)


def measure(declared: DeclaredStep, batch: Any, aliases: ParameterAliases) -> Measurement:
    """The footprint, and the ways to run in chunks that were probed.

    Rows come through buffers that are given back after each run, so that no larger one is still there in the next.
    Raises OutOfMemory where not even a few rows fit.
    """
    working_on("examining the step on a few rows")
    with WithinMemory(declared) as memory:
        return _measured(declared, batch, aliases)
    raise memory.refusal(asked="measure the step on a few of its rows", do=MORE_ROOM)


def _measured(declared: DeclaredStep, batch: Any, aliases: ParameterAliases) -> Measurement:
    refuse_sharded(
        declared.modules,
        asked="plan a step from a budget",
        do="say how many rows run at a time: rows= or plan=; ranks would each measure and choose for themselves, and "
        "wait for each other where they chose differently",
    )
    counters.take_workspaces(declared.device)
    layout = declared.layout(batch)
    refuse_without_targets_at_sight(declared, batch, asked="measure the step, to plan it")
    residents = count_residents(declared)
    one_row = CannotSplit(asked="split the rows of a step", found="the batch has one row", do="nothing is to be done")
    ways = find_ways(declared, aliases, batch, layout) if layout.rows > 1 else Ways(None, one_row)
    if ways.collectives or (ways.by_rows is not None and ways.by_rows.collectives):
        raise CannotSplit(
            asked="plan a step from a budget",
            found=f"the {'model' if ways.collectives else 'loss'} calls collectives, and each rank would run it as "
            "often as its own measurements ask",
            do="say how many rows run at a time: rows= or plan=",
        )
    refusals = ways.refusals | unsuited_levers(declared)
    if ways.refusal is not None:
        refusals["split_rows"] = ways.refusal.found
    if not _rows_are_elsewhere(batch, layout, declared.device):
        refusals["host_rows"] = "the batch is on the model's device already"
    elif ways.by_rows is None:
        refusals["host_rows"] = "the model sees the whole batch, so it is moved as a whole"
    missing = residents.missing_state_bytes
    optimizer_law = _optimizer_law(residents, standing_batch_bytes(batch, declared.device))
    whole_only = isinstance(ways.refusal, FailsOnFewRows)
    # Where rows are split, chunks are what is timed.
    plain = plain_probes(
        declared, batch, layout, StepDraws(ways.sites), whole_only=whole_only,
        timed_runs=TIMED_RUNS if ways.by_rows is None else 0,
    )  # fmt: skip
    if ways.by_rows is not None and (refusal := _refusal_of_reads(plain)) is not None:
        ways = dataclasses.replace(ways, by_rows=None, refusal=refusal)
        refusals["split_rows"] = refusal.found
        plain = plain_probes(declared, batch, layout, StepDraws(ways.sites), whole_only=whole_only)
    parts: list[Probe] = []
    if ways.by_rows is not None:
        parts = split_probes(_by_rows(declared, aliases, ways.by_rows), batch, layout)
    # Where nothing is split by rows, the plain step is what there is to time.
    passes = 1 if ways.by_rows is None else ways.by_rows.passes
    many_rows = None if whole_only else row_seconds(declared, batch, layout, StepDraws(ways.sites), forwards=passes)
    seconds_per_row, seconds_per_chunk = times(parts or plain, many_rows)
    probed, variants = [*plain, *parts], []
    for lever in ways.mapped:
        try:
            probes = lever_probes(declared, aliases, ways, lever, batch)
        except (CannotSplit, OutOfMemory) as refused:
            # Its forward could be tried; what stands in the way is the loss or what the forward brings into it.
            refusals[lever.name] = refused.found
            continue
        variants.append(_variant(lever, probes, seconds_per_row, missing, optimizer_law))
        probed += probes
    plain_laws = (*fit_laws(plain, missing_bytes=missing), optimizer_law)
    head = None
    with WithinMemory(declared) as memory:
        found = _find_head(declared, batch, layout, ways, peak_of(plain_laws, layout.rows, layout.rows))
        if isinstance(found, Head):
            head = measure_head(
                lambda deferred: MappedStep(deferred, aliases, ways.mapped_examination(), unchanged),
                declared, batch, layout, found, missing_bytes=missing, optimizer_law=optimizer_law,
            )  # fmt: skip
        else:
            refusals[ChunkLoss.name] = found
    if memory.found:
        refusals[ChunkLoss.name] = memory.found
    shown = probed[-1]
    footprint = Footprint(
        device=counters.device_name(declared.device),
        counting=Counting.CUDA_ALLOCATOR if declared.device.type == "cuda" else Counting.TENSOR_BYTES,
        origin=Origin.MEASURED,
        basis=f"{len(probed)} probes of the real step at {min(p.batch_rows for p in probed)} to "
        f"{max(p.batch_rows for p in probed)} rows",
        rows=shown.rows,
        batch_rows=layout.rows,
        peak_allocated_bytes=shown.peak_bytes,
        peak_reserved_bytes=shown.reserved_bytes,
        seconds=shown.seconds,
        forwards_per_step=passes,
        seconds_per_row=seconds_per_row,
        seconds_per_chunk=seconds_per_chunk,
        by_category=shown.by_category,
        by_phase=shown.by_phase,
        resident_bytes=residents.by_category,
        laws=(*fit_laws(parts, missing_bytes=missing), optimizer_law) if parts else (),
        plain_laws=plain_laws,
        variants=tuple(variants),
        head=head,
        kept_row_bytes=_kept_row_bytes(parts, declared, batch, layout)
        if ways.by_rows is not None and ways.by_rows.passes == 2
        else None,
        refusals=refusals,
        facts=_facts(ways, residents, streamed=isinstance(declared.loss_fn, SoftmaxLoss))
        | _truths_read(sorted(set().union(*(probe.truths_read for probe in probed)))),
        timeline=shown.timeline,
    )
    turn = OptimizerTurn(missing, residents.optimizer_temporary_bytes)
    # The probe that was shown was of a few rows; who asks for the peak of the step asks for all of it.
    return Measurement(footprint=predict_plan(footprint, {}), ways=ways, turn=turn)


def _find_head(declared: DeclaredStep, batch: Any, layout: RowLayout, ways: Ways, plain_bytes: int) -> Head | str:
    """The head whose loss may run in chunks, or why there is none. ``plain_bytes``: the peak of the plain step."""
    if isinstance(ways.refusal, NotToBeTried):
        return ways.refusal.found
    try:
        head = find_head(declared, batch, layout)
    except CannotSplit as refused:
        return refused.found
    positions = head.positions_per_row * layout.rows
    if positions <= ChunkLoss.fewest_positions:
        return f"{head.path}: its {positions:g} rows of logits are no more than a chunk has"
    logits_bytes = int(positions * head.classes * torch.float32.itemsize)
    if logits_bytes < _WORTH_FRACTION * plain_bytes and declared.head is None:
        return f"not needed: the logits of {head.path} are {format_bytes(logits_bytes)} of {format_bytes(plain_bytes)}"
    return head


def _kept_row_bytes(parts: Sequence[Probe], declared: DeclaredStep, batch: Any, layout: RowLayout) -> float | None:
    graph = kept_row_bytes(parts)
    # On the device a chunk whose graph is kept has rows of its own, since the next one arrives in its place.
    copied = trees.row_bytes(batch, layout) if declared.device.type == "cuda" else 0
    return None if graph is None else graph + copied


def _by_rows(declared: DeclaredStep, aliases: ParameterAliases, examination: Examination) -> SplitStep:
    return SplitStep(declared, aliases, examination, stream_chunks)


def lever_probes(
    declared: DeclaredStep, aliases: ParameterAliases, ways: Ways, lever: MappingLever, batch: Any,
    timed_runs: int = _TIMED_RUNS,
) -> list[Probe]:  # fmt: skip
    """The step by ``lever`` on a few rows. Raises CannotSplit where its loss stands in the way, and OutOfMemory."""
    mapped = MappedStep(declared, aliases, ways.mapped_examination(), lever.scheme())
    in_chunks = "rows" in lever.knobs()
    return mapped_probes(mapped, batch, declared.layout(batch), in_chunks=in_chunks, timed_runs=timed_runs)


def _variant(
    lever: MappingLever, probes: Sequence[Probe], plain_row_seconds: float | None, missing: int, optimizer_law: PhaseLaw
) -> Variant:
    seconds = None
    if plain_row_seconds is not None:
        # By its forwards: at a few rows launches are nearly all of the time, and what a row takes is lost in it.
        seconds = plain_row_seconds * (lever.forwards + BACKWARD_FORWARDS) / (1 + BACKWARD_FORWARDS)
    largest = probes[-1]
    return Variant(
        lever=lever.name,
        knobs=knobs_but_rows(lever),
        laws=(*fit_mapped_laws(probes, missing_bytes=missing), optimizer_law),
        forwards_per_step=lever.forwards,
        seconds_per_row=seconds,
        seconds_per_chunk=None
        if seconds is None
        else max(0.0, largest.seconds - seconds * largest.batch_rows) / largest.chunks,
    )


def knobs_but_rows(lever: MappingLever) -> dict[str, Any]:
    return {knob: value for knob, value in lever.knobs().items() if knob != "rows"}


def _rows_are_elsewhere(batch: Any, layout: RowLayout, device: torch.device) -> bool:
    row_leaves = [leaf for leaf, axis in zip(trees.leaves_of(batch), layout.axes) if axis is not None]
    return any(not isinstance(leaf, Tensor) or leaf.device != device for leaf in row_leaves)


def _optimizer_law(residents: Residents, standing_bytes: int) -> PhaseLaw:
    fixed = sum(residents.by_category.values()) + residents.optimizer_temporary_bytes + standing_bytes
    return PhaseLaw(phase=Phase.OPTIMIZER, fixed_bytes=float(fixed), per_chunk_row_bytes=0.0, per_batch_row_bytes=0.0)


def _refusal_of_reads(probes: Sequence[Probe]) -> CannotSplit | None:
    """Why rows are not split for somebody, where the forward reads a number: another chunk may go another way."""
    lines = sorted(set().union(*(probe.numbers_read for probe in probes)))
    if not lines:
        return None
    return CannotSplit(
        asked="split the rows of a step",
        found=f"the forward reads a number of its rows ({', '.join(lines[:3])}), and may do something else in a chunk",
        do="compute with tensors there (torch.where), or, where it makes no difference, pin rows= and verify_step",
    )


def _truths_read(lines: Sequence[str]) -> dict[str, str]:
    if not lines:
        return {}
    where = ", ".join(lines[:3])
    return {
        "values of the batch": f"the forward reads some ({where}), and may do something else for rows that were not "
        "examined; verify_step and samegrad verify compare the gradients"
    }


def _facts(ways: Ways, residents: Residents, *, streamed: bool) -> dict[str, str]:
    facts = {}
    examination = ways.by_rows
    if ways.mapped and ways.refusal is not None:
        facts["rows are not split through the whole model"] = ways.refusal.found
    if examination is not None:
        if examination.sites is not None:
            facts["random draws"] = "keyed by row: the same numbers for every split, and the key is one draw a step"
        if examination.rules:
            kinds = ", ".join(f"{rule.name} ({rule.reducer.value} over chunks)" for rule in examination.rules[:4])
            facts["state, written once a step"] = kinds
        if examination.passes == 1:
            facts["loss"] = f"one pass: {examination.reason}"
        else:
            facts["loss"] = (
                f"split by rows it takes two passes, exact for every loss, at the cost of a second forward "
                f"({examination.reason})"
            )
            if not streamed:
                facts[IN_THE_DECLARATION] = "normalise='mean' makes it one pass, if the loss is a mean over rows"
        if examination.module_hooks:
            facts["module hooks, run once a chunk"] = ", ".join(examination.module_hooks)
    if residents.note:
        facts["optimizer"] = residents.note
    return facts
