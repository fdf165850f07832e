"""Traces at other rows: storages on their lines, peaks read off afterwards, and what does not do the same refused."""

from __future__ import annotations

import dataclasses

import pytest

from samegrad.errors import BadInput
from samegrad.measure.events import MemoryEvent, Operation, Trace
from samegrad.measure.trace_laws import trace_at
from samegrad.measure.units import units_of
from samegrad.records import Category, Phase


def trace_on(rows: int, *, pairs: int = 0, name: str = "aten.addmm.default") -> Trace:
    """A block whose backward makes a weight's gradient of 500 bytes, then one of its input, 7 bytes a row.

    ``pairs``: bytes that the loss holds for each pair of rows.
    """
    phases = [Phase.FORWARD, Phase.LOSS, Phase.BACKWARD, Phase.BACKWARD, Phase.BACKWARD]
    modules = ["block", "", "", "block", "block"]
    operations = tuple(
        Operation(name, module, phase, 1, 30 * rows, 1000 + 9 * rows, "float32", 1)
        for phase, module in zip(phases, modules)
    )
    takes = [
        (-1, 100, Category.PARAMETERS), (0, 5 * rows, Category.ACTIVATIONS),
        (1, 4 + pairs * rows**2, Category.ACTIVATIONS), (2, 3 * rows, Category.TEMPORARY), (3, 500, Category.TEMPORARY),
        (4, 7 * rows, Category.TEMPORARY),
    ]  # fmt: skip
    events = [MemoryEvent(storage, size, at, category) for storage, (at, size, category) in enumerate(takes)]
    given = MemoryEvent(4, -500, 3, Category.TEMPORARY)
    return Trace(operations, (*events[:5], given, *events[5:]), "cpu", rows, (rows,))


@pytest.mark.parametrize("rows", [1, 2, 3, 17, 64, 1001])
def test_a_step_that_is_affine_comes_out_whole(rows: int) -> None:
    found = trace_at(trace_on(2), trace_on(5), rows, check=trace_on(40))
    assert found == trace_on(rows)
    assert trace_at(trace_on(5), trace_on(2), rows) == found


def test_a_line_through_peaks_would_mislead_where_lines_through_storages_hold() -> None:
    low, high, many = (units_of(trace_on(rows), ["block"], [0.0] * 5) for rows in (2, 5, 200))
    # 500 bytes of a weight's gradient at few rows, 1400 of the input's at many.
    extras = [table.units[0].backward_extra_bytes for table in (low, high, many)]
    assert extras[2] != extras[0] + (extras[1] - extras[0]) * (200 - 2) / (5 - 2)
    assert units_of(trace_at(trace_on(2), trace_on(5), 200), ["block"], [0.0] * 5) == many


def test_a_planted_loss_over_pairs_of_rows_is_refused_with_its_place() -> None:
    low, high, third = (trace_on(rows, pairs=1) for rows in (2, 5, 40))
    with pytest.raises(BadInput, match=r"aten\.addmm\.default in the step has 1604 bytes and not 274: .*not affine"):
        trace_at(low, high, 10, check=third)


def test_another_operation_is_refused_by_name() -> None:
    with pytest.raises(BadInput, match=r"aten\.addmm\.default in block or aten\.mm\.default in block"):
        trace_at(trace_on(2), trace_on(5, name="aten.mm.default"), 3)


def test_fewer_events_are_refused() -> None:
    high = trace_on(5)
    with pytest.raises(BadInput, match="7 or 6 events"):
        trace_at(trace_on(2), dataclasses.replace(high, events=high.events[:-1]), 3)


def test_memory_given_back_elsewhere_is_refused() -> None:
    high = trace_on(5)
    moved = high.events[5]._replace(operation=4)
    with pytest.raises(BadInput, match=r"otherwise in aten\.addmm\.default in block"):
        trace_at(trace_on(2), dataclasses.replace(high, events=(*high.events[:5], moved, *high.events[6:])), 3)


def test_chunks_and_equal_rows_are_refused() -> None:
    with pytest.raises(BadInput, match="in chunks"):
        trace_at(trace_on(2), dataclasses.replace(trace_on(5), sizes=(3, 2)), 3)
    with pytest.raises(BadInput, match="both traces are on 5 rows"):
        trace_at(trace_on(5), trace_on(5), 3)
