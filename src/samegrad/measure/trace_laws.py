"""A trace at any number of rows, from traces at two: the same operations, and every storage affine in the rows.

What is derived from a trace is often not affine itself: a block's backward peaks at its weight's gradient at few rows
and at an activation at many, and the allocator rounds. So the storages are put on their lines first, and everything
else is read off the trace that results.
"""

from __future__ import annotations

from samegrad.errors import BadInput
from samegrad.measure.affine import value_at
from samegrad.measure.events import MemoryEvent, Operation, Trace

# Of the largest storage: what a small one is off by decides nothing.
_AFFINE_WITHIN = 0.01


def trace_at(low: Trace, high: Trace, rows: int, *, check: Trace | None = None) -> Trace:
    """The plain step on ``rows`` rows, from traces at few rows and at more. Launches are those of the larger trace.

    ``check``: a third trace, which the other two must predict, storage by storage, to a hundredth of its largest one.
    Raises BadInput, with the module and the operation, where the traces do not do the same, where ``check`` is not on
    the lines, and for traces of steps in chunks or on equally many rows.
    """
    traces = [low, high] if check is None else [low, high, check]
    wrong = None
    if any(len(trace.sizes) > 1 for trace in traces):
        wrong = "a step in chunks"
    elif low.batch_rows == high.batch_rows:
        wrong = f"both traces are on {low.batch_rows} rows"
    else:
        wrong = next((found for trace in traces[1:] if (found := _difference(low, trace))), None)
    if wrong:
        raise BadInput(
            asked=f"the step on {rows} rows from traces on other rows", found=wrong,
            do=f"trace the step on {rows} rows itself",
        )  # fmt: skip
    if check is not None:
        _check_affine(_interpolated(low, high, check.batch_rows), check)
    return _interpolated(low, high, rows)


def _difference(one: Trace, other: Trace) -> str | None:
    """The first thing that the two do not do alike."""
    rows = f"on {one.batch_rows} rows and on {other.batch_rows}"
    for a, b in zip(one.operations, other.operations):
        if _same_operation(a) != _same_operation(b):
            return f"{a.name} in {a.module or 'the step'} or {b.name} in {b.module or 'the step'}, {rows}"
    counts = (len(one.operations), len(other.operations)), (len(one.events), len(other.events))
    if any(a != b for a, b in counts):
        return f"{counts[0][0]} or {counts[0][1]} operations, {counts[1][0]} or {counts[1][1]} events, {rows}"
    for event, twin in zip(one.events, other.events):
        if _same_event(event) != _same_event(twin):
            return f"memory is taken or given back otherwise in {_place(one, event)}, {rows}"
    return None


def _same_operation(operation: Operation) -> tuple[object, ...]:
    return operation.name, operation.module, operation.phase, operation.step, operation.dtype


def _same_event(event: MemoryEvent) -> tuple[object, ...]:
    return event.storage, event.change_bytes > 0, event.operation, event.category


def _place(trace: Trace, event: MemoryEvent) -> str:
    if event.operation < 0:
        return "what stands before the step"
    operation = trace.operations[event.operation]
    return f"{operation.name} in {operation.module or 'the step'}"


def _interpolated(low: Trace, high: Trace, rows: int) -> Trace:
    def at(few: int, many: int) -> int:
        return value_at(rows, (low.batch_rows, few), (high.batch_rows, many))

    operations = tuple(
        more._replace(
            flops=at(less.flops, more.flops),
            moved_bytes=at(less.moved_bytes, more.moved_bytes),
            bus_bytes=at(less.bus_bytes, more.bus_bytes),
        )
        for less, more in zip(low.operations, high.operations)
    )
    events = tuple(
        more._replace(change_bytes=at(less.change_bytes, more.change_bytes))
        if less.change_bytes > 0
        else more._replace(change_bytes=-at(-less.change_bytes, -more.change_bytes))
        for less, more in zip(low.events, high.events)
    )
    return Trace(operations, events, high.device, rows, (rows,), high.notes, high.pieces, high.module_classes)


def _check_affine(predicted: Trace, check: Trace) -> None:
    largest = max(abs(event.change_bytes) for event in check.events)
    for expected, event in zip(predicted.events, check.events):
        if abs(expected.change_bytes - event.change_bytes) > _AFFINE_WITHIN * largest:
            raise BadInput(
                asked=f"the step on {check.batch_rows} rows from traces on other rows",
                found=f"a storage of {_place(check, event)} has {abs(event.change_bytes)} bytes and not "
                f"{abs(expected.change_bytes)}: it is not affine in the rows",
                do="trace the step on the rows that run",
            )
