"""Tables of units at other rows: affine ones come out to the byte, others are refused by unit and column."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from samegrad.errors import BadInput
from samegrad.measure.unit_laws import units_at
from samegrad.unit_tables import Unit, UnitTable

BYTES = [field.name for field in dataclasses.fields(Unit) if field.name.endswith("_bytes")]
LINES = st.tuples(st.integers(-500, 5000), st.integers(-30, 300))


def table(rows: int, lines: list[dict[str, tuple[int, int]]]) -> UnitTable:
    """Every column on its line, and seconds that do not shrink below a launch."""
    units = []
    for number, line in enumerate(lines):
        columns: dict[str, Any] = {name: fixed + per_row * rows for name, (fixed, per_row) in line.items()}
        times = {"forward_seconds": 0.5 + 0.25 * rows, "backward_seconds": 0.75 * rows}
        units.append(Unit(name=f"block{number}", recomputable=True, **columns, **times))
    return UnitTable(rows=rows, resident_bytes=100 + 3 * rows, units=tuple(units))


@st.composite
def lines(draw: Any) -> list[dict[str, tuple[int, int]]]:
    return [{name: draw(LINES) for name in BYTES} for _ in range(draw(st.integers(1, 3)))]


@settings(max_examples=50, deadline=None)
@given(lines=lines(), rows=st.lists(st.integers(1, 500), min_size=4, max_size=4, unique=True))
def test_tables_that_are_affine_come_out_to_the_byte(lines: list[dict[str, tuple[int, int]]], rows: list[int]) -> None:
    low, high, third, wanted = (table(n, lines) for n in rows)
    found = units_at(low, high, wanted.rows, check=third)
    assert (found.rows, found.resident_bytes) == (wanted.rows, wanted.resident_bytes)
    for one, other in zip(found.units, wanted.units):
        assert {name: getattr(one, name) for name in BYTES} == {name: getattr(other, name) for name in BYTES}
        assert one.forward_seconds == pytest.approx(other.forward_seconds)


LINE = [dict.fromkeys(BYTES, (40, 100))] * 2


def test_bytes_between_whole_numbers_are_rounded_up() -> None:
    low, high = table(2, LINE), table(5, LINE)
    units = (dataclasses.replace(high.units[0], kept_bytes=541, arrival_extra_bytes=-541), high.units[1])
    found = units_at(low, dataclasses.replace(high, units=units), 3).units[0]
    # From 240 at 2 rows to 541 at 5: 340.3 at 3; from 240 to -541: -20.3.
    assert (found.kept_bytes, found.arrival_extra_bytes) == (341, -20)


def test_seconds_are_never_below_zero() -> None:
    low, high = table(20, LINE), table(10, LINE)
    units = tuple(dataclasses.replace(unit, forward_seconds=50.0) for unit in low.units)
    assert units_at(dataclasses.replace(low, units=units), high, 1).units[0].forward_seconds == 0.0


@pytest.mark.parametrize("name", BYTES)
def test_a_planted_column_off_the_line_is_refused_with_its_unit(name: str) -> None:
    low, high, third = (table(rows, LINE) for rows in (2, 5, 30))
    planted = dataclasses.replace(third.units[1], **{name: getattr(third.units[1], name) * 51 // 50})
    with pytest.raises(BadInput, match=rf"{name} of unit 1 \(block1\).*not affine"):
        units_at(low, high, 10, check=dataclasses.replace(third, units=(third.units[0], planted)))


def test_a_small_unit_that_is_off_by_little_decides_nothing() -> None:
    low, high, third = (table(rows, LINE) for rows in (2, 5, 30))
    off = dataclasses.replace(third.units[1], kept_bytes=third.units[1].kept_bytes + 25)
    third = dataclasses.replace(third, units=(third.units[0], off))
    assert units_at(low, high, 10, check=third) == table(10, LINE)


def test_other_units_are_refused() -> None:
    low, high = table(2, LINE), table(5, LINE[:1])
    with pytest.raises(BadInput, match="other units at 5 rows than at 2"):
        units_at(low, high, 3)


def test_two_tables_at_the_same_rows_are_refused() -> None:
    with pytest.raises(BadInput, match="both tables are at 2 rows"):
        units_at(table(2, LINE), table(2, LINE), 3)
