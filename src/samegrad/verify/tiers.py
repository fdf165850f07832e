"""The tiers of the contract, one comparison after another, on the rows of a bench.

0  bit for bit: which parameters have a gradient, whether a scaler would skip, buffers, generators, the second pass
1  the same function, in float64 or float32, where no half-percent error can hide
2  directly, in the precision that runs
3  no further from float64 than the plain step is
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch

from samegrad.errors import GradientsDiffer
from samegrad.exact.float64 import float64_declared, widened
from samegrad.exact.undisturbed import Generators, ModuleState, step_undisturbed
from samegrad.levers import levers_of
from samegrad.measure import counters
from samegrad.module_walk import convolves
from samegrad.records import Check, Departure, Exactness
from samegrad.verify import tolerance
from samegrad.verify.compare import (
    Allowance,
    Gradients,
    Unrest,
    bits_check,
    check_of,
    differences_of,
    largest_error,
    no_further_from_float64,
    norm_of,
    same_bits,
    same_finiteness,
    same_parameters,
)
from samegrad.verify.fewer import promising_bits
from samegrad.verify.float64_run import Float64Run, repeatable, widened_if_needed
from samegrad.verify.kept import Kept
from samegrad.verify.precision import uses_batch_statistics
from samegrad.verify.sides import Bench, Planned, plain_gradients
from samegrad.verify.state import LeftBehind, judged_again
from samegrad.verify.tolerance import Precision
from samegrad.verify.twin import NarrowestSeen, float64_twin
from samegrad.verify.unrest import own_unrest, sums_apart, unrest_of

PLAIN_TWICE = "plain run twice"
SECOND_PASS = "second pass"
KEPT_BITS = "levers that promise bits"
_REPEATS = "rows computed again are the first pass's bit for bit"
# A GradScaler's first loss scale; what overflows under it is tried with less.
_LARGEST_LOSS_SCALE = 2.0**16


@dataclasses.dataclass(frozen=True)
class Compared:
    """The checks that were made, and the precision in which gradients were compared entry by entry.

    ``draws``: the plain step advances a random generator. ``narrowed_by``: what keeps gradients from being compared in
    float64. ``exactly``: gradients and loss are those of the reference bit for bit. ``departure``: how far the
    declared step is, where the reference rounds otherwise.
    """

    checks: list[Check]
    precision: Precision
    parameters: int
    buffers: int
    draws: bool = False
    narrowed_by: str = ""
    exactly: bool = False
    departure: Departure | None = None


def compare(planned: Planned, rows: Any) -> Compared:
    """All tiers that can run, against the plain step on the same device. Nothing of the user's changes."""
    declared, precision = planned.declared, planned.precision
    with step_undisturbed(declared) as (generators, state), Kept.under(planned.plan, declared) as kept:
        bench = Bench(generators, state, rows)
        planned, plain = _with_reference(planned, bench)
        draws = bool(generators.advanced())
        left = LeftBehind.after(declared, state)
        exactly, departure = False, None
        try:
            ours = bench.run(planned.gradients)
            exactly = same_bits(plain, ours)
            # Where nothing is split, no addition has another order.
            behind = (dataclasses.replace(left, sums={}) if exactly and planned.split is None else left).checks(
                precision, lambda: sums_apart(planned, bench, left)
            )
            departure = _departure(planned, bench, ours)
            judged = _judge(planned, bench, (plain, ours), precision)
            checks = judged.checks + _directly(behind, judged, precision)
        except GradientsDiffer as difference:
            judged = _Judged([bits_check(SECOND_PASS, [difference.found], _REPEATS)], precision)
            checks = judged.checks
        checks = checks + kept.checks()
    buffers = sum(1 for module in declared.modules for _ in module.buffers())
    return Compared(
        checks, judged.precision, len(plain.by_name), buffers, draws, judged.narrowed_by, exactly, departure
    )


def _directly(behind: Sequence[Check], judged: _Judged, precision: Precision) -> list[Check]:
    """The state left in ``precision``. Where it was proven in float64, only rounding chose what else was added up."""
    if not judged.state_proven or all(check.passed for check in behind):
        return [*behind]
    return judged_again(behind, precision, judged.direct or precision, least=tolerance.LARGEST_DIRECT_UNREST)


def _with_reference(planned: Planned, bench: Bench) -> tuple[Planned, Gradients]:
    """The reference's gradients; in float16 under the largest loss scale that leaves them finite."""
    scale = _LARGEST_LOSS_SCALE if planned.rounding.dtype is torch.float16 else 1.0
    while True:
        planned = dataclasses.replace(planned, loss_scale=scale)
        plain = bench.run(planned.reference)
        if scale == 1 or all(bool(torch.isfinite(g).all()) for g in plain.by_name.values() if g is not None):
            return planned, plain
        scale /= 2


