"""The planned step against the plain step, parameter by parameter, and the verdict.

The plain step often does not fit: that is why the user came. So the reference is the plain step on as many rows as
fit, and the verdict says how many that were. Gradients are taken on both sides from the same weights; nothing of the
user's changes.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from samegrad import trees
from samegrad.declared import DeclaredStep, checked_loss
from samegrad.errors import UsageError
from samegrad.exact import losses
from samegrad.exact.aliases import GradientMagnitudes
from samegrad.exact.handoff import hooks_silenced
from samegrad.exact.split import SplitStep
from samegrad.exact.undisturbed import Generators, ModuleState, undisturbed
from samegrad.measure import counters
from samegrad.measure.laws import fit_laws
from samegrad.measure.probe import probe_plain
from samegrad.records import Check, Same, Verdict
from samegrad.trees import RowLayout
from samegrad.verify import tolerance
from samegrad.verify.twin import NarrowestSeen, float64_twin, widened

# A verification is to take seconds; more rows on request.
_USUAL_ROWS = 4096


class Verifiable(Protocol):
    """A step with a plan: a ``Step``, for one."""

    verdict: Verdict | None

    @property
    def declared(self) -> DeclaredStep: ...

    def sizes_for(self, batch: Any) -> tuple[int, ...]: ...

    def split_for(self, batch: Any, layout: RowLayout) -> SplitStep: ...


@dataclasses.dataclass(frozen=True)
class _Gradients:
    """One side of a comparison: gradients by parameter name (None where there is none), and the loss."""

    by_name: Mapping[str, Tensor | None]
    loss: float
    magnitudes: Mapping[str, Tensor | None] = dataclasses.field(default_factory=dict)


def verify_step(step: Verifiable, batch: Any, *, rows: int | None = None) -> Verdict:
    """Whether the planned step has the plain step's gradients, loss and buffers; also left in ``step.verdict``.

    ``rows``: compare on the first ``rows`` rows of ``batch``; None means as many as fit, up to 4096. Raises
    UsageError when ``rows`` is more than the batch has.
    """
    started = time.perf_counter()
    declared = step.declared
    layout = declared.layout(batch)
    sizes = step.sizes_for(batch)
    checked = _rows_to_check(declared, batch, layout, rows)
    few = trees.move(trees.slice_rows(batch, layout, 0, checked), declared.device)
    split, parts = None, _parts(sizes, checked, layout.rows)
    if len(sizes) > 1:
        split = dataclasses.replace(step.split_for(batch, layout), sums_of=GradientMagnitudes)
    comparison = _compare(declared, split, few, dataclasses.replace(layout, rows=checked), parts)
    verdict = _verdict(declared, comparison, checked, layout.rows)
    verdict = dataclasses.replace(verdict, seconds=time.perf_counter() - started)
    step.verdict = verdict
    return verdict


@dataclasses.dataclass(frozen=True)
class _Comparison:
    """The checks that were made, and whether the dtype they were made in proves anything when they pass."""

    checks: list[Check]
    proven: bool
    parameters: int
    buffers: int


@dataclasses.dataclass(frozen=True)
class _Bench:
    """Runs each side from the same buffers and generators, on rows of its own: forwards may write on their input."""

    generators: Generators
    state: ModuleState
    rows: Any

    def run(self, side: Callable[[Any], _Gradients]) -> _Gradients:
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
        checks, proven = [_left_behind(after_plain.changed())], True
        if split is None:
            checks.insert(0, _spread(plain, ours, _dtype(declared)))
        else:
            judged, proven = _judge(split, bench, (plain, ours), layout, parts)
            checks = [*judged, *checks]
    buffers = sum(1 for module in modules for _ in module.buffers())
    return _Comparison(checks, proven, len(plain.by_name), buffers)


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


def _spread(first: _Gradients, second: _Gradients, dtype: torch.dtype) -> Check:
    """A plan that runs whole is the plain call; what is left to see is plain's own spread."""
    error, worst = _largest(first.by_name, second.by_name, first.by_name)
    detail = "the plan runs the plain call itself; this is what two such calls differ by"
    return dataclasses.replace(
        _check("plain run twice", error, tolerance.entry_allowed(dtype), worst), detail=detail
    )


