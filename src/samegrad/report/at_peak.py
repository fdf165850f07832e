"""What lives at the peak of a step, largest first: as rows of a table, and as lines for a terminal."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from samegrad.records import Category, Footprint, LiveTensors, Phase
from samegrad.report.facts import category_name
from samegrad.report.module_paths import module_name
from samegrad.report.words import clean_line, format_percent
from samegrad.units import format_bytes

_MOST_ROWS = 12
_BEFORE = "there before the step"
_KEPT = "kept by cuBLAS, for each handle and stream"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PeakRow:
    what: str
    made_by: str
    amount: str
    share: str


def peak_rows(footprint: Footprint, *, most: int = _MOST_ROWS) -> list[PeakRow]:
    """The largest entries of ``at_peak``, and one row for all that is left of the peak."""
    whole = sum(footprint.by_category.values()) or footprint.peak_allocated_bytes
    shown = footprint.at_peak[:most]
    rows = [_row(_what(entry), _made_by(entry, footprint.module_classes), entry.size_bytes, whole) for entry in shown]
    rest = whole - sum(entry.size_bytes for entry in shown)
    return rows + ([_row("all else", "", rest, whole)] if rest > 0 else [])


def peak_sentence(footprint: Footprint) -> str:
    return f"{footprint.origin.value.capitalize()}; tensors that one operation of one module made stand together."


def peak_lines(footprint: Footprint, *, most: int = _MOST_ROWS) -> list[str]:
    """The same for a terminal, in columns."""
    rows = peak_rows(footprint, most=most)
    amounts, shares = max(len(row.amount) for row in rows), max(len(row.share) for row in rows)
    what = max(len(row.what) for row in rows)
    return [
        f"Live at the peak, largest first ({footprint.origin.value}):",
        *(f"  {r.amount:>{amounts}}  {r.share:>{shares}}  {r.what:<{what}}  {r.made_by}".rstrip() for r in rows),
    ]


def _row(what: str, made_by: str, amount_bytes: int, whole_bytes: int) -> PeakRow:
    share = format_percent(amount_bytes / whole_bytes) if whole_bytes else ""
    return PeakRow(what=what, made_by=clean_line(made_by), amount=format_bytes(amount_bytes), share=share)


def _what(entry: LiveTensors) -> str:
    name = category_name(entry.category)
    return name if entry.count == 1 else f"{name} ×{entry.count}"


def _made_by(entry: LiveTensors, classes: Mapping[str, str]) -> str:
    if not entry.operation:
        return _KEPT if entry.category is Category.WORKSPACES else _BEFORE
    # "aten.addmm.default" is torch's full name; its middle is what people know.
    operation = entry.operation.removeprefix("aten.").rpartition(".")[0] or entry.operation
    own = "the optimizer's turn" if entry.phase is Phase.OPTIMIZER else "the step's own code"
    module = module_name(entry.module, classes) if entry.module else own
    phase = "" if entry.phase in (None, Phase.OPTIMIZER) else f", {entry.phase.value}"
    return f"{module}: {operation}{phase}"