def _departure(planned: Planned, bench: Bench, ours: Gradients) -> Departure | None:
    """How far the declared step is from the planned one, where the plan rounds otherwise."""
    if planned.rounding.dtype is None:
        return None
    declared = bench.run(lambda rows: plain_gradients(planned.declared.as_plain, rows, planned.sites))
    size = norm_of([g for g in declared.by_name.values() if g is not None]) or 1.0
    return Departure(
        levers=tuple(lever.name for lever in levers_of(planned.plan) if lever.exactness >= Exactness.ROUNDED),
        gradient_norm_fraction=norm_of(differences_of(declared.by_name, ours.by_name)) / size,
        loss_fraction=abs(declared.loss - ours.loss) / (abs(declared.loss) or 1.0),
    )


def compare_with_cpu(planned: Planned, rows: Any) -> list[Check]:
    """Tiers 0 and 1 in float64 on ``rows``, the plain step on the CPU; raises what copies in float64 raise."""
    cpu = torch.device("cpu")
    twin = float64_twin(planned)
    reference = dataclasses.replace(planned, declared=float64_declared(planned.declared, cpu), split=None, by_rows=None)
    wide = widened(rows)
    generators = Generators(planned.declared.device)
    plain_bench = Bench(generators, ModuleState.of(reference.declared), wide)
    our_bench = Bench(generators, ModuleState.of(twin.declared), wide)
    with step_undisturbed(planned.declared), repeatable(planned.declared):
        plain = plain_bench.run(reference.reference)
        ours = our_bench.run(twin.handed_over).on(cpu)
        allowance = dataclasses.replace(
            _allowance(1, tolerance.precision_of(torch.float64), planned), place=", against the cpu"
        )
        logic = widened_if_needed(plain, ours, allowance, lambda: unrest_of(reference, plain_bench, plain))
    return [same_parameters(plain, ours), *logic]


@dataclasses.dataclass(frozen=True)
class _Judged:
    """The checks of a step's gradients, the precision that its logic was judged in, and why not in float64.

    ``state_proven``: sums that the step updates were those of the plain step in that precision. ``direct``: the
    coarsest precision that was seen inside the step as it runs, where that was looked for.
    """

    checks: list[Check]
    precision: Precision
    narrowed_by: str = ""
    state_proven: bool = False
    direct: Precision | None = None

    def beside(self, *, before: Sequence[Check] = (), after: Sequence[Check] = ()) -> _Judged:
        return dataclasses.replace(self, checks=[*before, *self.checks, *after])


def _judge(
    planned: Planned, bench: Bench, sides: tuple[Gradients, Gradients], precision: Precision
) -> _Judged:
    plain, ours = sides
    present = [same_parameters(plain, ours), same_finiteness(plain, ours)]
    if planned.split is None and promises_bits(planned):
        checks = [_spread(PLAIN_TWICE, bench, planned, sides), *present]
        if same_bits(plain, ours) or planned.is_plain_call:
            return _Judged(checks, precision)
        # Plain calls differ by themselves, and behind that a lever could hide something.
        return _judge_by_tiers(planned, bench, sides, precision).beside(before=checks)
    judged = _judge_by_tiers(planned, bench, sides, precision).beside(before=present)
    if (promised := promising_bits(planned)) is not None:
        again = bench.run(promised.bare_gradients)
        if planned.declared.plain_forward is not None:
            # The step that they are taken in is the forward's own.
            promised = dataclasses.replace(
                promised, declared=dataclasses.replace(planned.declared, plain_forward=None)
            )
            plain = bench.run(promised.reference)
        judged = judged.beside(after=[_spread(KEPT_BITS, bench, promised, (plain, again))])
    return judged


def promises_bits(planned: Planned) -> bool:
    """Whether every lever that does not round promises the bits of the step it is taken in.

    A forward that is compared with another one may add up in another order.
    """
    return planned.declared.plain_forward is None and all(
        lever.exactness is Exactness.SAME_BITS or lever.exactness >= Exactness.ROUNDED
        for lever in levers_of(planned.plan)
    )


