"""The planned step against the plain step, parameter by parameter, and the verdict.

The plain step often does not fit: that is why the user came. So the reference is the plain step on as many rows as
fit, and the verdict says how many that were. Gradients are taken on both sides from the same weights; nothing of the
user's changes.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from samegrad import trees
from samegrad.declared import DeclaredStep, checked_loss
from samegrad.errors import UsageError
from samegrad.exact import losses
from samegrad.exact.aliases import GradientMagnitudes
from samegrad.exact.handoff import hooks_silenced
from samegrad.exact.sharded import refuse_sharded
from samegrad.exact.split import SplitStep
from samegrad.exact.undisturbed import Generators, ModuleState, undisturbed
from samegrad.measure import counters
from samegrad.measure.laws import fit_laws
from samegrad.measure.probe import probe_plain
from samegrad.records import Check, Same, Verdict
from samegrad.trees import RowLayout
from samegrad.verify import tolerance
from samegrad.verify.compare import (
    Gradients,
    Unrest,
    check_of,
    differences_of,
    largest_error,
    no_further_from_float64,
    norm_of,
    same_function,
    same_parameters,
)
from samegrad.verify.twin import NarrowestSeen, Nudge, float64_twin, widened

# A verification is to take seconds; more rows on request.
_USUAL_ROWS = 4096
_MAGNITUDE_PARTS = 64
_SPREAD = "plain run twice"


class Verifiable(Protocol):
    """A step with a plan: a ``Step``, for one."""

    verdict: Verdict | None

    @property
    def declared(self) -> DeclaredStep: ...

    def sizes_for(self, batch: Any) -> tuple[int, ...]: ...

    def split_for(self, batch: Any, layout: RowLayout) -> SplitStep: ...


def verify_step(step: Verifiable, batch: Any, *, rows: int | None = None) -> Verdict:
    """Whether the planned step has the plain step's gradients, loss and buffers; also left in ``step.verdict``.

    ``rows``: compare on the first ``rows`` rows of ``batch``; None means as many as fit, up to 4096. Raises
    UsageError when ``rows`` is more than the batch has.
    """
    started = time.perf_counter()
    declared = step.declared
    refuse_sharded(
        declared.modules,
        asked="verify a step against the plain step",
        do="verify the same model before fully_shard is applied to it, on one process or under "
        "DistributedDataParallel; gradients of sharded parameters exist only after they are reduced",
    )
    layout = declared.layout(batch)
    sizes = step.sizes_for(batch)
    checked = _rows_to_check(declared, batch, layout, rows)
    few = trees.move(trees.slice_rows(batch, layout, 0, checked), declared.device)
    split, parts = None, _parts(sizes, checked, layout.rows)
    if len(sizes) > 1:
        split = step.split_for(batch, layout)
    comparison = _compare(declared, split, few, dataclasses.replace(layout, rows=checked), parts)
    verdict = _verdict(declared, comparison, checked, layout.rows)
    verdict = dataclasses.replace(verdict, seconds=time.perf_counter() - started)
    step.verdict = verdict
    return verdict


@dataclasses.dataclass(frozen=True)
class _Comparison:
    """The checks that were made, and the dtype in which gradients were compared entry by entry."""

    checks: list[Check]
    compared: torch.dtype
    parameters: int
    buffers: int


@dataclasses.dataclass(frozen=True)
class _Bench:
    """Runs each side from the same buffers and generators, on rows of its own: forwards may write on their input."""

    generators: Generators
    state: ModuleState
    rows: Any

    def run(self, side: Callable[[Any], Gradients]) -> Gradients:
        self.state.restore()
        self.generators.restore()
        return side(trees.map_tensors(self.rows, Tensor.clone))


def _compare(
    declared: DeclaredStep, split: SplitStep | None, few: Any, layout: RowLayout, parts: Sequence[int]
) -> _Comparison:
    modules = declared.modules
    with undisturbed(modules, declared.device) as (generators, state):
        bench = _Bench(generators, state, few)
        plain = bench.run(lambda rows: _plain(declared, rows))
        after_plain = ModuleState(modules)
        if split is None:
            ours = bench.run(lambda rows: _plain(declared, rows))
        else:
            ours = bench.run(lambda rows: _split(split, rows, layout, parts))
        left_behind = _left_behind(after_plain.changed())
        if split is None:
            judged, compared = [_spread(plain, ours, _dtype(declared))], _dtype(declared)
        else:
            judged, compared = _judge(split, bench, (plain, ours), layout, parts)
    buffers = sum(1 for module in modules for _ in module.buffers())
    return _Comparison([*judged, left_behind], compared, len(plain.by_name), buffers)


def _left_behind(changed: list[str]) -> Check:
    return Check(
        name="buffers",
        passed=not changed,
        error=float(len(changed)),
        allowed=0.0,
        worst=", ".join(changed[:3]),
        detail="buffers after the planned step, bit for bit those after the plain step",
    )


def _rows_to_check(declared: DeclaredStep, batch: Any, layout: RowLayout, rows: int | None) -> int:
    if rows is not None:
        if not 1 <= rows <= layout.rows:
            raise UsageError(
                asked=f"verify on {rows} rows",
                found=f"the batch has {layout.rows} rows",
                do=f"give a number between 1 and {layout.rows}",
                option="--rows",
            )
        return rows
    wanted = min(layout.rows, _USUAL_ROWS)
    # Not one row: batch normalisation in training mode refuses it.
    shapes = dict.fromkeys((min(2, layout.rows), min(4, layout.rows)))
    probes = [probe_plain(declared, batch, layout, batch_rows=n) for n in shapes]
    laws = fit_laws(probes, missing_bytes=0)
    # Beside the plain step: its gradients, the split step's, their magnitudes, and all of it in float64 again.
    besides = 12 * trees.storage_bytes(list(declared.network.parameters()))
    free = counters.free_now(declared.device)[0] - besides
    while wanted > 1 and 2 * max(law.peak_bytes(rows=wanted, batch_rows=wanted) for law in laws) > free:
        wanted //= 2
    return wanted


def _parts(sizes: Sequence[int], checked: int, batch_rows: int) -> list[int]:
    """The plan's chunks where they show on ``checked`` rows, else chunks of uneven size."""
    if checked == batch_rows:
        return list(sizes)
    rows = max(sizes)
    if rows < checked:
        return trees.even_sizes(checked, rows)
    return trees.even_sizes(checked, max(1, 2 * checked // 5))


def _spread(first: Gradients, second: Gradients, dtype: torch.dtype) -> Check:
    """A plan that runs whole is the plain call; what is left to see is plain's own spread."""
    error, worst = largest_error(first.by_name, second.by_name, first.by_name)
    detail = "the plan runs the plain call itself; this is what two such calls differ by"
    return dataclasses.replace(
        check_of(_SPREAD, error, tolerance.entry_allowed(dtype), worst), detail=detail
    )


def _judge(
    split: SplitStep, bench: _Bench, sides: tuple[Gradients, Gradients], layout: RowLayout, parts: Sequence[int]
) -> tuple[list[Check], torch.dtype]:
    """The checks of a split step's gradients, and the dtype in which they were compared entry by entry."""
    plain, ours = sides
    dtype = _dtype(split.declared)
    checks = [same_parameters(plain, ours)]
    in_twin = _twin_sides(split, bench, plain, layout, parts)
    if in_twin is None:
        return checks + same_function(plain, ours, dtype, Unrest()), dtype
    oracle, again, unrest, narrowest = in_twin
    if dtype is torch.float64:
        return checks + same_function(plain, ours, dtype, unrest), dtype
    judged_in = torch.float64
    logic = same_function(oracle, again, judged_in, unrest)
    if narrowest is not judged_in and not all(check.passed for check in logic):
        # Something inside computes in a narrower dtype whatever it is given, so its rounding is to be expected.
        judged_in = narrowest
        logic = same_function(oracle, again, judged_in, unrest)
    return [*checks, *logic, *no_further_from_float64(plain, ours, oracle, dtype)], judged_in


def _twin_sides(
    split: SplitStep, bench: _Bench, plain: Gradients, layout: RowLayout, parts: Sequence[int]
) -> tuple[Gradients, Gradients, Unrest, torch.dtype] | None:
    """Both sides in float64, the plain one's unrest and the narrowest dtype met, or None where float64 cannot run.

    A loss that holds parameters of its own out of reach cannot, nor can code that fixes a dtype or closes over the
    model itself.
    """
    names = set(_names(split.declared).values())
    if not plain.by_name.keys() <= names or any(p.is_complex() for p in split.declared.network.parameters()):
        return None
    try:
        twin = float64_twin(split)
        wide = _Bench(bench.generators, ModuleState(twin.declared.modules), widened(bench.rows))
        seen = NarrowestSeen()

        def watched(rows: Any) -> Gradients:
            with seen:
                return _plain(twin.declared, rows)

        with torch.autocast(split.declared.device.type, enabled=False):
            oracle = wide.run(watched)
            again = wide.run(lambda rows: _split(twin, rows, layout, parts))
            unrest = _unrest_of(twin.declared, wide, oracle)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError):
        # Of two dtypes in one operation, mostly; or of a module that cannot be copied.
        return None
    return (oracle, again, unrest, seen.dtype) if oracle.by_name.keys() == plain.by_name.keys() else None


def _unrest_of(twin: DeclaredStep, bench: _Bench, reference: Gradients) -> Unrest:
    """The plain step's answer to rows and weights moved by one unit in the last place; ``twin`` is a copy of ours."""
    by_name: dict[str, float] = {}
    norm = loss = 0.0
    for seed in range(2):
        nudge = Nudge(seed)
        moved = dataclasses.replace(bench, rows=trees.map_tensors(bench.rows, nudge.moved))
        with nudge.applied([p for module in twin.modules for p in module.parameters()]):
            gradients = moved.run(lambda rows: _plain(twin, rows))
        for name, gradient in gradients.by_name.items():
            before = reference.by_name.get(name)
            if gradient is not None and before is not None and gradient.numel():
                by_name[name] = max(by_name.get(name, 0.0), float((gradient - before).abs().max()))
        norm = max(norm, norm_of(differences_of(reference.by_name, gradients.by_name)))
        loss = max(loss, abs(gradients.loss - reference.loss))
    return Unrest(by_name, norm, loss)


def _dtype(declared: DeclaredStep) -> torch.dtype:
    """The narrowest dtype that gradients pass through."""
    device_type = declared.device.type
    kinds = {p.dtype for p in declared.network.parameters() if p.is_floating_point()}
    if torch.is_autocast_enabled(device_type):
        kinds.add(torch.get_autocast_dtype(device_type))
    return max(kinds, key=lambda kind: torch.finfo(kind).eps, default=torch.get_default_dtype())


def _names(declared: DeclaredStep) -> dict[int, str]:
    names = {id(p): name for name, p in declared.network.named_parameters()}
    if declared.loss_module is not None:
        names |= {id(p): f"loss_fn.{name}" for name, p in declared.loss_module.named_parameters()}
    return names


def _plain(declared: DeclaredStep, batch: Any) -> Gradients:
    with torch.enable_grad():
        loss = checked_loss(declared.loss_fn(declared.forward(declared.network, batch), batch))
    leaves = losses.leaves_under(loss)
    with hooks_silenced(leaves), torch.autocast(declared.device.type, enabled=False):
        gradients = torch.autograd.grad(loss, leaves)
    return Gradients(_by_name(declared, leaves, gradients), float(loss.detach()))


def _split(split: SplitStep, batch: Any, layout: RowLayout, parts: Sequence[int]) -> Gradients:
    totals = split.totals(batch, layout, parts)
    # Near an optimum a chunk's own gradient is what is left of terms that cancel, while rounding grows with the
    # terms: their size is taken from parts much smaller than the plan's.
    fine = trees.even_sizes(layout.rows, max(1, layout.rows // _MAGNITUDE_PARTS))
    with undisturbed(split.declared.modules, split.declared.device):
        small = dataclasses.replace(split, sums_of=GradientMagnitudes).totals(batch, layout, fine)
    magnitudes = list(small.magnitudes or [])
    # Gradients that the loss itself adds have no chunks; their own size is their scale.
    magnitudes += [None if t is None else t.abs() for t in totals.totals[len(magnitudes) :]]
    return Gradients(
        _by_name(split.declared, totals.parameters, totals.totals),
        float(totals.loss),
        _by_name(split.declared, totals.parameters, magnitudes),
    )


def _by_name(
    declared: DeclaredStep, leaves: Sequence[Tensor], gradients: Sequence[Tensor | None]
) -> dict[str, Tensor | None]:
    names = _names(declared)
    found: dict[str, Tensor | None] = {}
    for leaf, gradient in zip(leaves, gradients):
        if gradient is not None:
            name = names.get(id(leaf), f"a parameter of the loss, shape {tuple(leaf.shape)}")
            found[name] = gradient.to_dense() if gradient.is_sparse else gradient
    return found


def _verdict(declared: DeclaredStep, comparison: _Comparison, checked: int, batch_rows: int) -> Verdict:
    checks = comparison.checks
    passed = all(check.passed for check in checks)
    # A step that runs whole is the plain call: there is nothing that a low precision could hide.
    whole = any(check.name == _SPREAD for check in checks)
    proven = whole or tolerance.proves_logic(comparison.compared)
    answer = Same.DIFFERS if not passed else Same.SAME if proven else Same.UNPROVEN
    entries = [check for check in checks if check.name.startswith(("gradient entries", _SPREAD))]
    main = entries[0] if entries else checks[0]
    return Verdict(
        answer=answer,
        reference=f"the plain step on {counters.device_name(declared.device)}",
        rows_checked=checked,
        batch_rows=batch_rows,
        dtype=str(_dtype(declared)).removeprefix("torch."),
        compared_dtype=str(comparison.compared).removeprefix("torch."),
        max_relative_error=main.error,
        worst_parameter=main.worst,
        parameters_checked=comparison.parameters,
        buffers_checked=comparison.buffers,
        checks=tuple(checks),
    )
