"""Plans in plain words: what was taken, what was not needed, what the floor is made of and how to get lower."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from samegrad.errors import IN_THE_DECLARATION
from samegrad.levers import Slot, find_levers, levers_of, weakest_exactness
from samegrad.levers._variants import chunk_sizes, variant_in
from samegrad.levers.chunk_loss import ChunkLoss
from samegrad.levers.recompute import Recompute
from samegrad.levers.split_rows import SplitRows
from samegrad.plan.margin import budget_for, usable_bytes
from samegrad.plan.options import Options
from samegrad.plan.traced import Candidate, plain_peak_bytes, traced_candidates
from samegrad.records import Budget, Category, Exactness, Footprint, PhaseLaw, Plan, Variant
from samegrad.units import format_bytes, format_seconds

# Of the budget, from which on it is worth saying how less would be kept for the whole batch.
_SHARE_OF_KEPT = 0.1
_FLOOR = (Category.PARAMETERS, Category.GRADIENTS, Category.OPTIMIZER_STATE, Category.BUFFERS)


def floor_bytes(footprint: Footprint) -> int:
    """Bytes of the smallest plan: everything resident and one row at a time, or what else was probed or followed."""
    followed = _smallest_followed(footprint)
    smallest = list(ChunkLoss.smallest(footprint)) + ([] if followed is None else [followed.peak_bytes])
    smallest += [_smallest_bytes(footprint, variant) for variant in footprint.variants]
    rows = 1 if _splits(footprint) else footprint.batch_rows
    return min([footprint.predicted_peak_bytes(rows=rows), *smallest])


def _splits(footprint: Footprint) -> bool:
    return SplitRows.refusal(footprint) is None and bool(footprint.laws)


def _smallest_bytes(footprint: Footprint, variant: Variant) -> int:
    return max(law.peak_bytes(rows=1, batch_rows=footprint.batch_rows) for law in variant.laws)


def floor_sentence(footprint: Footprint, budget: Budget | None = None) -> str:
    """What the smallest plan needs and what that is made of, and what of ``budget`` is not for it."""
    floor = floor_bytes(footprint)
    resident = {category: footprint.resident_bytes.get(category, 0) for category in _FLOOR}
    parts = [f"{category.value.replace('_', ' ')} {format_bytes(n)}" for category, n in resident.items() if n]
    rest = floor - sum(resident.values())
    followed = _smallest_followed(footprint)
    beside = "one row and what stays beside it"
    if followed is not None and followed.peak_bytes == floor:
        beside = f"activations and temporaries {_by_levers(followed)}"
    elif _splits(footprint):
        # Beside a split there is one other way: all rows at once, blocks run again.
        again = [v.lever for v in footprint.variants if _smallest_bytes(footprint, v) == floor]
        beside = f"activations and temporaries with {again[0]}" if again else beside
    parts.append(f"{beside} {format_bytes(max(rest, 0))}")
    sentence = f"the smallest plan needs {format_bytes(floor)}: " + ", ".join(parts)
    if budget is None or floor > budget.total_bytes:
        return sentence
    left = format_bytes(budget.total_bytes - usable_bytes(budget))
    return f"{sentence}; of the budget {left} are left for gaps between tensors and for what libraries take"


def _smallest_followed(footprint: Footprint) -> Candidate | None:
    return min(traced_candidates(footprint, Options()), key=lambda candidate: candidate.peak_bytes, default=None)


def _by_levers(candidate: Candidate) -> str:
    if not candidate.levers:
        return "of the plain step"
    return f"with {' and '.join(lever.name for lever in candidate.levers)}"


def ways_down(footprint: Footprint, budget: Budget) -> str:
    """The three cheapest ways to fit, each with its bytes; those that need another declaration come last."""
    floor = floor_bytes(footprint)
    state = footprint.resident_bytes.get(Category.OPTIMIZER_STATE, 0)
    parameters = footprint.resident_bytes.get(Category.PARAMETERS, 0)
    declaring = _ways_to_keep_less(footprint, budget)
    if state:
        declaring.append(
            f"an optimizer with less state (SGD without momentum holds none: {format_bytes(state)} less)"
        )
    ways = [f"raise the budget to {format_bytes(budget_for(floor, budget.counting))}"]
    if SplitRows.refusal(footprint) is not None:
        plain_row = _plain_row_bytes(footprint)
        ways.append(f"a smaller batch ({format_bytes(plain_row)} a row, and it is another step)")
    else:
        both = format_bytes(2 * parameters)
        ways.append(f"a smaller model (parameters and gradients take {both}, and it is another one)")
    # Where two declarations help, what makes another step of it can wait.
    ways = ways[: max(1, 3 - len(declaring))]
    if declaring:
        declaring[0] = f"{IN_THE_DECLARATION}: {declaring[0]}"
    return "; ".join((ways + declaring)[:3])


def _plain_row_bytes(footprint: Footprint) -> float:
    """What one more row adds to the peak of the plain step."""
    slope = max((law.per_chunk_row_bytes for law in footprint.plain_laws), default=0.0)
    if slope or not footprint.traced or len(footprint.traced[0].tables) == 1:
        return slope
    most, *_, fewest = footprint.traced[0].tables
    return (plain_peak_bytes(most) - plain_peak_bytes(fewest)) / (most.rows - fewest.rows)


def _ways_to_keep_less(footprint: Footprint, budget: Budget) -> list[str]:
    """Where what is there for the whole batch takes its share of the budget, in two passes or in a coupled model."""
    ways = [footprint.laws] if footprint.laws else [variant.laws for variant in footprint.variants]
    laws = min(ways, key=_kept_bytes(footprint), default=())
    rows = footprint.batch_rows
    largest = max(laws, key=lambda law: law.kept_bytes(rows), default=None)
    if largest is None or largest.kept_bytes(rows) <= _SHARE_OF_KEPT * budget.total_bytes:
        return []
    if (pairs := largest.per_row_pair_bytes * rows**2) > largest.per_batch_row_bytes * rows:
        return [f"sg.over for what compares all rows with all, some at a time, instead of {format_bytes(pairs)}"]
    kept = format_bytes(largest.kept_bytes(rows))
    if not footprint.laws:
        return [f"segments= that take in more of the model, so that less of the {kept} between them is kept"]
    return [
        f"normalise= if the loss is a sum over rows over a count, so that {kept} of output rows need not be kept",
        f"a loss computed inside the model or a sg.rowwise function, so that its few numbers a row are kept "
        f"instead of {kept} of outputs",
    ]


def _kept_bytes(footprint: Footprint) -> Callable[[Sequence[PhaseLaw]], float]:
    return lambda laws: max(law.kept_bytes(footprint.batch_rows) for law in laws)


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