def _spread(name: str, bench: Bench, planned: Planned, sides: tuple[Gradients, Gradients]) -> Check:
    """Bit for bit, or within what plain calls differ by among themselves."""
    plain, ours = sides
    error, worst = _apart(plain, ours)
    allowed, levers = 0.0, ", ".join(planned.plan.levers)
    detail = f"{levers or 'the plain call'}, on all rows at once: bit for bit {planned.rounding.plain_step}"
    if error != 0:
        spread = max(_apart(plain, bench.run(planned.reference))[0] for _ in range(2))
        if not planned.plan.levers:
            spread = max(spread, error)
        allowed = tolerance.entry_allowed(planned.precision)
        if counters.retries(planned.declared.device) and convolves(planned.declared.modules):
            # It remembers which kernel it took.
            detail += " could not be asked: memory was short once, and cuDNN takes other kernels then"
        else:
            allowed = min(tolerance.UNREST_RATIO * spread, allowed)
            detail += f" was asked; plain calls differ by up to {spread:.2g}"
    return dataclasses.replace(check_of(name, error, allowed, worst), detail=detail, tier=0)


def _apart(plain: Gradients, ours: Gradients) -> tuple[float, str]:
    """The largest difference of an entry or of the loss, relative to its scale, and the parameter it is in."""
    error, worst = largest_error(plain.by_name, ours.by_name, plain.by_name)
    of_loss = abs(plain.loss - ours.loss) / (abs(plain.loss) or 1.0)
    return (error, worst) if math.isnan(error) or of_loss <= error else (of_loss, "")


def _judge_by_tiers(
    planned: Planned, bench: Bench, sides: tuple[Gradients, Gradients], precision: Precision
) -> _Judged:
    plain, ours = sides
    # Totals raise where that is not so.
    two_passes = planned.split is not None and planned.split.examination.passes == 2
    checks = [bits_check(SECOND_PASS, [], _REPEATS)] if two_passes else []
    twin = Float64Run.run(planned, bench, plain)
    allowance = _allowance(1 if tolerance.proves_logic(precision) else 2, precision, planned)
    if isinstance(twin, str):
        narrowed_by = "" if precision.dtype is torch.float64 else twin
        return _Judged(checks + widened_if_needed(plain, ours, allowance, Unrest), precision, narrowed_by)
    if precision.dtype is torch.float64:
        handed = twin.checks(dataclasses.replace(allowance, place=", as handed over"))
        return _Judged([*checks, *widened_if_needed(plain, ours, allowance, twin.unrest), *handed], precision)
    judged_in, narrowed_by, behind = tolerance.precision_of(torch.float64), "", twin.behind
    logic = twin.checks(_allowance(1, judged_in, planned))
    if twin.narrowest is not torch.float64 and not all(check.passed for check in (*logic, *behind)):
        # Something inside computes in a narrower dtype whatever it is given, so its rounding is to be expected.
        judged_in, narrowed_by = tolerance.precision_of(twin.narrowest), twin.narrowed_by
        logic = twin.checks(_allowance(1 if tolerance.proves_logic(judged_in) else 2, judged_in, planned))
        behind = judged_again(behind, tolerance.precision_of(torch.float64), judged_in)
    direct, seen = _direct_checks(planned, bench, sides, precision), None
    if not all(check.passed for check in direct):
        seen = _coarsest_inside(planned, bench, precision)
        direct = _direct_checks(planned, bench, sides, seen)
    noise = no_further_from_float64(plain, ours, twin.plain, _allowance(2, precision, planned))
    proven = bool(behind) and all(check.passed for check in behind)
    return _Judged([*checks, *logic, *behind, *direct, noise], judged_in, narrowed_by, proven, seen)


def _direct_checks(
    planned: Planned, bench: Bench, sides: tuple[Gradients, Gradients], precision: Precision
) -> list[Check]:
    """The two sides as they run, after their logic was judged."""
    plain, ours = sides
    allowance = dataclasses.replace(
        _allowance(2, precision, planned), largest_unrest=tolerance.LARGEST_DIRECT_UNREST
    )
    return widened_if_needed(plain, ours, allowance, lambda: own_unrest(planned, bench, plain))


def _coarsest_inside(planned: Planned, bench: Bench, precision: Precision) -> Precision:
    """The precision that the plain step computes in where it is coarsest: the user's forward may open autocast."""
    seen = NarrowestSeen()

    def watched(rows: Any) -> Gradients:
        with seen:
            return planned.reference(rows)

    bench.run(watched)
    inside = tolerance.precision_of(seen.dtype)
    return inside if inside.roundoff > precision.roundoff else precision


def _allowance(tier: int, precision: Precision, planned: Planned) -> Allowance:
    statistics = uses_batch_statistics(planned.declared)
    return Allowance(
        tier=tier,
        precision=precision,
        norm_constant=tolerance.BATCH_STATISTICS_NORM_CONSTANT if statistics else tolerance.NORM_CONSTANT,
        lost=tolerance.subnormal_loss(precision.dtype, len(planned.parts), planned.loss_scale),
    )
