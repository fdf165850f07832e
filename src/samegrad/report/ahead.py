"""What is said of a plan for a card that may be elsewhere: every amount predicted, and what that rests on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from samegrad.records import Footprint, Plan
from samegrad.report.words import clean_line, format_percent
from samegrad.units import format_bytes, format_seconds


def ahead_lines(plan: Plan, predicted: Footprint, card: Mapping[str, Any]) -> list[str]:
    """Lines for a terminal. ``card``: its name, memory, context and calibration, as the command's JSON has them."""
    smallest, steady = predicted.smallest_cap_bytes, predicted.steady_cap_bytes
    gives_back = "runs at all, but gives memory back and takes it again"
    amounts: list[tuple[str, int | None, str]] = [
        ("peak allocated", predicted.peak_allocated_bytes, "tensors and the libraries' workspaces"),
        ("peak reserved", predicted.peak_reserved_bytes, "by the allocator, where nothing limits it"),
        ("steady cap", steady, _against_budget(plan, predicted)),
        ("smallest cap", smallest, "runs at all, and as freely" if smallest == steady else gives_back),
        ("beside it", card["context_bytes"], f"driver and kernels, in no budget ({card['context_basis']})"),
    ]
    known = [(name, format_bytes(amount), what) for name, amount, what in amounts if amount is not None]
    if predicted.seconds is not None:
        known.append(("time of a step", format_seconds(predicted.seconds), ""))
    name_columns, amount_columns = (max(len(row[place]) for row in known) for place in (0, 1))
    lines = [f"Predicted for {card['name']}, not measured:"]
    lines += [f"  {name:<{name_columns}}  {amount:>{amount_columns}}  {what}".rstrip() for name, amount, what in known]
    return [*lines, *_basis_lines(predicted, card)]


def _against_budget(plan: Plan, predicted: Footprint) -> str:
    what = "the least under which steps run freely"
    if plan.budget is None or predicted.steady_cap_bytes is None:
        return what
    share = format_percent(predicted.steady_cap_bytes / plan.budget.total_bytes)
    return f"{what}: {share} of the budget"


def _basis_lines(predicted: Footprint, card: Mapping[str, Any]) -> list[str]:
    calibrated = "calibrated" if card["calibrated"] else "uncalibrated: no such card was measured, times are a guess"
    memory = f"{format_bytes(card['memory_bytes'])} {card['memory_basis']}"
    lines = [f"{card['name']} has {memory}; {calibrated}.", clean_line(f"From {predicted.basis}.")]
    return lines + [clean_line(f"{topic}: {fact}.") for topic, fact in predicted.facts.items()]
