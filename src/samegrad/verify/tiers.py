"""The tiers of the contract, one comparison after another, on the rows of a bench.

0  bit for bit: which parameters have a gradient, whether a scaler would skip, buffers, generators, the second pass
1  the same function, in float64 or float32, where no half-percent error can hide
2  directly, in the precision that runs
3  no further from float64 than the plain step is
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from samegrad import trees
from samegrad.declared import DeclaredStep
from samegrad.errors import GradientsDiffer
from samegrad.exact.draw_sites import DrawSites
from samegrad.exact.mapped import ChunkedStep
from samegrad.exact.undisturbed import Generators, ModuleState, step_undisturbed
from samegrad.measure.failures import first_line, line_of
from samegrad.records import Check
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
    same_function,
    same_parameters,
)
from samegrad.verify.precision import precision_in_use, uses_batch_statistics
from samegrad.verify.sides import Bench, Planned, parameter_names, plain_gradients
from samegrad.verify.state import LeftBehind
from samegrad.verify.tolerance import Precision
from samegrad.verify.twin import NarrowestSeen, Nudge, copied, float64_declared, float64_twin, widened

PLAIN_TWICE = "plain run twice"
SECOND_PASS = "second pass"
_REPEATS = "rows computed again are the first pass's bit for bit"


@dataclasses.dataclass(frozen=True)
class Compared:
    """The checks that were made, and the precision in which gradients were compared entry by entry.

    ``draws``: the plain step advances a random generator. ``narrowed_by``: what keeps gradients from being compared in
    float64.
    """

    checks: list[Check]
    precision: Precision
    parameters: int
    buffers: int
    draws: bool = False
    narrowed_by: str = ""


def compare(planned: Planned, rows: Any) -> Compared:
    """All tiers that can run, against the plain step on the same device. Nothing of the user's changes."""
    declared = planned.declared
    precision = precision_in_use(declared)
    with step_undisturbed(declared) as (generators, state):
        bench = Bench(generators, state, rows)
        plain = bench.run(lambda rows: plain_gradients(declared, rows, planned.sites))
        draws = bool(generators.advanced())
        left = LeftBehind.after(declared, state)
        try:
            ours = bench.run(planned.gradients)
            exactly = planned.split is None and same_bits(plain, ours)
            # Where nothing is split, no addition has another order.
            behind = (dataclasses.replace(left, sums={}) if exactly else left).checks(precision)
            if planned.split is None:
                judged = _Judged([_spread(bench, planned, plain, ours)], precision)
            else:
                judged = _judge(planned, planned.split, bench, (plain, ours))
            checks = judged.checks + behind
        except GradientsDiffer as difference:
            judged = _Judged([bits_check(SECOND_PASS, [difference.found], _REPEATS)], precision)
            checks = judged.checks
    buffers = sum(1 for module in declared.modules for _ in module.buffers())
    return Compared(checks, judged.precision, len(plain.by_name), buffers, draws, judged.narrowed_by)


def compare_with_cpu(planned: Planned, rows: Any) -> list[Check]:
    """Tiers 0 and 1 in float64 on ``rows``, the plain step on the CPU; raises what copies in float64 raise."""
    cpu = torch.device("cpu")
    reference, twin = float64_declared(planned.declared, cpu), float64_twin(planned)
    wide = widened(rows)
    generators = Generators(planned.declared.device)
    plain_bench = Bench(generators, ModuleState.of(reference), wide)
    our_bench = Bench(generators, ModuleState.of(twin.declared), wide)
    with step_undisturbed(planned.declared), _no_autocast(planned.declared):
        plain = plain_bench.run(lambda rows: plain_gradients(reference, rows, planned.sites))
        ours = our_bench.run(twin.handed_over).on(cpu)
        allowance = dataclasses.replace(
            _allowance(1, tolerance.precision_of(torch.float64), planned), place=", against the cpu"
        )
        logic = _widened_if_needed(
            plain, ours, allowance, lambda: _unrest_of(reference, plain_bench, plain, planned.sites)
        )
    return [same_parameters(plain, ours), *logic]


