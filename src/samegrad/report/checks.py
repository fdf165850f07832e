"""The checks of a verdict in words: which tier of the contract each belongs to."""

from __future__ import annotations

from samegrad.records import Check, Verdict

_TIERS = {
    0: "bit for bit",
    1: "the same function",
    2: "directly in its own dtype",
    3: "rounding against float64",
}


def check_title(check: Check) -> str:
    """A check's name with its tier of the contract before it."""
    return check.name if check.tier is None else f"tier {check.tier}, {check.name}"


def describe_tiers(verdict: Verdict) -> str:
    """The tiers that were compared, in words; empty where the checks name none."""
    return ", ".join(f"{tier} {_TIERS[tier]}" for tier in verdict.tiers if tier in _TIERS)