def _judge(
    split: SplitStep, bench: _Bench, sides: tuple[_Gradients, _Gradients], layout: RowLayout, parts: Sequence[int]
) -> tuple[list[Check], bool]:
    """The checks of a split step's gradients, and whether they were made where rounding hides nothing."""
    plain, ours = sides
    dtype = _dtype(split.declared)
    checks = [_none_pattern(plain, ours)]
    if dtype is torch.float64:
        return checks + _logic(plain, ours, dtype), True
    in_twin = _twin_sides(split, bench, plain, layout, parts)
    if in_twin is None:
        return checks + _logic(plain, ours, dtype), tolerance.proves_logic(dtype)
    oracle, again, narrowest = in_twin
    judged_in = torch.float64
    logic = _logic(oracle, again, judged_in)
    if narrowest is not judged_in and not all(check.passed for check in logic):
        # Something inside computes in a narrower dtype whatever it is given, so its rounding is to be expected.
        judged_in = narrowest
        logic = _logic(oracle, again, judged_in)
    return [*checks, *logic, *_noise(plain, ours, oracle, dtype)], tolerance.proves_logic(judged_in)


def _twin_sides(
    split: SplitStep, bench: _Bench, plain: _Gradients, layout: RowLayout, parts: Sequence[int]
) -> tuple[_Gradients, _Gradients, torch.dtype] | None:
    """Both sides in float64 and the narrowest dtype met on the way, or None for a step that cannot run in it.

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

        def watched(rows: Any) -> _Gradients:
            with seen:
                return _plain(twin.declared, rows)

        with torch.autocast(split.declared.device.type, enabled=False):
            oracle = wide.run(watched)
            again = wide.run(lambda rows: _split(twin, rows, layout, parts))
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError):
        # Of two dtypes in one operation, mostly; or of a module that cannot be copied.
        return None
    return (oracle, again, seen.dtype) if oracle.by_name.keys() == plain.by_name.keys() else None


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


def _plain(declared: DeclaredStep, batch: Any) -> _Gradients:
    with torch.enable_grad():
        loss = checked_loss(declared.loss_fn(declared.forward(declared.network, batch), batch))
    leaves = losses.leaves_under(loss)
    with hooks_silenced(leaves), torch.autocast(declared.device.type, enabled=False):
        gradients = torch.autograd.grad(loss, leaves)
    return _Gradients(_by_name(declared, leaves, gradients), float(loss.detach()))


def _split(split: SplitStep, batch: Any, layout: RowLayout, parts: Sequence[int]) -> _Gradients:
    totals = split.totals(batch, layout, parts)
    magnitudes = list(totals.magnitudes or [])
    # Gradients that the loss itself adds have no chunks; their own size is their scale.
    magnitudes += [None if t is None else t.abs() for t in totals.totals[len(magnitudes) :]]
    return _Gradients(
        _by_name(split.declared, totals.parameters, totals.totals),
        float(totals.loss),
        _by_name(split.declared, totals.parameters, magnitudes),
    )


def _by_name(
    declared: DeclaredStep, leaves: Sequence[Tensor], gradients: Sequence[Tensor | None]
) -> dict[str, Tensor | None]:
    names = _names(declared)
    return {
        names.get(id(leaf), f"a parameter of the loss, shape {tuple(leaf.shape)}"): gradient
        for leaf, gradient in zip(leaves, gradients)
        if gradient is not None
    }


def _none_pattern(plain: _Gradients, ours: _Gradients) -> Check:
    different = sorted(plain.by_name.keys() ^ ours.by_name.keys())
    return Check(
        name="which parameters have a gradient",
        passed=not different,
        error=float(len(different)),
        allowed=0.0,
        worst=", ".join(different[:3]),
        detail=f"{len(plain.by_name)} parameters have one in the plain step",
    )


def _logic(plain: _Gradients, ours: _Gradients, dtype: torch.dtype) -> list[Check]:
    """The same real-number function: entries and norms within rounding of ``dtype``."""
    entry, worst = _largest(plain.by_name, ours.by_name, ours.magnitudes)
    distance = _norm(_differences(plain.by_name, ours.by_name))
    scale = _norm([m for m in ours.magnitudes.values() if m is not None]) or 1.0
    loss = abs(plain.loss - ours.loss) / (abs(plain.loss) or 1.0)
    kind = str(dtype).removeprefix("torch.")
    return [
        _check(f"gradient entries, {kind}", entry, tolerance.entry_allowed(dtype), worst),
        _check(f"gradient norm, {kind}", distance / scale, tolerance.norm_allowed(dtype), worst),
        _check(f"loss, {kind}", loss, tolerance.loss_allowed(dtype), ""),
    ]


def _noise(plain: _Gradients, ours: _Gradients, oracle: _Gradients, dtype: torch.dtype) -> list[Check]:
    """No further from float64 than the plain step is in the dtype it runs in."""
    scale = _norm([m for m in ours.magnitudes.values() if m is not None]) or 1.0
    mine = _norm(_differences(oracle.by_name, ours.by_name)) / scale
    theirs = _norm(_differences(oracle.by_name, plain.by_name)) / scale
    accumulator = tolerance.accumulator(dtype)
    allowed = tolerance.NOISE_RATIO * theirs + tolerance.norm_allowed(accumulator)
    kind = str(dtype).removeprefix("torch.")
    detail = f"distance to float64; the plain step's own is {theirs:.2g}"
    return [dataclasses.replace(_check(f"rounding, {kind}", mine, allowed, ""), detail=detail)]


def _check(name: str, error: float, allowed: float, worst: str) -> Check:
    # A comparison with NaN is false, so a gradient that is not a number fails.
    return Check(name=name, passed=error <= allowed, error=error, allowed=allowed, worst=worst)


def _largest(
    plain: Mapping[str, Tensor | None], ours: Mapping[str, Tensor | None], scales: Mapping[str, Tensor | None]
) -> tuple[float, str]:
    """The largest entry difference relative to its tensor's largest scale, and the parameter it is in."""
    worst, name = 0.0, ""
    sizes = {key: float(s.double().abs().max()) for key, s in scales.items() if s is not None and s.numel()}
    anywhere = max(sizes.values(), default=0.0)
    for key, reference in plain.items():
        gradient = ours.get(key)
        if reference is None or gradient is None or not reference.numel():
            continue
        difference = float((gradient.double() - reference.double()).abs().max())
        size = tolerance.entry_scale(sizes.get(key, 0.0), anywhere)
        relative = difference / size if size else difference
        if not relative <= worst:
            worst, name = relative, key
    return worst, name


