"""Attempts that ran out of memory, in words: what was left for what, where, and what it cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from samegrad.records import Recovery
from samegrad.report.front import describe_levers
from samegrad.report.words import clean_line
from samegrad.units import format_bytes, format_seconds


def describe_recovery(recovery: Recovery) -> str:
    """One sentence, as for a log: ``out of memory in backward under ...: the same batch runs again under ...``."""
    rank = "" if recovery.rank is None else f" on rank {recovery.rank}"
    left = describe_plan_taken(recovery.left, recovery.left_predicted_bytes)
    taken = describe_plan_taken(recovery.taken, recovery.taken_predicted_bytes)
    return clean_line(
        f"out of memory{rank} in {recovery.place} under {left}; {format_seconds(recovery.seconds)} lost. The attempt "
        f"is undone, and the same batch runs again under {taken}, as later ones will"
    )


def describe_plan_taken(levers: Mapping[str, Mapping[str, Any]], predicted_bytes: int | None) -> str:
    """The levers of a plan and what it was predicted to need: ``split_rows 8 rows (predicted 1.20 GiB)``."""
    needs = "" if predicted_bytes is None else f" (predicted {format_bytes(predicted_bytes)})"
    return describe_levers(levers) + needs
