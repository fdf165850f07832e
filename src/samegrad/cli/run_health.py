"""How a run went, read from its records: each check with its number, and nothing claimed from too few steps. No torch.

Fails are facts that a run should not show; UNKNOWN says what is missing to tell.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from samegrad.cli.run_memory import SMALLER, WARM_UP_STEPS
from samegrad.cli.run_story import read_metrics, read_object, read_record
from samegrad.errors import BadInput
from samegrad.recipes import Answer, Finding, find_health
from samegrad.recipes._recipe.findings import is_slow
from samegrad.records import Plan, StepResult, timed
from samegrad.units import format_bytes, format_seconds

# Fewer steps say nothing about a trend.
FEWEST_STEPS = 6
STABLE_FRACTION = 0.02


def examine_run(folder: Path) -> tuple[Finding, ...]:
    """The findings on the run in ``folder``. Raises BadInput when it holds no run."""
    status = read_object(folder / "status.json")
    if not status:
        raise BadInput(
            asked=f"doctor --run {folder}",
            found="no status.json in it" if folder.is_dir() else "no such folder",
            do="give the folder that `samegrad run` printed",
            file=str(folder),
        )
    lines = read_metrics(folder / "metrics.jsonl")
    plan = read_record(folder / "plan.json", Plan)
    health = find_health(str(status.get("name")))
    return (
        _ended(status),
        _out_of_memory(status, lines.results),
        _within_budget(lines.results, plan),
        _stable(lines.results),
        _finite(lines.results),
        _falling(lines.results),
        _in_time(lines.results, plan),
        *(() if health is None else health.examine(folder)),
    )


def _ended(status: Mapping[str, Any]) -> Finding:
    state = str(status.get("state"))
    answer = {"done": Answer.OK, "failed": Answer.FAILS}.get(state, Answer.UNKNOWN)
    detail = f"{state}, exit code {status.get('exit_code')}" if "exit_code" in status else state
    do = "" if answer is Answer.OK else "samegrad run with --resume continues it"
    return Finding(name="ended", answer=answer, detail=detail, do=do)


def _out_of_memory(status: Mapping[str, Any], results: Sequence[StepResult]) -> Finding:
    retries = sum(result.allocator_retries or 0 for result in results)
    undone = sum(len(result.recoveries) for result in results)
    over = status.get("error_code") == "over-budget"
    short = over or retries or undone
    ended = "the run ended out of memory" if over else "none that ended the run"
    return Finding(
        name="no out-of-memory",
        answer=Answer.FAILS if short else Answer.OK,
        detail=f"{ended}; {undone} attempts undone and run again under a smaller plan; {retries} allocator retries",
        do=SMALLER if short else "",
    )


def peaks_of(results: Sequence[StepResult]) -> list[int]:
    """The peak bytes of each step that counted them, reserved ones where the device has them."""
    found = [r.peak_reserved_bytes if r.peak_reserved_bytes is not None else r.peak_allocated_bytes for r in results]
    return [peak for peak in found if peak is not None]


def _within_budget(results: Sequence[StepResult], plan: Plan | None) -> Finding:
    name, peaks = "within the budget", peaks_of(results)
    if plan is None or plan.budget is None or not peaks:
        return Finding(name=name, answer=Answer.UNKNOWN, detail="not judged, no budget or no peak was recorded")
    budget = plan.budget.total_bytes
    return Finding(
        name=name,
        answer=Answer.OK if max(peaks) <= budget else Answer.FAILS,
        detail=f"peak {format_bytes(max(peaks))} of {format_bytes(budget)} {plan.budget.counting.value}",
        do="" if max(peaks) <= budget else "report it: a plan that was accepted must hold",
    )


def _stable(results: Sequence[StepResult]) -> Finding:
    name, peaks = "memory stable", peaks_of(results[WARM_UP_STEPS:])
    # On the CPU not every step's bytes are counted; one peak shows no growth.
    if len(results) < FEWEST_STEPS or len(peaks) < 2:
        return _too_short(name, results)
    third = max(1, len(peaks) // 3)
    first, last = statistics.median(peaks[:third]), statistics.median(peaks[-third:])
    growth = last / first - 1 if first else 0.0
    return Finding(
        name=name,
        answer=Answer.OK if growth <= STABLE_FRACTION else Answer.FAILS,
        detail=f"median peak {format_bytes(first)} in the first third, {format_bytes(last)} in the last, {growth:+.1%}",
        do="" if growth <= STABLE_FRACTION else "look for losses or outputs that are kept with their graph",
    )


def _finite(results: Sequence[StepResult]) -> Finding:
    wrong = [result.index for result in results if not math.isfinite(result.loss)]
    return Finding(
        name="losses finite",
        answer=Answer.FAILS if wrong else Answer.OK if results else Answer.UNKNOWN,
        detail=f"{len(wrong)} of {len(results)} not finite" + (f", first at step {wrong[0]}" if wrong else ""),
        do="lower the learning rate, or train in float32" if wrong else "",
    )


def _falling(results: Sequence[StepResult]) -> Finding:
    name, losses = "losses falling", [result.loss for result in results if math.isfinite(result.loss)]
    if len(losses) < FEWEST_STEPS:
        return _too_short(name, results)
    third = len(losses) // 3
    first, last = statistics.median(losses[:third]), statistics.median(losses[-third:])
    return Finding(
        name=name,
        answer=Answer.OK if last < first else Answer.FAILS,
        detail=f"median {first:.4g} in the first third, {last:.4g} in the last ({len(losses)} steps)",
        do="" if last < first else "train longer, or change the learning rate",
    )


def _in_time(results: Sequence[StepResult], plan: Plan | None) -> Finding:
    name, seconds = "step time as planned", timed(results[WARM_UP_STEPS:])
    if plan is None or plan.predicted_seconds is None:
        return Finding(name=name, answer=Answer.UNKNOWN, detail="not judged, the plan predicts no time")
    if len(results) < FEWEST_STEPS or not seconds:
        return _too_short(name, results)
    median = statistics.median(seconds)
    ratio = median / plan.predicted_seconds if plan.predicted_seconds else math.inf
    slow = is_slow(median, plan.predicted_seconds)
    predicted = format_seconds(plan.predicted_seconds)
    return Finding(
        name=name,
        answer=Answer.FAILS if slow else Answer.OK,
        detail=f"median {format_seconds(median)}, {ratio:.2f} times the predicted {predicted}",
        do="see whether something else used the machine, or whether reading the data is slow" if slow else "",
    )


def _too_short(name: str, results: Sequence[StepResult]) -> Finding:
    return Finding(
        name=name,
        answer=Answer.UNKNOWN,
        detail=f"not judged, not enough epochs: {len(results)} steps, needs {FEWEST_STEPS}",
        do="train longer",
    )