def _differences(a: Mapping[str, Tensor | None], b: Mapping[str, Tensor | None]) -> list[Tensor]:
    return [x.double() - y.double() for key, x in a.items() if x is not None and (y := b.get(key)) is not None]


def _norm(tensors: Sequence[Tensor]) -> float:
    return float(torch.nn.utils.get_total_norm([t.double() for t in tensors])) if tensors else 0.0


def _verdict(declared: DeclaredStep, comparison: _Comparison, checked: int, batch_rows: int) -> Verdict:
    checks = comparison.checks
    passed = all(check.passed for check in checks)
    answer = Same.DIFFERS if not passed else Same.SAME if comparison.proven else Same.UNPROVEN
    entries = [check for check in checks if check.name.startswith(("gradient entries", "plain run twice"))]
    main = entries[0] if entries else checks[0]
    rows = "all rows" if checked == batch_rows else f"the first {checked} of {batch_rows} rows"
    return Verdict(
        answer=answer,
        reference=f"the plain step on {counters.device_name(declared.device)}, {rows}",
        rows_checked=checked,
        batch_rows=batch_rows,
        dtype=str(_dtype(declared)).removeprefix("torch."),
        max_relative_error=main.error,
        worst_parameter=main.worst,
        parameters_checked=comparison.parameters,
        buffers_checked=comparison.buffers,
        checks=tuple(checks),
    )
