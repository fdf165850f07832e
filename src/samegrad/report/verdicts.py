"""A verdict in words: the answer with its numbers, how exact the plan was asked to be, and what was compared.

The rule: a verdict is only called "same" when it carries a finite error and no failed check, and "same gradients" only
when it was compared with the declared step.
"""

from __future__ import annotations

import math

from samegrad.records import Check, Departure, Exactness, Same, Verdict
from samegrad.report.statement import Statement, Tone
from samegrad.report.words import format_number, format_percent, format_rows

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


def judge(verdict: Verdict | None) -> Statement:
    """The headline: whether the step's gradients are the plain step's, with the numbers that say so."""
    if verdict is None:
        return Statement(
            tone=Tone.OPEN,
            answer="Not verified",
            sentence="the gradients of this step were not compared with those of the plain step",
        )
    failed = [check for check in verdict.checks if not check.passed]
    evidence = f"{_largest_error(verdict)}, {_comparison(verdict)}, {_precision(verdict)}"
    tally = _tally(verdict.checks, failed)
    if verdict.answer is Same.DIFFERS:
        at_fault = f"at fault: {verdict.fault}; " if verdict.fault else ""
        step = "the plain step" if verdict.departure is None else "its own reference"
        end = f"{at_fault}results of this plan are not those of {step}"
        return Statement(tone=Tone.BAD, answer="Not the same", sentence=f"{evidence}; {tally}{end}")
    if verdict.answer is Same.UNPROVEN:
        because = f" ({verdict.narrowed_by})" if verdict.narrowed_by else ""
        why = f"compared only in {verdict.dtype}{because}, which proves nothing by itself"
        return Statement(
            tone=Tone.OPEN,
            answer="Unproven",
            sentence=f"{why}; {tally}{_largest_error(verdict)}, {_comparison(verdict)}",
        )
    if failed:  # the rule
        return Statement(
            tone=Tone.BAD, answer="Contradictory", sentence=f"the verdict says same, but {tally}{evidence}"
        )
    if not math.isfinite(verdict.max_relative_error):  # the rule
        return Statement(
            tone=Tone.OPEN, answer="Unproven", sentence=f"the verdict says same without a finite error; {evidence}"
        )
    if verdict.departure is not None:
        sentence = f"{evidence}; {_departed(verdict.departure)}"
        return Statement(tone=Tone.GOOD, answer="Same as its own reference", sentence=sentence)
    return Statement(tone=Tone.GOOD, answer="Same gradients", sentence=evidence)


def _departed(departure: Departure) -> str:
    """How far the declared step is from one that is the same as its own reference only."""
    gradients, loss = format_percent(departure.gradient_norm_fraction), format_percent(departure.loss_fraction)
    levers = " and ".join(departure.levers)
    costs = "cost" if len(departure.levers) > 1 else "costs"
    away = f"its gradients are {gradients} away and its loss {loss}"
    return f"not the declared step: {away}, which is what {levers} {costs}"


def describe_exactness(verdict: Verdict) -> list[tuple[str, str]]:
    """How exact the plan was asked to be and was found to be, each with its name; empty for verdicts without it."""
    if verdict.asked is None:
        return []
    found = "nothing that is proven" if verdict.found is None else _named(verdict.found)
    return [("asked", _named(verdict.asked)), ("found", found)]


def _named(exactness: Exactness) -> str:
    return f"{exactness.explained()} ({exactness.name})"


def _tally(checks: tuple[Check, ...], failed: list[Check]) -> str:
    if not failed:
        return ""
    names = ", ".join(check_title(check) for check in failed[:3]) + (" …" if len(failed) > 3 else "")
    return f"{len(failed)} of {len(checks)} checks failed ({names}); "


def _largest_error(verdict: Verdict) -> str:
    error = format_number(verdict.max_relative_error)
    where = f", in {verdict.worst_parameter}" if verdict.worst_parameter else ""
    # The verdict holds no allowance of its own: it is that of the check which found this very error.
    sources = [check for check in verdict.checks if check.error == verdict.max_relative_error]
    sources.sort(key=lambda check: check.worst != verdict.worst_parameter)
    if not sources:
        return f"largest error {error}{where}"
    allowed = format_number(sources[0].allowed)
    joined = f"{error} of the allowed {allowed}" if sources[0].passed else f"{error} where {allowed} is allowed"
    return f"largest error {joined}{where}"


def _precision(verdict: Verdict) -> str:
    why = f" and not in float64 ({verdict.narrowed_by})" if verdict.narrowed_by else ""
    if verdict.compared_dtype == verdict.dtype:
        return f"in {verdict.dtype}{why}"
    return f"compared in {verdict.compared_dtype}{why} for a step that runs in {verdict.dtype}"


def _comparison(verdict: Verdict) -> str:
    rows = format_rows(verdict.rows_checked, of=verdict.batch_rows)
    return f"against {verdict.reference}, {rows}"


def share_of_allowed(check: Check) -> str:
    """The error as a share of what is allowed: ``"0.5 %"``, ``"40 times"``; empty where nothing is allowed."""
    if check.allowed == 0 or not math.isfinite(share := check.error / check.allowed):
        return ""
    return format_percent(share) if share < 10 else f"{format_number(share)} times"