def _spread(bench: Bench, planned: Planned, first: Gradients, second: Gradients) -> Check:
    """A plan that runs whole is the plain call; what is left to see is plain's own spread."""
    error, worst = largest_error(first.by_name, second.by_name, first.by_name)
    allowed, detail = 0.0, "the plan runs the plain call itself, bit for bit"
    if error != 0:
        others = [bench.run(lambda rows: plain_gradients(planned.declared, rows, planned.sites)) for _ in range(2)]
        spread = max(largest_error(first.by_name, other.by_name, first.by_name)[0] for other in others)
        if not planned.plan.levers:
            spread = max(spread, error)
        limit = tolerance.entry_allowed(precision_in_use(planned.declared))
        allowed = min(tolerance.UNREST_RATIO * spread, limit)
        detail = f"the plan runs the plain call itself; plain calls differ by up to {spread:.2g}"
    return dataclasses.replace(check_of(PLAIN_TWICE, error, allowed, worst), detail=detail, tier=0)


@dataclasses.dataclass(frozen=True)
class _Judged:
    """The checks of a step's gradients, the precision that its logic was judged in, and why not in float64."""

    checks: list[Check]
    precision: Precision
    narrowed_by: str = ""


def _judge(
    planned: Planned, split: ChunkedStep, bench: Bench, sides: tuple[Gradients, Gradients]
) -> _Judged:
    plain, ours = sides
    precision = precision_in_use(planned.declared)
    checks = [same_parameters(plain, ours), same_finiteness(plain, ours)]
    if split.examination.passes == 2:
        # Totals raise where that is not so.
        checks.append(bits_check(SECOND_PASS, [], _REPEATS))
    twin = _Twin.run(planned, bench, plain)
    allowance = _allowance(1 if tolerance.proves_logic(precision) else 2, precision, planned)
    if isinstance(twin, str):
        narrowed_by = "" if precision.dtype is torch.float64 else twin
        return _Judged(checks + _widened_if_needed(plain, ours, allowance, Unrest), precision, narrowed_by)
    if precision.dtype is torch.float64:
        handed = twin.checks(dataclasses.replace(allowance, place=", as handed over"))
        return _Judged([*checks, *_widened_if_needed(plain, ours, allowance, twin.unrest), *handed], precision)
    judged_in, narrowed_by = tolerance.precision_of(torch.float64), ""
    logic = twin.checks(_allowance(1, judged_in, planned))
    if twin.narrowest is not torch.float64 and not all(check.passed for check in logic):
        # Something inside computes in a narrower dtype whatever it is given, so its rounding is to be expected.
        judged_in, narrowed_by = tolerance.precision_of(twin.narrowest), twin.narrowed_by
        logic = twin.checks(_allowance(1 if tolerance.proves_logic(judged_in) else 2, judged_in, planned))
    allowance = dataclasses.replace(
        _allowance(2, precision, planned), largest_unrest=tolerance.LARGEST_DIRECT_UNREST
    )
    direct = _widened_if_needed(plain, ours, allowance, lambda: _own_unrest(planned, bench, plain))
    noise = no_further_from_float64(plain, ours, twin.plain, precision, allowance.lost)
    return _Judged([*checks, *logic, *direct, noise], judged_in, narrowed_by)


def _allowance(tier: int, precision: Precision, planned: Planned) -> Allowance:
    statistics = uses_batch_statistics(planned.declared)
    return Allowance(
        tier=tier,
        precision=precision,
        norm_constant=tolerance.BATCH_STATISTICS_NORM_CONSTANT if statistics else tolerance.NORM_CONSTANT,
        lost=tolerance.subnormal_loss(precision.dtype, len(planned.parts)),
    )


