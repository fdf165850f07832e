"""Plans in plain words: what was taken, what was not needed, and why."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from samegrad.levers import Slot, find_levers, levers_of, weakest_exactness
from samegrad.levers._variants import chunk_sizes, variant_in
from samegrad.levers.chunk_loss import ChunkLoss
from samegrad.levers.recompute import Recompute
from samegrad.levers.split_rows import SplitRows
from samegrad.plan.floor import floor_sentence
from samegrad.records import Exactness, Footprint, Plan
from samegrad.units import format_bytes, format_seconds


def explain_plan(plan: Plan, footprint: Footprint) -> str:
    """The plan in lines a tired person understands."""
    lines = []
    if plan.budget is not None:
        lines.append(f"Budget {format_bytes(plan.budget.total_bytes)} ({plan.budget.source}), "
                     f"{plan.budget.counting.value} on {plan.budget.device}.")
    plain = footprint.predicted_peak_bytes(rows=footprint.batch_rows)
    lines.append(f"The plain step on {plan.batch_rows} rows is predicted to need {format_bytes(plain)}.")
    lines += [_how(plan, footprint), *exactness_lines(plan)]
    peak = format_bytes(plan.predicted_peak_bytes) if plan.predicted_peak_bytes is not None else "unknown"
    seconds = f", {format_seconds(plan.predicted_seconds)} a step" if plan.predicted_seconds else ""
    lines.append(f"Predicted peak {peak}{seconds}, from {footprint.basis}.")
    lines += [f"{name}: {reason}." for name, reason in plan.reasons.items()]
    lines += [f"{knob}: {origin.value}." for knob, origin in plan.knob_origins.items()]
    lines += [f"{topic}: {fact}." for topic, fact in footprint.facts.items()]
    # Ways that keep less are looked at where a budget asks for them.
    lines.append(f"of the ways that were looked at, {floor_sentence(footprint)}.")
    return "\n".join(lines)


def explain_given(plan: Plan, facts: Sequence[str]) -> str:
    """A plan that nobody chose, in such lines; ``facts``: what was found of the step that it runs."""
    levers = ", ".join(f"{name} {knobs}" for name, knobs in plan.levers.items()) or "no levers"
    costs = [
        f"{lever.name}: {lever.forwards:g} forwards a row in its parts"
        for lever in levers_of(plan)
        if hasattr(lever, "forwards")
    ]
    return "\n".join([f"The plan was given, not chosen: {levers}.", *exactness_lines(plan), *costs, *facts])


def exactness_lines(plan: Plan) -> list[str]:
    """How exact the plan is and which lever decides that; nothing for a plan that is the plain step bit for bit."""
    weakest = weakest_exactness(plan)
    if weakest is Exactness.SAME_BITS:
        return []
    names = " and ".join(lever.name for lever in levers_of(plan) if lever.exactness is weakest) or "the plan itself"
    line = f"Exactness {weakest.name}, {weakest.explained()}: as exact as its weakest lever ({names})."
    if weakest is Exactness.ROUNDED:
        line += " It is verified against the plain step rounded in the same way, not against the declared one."
    return [line]


def _how(plan: Plan, footprint: Footprint) -> str:
    """How the plan runs, in a sentence."""
    slots = {name: lever.slot for name, lever in find_levers().items()}
    taken = {name: knobs for name, knobs in plan.levers.items() if slots[name] is not Slot.DATA}
    if not taken:
        return "It runs whole: the plain call, bit for bit under the same draws."
    split = next((name for name in taken if slots[name] is Slot.SPLIT), None)
    how = [] if split is None else [_in_chunks(split, taken[split], plan, footprint)]
    loss = next((f"the loss of {k['head']} {k['rows']} positions at a time" for k in _knobs(taken, ChunkLoss.name)), "")
    again = next((_again(knobs, plan, footprint) for knobs in _knobs(taken, Recompute.name)), "")
    others = " and ".join(name for name in taken if name not in (split, ChunkLoss.name, Recompute.name))
    how += filter(None, (again, loss, others and f"with {others}"))
    rows = "all rows at once" if split is None else ""
    if split is None and not again and not loss:
        return f"It runs whole, with {others}: {plan.exactness.explained()}."
    return f"It runs {f'{rows}: ' if again and rows else f'{rows}, ' if rows else ''}{', '.join(how)}; " \
        f"{plan.exactness.explained()}."


def _knobs(taken: dict[str, dict[str, Any]], name: str) -> list[dict[str, Any]]:
    return [taken[name]] if name in taken else []


def _in_chunks(name: str, knobs: dict[str, Any], plan: Plan, footprint: Footprint) -> str:
    """Rows at a time, through the whole model or in parts of it."""
    rows = knobs["rows"]
    shape = f"{rows} rows at a time" if isinstance(rows, int) else "chunks of the given sizes"
    how = _in_two_passes(knobs, footprint) if name == SplitRows.name else _in_parts(name, knobs, plan, footprint)
    return f"{shape}: {len(chunk_sizes(rows, plan.batch_rows))} chunks, {how}"


def _again(knobs: dict[str, Any], plan: Plan, footprint: Footprint) -> str:
    """Blocks that run again, beside chunks or as the one thing that is done."""
    if variant_in(plan, footprint) is not None:
        return _in_parts(Recompute.name, knobs, plan, footprint)
    blocks = [name for entry in knobs["blocks"] for name in ([entry] if isinstance(entry, str) else entry)]
    return f"{len(blocks)} {'block runs' if len(blocks) == 1 else 'blocks run'} again in backward"


def _in_two_passes(knobs: dict[str, Any], footprint: Footprint) -> str:
    kept = knobs.get("kept_chunks", 0)
    again = f", {kept} of them keep their graph from the first" if kept else ""
    return f"{footprint.forwards_per_step} {'pass' if footprint.forwards_per_step == 1 else 'passes'}{again}"


def _in_parts(name: str, knobs: dict[str, Any], plan: Plan, footprint: Footprint) -> str:
    variant = variant_in(plan, footprint)
    scheme = ", ".join(f"{knob} {value}" for knob, value in knobs.items() if knob != "rows" and _is_short(value))
    cost = f", {variant.forwards_per_step:g} forwards a row" if variant is not None else ""
    return f"parts of the model by {name}{f' ({scheme})' if scheme else ''}{cost}"


def _is_short(value: Any) -> bool:
    return isinstance(value, (str, int))
