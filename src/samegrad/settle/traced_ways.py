"""Ways to run a step that were followed: its units at many numbers of rows, with and without its head's loss in chunks.

The plain step is traced on the whole batch and on a part of it; at any other number of rows every storage lies on the
line through the two. Steps that do something else on other rows, and those with the loss in chunks, are traced at a few
numbers of rows each.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from samegrad import trees
from samegrad.errors import BadInput
from samegrad.exact.find_head import Head
from samegrad.exact.softmax_loss import SoftmaxLoss
from samegrad.levers.chunk_loss import ChunkLoss
from samegrad.levers.recompute import Recompute
from samegrad.measure.events import Trace
from samegrad.measure.summed_gradients import with_summed_gradients
from samegrad.measure.trace_laws import trace_at
from samegrad.measure.trace_reading import CUDA_BLOCK_BYTES, find_peak, loss_peak_bytes, peak_by_phase
from samegrad.measure.units import units_of
from samegrad.records import Phase
from samegrad.settle.followed_step import FollowedStep
from samegrad.unit_tables import TracedWay, UnitTable
from samegrad.units import format_bytes

# Rows that the second trace has, of the batch's.
_FEWER = 4
# Numbers of chunks that are planned for; between them time hardly differs, and few bytes.
_CHUNK_COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
# And where every number of rows is a trace of its own.
_TRACED_CHUNK_COUNTS = (1, 2, 4, 8)
# Parts that the positions of a batch's logits are cut into, and the fewest of a part: fewer would save few bytes.
_LOGIT_PARTS = (4, 32)
_FEWEST_POSITIONS = 512
# Of the plain step's peak, from which on logits are worth traces of their own.
_WORTH_FRACTION = 0.05
_NARROW_BYTES = 4


def traced_ways(step: FollowedStep, plain: Trace) -> tuple[tuple[TracedWay, ...], dict[str, str]]:
    """The step followed plainly and with the loss of its head in chunks, and why levers were not followed."""
    look = step.look
    refusals = {} if step.blocks else {Recompute.name: look.units.reason or "single layers keep little inside"}
    found = [way_of(step, {}, traces_under(step, {}, plain), step.blocks)]
    if isinstance(look.head, str):
        return tuple(found), refusals | {ChunkLoss.name: look.head}
    parts = _positions(look.head, step, find_peak(plain).live_bytes)
    if isinstance(parts, str):
        return tuple(found), refusals | {ChunkLoss.name: parts}
    for positions in parts:
        levers = {ChunkLoss.name: {"head": look.head.path, "rows": positions}}
        traces = {rows: step.trace_whole(levers, rows) for rows in _rows_of(step.layout.rows, _TRACED_CHUNK_COUNTS)}
        found.append(way_of(step, levers, traces, step.blocks))
    return tuple(found), refusals


def _positions(head: Head, step: FollowedStep, peak_bytes: int) -> list[int] | str:
    """Positions of logits at a time that are worth a trace, or why none are."""
    positions = head.positions_per_row * step.layout.rows
    logits_bytes = int(positions * head.classes * torch.float32.itemsize)
    if logits_bytes < _WORTH_FRACTION * peak_bytes:
        return f"not needed: the logits of {head.path} are {format_bytes(logits_bytes)} of {format_bytes(peak_bytes)}"
    parts = {1 << (int(positions) // n).bit_length() - 1 for n in _LOGIT_PARTS if positions // n >= _FEWEST_POSITIONS}
    return sorted(parts, reverse=True) or f"{head.path}: its {positions:g} rows of logits are no more than a chunk has"


def _rows_of(batch_rows: int, chunk_counts: Sequence[int]) -> list[int]:
    """The rows of a chunk for each number of chunks, and those of the smaller of two halves."""
    rows = [-(-batch_rows // n) for n in chunk_counts if n <= batch_rows]
    return sorted({*rows, max(1, batch_rows // 2)}, reverse=True)


def traces_under(step: FollowedStep, levers: dict[str, dict[str, Any]], whole: Trace) -> dict[int, Trace]:
    """The step under ``levers`` on the rows of a chunk, for each number of rows that is planned for.

    ``whole``: on the whole batch. A step that is not split is looked at on one other number of rows.
    """
    batch_rows = step.layout.rows
    low_rows = max(1, batch_rows // _FEWER)
    if low_rows == batch_rows:
        return {batch_rows: whole}
    low = step.trace_whole(levers, low_rows)
    traces = {batch_rows: whole, low_rows: low}
    if step.ways.by_rows is None:
        return traces
    traced_one_by_one = _rows_of(batch_rows, _TRACED_CHUNK_COUNTS)
    for rows in _rows_of(batch_rows, _CHUNK_COUNTS):
        if rows in traces:
            continue
        try:
            traces[rows] = trace_at(low, whole, rows)
        except BadInput:
            # It does something else on other rows.
            if rows in traced_one_by_one:
                traces[rows] = step.trace_whole(levers, rows)
    return traces


def way_of(
    step: FollowedStep,
    levers: dict[str, dict[str, Any]],
    traces: dict[int, Trace],
    blocks: Sequence[Sequence[str]],
) -> TracedWay:
    """The step as it was followed under ``levers``: ``traces`` by their rows, the whole batch among them.

    ``blocks``: those of its modules that may run again.
    """
    parameters = [p for part in step.declared.modules for p in part.parameters() if p.requires_grad]
    gradient_bytes = sum(p.nbytes for p in parameters)
    seconds = {rows: step.target.seconds_of(trace) for rows, trace in traces.items()}
    tables = [_table(traces[rows], blocks, seconds[rows]) for rows in sorted(traces, reverse=True)]
    # Narrow gradients are added to wide sums when the whole chunk is done.
    narrow = any(p.is_floating_point() and p.itemsize < _NARROW_BYTES for p in parameters)
    later_tables = tables
    if not narrow:
        shared = _shared_sizes(step.declared.modules)
        # In other events of the same operations.
        later_tables = [
            _table(with_summed_gradients(traces[table.rows], lasting_bytes=shared), blocks, seconds[table.rows])
            for table in tables
        ]
    whole = traces[step.layout.rows]
    # Rows that go through a softmax leave nothing behind, and what the loss sees is as small as for one row.
    streamed = isinstance(step.declared.loss_fn, SoftmaxLoss)
    last = max(operation.step for operation in whole.operations)
    output_bytes = step.look.output_row_bytes * step.layout.rows
    return TracedWay(
        levers=levers,
        tables=tuple(tables),
        later_tables=tuple(later_tables),
        accumulator_bytes=sum(_in_blocks(max(p.itemsize, _NARROW_BYTES) * p.numel()) for p in parameters),
        chunk_seconds=_folding_seconds(step, gradient_bytes, len(parameters)),
        copied_bytes=_recurrent_bytes(step.declared.modules),
        arriving_row_bytes=0 if step.batch_stands_on_device else trees.row_bytes(step.batch, step.layout),
        output_bytes=0 if streamed else 2 * output_bytes,
        loss_bytes=0 if streamed else loss_peak_bytes(whole, round_to=CUDA_BLOCK_BYTES) + output_bytes,
        optimizer_bytes=peak_by_phase(whole, round_to=CUDA_BLOCK_BYTES).get(Phase.OPTIMIZER, 0),
        optimizer_seconds=sum(
            taken
            for operation, taken in zip(whole.operations, seconds[step.layout.rows])
            if operation.step == last and operation.phase is Phase.OPTIMIZER
        ),
        host_buffer_bytes=tuple(
            -operation.bus_bytes
            for operation in whole.operations
            if operation.step == last and operation.bus_bytes < 0 and operation.phase is not Phase.OPTIMIZER
        ),
        host_state_bytes=tuple(
            -operation.bus_bytes
            for operation in whole.operations
            if operation.step == last and operation.bus_bytes < 0 and operation.phase is Phase.OPTIMIZER
        ),
    )


def _in_blocks(size_bytes: int) -> int:
    return -(-size_bytes // CUDA_BLOCK_BYTES) * CUDA_BLOCK_BYTES


def _table(trace: Trace, blocks: Sequence[Sequence[str]], operation_seconds: Sequence[float]) -> UnitTable:
    return units_of(trace, blocks, operation_seconds, round_to_bytes=CUDA_BLOCK_BYTES)


def _folding_seconds(step: FollowedStep, gradient_bytes: int, launches: int) -> float:
    """What adding a chunk's gradients to the sums takes: read twice, written once, a launch each."""
    moving = 3 * gradient_bytes / step.target.card.bandwidth_bytes_per_second
    return max(moving, launches * step.target.calibration.launch_seconds)


def _shared_sizes(modules: Sequence[nn.Module]) -> set[int]:
    """Bytes of the parameters that are found at several places."""
    places = collections.Counter(
        id(parameter) for part in modules for _, parameter in part.named_parameters(remove_duplicate=False)
    )
    return {p.nbytes for part in modules for p in part.parameters() if places[id(p)] > 1}


def _recurrent_bytes(modules: Sequence[nn.Module]) -> int:
    """Weights that recurrent kernels lay out again where others take their place, as those of chunks do."""
    layers = {layer for part in modules for layer in part.modules() if isinstance(layer, nn.RNNBase)}
    return sum(_in_blocks(sum(parameter.nbytes for parameter in layer.parameters())) for layer in layers)