def _widened_if_needed(
    plain: Gradients, ours: Gradients, allowance: Allowance, unrest: Callable[[], Unrest]
) -> list[Check]:
    """The same-function checks; only where they fail is it asked how much the plain step itself moves."""
    checks = same_function(plain, ours, allowance)
    if all(check.passed for check in checks):
        return checks
    return same_function(plain, ours, dataclasses.replace(allowance, unrest=unrest()))


@dataclasses.dataclass(frozen=True)
class _Twin:
    """Both sides in float64, the narrowest dtype that was met there, and what brought it in."""

    plain: Gradients
    ours: Gradients
    narrowest: torch.dtype
    narrowed_by: str
    declared: DeclaredStep
    bench: Bench
    sites: DrawSites | None

    @classmethod
    def run(cls, planned: Planned, bench: Bench, plain: Gradients) -> _Twin | str:
        """Why not, in words, where float64 cannot run.

        A loss that holds parameters of its own out of reach cannot, nor can code that fixes a dtype or closes over
        the model itself.
        """
        names = set(parameter_names(planned.declared).values())
        if held := sorted(plain.by_name.keys() - names):
            return f"{held[0]} is held where no copy of it can be made"
        if any(p.is_complex() for p in planned.declared.network.parameters()):
            return "the model has complex parameters"
        try:
            twin = float64_twin(planned)
            wide = Bench(bench.generators, ModuleState.of(twin.declared), widened(bench.rows))
            seen = NarrowestSeen()

            def watched(rows: Any) -> Gradients:
                with seen:
                    return plain_gradients(twin.declared, rows, planned.sites)

            with _no_autocast(planned.declared):
                oracle = wide.run(watched)
                if oracle.by_name.keys() != plain.by_name.keys():
                    # It would leave gradients there.
                    return "forward or loss_fn closes over the model itself, and not over the one that it is given"
                again = wide.run(twin.handed_over)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError) as error:
            # Of two dtypes in one operation, mostly; or of a module that cannot be copied.
            return f"a copy of the step in float64 cannot run: {first_line(error)}{line_of(error)}"
        return cls(oracle, again, seen.dtype, seen.where, twin.declared, wide, planned.sites)

    def unrest(self) -> Unrest:
        with _no_autocast(self.declared):
            return _unrest_of(self.declared, self.bench, self.plain, self.sites)

    def checks(self, allowance: Allowance) -> list[Check]:
        return _widened_if_needed(self.plain, self.ours, allowance, self.unrest)


def _no_autocast(declared: DeclaredStep) -> torch.autocast:
    return torch.autocast(declared.device.type, enabled=False)


def _own_unrest(planned: Planned, bench: Bench, plain: Gradients) -> Unrest:
    """The plain step's unrest in the precision that runs, on a copy of the model; none where it cannot be copied."""
    try:
        twin = copied(planned.declared)
    except (RuntimeError, TypeError):
        return Unrest()
    own = dataclasses.replace(bench, state=ModuleState.of(twin))
    return _unrest_of(twin, own, plain, planned.sites)


def _unrest_of(twin: DeclaredStep, bench: Bench, reference: Gradients, sites: DrawSites | None) -> Unrest:
    """The plain step's answer to rows and weights moved by one unit in the last place; ``twin`` is a copy of ours."""
    by_name: dict[str, float] = {}
    norm = loss = 0.0
    for seed in range(2):
        nudge = Nudge(seed)
        moved = dataclasses.replace(bench, rows=trees.map_tensors(bench.rows, nudge.moved))
        with nudge.applied([p for module in twin.modules for p in module.parameters()]):
            gradients = moved.run(lambda rows: plain_gradients(twin, rows, sites))
        for name, gradient in gradients.by_name.items():
            before = reference.by_name.get(name)
            if gradient is not None and before is not None and gradient.numel():
                by_name[name] = max(by_name.get(name, 0.0), float((gradient - before).abs().max()))
        norm = max(norm, norm_of(differences_of(reference.by_name, gradients.by_name)))
        loss = max(loss, abs(gradients.loss - reference.loss))
    return Unrest(by_name, norm, loss)
