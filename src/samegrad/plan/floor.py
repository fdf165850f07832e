"""Below the floor: what the smallest plan is made of, and the cheapest ways down. Every refusal tells it from here."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from samegrad.errors import IN_THE_DECLARATION, BudgetTooSmall
from samegrad.levers.chunk_loss import ChunkLoss
from samegrad.levers.split_rows import SplitRows
from samegrad.plan.margin import budget_for, followed_reserve_sentence, reserve_sentence
from samegrad.plan.options import Options
from samegrad.plan.traced import Candidate, plain_peak_bytes, traced_candidates
from samegrad.records import Budget, Category, Counting, Footprint, PhaseLaw, Variant
from samegrad.units import format_bytes

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


@dataclasses.dataclass(frozen=True)
class Smallest:
    """The smallest plan that was followed whole, by its levers, with what is predicted under it."""

    levers: str
    predicted: Footprint


def floor_sentence(footprint: Footprint, budget: Budget | None = None, smallest: Smallest | None = None) -> str:
    """What the smallest plan needs and what that is made of, and what of ``budget`` is kept in reserve.

    ``smallest``: what is known better than by laws, where it was followed.
    """
    if smallest is not None:
        return _followed_sentence(smallest, budget)
    floor = floor_bytes(footprint)
    resident = {category: footprint.resident_bytes.get(category, 0) for category in _FLOOR}
    followed = _smallest_followed(footprint)
    beside = "one row and what stays beside it"
    if followed is not None and followed.peak_bytes == floor:
        beside = f"activations and temporaries {_by_levers(followed)}"
    elif _splits(footprint):
        # Beside a split there is one other way: all rows at once, blocks run again.
        again = [v.lever for v in footprint.variants if _smallest_bytes(footprint, v) == floor]
        beside = f"activations and temporaries with {again[0]}" if again else beside
    sentence = f"the smallest plan needs {format_bytes(floor)}: {_made_of(floor, resident, beside)}"
    # Counted bytes are what they are: the reserve is worth a word where it alone is why nothing fits.
    if budget is None or (budget.counting is not Counting.CUDA_ALLOCATOR and floor > budget.total_bytes):
        return sentence
    return f"{sentence}; {reserve_sentence(budget)}"


def _followed_sentence(smallest: Smallest, budget: Budget | None) -> str:
    predicted = smallest.predicted
    cap, tensors = predicted.steady_cap_bytes or 0, predicted.peak_allocated_bytes
    resident = {category: predicted.by_category.get(category, 0) for category in _FLOOR}
    beside = f"activations, temporaries and libraries' workspaces with {smallest.levers}"
    made_of = _made_of(tensors, resident, beside)
    gaps = f"gaps between tensors {format_bytes(max(cap - tensors, 0))}"
    sentence = f"the smallest plan needs {format_bytes(cap)} on {predicted.device}: {made_of}, {gaps}"
    return sentence if budget is None else f"{sentence}; {followed_reserve_sentence(budget)}"


def _made_of(total: int, resident: Mapping[Category, int], beside: str) -> str:
    parts = [f"{category.value.replace('_', ' ')} {format_bytes(n)}" for category, n in resident.items() if n]
    return ", ".join([*parts, f"{beside} {format_bytes(max(total - sum(resident.values()), 0))}"])


def below_floor(
    footprint: Footprint,
    budget: Budget,
    *,
    smallest: Smallest | None = None,
    needed_bytes: int | None = None,
    found: str = "",
) -> BudgetTooSmall:
    """The one refusal of a budget that no plan fits: what the floor is made of, and the cheapest ways down.

    ``needed_bytes``: a budget that is known to be enough, where something was followed or measured; ``found``: what
    else was seen.
    """
    return BudgetTooSmall(
        asked=f"a plan within {format_bytes(budget.total_bytes)} ({budget.source})",
        found="; ".join(filter(None, (floor_sentence(footprint, budget, smallest), found))),
        do=ways_down(footprint, budget, needed_bytes),
        option="--budget",
    )


def _smallest_followed(footprint: Footprint) -> Candidate | None:
    return min(traced_candidates(footprint, Options()), key=lambda candidate: candidate.peak_bytes, default=None)


def _by_levers(candidate: Candidate) -> str:
    if not candidate.levers:
        return "of the plain step"
    return f"with {' and '.join(lever.name for lever in candidate.levers)}"


def ways_down(footprint: Footprint, budget: Budget, needed_bytes: int | None = None) -> str:
    """A budget that is enough, and the three cheapest ways down, each with its bytes.

    Those that need another declaration come last: whoever cannot declare the step otherwise is not told of them.
    ``needed_bytes``: that budget, where it is known better than by laws.
    """
    floor = floor_bytes(footprint)
    state = footprint.resident_bytes.get(Category.OPTIMIZER_STATE, 0)
    parameters = footprint.resident_bytes.get(Category.PARAMETERS, 0)
    declaring = _ways_to_keep_less(footprint, budget)
    if state:
        declaring.append(
            f"an optimizer with less state (SGD without momentum holds none: {format_bytes(state)} less)"
        )
    ways = [f"raise the budget to {format_bytes(needed_bytes or budget_for(floor, budget.counting))}"]
    both = format_bytes(2 * parameters)
    smaller_model = f"a smaller model (parameters and gradients take {both}, and it is another one)"
    is_of_all_rows = SplitRows.refusal(footprint) is not None
    if is_of_all_rows:
        plain_row = _plain_row_bytes(footprint)
        ways.append(f"a smaller batch ({format_bytes(plain_row)} a row of the plain step, and it is another step)")
    if not is_of_all_rows or not declaring:
        ways.append(smaller_model)
    if declaring:
        declaring[0] = f"{IN_THE_DECLARATION}: {declaring[0]}"
    return "; ".join((ways + declaring)[:4])


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
