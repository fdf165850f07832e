"""A table of units at any number of rows, from tables at two, where every entry is affine in the rows.

That holds for measured tables where activations decide every peak. Where traces are at hand, ``trace_laws`` puts their
storages on lines instead, which holds at any rows.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from samegrad.errors import BadInput
from samegrad.measure.affine import value_at
from samegrad.unit_tables import Unit, UnitTable

_BYTES = tuple(field.name for field in dataclasses.fields(Unit) if field.name.endswith("_bytes"))
_SECONDS = tuple(field.name for field in dataclasses.fields(Unit) if field.name.endswith("_seconds"))
_SAME = tuple(field.name for field in dataclasses.fields(Unit) if field.name not in _BYTES + _SECONDS)
# Of the largest entry of the same kind: what a small unit is off by decides nothing.
_AFFINE_WITHIN = 0.01


def units_at(low: UnitTable, high: UnitTable, rows: int, *, check: UnitTable | None = None) -> UnitTable:
    """The table at ``rows``, from one at few and one at more. Bytes are rounded up, seconds never below 0.

    ``check``: a third table, which the other two must predict to a hundredth of each column's largest entry in bytes.
    Seconds are not checked: what a kernel takes at few rows is not affine.

    Raises BadInput for tables of different units or of the same rows, and, with the unit and the column, for a third
    one that is not on the line.
    """
    for table in (low, high) if check is None else (low, high, check):
        if [_same(unit) for unit in table.units] != [_same(unit) for unit in low.units]:
            raise BadInput(
                asked=f"units at {rows} rows", found=f"other units at {table.rows} rows than at {low.rows}",
                do="plan for this number of rows from a trace of its own: the step branches on its rows",
            )  # fmt: skip
    if low.rows == high.rows:
        raise BadInput(
            asked=f"units at {rows} rows", found=f"both tables are at {low.rows} rows",
            do="trace the step at two numbers of rows",
        )  # fmt: skip
    if check is not None:
        _check_affine(low, high, check)
    return _interpolated(low, high, rows)


def _interpolated(low: UnitTable, high: UnitTable, rows: int) -> UnitTable:
    def between(a: float, b: float) -> float:
        return a + (b - a) * (rows - low.rows) / (high.rows - low.rows)

    def at(few: int, many: int) -> int:
        return value_at(rows, (low.rows, few), (high.rows, many))

    units = []
    for a, b in zip(low.units, high.units):
        found: dict[str, Any] = {name: max(0.0, between(getattr(a, name), getattr(b, name))) for name in _SECONDS}
        # In whole numbers, so that a table of bytes that is affine comes out to the byte.
        found |= {name: at(getattr(a, name), getattr(b, name)) for name in _BYTES}
        units.append(dataclasses.replace(a, **found))
    resident_bytes = at(low.resident_bytes, high.resident_bytes)
    return UnitTable(rows=rows, resident_bytes=resident_bytes, units=tuple(units))


def _same(unit: Unit) -> tuple[object, ...]:
    return tuple(getattr(unit, name) for name in _SAME)


def _check_affine(low: UnitTable, high: UnitTable, check: UnitTable) -> None:
    predicted = _interpolated(low, high, check.rows)
    for name in _BYTES:
        scale = max(abs(getattr(unit, name)) for unit in check.units)
        for index, (expected, unit) in enumerate(zip(predicted.units, check.units)):
            difference = abs(getattr(expected, name) - getattr(unit, name))
            if difference > math.ceil(_AFFINE_WITHIN * scale):
                raise BadInput(
                    asked=f"units at {check.rows} rows from those at {low.rows} and {high.rows}",
                    found=f"{name} of unit {index} ({unit.name or 'between blocks'}) is {getattr(unit, name)} and not "
                    f"{getattr(expected, name)}: it is not affine in the rows",
                    do="trace the step at rows nearer to those that run",
                )
